"""Small forward passes and decoding loops, written from the papers; nothing here knows the toolkit.

Everything is a function of a public state dict, in float32 and without any saving.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def rms(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, position, theta):
    """[..., L, D]: pairs (d, d + D/2) turned by position · theta^(-2d/D)."""
    half = x.shape[-1] // 2
    return turn(x, position, theta ** (-torch.arange(half).double() / half))


def turn(x, position, speed):
    """[..., L, D]: pairs (d, d + D/2) turned by position · speed[d]."""
    angle = position[:, None].double() * speed
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def yarn(x, position, theta, *, factor, original, fast=32, slow=1):
    """`rotate` after YaRN (arXiv 2309.00071): pairs that turn less than `slow` times in `original` positions are
    slowed down by `factor`, those of more than `fast` times are not, and queries and keys grow by 0.1 ln s + 1."""
    half = x.shape[-1] // 2
    place = [half * math.log(original / (2 * math.pi * turns)) / math.log(theta) for turns in (fast, slow)]
    low, high = max(math.floor(place[0]), 0), min(math.ceil(place[1]), 2 * half - 1)
    number = torch.arange(half).double()
    slowed = ((number - low) / max(high - low, 0.001)).clamp(0, 1)
    speed = theta ** (-number / half)
    return (0.1 * math.log(factor) + 1) * turn(x, position, speed * (1 - slowed + slowed / factor))


def llama3(x, position, theta, *, factor, original, low, high):
    """`rotate` after Llama 3.1: full speed above `high` turns in `original` positions, 1/factor below `low`."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half).double() / half)
    turns = original * speed / (2 * math.pi)
    whole = ((turns - low) / (high - low)).clamp(0, 1)
    return turn(x, position, speed * (whole + (1 - whole) / factor))


def linear_scaling(x, position, theta, *, factor):
    """`rotate` at positions divided by a factor."""
    return turn(
        x, position, theta ** (-torch.arange(x.shape[-1] // 2).double() / (x.shape[-1] // 2)) / factor
    )


def attend(q, k, v, sees):
    """[H, L, D] each (keys and values of fewer heads are repeated); sees [L, L] bool."""
    times = len(q) // len(k)
    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
    score = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return score.masked_fill(~sees, -math.inf).softmax(-1) @ v


def heads(x, count):
    """[L, H D] -> [H, L, D]."""
    return x.view(len(x), count, -1).transpose(0, 1)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def swiglu(state, stems, x):
    gate, up, down = stems
    return linear(state, down, F.silu(linear(state, gate, x)) * linear(state, up, x))


def mixture(state, stem, x, experts, chosen):
    """[L, D]: a token's likeliest experts, each weighted with its probability among all of them."""
    out = []
    for token in x:
        share = (state[f"{stem}.gate.weight"] @ token).softmax(0)
        best = sorted(range(experts), key=lambda j: -float(share[j]))[:chosen]
        parts = [
            share[j]
            * swiglu(state, [f"{stem}.experts.{j}.{n}_proj" for n in ("gate", "up", "down")], token[None])[0]
            for j in best
        ]
        out.append(sum(parts))
    return torch.stack(out)


def all_see(length):
    return torch.ones(length, length, dtype=torch.bool)


def blocks_see(length, size):
    """A position sees its own block of so many and all earlier ones."""
    block = torch.arange(length) // size
    return block[None] <= block[:, None]


def llama_like(state, x, names, *, layers, q_heads, kv_heads, theta, eps, sees, qk_norm=False, feed=None):
    """A pre-norm decoder with rotary positions and SwiGLU, from embeddings [L, D]; `names` maps parts to stems.

    `feed(i, y)` stands for the feed-forward part of some layers; None from it for SwiGLU.
    """
    position = torch.arange(len(x))
    for i in range(layers):

        def at(part, i=i):
            return names[part].format(i=i)

        y = rms(x, state[at("norm1") + ".weight"], eps)
        q, k, v = (
            heads(linear(state, at(part), y), n)
            for part, n in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))
        )
        if qk_norm:
            q, k = rms(q, state[at("q_norm") + ".weight"], eps), rms(k, state[at("k_norm") + ".weight"], eps)
        y = attend(rotate(q, position, theta), rotate(k, position, theta), v, sees)
        x = x + linear(state, at("o"), y.transpose(0, 1).flatten(1))
        y = rms(x, state[at("norm2") + ".weight"], eps)
        mixed = feed(i, y) if feed else None
        x = x + (swiglu(state, [at(part) for part in ("gate", "up", "down")], y) if mixed is None else mixed)
    return rms(x, state[names["norm"] + ".weight"], eps)


