"""Moving tensors to the device of a model."""

from __future__ import annotations

import torch


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the host does not wait for what the device is doing."""
    return x.to(device, non_blocking=True)
