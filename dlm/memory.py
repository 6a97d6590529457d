"""Memory: what a model's weights need, and what this machine has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

SPARE = 1.15
"""Memory that a model needs, over the bytes of its weights: reading them, and short rows."""


@dataclass(frozen=True)
class Fit:
    """Memory that weights need, and memory that is free.

    Attributes:
        needed: bytes that the weights and what comes with them need.
        free: bytes that are free where they would go.
        place: "cuda" or "cpu".
    """

    needed: int
    free: int
    place: str

    def __str__(self) -> str:
        """One line, such as "yes: 3.4 GB of 23.1 GB free on the CPU"."""
        word = "yes" if self.needed <= self.free else "no"
        where = "the GPU" if self.place == "cuda" else "the CPU"
        return f"{word}: needs {self.needed / 1e9:.1f} GB of {self.free / 1e9:.1f} GB free on {where}"


def room(weights: int, device: str = "auto") -> Fit:
    """The memory for weights of so many bytes in memory, on the device that `load_model` would choose."""
    import psutil
    import torch

    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    free = torch.cuda.mem_get_info()[0] if cuda else int(psutil.virtual_memory().available)
    if not cuda:
        free = min(free, container_room() or free)
    return Fit(int(weights * SPARE), free, "cuda" if cuda else "cpu")


def container_room(control: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this container may still take, by cgroups v2 or v1; None where there is no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(int((control / limit).read_text()) - int((control / used).read_text()), 0)
        except (OSError, ValueError):  # not this version; "max"
            continue
    return None


def fit(stored: int, stored_bits: int, device: str = "auto", bits: int | None = None) -> Fit:
    """The memory for weights of so many bytes, on the device that `load_model` would choose.

    Args:
        stored: bytes of the weights in the files.
        stored_bits: bits of a value there.
        device: "cpu", "cuda", or "auto".
        bits: bits of a value in memory; by default 16 on a GPU and 32 on a CPU.
    """
    import torch

    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return room(stored * (bits or (16 if cuda else 32)) // stored_bits, device)


@contextmanager
def heap_without_holes() -> Iterator[None]:
    """Give temporary tensors back to the system at once; glibc would keep their places, twice a model.

    Afterwards its thresholds are those that they grow to by themselves. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
