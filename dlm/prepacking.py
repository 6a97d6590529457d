"""Linear layers on a CPU with their weights in the order in which oneDNN's kernels read them.

PyTorch brings weights into that order anew in every call, which costs a small batch half as much as the
product itself. Here it is done once (`python -m benchmarks.chat default default:plain` measures it); the
memory is the same.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from dlm.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)

ONLY_COMPUTES = "prepacked weights only compute: save, move or copy a model that was loaded without"
"""Error of everything else that is done with them."""


class PrepackedLinear(nn.Module):
    """A linear layer whose weights are packed; it can be computed, and neither trained, moved nor saved.

    Args:
        layer: on a CPU, in float32 or bfloat16.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.numel = layer.weight.numel()
        self.nbytes = layer.weight.nbytes

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
    """The model with the linear layers of its repeated `layers` packed, in place.

    Layers stay as they are where PyTorch lacks the kernels, and elsewhere than on a CPU, in other types than
    float32 and bfloat16, and in 8 or 4 bits.
    """
    layers: nn.Module = model.layers  # type: ignore[assignment]
    names = [name for name, layer in layers.named_modules() if type(layer) is nn.Linear]
    for name in names:  # one after the other, so that there are never two copies of more than one
        layer = layers.get_submodule(name)
        if layer.weight.is_cpu and can_prepack(layer.weight.dtype):  # type: ignore[arg-type]
            layers.set_submodule(name, PrepackedLinear(layer))  # type: ignore[arg-type]
    return model


def prepacked_layers(model: Any) -> list[PrepackedLinear]:
    """The packed layers of a model, whose weights are not among its parameters."""
    modules: Iterable[nn.Module] = getattr(model, "modules", list)()
    return [module for module in modules if isinstance(module, PrepackedLinear)]
