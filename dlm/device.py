"""Devices and types of numbers by name, and moving tensors; importable without torch."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, TypeVar

from dlm.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")

DTYPES = ("float32", "bfloat16", "float16")
"""Types of weights, by torch's names."""

QUANTIZED = ("int8", "nf4")
"""Types of linear layers in 8 and 4 bits, by bitsandbytes; see `dlm.quantization`."""


_DEVICE = re.compile(r"auto|cpu|(cuda|mps|xpu)(:\d+)?")


def check_place(device: str, dtype: str) -> None:
    """Refuse a device or a type that does not exist, before anything is loaded.

    Raises:
        ConfigError: naming the choices.
    """
    for name, value in (("device", device), ("dtype", dtype)):
        if not isinstance(value, str):
            raise ConfigError(
                f"{name} must be a text, such as {'cpu' if name == 'device' else 'float32'!r}, got {value!r}"
            )
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"unknown device {device!r}; choices: auto, cpu, cuda, cuda:1 (or another number)")
    if dtype not in ("auto", "fastest", *DTYPES, *QUANTIZED):
        raise unknown_name("dtype", dtype, ("auto", "fastest", *DTYPES, *QUANTIZED))
    check_quantized(dtype, device)


def check_quantized(dtype: str, device: str = "cpu") -> None:
    """Refuse a type in 8 or 4 bits where bitsandbytes is not installed, or has nothing for the device.

    Raises:
        ConfigError: saying what to install, or which devices there are.
    """
    if dtype not in QUANTIZED:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"dtype {dtype} needs the package bitsandbytes: pip install 'dlm[quantized]'")
    if device.startswith("mps"):
        raise ConfigError(f"dtype {dtype} is for cpu and cuda, got device {device!r}")


def cast_weights(model: Module, dtype: torch.dtype) -> Module:
    """The model with its weights in another type.

    Buffers stay: the frequencies of rotary positions are float32 in transformers whatever the weights are in.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the host does not wait for what the device is doing."""
    return x.to(device, non_blocking=True)
