"""Weight files: what they hold, whether they are whole, how large they are, and one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlm.errors import CheckpointError
from dlm.families.base import file_of
from dlm.json_files import damaged, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = "__metadata__"
"""In a safetensors header, what is said about the file."""
_COPY_BYTES = 16 << 20
"""Bytes that are copied at once."""

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
        CheckpointError: when the file is not one, or its header does not go with its bytes: by the format
            tensors follow each other without a gap, to the end of the file, each as long as its shape and
            type say.
    """
    begin, entries = _entries(file)
    return {
        name: Stored(tuple(entry["shape"]), entry["dtype"], file, begin + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != METADATA
    }


def _entries(file: Path) -> tuple[int, dict[str, Any]]:
    """First byte of a file's values, and the entries of its header, checked; see `header`."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size - 8 - length
            entries = json.loads(stream.read(length) if size >= 0 else b"")
        metadata = dict(entries.pop(METADATA, None) or {})
        _check_entries(file, entries, 8 + length, size)
    except CheckpointError:
        raise
    except (
        struct.error, ValueError, LookupError, TypeError, AttributeError, MemoryError, RecursionError,
        OverflowError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{file}: truncated or damaged (not a safetensors header)") from error
    return 8 + length, {METADATA: metadata, **entries}


def write_renamed(file: Path, target: Path, renamed: Callable[[str], str]) -> list[str]:
    """Copy a safetensors file under other names of its tensors, a few megabytes at a time.

    Args:
        file: to be copied.
        target: the new file.
        renamed: gives a tensor's new name.

    Returns:
        The new names.

    Raises:
        CheckpointError: see `header`.
    """
    begin, entries = _entries(file)
    metadata = {**entries.pop(METADATA), "format": "pt"}
    tensors = {renamed(name): entry for name, entry in entries.items()}
    text = json.dumps({METADATA: metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8, as by the format
    with file.open("rb") as source, target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        source.seek(begin)
        shutil.copyfileobj(source, out, _COPY_BYTES)
    return list(tensors)


def _check_entries(file: Path, entries: dict[str, Any], start: int, size: int) -> None:
    """Refuse tensors that do not follow each other, or are not as long as their shapes and types need.

    Args:
        file: where they lie.
        entries: entries of the header by name.
        start: first byte of the values.
        size: bytes from there to the end of the file.
    """
    places = {name: _place_tensor(file, name, entry) for name, entry in entries.items()}
    end = max((end for _, end in places.values()), default=0)
    if size < end:
        raise CheckpointError(f"{file}: truncated ({start + size:,} bytes of {start + end:,})")
    expected = 0
    for (begin, stop), name in sorted((place, name) for name, place in places.items()):
        _check_entry(file, name, entries[name], stop - begin)
        if begin != expected:
            raise CheckpointError(
                f"{file}: damaged ({name} begins at byte {begin:,} in place of {expected:,})"
            )
        expected = stop
    if size > expected:
        raise CheckpointError(f"{file}: damaged ({size - expected:,} bytes behind the last tensor)")


def _place_tensor(file: Path, name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Begin and end of a tensor among the values of its file; refuse what is no place."""
    begin, end = entry["data_offsets"]
    if not (_is_count(begin) and _is_count(end) and begin <= end):
        raise CheckpointError(f"{file}: damaged ({name} is said to lie from byte {begin} to {end})")
    return begin, end


def _check_entry(file: Path, name: str, entry: dict[str, Any], size: int) -> None:
    """Refuse a tensor of a type that is not read, and one whose bytes are not as many as its values need."""
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in TORCH_DTYPES:
        readable = ", ".join(TORCH_DTYPES)
        raise CheckpointError(f"{file}: {name} is stored as {dtype}, which is not read; types: {readable}")
    if not all(map(_is_count, shape)):
        raise CheckpointError(f"{file}: damaged ({name} has the shape {shape})")
    needed = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if size != needed:
        raise CheckpointError(
            f"{file}: damaged ({name} has {size:,} bytes; {shape} of {dtype} need {needed:,})"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
        for name, place in places.items():
            if not isinstance(place, str) or Path(place).name != place:
                raise CheckpointError(f"{file}: the place of {name} is no name of a file: {place!r}")
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(file, error) from error


def read_lazily(path: str | Path) -> dict[str, Stored]:
    """The tensors of a folder or hub repository by name, fetched if need be, read when asked for (`x[...]`).

    Empty where there are no safetensors files.
    """
    return _merged(shards(path) if Path(path).is_dir() else _hub_shards(str(path)))


def _merged(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of several files by name; a name that is in two of them is refused."""
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, entry in header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: holds {name}, which {tensors[name].file.name} also holds")
            tensors[name] = entry
    return tensors


def _hub_shards(path: str) -> list[Path]:
    """The safetensors files of a hub repository, on this machine."""
    index = file_of(path, INDEX)
    names = _names_on_hub(index)
    paths = {name: file_of(path, name) for name in names}
    missing = [name for name, file in paths.items() if file is None]
    if missing and index is not None:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        )
    return [Path(file) for file in paths.values() if file is not None]


def _names_on_hub(index: str | None) -> list[str]:
    """Names of the weight files of a hub repository, by its index if it has one."""
    return [SINGLE] if index is None else sorted(set(read_index(Path(index))["weight_map"].values()))


def is_fetched(path: str) -> bool:
    """True where all weight files of a hub repository are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    names = _names_on_hub(file_of(path, INDEX))
    return all(isinstance(try_to_load_from_cache(path, name), str) for name in names)


def check_files(path: str | Path) -> None:
    """Refuse a folder whose weight files are missing or truncated, in a moment and before anything is loaded.

    Raises:
        CheckpointError: naming the file. Of hub ids and of folders with other files nothing is said.
    """
    if not Path(path).is_dir():
        return
    held = tensors(path)
    if (Path(path) / INDEX).is_file():
        lacking = sorted(read_index(Path(path) / INDEX)["weight_map"].keys() - held.keys())
        if lacking:
            raise CheckpointError(f"{path}: its files lack {len(lacking)} weights, the first is {lacking[0]}")


def tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a folder by name; empty for a hub id, and where there are no safetensors files."""
    return _merged(shards(path))


def stored_bytes(path: str | Path) -> int | None:
    """Bytes of the weights of a folder or hub repository, before they are fetched; None where unknown."""
    if Path(path).is_dir():
        return sum(file.stat().st_size for file in shards(path)) or None
    index = file_of(str(path), INDEX)
    if index is not None:
        metadata = read_index(Path(index)).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return int(total) if isinstance(total, int | float) else None
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
