"""Tiny random checkpoints in the layouts of the families, with an independent forward pass for each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from tests.dlm.families import plain

V, D, LAYERS, HEADS, KV = 448, 32, 2, 4, 2
"""Size of the tiny models; the vocabulary is larger than any tokenizer here."""


@dataclass
class Layout:
    """A family as a test sees it.

    Attributes:
        family: its name in the toolkit.
        public: config.json.
        state: the tensors by their public names.
        forward: ids [L] -> logits [L, V], as published.
        mask: the mask token; `None` where the tokenizer has it already.
        specials: further tokens of the tokenizer.
    """

    family: str
    public: dict[str, Any]
    state: dict[str, torch.Tensor]
    forward: Any
    mask: str | None
    specials: tuple[str, ...] = ()
    tokenizer: dict[str, Any] = field(default_factory=dict)

    def write(self, folder, base, shards=1):
        """Write the checkpoint; `base` is a tokenizer without specials to begin with."""
        folder.mkdir(parents=True, exist_ok=True)
        made = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, **self.tokenizer)
        made.add_tokens([*self.specials, *([self.mask] if self.mask else [])], special_tokens=True)
        made.save_pretrained(folder)
        public = {
            **self.public,
            **({"mask_token_id": made.convert_tokens_to_ids(self.mask)} if self.mask else {}),
        }
        public = {**public, **self._ends(made)}
        (folder / "config.json").write_text(json.dumps(public))
        names = sorted(self.state)
        if shards == 1:
            save_file(self.state, folder / "model.safetensors", {"format": "pt"})
            return folder
        where = {
            name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
        }
        for file in set(where.values()):
            save_file({n: self.state[n] for n in names if where[n] == file}, folder / file, {"format": "pt"})
        total = sum(x.numel() * x.element_size() for x in self.state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def _ends(self, made):
        names = {
            "eos_token_id": self.tokenizer.get("eos_token"),
            "pad_token_id": self.tokenizer.get("pad_token"),
        }
        return {key: made.convert_tokens_to_ids(token) for key, token in names.items() if token}


def noise(shapes, seed=0, scale=0.3):
    """Random tensors by name; norms near 1."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=made) * (0.1 if "norm" in name or "ln_" in name else scale)
        + (1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def llada(dtype=torch.float32, kv_heads=KV, inner=48):
    stem = "model.transformer.blocks.{i}."
    names = {
        "norm1": stem + "attn_norm", "norm2": stem + "ff_norm", "q": stem + "q_proj", "k": stem + "k_proj",
        "v": stem + "v_proj", "o": stem + "attn_out", "gate": stem + "ff_proj", "up": stem + "up_proj",
        "down": stem + "ff_out", "norm": "model.transformer.ln_f",
    }  # fmt: skip
    kv = D // HEADS * kv_heads
    shapes = {"model.transformer.wte.weight": (V, D), "model.transformer.ff_out.weight": (V, D)}
    shapes["model.transformer.ln_f.weight"] = (D,)
    for i in range(LAYERS):
        sizes = {"norm1": (D,), "norm2": (D,), "q": (D, D), "k": (kv, D), "v": (kv, D), "o": (D, D),
                 "gate": (inner, D), "up": (inner, D), "down": (D, inner)}  # fmt: skip
        shapes |= {names[part].format(i=i) + ".weight": size for part, size in sizes.items()}
    state = {name: x.to(dtype) for name, x in noise(shapes).items()}
    public = {
        "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
        "d_model": D, "embedding_size": V, "include_bias": False, "include_qkv_bias": False,
        "input_emb_norm": False, "layer_norm_type": "rms", "max_sequence_length": 256, "mlp_hidden_size": inner,
        "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": HEADS, "n_kv_heads": kv_heads,
        "n_layers": LAYERS, "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True,
        "rope_theta": 500000.0, "scale_logits": False, "vocab_size": V, "weight_tying": False,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.transformer.wte.weight"][ids], names, layers=LAYERS, q_heads=HEADS,
            kv_heads=kv_heads, theta=500000.0, eps=1e-5, sees=plain.all_see(len(ids)),
        )  # fmt: skip
        return x @ state["model.transformer.ff_out.weight"].T

    ends = ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    chat = (
        "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
        "{{ m['content'] }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>"
    )
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
    return Layout("llada", public, state, forward, "<|mdm_mask|>", ends, {**settings, "chat_template": chat})


def qwen2_shapes(bias=True, tied=False, inner=48, head_dim=None, qk_norm=False):
    head_dim = head_dim or D // HEADS
    q, kv = head_dim * HEADS, head_dim * KV
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for i in range(LAYERS):
        sizes = {"norm1": (D,), "norm2": (D,), "q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q),
                 "gate": (inner, D), "up": (inner, D), "down": (D, inner)}  # fmt: skip
        if qk_norm:
            sizes |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
        shapes |= {plain.HF[part].format(i=i) + ".weight": size for part, size in sizes.items()}
        if bias:
            shapes |= {plain.HF[part].format(i=i) + ".bias": sizes[part][:1] for part in "qkv"}
    return shapes


def dream():
    state = noise(qwen2_shapes(), seed=1)
    public = {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "hidden_act": "silu", "hidden_size": D, "initializer_range": 0.02, "intermediate_size": 48,
        "max_position_embeddings": 256, "max_window_layers": 28, "model_type": "Dream",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS,
            kv_heads=KV, theta=1000000.0, eps=1e-6, sees=plain.all_see(len(ids)),
        )  # fmt: skip
        return plain.shifted(x @ state["lm_head.weight"].T)

    ends = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>")
    chat = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|beginoftext|>"}
    return Layout(
        "dream", public, state, forward, "<|mask|>", ends,
        {**settings, "mask_token": "<|mask|>", "chat_template": chat},
    )  # fmt: skip


def dit_state(vocab, cond=16, adaln=True, seed=2):
    shapes = {
        "backbone.vocab_embed.embedding": (vocab, D), "backbone.output_layer.norm_final.weight": (D,),
        "backbone.output_layer.linear.weight": (vocab, D), "backbone.output_layer.linear.bias": (vocab,),
    }  # fmt: skip
    if adaln:
        shapes |= {
            "backbone.sigma_map.mlp.0.weight": (cond, 256), "backbone.sigma_map.mlp.0.bias": (cond,),
            "backbone.sigma_map.mlp.2.weight": (cond, cond), "backbone.sigma_map.mlp.2.bias": (cond,),
            "backbone.output_layer.adaLN_modulation.weight": (2 * D, cond),
            "backbone.output_layer.adaLN_modulation.bias": (2 * D,),
        }  # fmt: skip
    for i in range(LAYERS):
        stem = f"backbone.blocks.{i}."
        sizes = {
            "norm1.weight": (D,), "attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D), "norm2.weight": (D,),
            "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,), "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,),
        }  # fmt: skip
        if adaln:
            sizes |= {"adaLN_modulation.weight": (6 * D, cond), "adaLN_modulation.bias": (6 * D,)}
        shapes |= {stem + name: size for name, size in sizes.items()}
    state = noise(shapes, seed, scale=0.2)  # adaLN multiplies: logits of the others' size
    half = D // HEADS // 2
    state["backbone.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(half) / half)
    return state


def mdlm():
    vocab = 382  # 380 tokens, an end token, the mask
    state = dit_state(vocab)
    public = {
        "architectures": ["MDLM"],
        "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
        "cond_dim": 16, "dropout": 0.1, "hidden_dim": D, "model_length": 1024, "model_type": "mdlm",
        "n_blocks": LAYERS, "n_heads": HEADS, "return_dict": False, "time_conditioning": False, "vocab_size": vocab,
    }  # fmt: skip

    def forward(ids):
        x = state["backbone.vocab_embed.embedding"][ids]
        return plain.dit(state, x, layers=LAYERS, heads_count=HEADS, sees=plain.all_see(len(ids)))

    ends = ("<|endoftext|>",)
    return Layout("mdlm", public, state, forward, None, ends, {"eos_token": ends[0], "bos_token": ends[0]})


def qwen3(model_type, seed, sees, **settings):
    """Qwen3 of the authors, with tied embeddings and heads wider than the model over their number."""
    state = noise(qwen2_shapes(bias=False, tied=True, head_dim=16, qk_norm=True), seed=seed)
    public = {
        "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu",
        "hidden_size": D, "intermediate_size": 48, "max_position_embeddings": 256, "max_window_layers": 28,
        "model_type": model_type, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False,
        "vocab_size": V, **settings,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS, kv_heads=KV,
            theta=1000000.0, eps=1e-6, sees=sees(len(ids)), qk_norm=True,
        )  # fmt: skip
        return x @ state["model.embed_tokens.weight"].T

    return public, state, forward


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}thought{% endif %}"
)


