"""LLaDA (arXiv 2502.09992): a Llama with tensor names of its own, no shift, and a mask of its own."""

from __future__ import annotations

from typing import Any

from dlm.families.base import Family
from dlm.families.fields import Public, layers_only, require, rotary, whole

_SHAPE_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
}

_KNOWN: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "block_group_size": (1,),
    "multi_query_attention": (False, None),
    "clip_qkv": (None,),
    "layer_norm_with_affine": (True,),
}

_DEFAULTS: dict[str, Any] = {
    "block_type": "sequential",
    "layer_norm_type": "default",
    "activation_type": "swiglu",
    "rope": False,
    "rms_norm_eps": 1e-5,
    "mlp_ratio": 4,
    "max_sequence_length": 1024,
    "weight_tying": True,
}
"""Defaults of the published code where config.json says nothing (`ModelConfig` of configuration_llada.py)."""


class LLaDA(Family):
    """LLaDA 8B Base, Instruct and 1.5."""

    name = "llada"
    ids = ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5")
    model_types = ("llada",)
    mask = "<|mdm_mask|>"
    ends = ("<|eot_id|>", "<|endoftext|>")
    generation = {  # noqa: RUF012 (a class attribute by design)
        "decoder": "llada",
        "options": {"block_size": 32},
        "canvas": "full",
        "max_tokens": 128,
        "steps": 128,
        "eos_fill": False,
    }
    tensors = {  # noqa: RUF012
        "model.transformer.wte": "backbone.embed_tokens",
        "model.transformer.ln_f": "backbone.norm",
        "model.transformer.ff_out": "lm_head",
        "model.transformer.blocks.{i}.attn_norm": "backbone.layers.{i}.input_layernorm",
        "model.transformer.blocks.{i}.q_proj": "backbone.layers.{i}.self_attn.q_proj",
        "model.transformer.blocks.{i}.k_proj": "backbone.layers.{i}.self_attn.k_proj",
        "model.transformer.blocks.{i}.v_proj": "backbone.layers.{i}.self_attn.v_proj",
        "model.transformer.blocks.{i}.attn_out": "backbone.layers.{i}.self_attn.o_proj",
        "model.transformer.blocks.{i}.ff_norm": "backbone.layers.{i}.post_attention_layernorm",
        "model.transformer.blocks.{i}.ff_proj": "backbone.layers.{i}.mlp.gate_proj",
        "model.transformer.blocks.{i}.up_proj": "backbone.layers.{i}.mlp.up_proj",
        "model.transformer.blocks.{i}.ff_out": "backbone.layers.{i}.mlp.down_proj",
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Llama; what OLMo's layout could do beyond it is refused."""
        public = {**_DEFAULTS, **public}
        require(public, _KNOWN)
        inner = int((public["mlp_ratio"] or 4) * whole(public, "d_model"))
        rows = "embedding_size" if public.get("embedding_size") else "vocab_size"
        shared = "n_kv_heads" if public.get("n_kv_heads") else "n_heads"
        return {
            "model_type": "llama",
            "vocab_size": whole(public, rows),
            "num_attention_heads": whole(public, "n_heads"),
            "num_key_value_heads": whole(public, shared),
            "hidden_act": "silu",
            "rope_parameters": rotary(public, rotations=("default",)),
            "intermediate_size": inner,
            **layers_only(public, _SHAPE_NAMES),
        }
