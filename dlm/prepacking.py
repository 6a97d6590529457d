"""Models on a CPU, for computing alone: packed weights, and fewer and larger operations.

PyTorch brings the weights of a linear layer anew in every call into the order in which oneDNN's kernels read
them, which costs a small batch half as much as the product itself. Here it is done once, and products of the
same input become one: a call for one row spends much of its time between small ones. What is computed is the
same, in bfloat16 to the bit (where it was tried), in float32 up to the rounding of sums. `python -m
benchmarks.chat default default:plain` measures it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from dlm.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)

ONLY_COMPUTES = "prepacked weights only compute: save, move or copy a model that was loaded without"
"""Error of everything else that is done with them."""


class PrepackedLinear(nn.Module):
    """Linear layers of one input, as one whose weights are packed: their outputs stand side by side.

    It can be computed, and neither trained, moved nor saved.

    Args:
        layers: on a CPU, in float32 or bfloat16; all of them with a bias, or none.
        bias: in place of theirs.
    """

    def __init__(self, *layers: nn.Linear, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases and bias is None else bias
        self.numel = weight.numel() + sum(value.numel() for value in biases)
        self.nbytes = weight.nbytes + sum(value.nbytes for value in biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], as `nn.Linear`."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Refuse to be moved, or brought into another type: PyTorch would leave the packed weights behind."""
        raise ConfigError(ONLY_COMPUTES)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: packed weights have no storage that can be read."""
        raise ConfigError(ONLY_COMPUTES)

    def extra_repr(self) -> str:
        """Say the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PrepackedMLP(nn.Module):
    """The feed-forward part of a Llama and its kin: gate and up are one product.

    Args:
        mlp: of transformers.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = PrepackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = PrepackedLinear(mlp.down_proj)
        self.activation = mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))  # type: ignore[no-any-return]


class PrepackedAttention(nn.Module):
    """The attention of a Llama: queries, keys and values are one product, and are turned in one operation.

    Args:
        attention: of transformers; its projections are taken from it.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.projection = PrepackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = PrepackedLinear(attention.o_proj)
        self.width = attention.head_dim
        self.heads, self.groups = (x.out_features // self.width for x in (attention.q_proj, attention.k_proj))
        del attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.attention = attention
        """The layer, which attention functions ask for its settings."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """[B, A, D] -> [B, A, D], and the attention weights if the attention function gives them."""
        shape = hidden_states.shape[:-1]
        states = self.projection(hidden_states).view(*shape, -1, self.width).transpose(1, 2)
        plain, value = states.split([self.heads + self.groups, self.groups], dim=1)
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        first, second = plain.chunk(2, dim=-1)
        turned = plain * cos + torch.cat((-second, first), dim=-1) * sin
        query, key = turned.split([self.heads, self.groups], dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.attention.layer_idx)
        name = self.attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        mixed, weights = attend(
            self.attention, query, key, value, attention_mask, scaling=self.attention.scaling, **kwargs
        )
        return self.output(mixed.reshape(*shape, -1)), weights


def can_prepack(dtype: torch.dtype) -> bool:
    """True where PyTorch has oneDNN's kernels for a type, on an x86 processor; others have not been tried."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    ):
        return False
    half = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bool(half)


@torch.no_grad()
def prepack(model: Model) -> Model:
    """The model with its repeated layers and its head packed, in place.

    What stays as it is: modules elsewhere than on a CPU, in other types than float32 and bfloat16, in 8 or
    4 bits, and all where PyTorch lacks the kernels. A head that shares the embedding's weights has a copy.
    Transformers' `output_attentions` gives nothing of layers that were packed.

    Args:
        model: a masked diffusion model, or a causal language model of transformers with `layers` (Llama's).
    """
    layers: nn.Module = model.layers if hasattr(model, "layers") else model.base_model.layers  # type: ignore
    for name, module in list(layers.named_modules()):  # one by one: never two copies of more than one
        packed = _packed(type(module).__name__)
        if packed is not None and _can_pack(module):
            layers.set_submodule(name, packed(module))
    for name, module in list(layers.named_modules()):
        if type(module) is nn.Linear and _can_pack(module):
            layers.set_submodule(name, PrepackedLinear(module))
    head: Any = model.lm_head
    if _can_pack(head):
        offsets = head.offsets(head.weight) if hasattr(head, "offsets") else None
        packed_head = PrepackedLinear(head, bias=offsets)
        if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
            packed_head.numel -= head.weight.numel()  # they are counted as the embedding's
            packed_head.nbytes -= head.weight.nbytes
        model.lm_head = packed_head
    return model


RELATED = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families of transformers whose feed-forward parts are computed alike."""


def _packed(kind: str) -> Callable[[Any], nn.Module] | None:
    """The class that takes the place of one named `kind`; None where the parts are packed alone."""
    if kind == "LlamaAttention":
        return PrepackedAttention
    return PrepackedMLP if kind in [f"{family}MLP" for family in RELATED] else None


def _can_pack(module: nn.Module) -> bool:
    """True for a module on a CPU, in a type with kernels, whose parts with weights are linear layers."""
    parts = [part for part in module.children() if any(True for _ in part.parameters())]
    return all(type(part) is nn.Linear for part in parts) and all(
        weight.is_cpu and can_prepack(weight.dtype) for weight in module.parameters()
    )


def prepacked_layers(model: Any) -> list[PrepackedLinear]:
    """The packed layers of a model, whose weights are not among its parameters."""
    modules: Iterable[nn.Module] = getattr(model, "modules", list)()
    return [module for module in modules if isinstance(module, PrepackedLinear)]