HF = {
    "norm1": "model.layers.{i}.input_layernorm",
    "norm2": "model.layers.{i}.post_attention_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
}
"""Names of transformers' Llama, Qwen2 and Qwen3."""


def shifted(logits):
    """[L, V]: row i becomes that of i - 1."""
    return torch.cat([logits[:1], logits[:-1]])


# ---- decoding, as published: `logits(ids)` gives [L, V] with what may not come out at -inf ------------------


def llada_loop(logits, prompt, mask_id, *, length, block, steps):
    """Low-confidence remasking in blocks, greedy (LLaDA, section 2.4 and appendix)."""
    x = torch.tensor(prompt + [mask_id] * length)
    blocks = length // block
    for number in range(blocks):
        begin, end = len(prompt) + number * block, len(prompt) + (number + 1) * block
        share, rest = divmod(block, steps // blocks)
        for step in range(steps // blocks):
            probability = logits(x).double().softmax(-1)
            best, token = probability.max(-1)
            best[x != mask_id] = -math.inf
            best[end:] = -math.inf
            for at in best.topk(share + (step < rest)).indices:
                assert begin <= at < end
                x[at] = token[at]
    return x[len(prompt) :].tolist()


def dream_loop(logits, prompt, mask_id, *, length, steps, top_p=1.0, eps=1e-3):
    """Tokens of least entropy first, by the times from 1 to eps (Dream's "entropy"), greedy."""
    x = torch.tensor(prompt + [mask_id] * length)
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        masked = x == mask_id
        count = int(masked.sum())
        number = int(count * (1 - times[step + 1] / times[step])) if step < steps - 1 else count
        p = logits(x).softmax(-1)
        ordered, index = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
        p = p / p.sum(-1, keepdim=True)
        sure = torch.xlogy(p, p).sum(-1).masked_fill(~masked, -math.inf)
        token = p.argmax(-1)
        for at in sure.topk(number).indices if number else []:
            x[at] = token[at]
    return x[len(prompt) :].tolist()


def dit(state, x, *, layers, heads_count, sees, adaln=True):
    """MDLM's transformer at time 0, from embeddings [L, D], up to its logits."""
    position = torch.arange(len(x))

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:]) * state[name + ".weight"]

    if adaln:
        time = torch.cat([torch.ones(128), torch.zeros(128)])
        c = F.silu(linear(state, "backbone.sigma_map.mlp.0", time))
        c = F.silu(linear(state, "backbone.sigma_map.mlp.2", c))
    for i in range(layers):
        stem = f"backbone.blocks.{i}."
        parts = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        if adaln:
            parts = linear(state, stem + "adaLN_modulation", c).chunk(6)
        y = linear(state, stem + "attn_qkv", norm(x, stem + "norm1") * (1 + parts[1]) + parts[0])
        q, k, v = (heads(part, heads_count) for part in y.chunk(3, -1))
        y = attend(rotate(q, position, 10000.0), rotate(k, position, 10000.0), v, sees)
        x = x + parts[2] * linear(state, stem + "attn_out", y.transpose(0, 1).flatten(1))
        y = linear(state, stem + "mlp.0", norm(x, stem + "norm2") * (1 + parts[4]) + parts[3])
        x = x + parts[5] * linear(state, stem + "mlp.2", F.gelu(y, approximate="tanh"))
    x = norm(x, "backbone.output_layer.norm_final")
    if adaln:
        shift, scale = linear(state, "backbone.output_layer.adaLN_modulation", c).chunk(2)
        x = x * (1 + scale) + shift
    return linear(state, "backbone.output_layer.linear", x)


