"""Weight files: what they hold, whether they are whole, how large they are, and one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlm.errors import CheckpointError
from dlm.families.base import file_of
from dlm.json_files import damaged, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types by safetensors' names."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name of the type, such as "BF16"."""
    file: Path
    begin: int
    """First byte of its values in the file."""

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return TORCH_DTYPES[self.dtype].itemsize * 8

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The tensor, read from its file (not mapped: what has been read does not stay beside the model)."""
        kind, size = TORCH_DTYPES[self.dtype], math.prod(self.shape)
        if not size:
            return torch.empty(self.shape, dtype=kind)[key]
        room = mmap.mmap(-1, size * kind.itemsize)  # goes back to the system whole, where a heap keeps holes
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin)
            view = memoryview(room)
            while len(view) > 0:
                read = stream.readinto(view)
                if not read:
                    raise CheckpointError(f"{self.file}: truncated")
                view = view[read:]
        out = torch.frombuffer(room, dtype=kind).view(self.shape)
        return out[key]


def header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        CheckpointError: when the file is not one, shorter than its header says, or its header does not go
            with its bytes: tensors follow each other, each as long as its shape and type say.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        return _checked(file, 8 + length, entries)
    except CheckpointError:
        raise
    except (
        struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, RecursionError,
        OverflowError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{file}: truncated or damaged (not a safetensors header)") from error


def _checked(file: Path, start: int, entries: dict[str, Any]) -> dict[str, Stored]:
    """The tensors of a file whose values begin at `start`, from the entries of its header."""
    end, size = max((entry["data_offsets"][1] for entry in entries.values()), default=0), file.stat().st_size
    if size < start + end:
        raise CheckpointError(f"{file}: truncated ({size:,} bytes of {start + end:,})")
    expected = 0
    for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in entries.items()):
        _check_entry(file, name, entries[name], stop - begin)
        if begin != expected:
            raise CheckpointError(
                f"{file}: damaged ({name} begins at byte {begin:,} in place of {expected:,})"
            )
        expected = stop
    return {
        name: Stored(tuple(entry["shape"]), entry["dtype"], file, start + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _check_entry(file: Path, name: str, entry: dict[str, Any], size: int) -> None:
    """Refuse a tensor of a type that is not read, and one whose bytes are not as many as its values need."""
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {dtype}, which is not read; types: {', '.join(TORCH_DTYPES)}"
        )
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape):
        raise CheckpointError(f"{file}: damaged ({name} has the shape {shape})")
    needed = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if size != needed:
        raise CheckpointError(
            f"{file}: damaged ({name} has {size:,} bytes; {shape} of {dtype} need {needed:,})"
        )


def shards(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one; empty where there are none.

    Raises:
        CheckpointError: when the index is damaged or missing, or names files that are not there.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file() and any(folder.glob("model-*-of-*.safetensors")):
            raise CheckpointError(f"{folder}: {INDEX} is missing, which says what lies in which file")
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    names = sorted(set(read_index(folder / INDEX)["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        )
    return [folder / name for name in names]


def read_index(file: Path) -> dict[str, Any]:
    """The index of a checkpoint in several files: `weight_map`, tensor names to names of files.

    Raises:
        CheckpointError: when it is damaged.
    """
    try:
        index = read_object(file)
        places = index["weight_map"]
        wrong = sorted(str(name) for name, place in places.items() if not isinstance(place, str))
        if wrong:
            raise CheckpointError(f"{file}: the place of {wrong[0]} is no name of a file")
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(file, error) from error


def read_lazily(path: str | Path) -> dict[str, Stored]:
    """The tensors of a folder or hub repository by name, fetched if need be, read when asked for (`x[...]`).

    Empty where there are no safetensors files.
    """
    files = shards(path) if Path(path).is_dir() else _hub_shards(str(path))
    return {name: each for file in files for name, each in header(file).items()}


def _hub_shards(path: str) -> list[Path]:
    """The safetensors files of a hub repository, on this machine."""
    index = file_of(path, INDEX)
    names = [SINGLE] if index is None else sorted(set(read_index(Path(index))["weight_map"].values()))
    paths = {name: file_of(path, name) for name in names}
    missing = [name for name, file in paths.items() if file is None]
    if missing and index is not None:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        )
    return [Path(file) for file in paths.values() if file is not None]


def check_files(path: str | Path) -> None:
    """Refuse a folder whose weight files are missing or truncated, in a moment and before anything is loaded.

    Raises:
        CheckpointError: naming the file. Of hub ids and of folders with other files nothing is said.
    """
    if not Path(path).is_dir():
        return
    files = shards(path)
    held = {name for file in files for name in header(file)}
    if (Path(path) / INDEX).is_file():
        lacking = sorted(set(read_index(Path(path) / INDEX)["weight_map"]) - held)
        if lacking:
            raise CheckpointError(f"{path}: its files lack {len(lacking)} weights, the first is {lacking[0]}")


def tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a folder by name; empty for a hub id, and where there are no safetensors files."""
    return {name: each for file in shards(path) for name, each in header(file).items()}


def stored_bytes(path: str | Path) -> int | None:
    """Bytes of the weights of a folder or hub repository, before they are fetched; None where unknown."""
    if Path(path).is_dir():
        return sum(file.stat().st_size for file in shards(path)) or None
    index = file_of(str(path), INDEX)
    if index is not None:
        total = read_index(Path(index)).get("metadata", {}).get("total_size")
        return None if total is None else int(total)
    return _size_on_hub(str(path))


def _size_on_hub(path: str) -> int | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for name in (SINGLE, "pytorch_model.bin"):
        try:
            size = get_hf_file_metadata(hf_hub_url(path, name)).size
        except Exception:  # no network, no such file
            continue
        if size:
            return int(size)
    return None
