"""LLaDA-MoE (arXiv 2509.24389): the attention of Qwen3, and a mixture of experts as its feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Qwen3Config, Qwen3Model

from dlm.errors import CheckpointError
from dlm.families.base import Family
from dlm.families.fields import Public, layers_only, require, rotary, whole
from dlm.families.llada import LLaDA


class ExpertsConfig(Qwen3Config):  # type: ignore[misc]
    """Configuration of `Qwen3Experts`.

    Attributes:
        num_experts: experts of a layer.
        num_experts_per_tok: experts that a position is computed by.
        expert_intermediate_size: inner width of an expert.
        dense_layers: numbers of the layers that have one feed-forward part for all positions.
    """

    model_type = "qwen3_experts"

    num_experts: int = 64
    num_experts_per_tok: int = 8
    expert_intermediate_size: int = 1024
    dense_layers: list[int] | None = None


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Σ over the k likeliest experts of a position of p(expert | x) · expert(x); the rest of p is lost."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.count = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = (config.hidden_size, config.expert_intermediate_size)
        self.experts = nn.ModuleList(Expert(*sizes) for _ in range(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]; each expert is called once, with the positions that chose it."""
        x = hidden_states.flatten(0, -2)
        weight, experts = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.count)  # [N, k]
        out = torch.zeros_like(x)
        for number in experts.unique().tolist():
            row, slot = (experts == number).nonzero(as_tuple=True)
            part = self.experts[number](x[row]) * weight[row, slot, None].to(x.dtype)
            out.index_add_(0, row, part.to(out.dtype))
        return out.view_as(hidden_states)


class Qwen3Experts(Qwen3Model):  # type: ignore[misc]
    """Qwen3 with experts."""

    config_class = ExpertsConfig

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            if number not in (config.dense_layers or ()):
                layer.mlp = Experts(config)
        self.post_init()


AutoConfig.register(ExpertsConfig.model_type, ExpertsConfig, exist_ok=True)
AutoModel.register(ExpertsConfig, Qwen3Experts, exist_ok=True)

_MOE_SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "initializer_range",
    "num_experts",
    "num_experts_per_tok",
    "expert_intermediate_size",
)

_KNOWN_MOE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "qk_layernorm": (True,),
    "clip_qkv": (None,),
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "norm_topk_prob": (False, None),
    "routed_scaling_factor": (1, None),
}


class LLaDAMoE(Family):
    """LLaDA-MoE 7B-A1B Base and Instruct."""

    name = "llada-moe"
    ids = ("inclusionAI/LLaDA-MoE-7B-A1B-Base", "inclusionAI/LLaDA-MoE-7B-A1B-Instruct")
    model_types = ("lladamoe", "llada_moe", "llada")
    mask = "<|mask|>"
    ends = ("<|endoftext|>", "<|role_end|>")
    generation = LLaDA.generation

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`; one of its configurations calls itself "llada"."""
        return super().detect(public, path, names) and "num_experts" in public

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Qwen3 with experts, whose probabilities are not brought to a sum of one."""
        require({"qk_layernorm": None, **public}, _KNOWN_MOE)
        settings = layers_only(public, {name: name for name in _MOE_SHAPE})
        heads = whole(public, "num_attention_heads")
        dense = (
            "dense_intermediate_size" if public.get("dense_intermediate_size") else "expert_intermediate_size"
        )
        return {
            "tie_word_embeddings": False,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-5,
            **settings,
            "rope_parameters": rotary(public, rotations=("default",), theta=None),
            "model_type": ExpertsConfig.model_type,
            "head_dim": whole(public, "hidden_size") // heads,
            "intermediate_size": whole(public, dense),
            "dense_layers": _dense_layers(public),
        }


def _dense_layers(public: Public) -> list[int]:
    """Numbers of the layers without experts."""
    frequency = public.get("moe_layer_freq") or []
    if not isinstance(frequency, list):
        raise CheckpointError(
            f"config.json says moe_layer_freq = {frequency!r}; it is a list with one number a layer"
        )
    return [number for number, routed in enumerate(frequency) if not routed]