def a2d(name="a2d", sees=plain.all_see, **more):
    auto = {"AutoConfig": "modeling_qwen3.A2DQwen3Config", "AutoModel": "modeling_qwen3.A2DQwen3LMHeadModel"}
    made = qwen3("a2d-qwen3", 3, sees, architectures=["A2DQwen3LMHeadModel"], auto_map=auto, **more)
    ends = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    return Layout(name, *made, None, ends, {**settings, "chat_template": QWEN_CHAT})


def a2d_blocks():
    return a2d(
        "a2d-bd3lm",
        lambda n: plain.blocks_see(n, 32),
        _name_or_path="dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
    )


def bert_chat():
    inner, layers, local = 40, 4, 8
    shapes = {
        "model.embeddings.tok_embeddings.weight": (V, D), "model.embeddings.norm.weight": (D,),
        "model.final_norm.weight": (D,), "head.dense.weight": (D, D), "head.norm.weight": (D,), "decoder.bias": (V,),
    }  # fmt: skip
    for i in range(layers):
        stem = f"model.layers.{i}."
        if i:
            shapes[stem + "attn_norm.weight"] = (D,)
        shapes |= {
            stem + "attn.Wqkv.weight": (3 * D, D), stem + "attn.Wo.weight": (D, D), stem + "mlp_norm.weight": (D,),
            stem + "mlp.Wi.weight": (2 * inner, D), stem + "mlp.Wo.weight": (D, inner),
        }  # fmt: skip
    state = noise(shapes, seed=4)
    public = {
        "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
        "classifier_activation": "gelu", "classifier_bias": False, "decoder_bias": True, "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "hidden_activation": "gelu",
        "hidden_size": D, "intermediate_size": inner, "layer_norm_eps": 1e-05, "local_attention": local,
        "local_rope_theta": 10000.0, "max_position_embeddings": 256, "mlp_bias": False, "model_type": "modernbert",
        "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": HEADS, "num_hidden_layers": layers,
        "tie_word_embeddings": True, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        return plain.modernbert(state, ids, layers=layers, heads_count=HEADS, reach=local // 2)

    settings = {"pad_token": "[PAD]", "mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Layout("bert-chat", public, state, forward, None, (), settings)


def diffugpt():
    shapes = {
        "embed_tokens.weight": (V, D), "denoise_model.wpe.weight": (256, D), "denoise_model.ln_f.weight": (D,),
        "denoise_model.ln_f.bias": (D,),
    }  # fmt: skip
    for i in range(LAYERS):
        stem = f"denoise_model.h.{i}."
        sizes = {
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
        }
        for part, size in sizes.items():
            shapes |= {f"{stem}{part}.weight": size, f"{stem}{part}.bias": size[1:]}
        shapes |= {f"{stem}{part}.{kind}": (D,) for part in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    state = noise(shapes, seed=5)
    state |= {
        f"denoise_model.h.{i}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.bool) for i in range(LAYERS)
    }
    public = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 256, "n_embd": D,
        "n_head": HEADS, "n_layer": LAYERS, "n_positions": 256, "resid_pdrop": 0.1, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.gpt2(state, ids, layers=LAYERS, heads_count=HEADS)
        return plain.shifted(x @ state["embed_tokens.weight"].T)

    ends = ("<|endoftext|>",)
    settings = {"eos_token": ends[0], "bos_token": ends[0], "mask_token": "[MASK]"}
    return Layout("diffugpt", public, state, forward, None, ends, settings)


def diffullama():
    state = noise(qwen2_shapes(bias=False), seed=6)
    public = {
        "_name_or_path": "diffusionfamily/diffullama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "hidden_act": "silu", "hidden_size": D, "initializer_range": 0.02, "intermediate_size": 48,
        "max_position_embeddings": 256, "mlp_bias": False, "model_type": "llama", "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS, kv_heads=KV,
            theta=10000.0, eps=1e-5, sees=plain.all_see(len(ids)),
        )  # fmt: skip
        return plain.shifted(x @ state["lm_head.weight"].T)

    ends = ("<s>", "</s>")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return Layout("diffullama", public, state, forward, None, ends, settings)


def sdar(size=4):
    auto = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"}
    sees = lambda length: plain.blocks_see(length, size)  # noqa: E731
    made = qwen3("sdar", 7, sees, architectures=["SDARForCausalLM"], auto_map=auto)
    ends = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Layout("sdar", *made, "<|MASK|>", ends, {**settings, "chat_template": QWEN_CHAT})


def fast_dllm():
    state = noise(qwen2_shapes(tied=True), seed=8)
    public = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"], "attention_dropout": 0.0, "bd_size": 32, "hidden_act": "silu",
        "auto_map": {"AutoConfig": "configuration.Fast_dLLM_QwenConfig", "AutoModel": "modeling.Fast_dLLM_QwenModel"},
        "hidden_size": D, "initializer_range": 0.02, "intermediate_size": 48, "layer_types": ["full_attention"] * LAYERS,
        "max_position_embeddings": 256, "max_window_layers": 28, "model_type": "Fast_dLLM_Qwen",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS, kv_heads=KV,
            theta=1000000.0, eps=1e-6, sees=plain.blocks_see(len(ids), 32),
        )  # fmt: skip
        return plain.shifted(x @ state["model.embed_tokens.weight"].T)

    ends = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Layout(
        "fast-dllm-v2", public, state, forward, "|<MASK>|", ends, {**settings, "chat_template": QWEN_CHAT}
    )


def bd3lm():
    vocab = 382
    state = dit_state(vocab, seed=9)
    state |= {"sampling_eps_min": torch.tensor(0.001), "sampling_eps_max": torch.tensor(1.0)}
    public = {
        "adaln": True, "architectures": ["BD3LM"], "attn_backend": "sdpa", "block_size": 4, "causal": False,
        "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        "cond_dim": 16, "cross_attn": True, "dropout": 0.1, "hidden_dim": D, "model_length": 1024, "model_type": "bd3lm",
        "n_blocks": LAYERS, "n_heads": HEADS, "time_conditioning": False, "var_min": True, "vocab_size": vocab,
    }  # fmt: skip

    def forward(ids):
        x = state["backbone.vocab_embed.embedding"][ids]
        return plain.dit(state, x, layers=LAYERS, heads_count=HEADS, sees=plain.blocks_see(len(ids), 4))

    ends = ("<|endoftext|>",)
    return Layout("bd3lm", public, state, forward, None, ends, {"eos_token": ends[0], "bos_token": ends[0]})


def llada_moe(model_type="lladamoe"):
    shapes = qwen2_shapes(bias=False, qk_norm=True)
    for part in ("gate", "up", "down"):  # of the second layer, which has experts
        shape = shapes.pop(f"model.layers.1.mlp.{part}_proj.weight")
        inner = tuple(24 if n == 48 else n for n in shape)
        shapes |= {f"model.layers.1.mlp.experts.{j}.{part}_proj.weight": inner for j in range(5)}
    shapes["model.layers.1.mlp.gate.weight"] = (5, D)
    state = noise(shapes, seed=11)
    public = {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig", "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"},
        "dense_intermediate_size": 48, "expert_intermediate_size": 24, "hidden_act": "silu", "hidden_size": D,
        "initializer_range": 0.02, "max_position_embeddings": 256, "model_type": model_type,
        "moe_layer_freq": [0, 1], "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax",
        "norm_topk_prob": None, "num_attention_heads": HEADS, "num_experts": 5, "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "partial_rotary_factor": 1, "qk_layernorm": True,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS, kv_heads=KV,
            theta=50000.0, eps=1e-5, sees=plain.all_see(len(ids)), qk_norm=True,
            feed=lambda i, y: plain.mixture(state, "model.layers.1.mlp", y, 5, 2) if i == 1 else None,
        )  # fmt: skip
        return x @ state["lm_head.weight"].T

    ends = ("<|startoftext|>", "<|endoftext|>", "<|role_end|>")
    chat = (
        "{% for m in messages %}<role>{{ 'HUMAN' if m['role'] == 'user' else m['role'].upper() }}</role>"
        "{{ m['content'] }}<|role_end|>{% endfor %}<role>ASSISTANT</role>"
    )
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    return Layout("llada-moe", public, state, forward, None, ends, {**settings, "chat_template": chat})


LAYOUTS = {
    "sdar": sdar,
    "fast-dllm-v2": fast_dllm,
    "bd3lm": bd3lm,
    "diffugpt": diffugpt,
    "diffullama": diffullama,
    "a2d": a2d,
    "a2d-bd3lm": a2d_blocks,
    "bert-chat": bert_chat,
    "mdlm": mdlm,
    "llada": llada,
    "llada-moe": llada_moe,
    "dream": dream,
}
