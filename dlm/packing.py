"""Linear layers on a CPU with their weights in the order in which oneDNN's kernels read them.

PyTorch brings weights into that order anew in every call, which costs a small batch as much as the product
itself. Packed once, a call of the default model for 16 positions takes two thirds of the time
(`python -m benchmarks.chat default default:plain`), and the memory that it took.
"""

from __future__ import annotations

import platform
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed; it can be computed, and neither trained, moved nor saved.

    Args:
        layer: on a CPU, in float32 or bfloat16.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], as `nn.Linear`."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def extra_repr(self) -> str:
        """Say the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def can_pack() -> bool:
    """True where PyTorch has oneDNN's kernels, on an x86 processor; others have not been tried."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


@torch.no_grad()
def pack(model: Model) -> Model:
    """The model with the linear layers of its backbone packed, in place.

    Layers stay as they are where PyTorch lacks the kernels, and elsewhere than on a CPU, in other types than
    float32 and bfloat16, and in 8 or 4 bits. Embedding and LM head, which may be one, stay too.
    """
    if can_pack():
        backbone: nn.Module = model.get_submodule("backbone")
        for name, layer in list(backbone.named_modules()):
            if type(layer) is nn.Linear and layer.weight.is_cpu and layer.weight.dtype in _TYPES:
                backbone.set_submodule(name, PackedLinear(layer))
    return model


_TYPES = (torch.float32, torch.bfloat16)


def is_packed(model: nn.Module) -> bool:
    """True for a model with a packed layer."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