def modernbert(state, ids, *, layers, heads_count, reach):
    """ModernBERT with its language-model head: every third layer sees all, the others `reach` to either side."""
    position = torch.arange(len(ids))
    near = (position[:, None] - position).abs() <= reach

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[name + ".weight"], eps=1e-5)

    x = norm(state["model.embeddings.tok_embeddings.weight"][ids], "model.embeddings.norm")
    for i in range(layers):
        stem, everything = f"model.layers.{i}.", i % 3 == 0
        y = linear(state, stem + "attn.Wqkv", norm(x, stem + "attn_norm") if i else x)
        q, k, v = (heads(part, heads_count) for part in y.chunk(3, -1))
        theta = 160000.0 if everything else 10000.0
        y = attend(rotate(q, position, theta), rotate(k, position, theta), v, near | everything)
        x = x + linear(state, stem + "attn.Wo", y.transpose(0, 1).flatten(1))
        inner, gate = linear(state, stem + "mlp.Wi", norm(x, stem + "mlp_norm")).chunk(2, -1)
        x = x + linear(state, stem + "mlp.Wo", F.gelu(inner) * gate)
    x = norm(F.gelu(linear(state, "head.dense", norm(x, "model.final_norm"))), "head.norm")
    return x @ state["model.embeddings.tok_embeddings.weight"].T + state["decoder.bias"]


def gpt2(state, ids, *, layers, heads_count):
    """GPT-2 without its causal mask, up to its last norm; weights of linear maps are stored [in, out]."""

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-5)

    def conv(y, name):
        return y @ state[name + ".weight"] + state[name + ".bias"]

    x = state["embed_tokens.weight"][ids] + state["denoise_model.wpe.weight"][: len(ids)]
    for i in range(layers):
        stem = f"denoise_model.h.{i}."
        parts = conv(norm(x, stem + "ln_1"), stem + "attn.c_attn").chunk(3, -1)
        y = attend(*(heads(part, heads_count) for part in parts), all_see(len(ids)))
        x = x + conv(y.transpose(0, 1).flatten(1), stem + "attn.c_proj")
        x = x + conv(
            F.gelu(conv(norm(x, stem + "ln_2"), stem + "mlp.c_fc"), approximate="tanh"), stem + "mlp.c_proj"
        )
    return norm(x, "denoise_model.ln_f")


def sdar_loop(logits, prompt, mask_id, *, blocks, size=4, tau=0.9):
    """Blocks of the row from the left; in each step all tokens above a confidence, or the best one; greedy."""
    x = torch.tensor(prompt + [mask_id] * (blocks * size - len(prompt)))
    for number in range(len(prompt) // size, blocks):
        here = slice(number * size, (number + 1) * size)
        while (x[here] == mask_id).any():
            best, token = logits(x[: here.stop])[here].softmax(-1).max(-1)
            best[x[here] != mask_id] = -math.inf
            chosen = best > tau
            if not chosen.any():
                chosen[best.argmax()] = True
            x[here] = torch.where(chosen, token, x[here])
    return x[len(prompt) :].tolist()


def fast_dllm_loop(logits, prompt, mask_id, *, length, block=32, small=8, tau=0.9):
    """Blocks of 32, their first token from the block before; sub-blocks of 8 by a confidence; greedy.

    `logits` are shifted: row i predicts token i.
    """
    x = list(prompt)
    if len(x) % block == 0:
        x.append(int(logits(torch.tensor([*x, mask_id]))[-1].argmax()))
    while len(x) < len(prompt) + length:
        end = (len(x) // block + 1) * block
        row = torch.tensor(x + [mask_id] * (end - len(x)))
        for begin in range(end - block, end, small):
            here = slice(begin, begin + small)
            while (row[here] == mask_id).any():
                best, token = logits(row)[here].softmax(-1).max(-1)
                best[row[here] != mask_id] = -math.inf
                chosen = best > tau
                chosen[best.argmax()] = True
                row[here] = torch.where(chosen, token, row[here])
        x = [*row.tolist(), int(logits(torch.tensor([*row.tolist(), mask_id]))[-1].argmax())]
    return x[len(prompt) : len(prompt) + length]
