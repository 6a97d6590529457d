"""Big files as pieces with checksums, for ways that only small ones can go."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

SIZE = 15 * 2**20
"""Bytes of a piece, unless another size is given."""

SUMS = "pieces.json"
"""Beside the pieces: for each whole its SHA-256 and the number of its pieces."""


def cut(data: bytes, folder: Path, name: str, size: int = SIZE) -> list[Path]:
    """Write `name.00`, `name.01` …, and the digest of the whole into `SUMS`."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for i, start in enumerate(range(0, len(data), size)):
        pieces.append(folder / f"{name}.{i:02d}")
        pieces[-1].write_bytes(data[start : start + size])
    file = folder / SUMS
    sums = json.loads(file.read_text()) if file.exists() else {}
    sums[name] = {"sha256": hashlib.sha256(data).hexdigest(), "pieces": len(pieces)}
    file.write_text(json.dumps(sums, indent=1))
    return pieces


def joined(folder: Path, name: str) -> bytes:
    """The whole of what `cut` wrote.

    Raises:
        ValueError: when a piece is missing or damaged.
    """
    sums = json.loads((folder / SUMS).read_text())
    if name not in sums:
        raise ValueError(f"{folder / SUMS} knows no {name}, only {', '.join(sums)}")
    pieces = [folder / f"{name}.{i:02d}" for i in range(sums[name]["pieces"])]
    lacking = [piece.name for piece in pieces if not piece.is_file()]
    if lacking:
        raise ValueError(f"{folder}: {', '.join(lacking)} not there")
    data = b"".join(piece.read_bytes() for piece in pieces)
    if hashlib.sha256(data).hexdigest() != sums[name]["sha256"]:
        raise ValueError(f"{folder}: the pieces of {name} do not add up to what was cut")
    return data


def packed(paths: Iterable[Path], root: Path, compress: bool = True) -> bytes:
    """A tar archive of files, by their names under `root`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as archive:
        for path in sorted(paths):
            archive.add(path, str(path.relative_to(root)))
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Write the files of such an archive."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")


def main() -> None:
    """Join the pieces of an archive and unpack it."""
    parser = argparse.ArgumentParser(description="join the pieces of an archive and unpack it")
    parser.add_argument("folder", type=Path, help="where the pieces are")
    parser.add_argument("name", help="of the archive, such as sft.tar.gz")
    parser.add_argument("--output", type=Path, required=True, help="where its files go; made if need be")
    options = parser.parse_args()
    unpack(joined(options.folder, options.name), options.output)


if __name__ == "__main__":
    main()
