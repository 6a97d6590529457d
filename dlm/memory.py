"""Memory and disks: what a model's weights need, and what this machine has."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

SPARE = 1.15
"""Memory that a model needs, over the bytes of its weights: reading them, and short rows."""


_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of cgroups v2 and v1: folder, files with the limit and with what is used, and the part of it that is given
back on demand (files that were read), as `memory.stat` calls it."""


@dataclass(frozen=True)
class Fit:
    """Memory that weights need, and memory that is free; or room on a disk.

    Attributes:
        needed: bytes that the weights and what comes with them need.
        free: bytes that are free where they would go.
        place: "cuda", "cpu", or the folder on a disk.
    """

    needed: int
    free: int
    place: str

    def __str__(self) -> str:
        """One line, such as "yes: needs 3.4 GB of 23.1 GB free on the CPU"."""
        word = "yes" if self.needed <= self.free else "no"
        where = {"cuda": "on the GPU", "cpu": "on the CPU"}.get(self.place, f"in {self.place}")
        return f"{word}: needs {self.needed / 1e9:.1f} GB of {self.free / 1e9:.1f} GB free {where}"


def room(weights: int, device: str = "auto") -> Fit:
    """The memory for weights of so many bytes in memory, on the device that `load_model` would choose."""
    import psutil
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return Fit(int(weights * SPARE), torch.cuda.mem_get_info()[0], "cuda")
    free, limited = int(psutil.virtual_memory().available), container_room()
    return Fit(int(weights * SPARE), free if limited is None else min(free, limited), "cpu")


def disk(needed: int, folder: str | Path) -> Fit:
    """The room on the disk of a folder, which need not be there yet, for so many bytes."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return Fit(needed, shutil.disk_usage(place).free, str(folder))


def container_room(
    control: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes that this process may still take by its control groups, v2 or v1; None where there is no limit.

    Args:
        control: where the groups are mounted; in a container its own is the root.
        groups: lines "number:controllers:path" with the group of this process; its parents' limits count too.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text("utf-8").splitlines()]
    except OSError:
        lines = []
    rooms = []
    for folder, *files in _CGROUPS:
        group = next((Path(x[2].strip("/")) for x in lines if folder in x[1].split(",")), Path())
        rooms += [_room_in(control / folder / path, *files) for path in {group, *group.parents, Path()}]
    return min((path for path in rooms if path is not None), default=None)


def _room_in(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Bytes that a control group may still take; None for no limit. Names are those of `_CGROUPS`."""
    try:
        left = int((group / limit).read_text()) - int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not this version, no such group here; "max"
        return None
    return max(left + int(stat.get(reclaimable, 0)), 0)


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
