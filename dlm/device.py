"""Devices and types of numbers by name, and moving tensors; importable without torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dlm.errors import ConfigError, how_to_install, unknown_name

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""Types of weights, by torch's names."""

QUANTIZED = ("int8", "nf4")
"""Types of linear layers in 8 and 4 bits, by bitsandbytes; see `dlm.quantization`."""


SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads a model over the devices that there are."""

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
    if dtype not in ("auto", "fastest", *DTYPE_NAMES, *QUANTIZED):
        raise unknown_name("dtype", dtype, ("auto", *DTYPE_NAMES, *QUANTIZED))
    check_quantized(dtype, device)


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """The place where a model is computed, and its numbers.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the machine computes in it; or
            "int8", "nf4" for linear layers in 8 or 4 bits.
    """

    device: str = "auto"
    dtype: str = "auto"

    def check_place(self) -> None:
        """Refuse what does not exist; see the function of this name."""
        check_place(self.device, self.dtype)


def devices_of(device_map: str | dict[str, Any] | None) -> list[str]:
    """The devices that a map names, as texts; none where accelerate is to find them.

    Raises:
        ConfigError: for what is no device, and for weights that would be left on disk or nowhere.
    """
    if device_map is None or (isinstance(device_map, str) and device_map in SPREADS):
        return []
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    names = [f"cuda:{value}" if isinstance(value, int) else str(value) for value in values]
    for name in names:
        if name in ("disk", "meta"):
            raise ConfigError(
                f'device_map: weights are not left on "{name}"; name devices, or load with int8 or nf4'
            )
        if name == "auto" or not _DEVICE.fullmatch(name):
            raise ConfigError(
                f"device_map: unknown device {name!r}; choices: cpu, cuda:0 (or another number), and in "
                f"place of a map {', '.join(SPREADS)}"
            )
    return names


def check_quantized(dtype: str, device: str = "cpu") -> None:
    """Refuse a type in 8 or 4 bits where bitsandbytes is not installed, or has nothing for the device.

    Raises:
        ConfigError: saying what to install, or which devices there are.
    """
    if dtype not in QUANTIZED:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"dtype {dtype} needs the package bitsandbytes: {how_to_install('quantized')}")
    if device.startswith("mps"):
        raise ConfigError(f"dtype {dtype} is for cpu and cuda, got device {device!r}")


def cast_weights(model: Module, dtype: torch.dtype) -> Module:
    """The model with its weights in another type.

    Buffers stay: the frequencies of rotary positions are float32 in transformers whatever the weights are in.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the host does not wait for what the device is doing."""
    return x.to(device, non_blocking=True)


class Movable:
    """A dataclass whose tensors follow the device that needs them.

    Of a model that is spread over several devices accelerate moves what each layer is given, by `to`.
    """

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The object with its tensors on a device, copied once for each; itself where they are there."""
        import torch

        del non_blocking
        place = torch.device(device)
        copies: dict[torch.device, Self] = vars(self).setdefault("_copies", {})
        if place not in copies:
            values = {field.name: getattr(self, field.name) for field in fields(self) if field.init}  # type: ignore[arg-type]
            moved = {name: _moved(value, place) for name, value in values.items()}
            unmoved = all(moved[name] is value for name, value in values.items())
            copies[place] = self if unmoved else replace(self, **moved)  # type: ignore[type-var]
        return copies[place]


def _moved(value: Any, device: torch.device) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return to_device(value, device)
    if isinstance(value, Movable):
        return value.to(device)
    if isinstance(value, dict) and value:
        return {key: _moved(item, device) for key, item in value.items()}
    return value
