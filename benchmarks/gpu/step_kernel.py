"""One pass over the logits: the softmax's normaliser, the k best tokens, and the draw among them, in Triton.

An experiment, measured by stage `kernels` and not used by `decoding`. It has the law of `decoding.tokens`,
and on an NVIDIA H200 it takes 1.4 to 12 times as long as the same in PyTorch (docs/results/gpu.md): one
program sorts all of a position's logits, 1,024 at a time, which neither fills the GPU nor reads fast. To win,
a kernel has to split the vocabulary over programs and select by threshold before it sorts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

MOST = 64
"""Largest k that the kernel takes: it keeps the k best in registers."""

BLOCK = 1024
"""Logits that the kernel reads at a time."""


def choose(
    logits: torch.Tensor,
    noise: torch.Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token for each of N positions, drawn from its k best.

    Args:
        logits: [N, V], -inf at tokens that must not come out.
        noise: [N] uniform numbers of (0, 1).
        k: how many tokens are kept before top_p and min_p, at most `MOST` and V.
        temperature: see `decoding.tokens.TokenRule`, as are the others.
        top_p: in (0, 1].
        min_p: in [0, 1].

    Returns:
        [N] int64 tokens; [N] float32, the probability that the model gives them; [N] float32, that which it
        gives to all tokens kept. Probabilities are over the whole vocabulary, at temperature 1; NaN in
        positions of which a logit is NaN.
    """
    logits = logits.contiguous()
    count, vocab = logits.shape
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    probability = torch.empty(count, dtype=torch.float32, device=logits.device)
    mass = torch.empty_like(probability)
    room = 1 << max(k - 1, 1).bit_length()
    if count:
        heat = temperature or 1.0
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _kernel()[(count,)](
                logits, noise.contiguous(), token, probability, mass, vocab, k, 1 / heat,
                top_p if top_p < 1 else math.inf, min_p, GREEDY=temperature == 0, ROOM=room, BLOCK=BLOCK,
            )  # fmt: skip
    return token, probability, mass


@cache
def _kernel() -> Any:
    """The kernel, compiled when it is first wanted; Triton is imported here alone.

    A value and its token travel together as one 64-bit number whose order is that of the values: the upper
    half is the bits of the float, made monotonic, the lower half tells tokens apart, lower ids first. One
    program works on one position: it keeps the `ROOM` largest numbers seen, and the running normaliser
    Σ exp(x - max); then it cuts the k best and inverts their cumulative distribution at the noise.
    """
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
        logits, noise, token, probability, mass,  # noqa: ANN001
        vocab, k, sharpness, top_p, min_p,  # noqa: ANN001
        GREEDY: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        best = tl.full([1, ROOM], -0x7FFFFFFFFFFFFFFF, tl.int64)
        highest = tl.full((), -float("inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for begin in range(0, vocab, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            above = tl.maximum(highest, tl.max(x, axis=0))
            safe = tl.where(above == -float("inf"), 0.0, above)
            total = total * tl.exp(highest - safe) + tl.sum(tl.exp(x - safe), axis=0)
            highest = above
            bits = x.to(tl.int32, bitcast=True)
            order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            both = (order.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
            both = tl.where(at < vocab, both, -0x7FFFFFFFFFFFFFFF)
            top = tl.topk(both.reshape(1, BLOCK), ROOM)
            best = tl.topk(tl.join(best, top).reshape(1, 2 * ROOM), ROOM)
        found = best.reshape(ROOM)
        order = (found >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        place = tl.arange(0, ROOM)
        p = tl.where(place < k, tl.exp(value - highest) / total, 0.0)
        heated = tl.where(p > 0, tl.exp((value - highest) * sharpness), 0.0)
        heated = heated / tl.sum(heated, axis=0)
        before = tl.cumsum(heated, axis=0) - heated
        kept = (p > 0) & (heated >= min_p * tl.max(heated, axis=0)) & (before < top_p)
        drawn = tl.zeros((), tl.int32)
        if not GREEDY:
            weight = tl.where(kept, heated, 0.0)
            cumulative = tl.cumsum(weight, axis=0)
            point = tl.load(noise + row) * tl.sum(weight, axis=0)
            last = tl.max(tl.where(weight > 0, place, 0), axis=0)
            drawn = tl.minimum(tl.sum((cumulative <= point).to(tl.int32), axis=0), last)
        is_it = place == drawn
        ids = 0x7FFFFFFF - (found & 0xFFFFFFFF)
        tl.store(token + row, tl.sum(tl.where(is_it, ids, 0), axis=0))
        tl.store(probability + row, tl.sum(tl.where(is_it, p, 0.0), axis=0) + total * 0)
        tl.store(mass + row, tl.sum(tl.where(kept, p, 0.0), axis=0) + total * 0)

    return kernel
