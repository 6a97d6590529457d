"""Folders in the user's cache: made at once or not at all, whole or made anew, by one process at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlm.atomic import write_whole

logger = logging.getLogger(__name__)

MANIFEST = "fetched.json"
"""In a folder: where it came from; size, digest and time of all files; written last."""

_SCRATCH = ".dlm-fetch-"
"""Prefix of the names of half-made folders."""


def cache() -> Path:
    """Folder of what is kept: $DLM_CACHE, or `dlm` in the cache folder of the user's system."""
    if named := os.environ.get("DLM_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path

    return Path(user_cache_path("dlm"))


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none that can be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def is_stored(folder: Path) -> bool:
    """True for a folder that holds everything its manifest lists, as it was when it was made.

    A file's digest is looked at when its time is another one than at the last look.
    """
    facts = manifest(folder)
    try:
        stats = {name: (folder / name).stat() for name in facts["files"]}
        if any(stats[name].st_size != size for name, size in facts["files"].items()):
            return False
        times, digests = facts.get("times", {}), facts.get("digests", {})  # older manifests have neither
        changed = [name for name in digests if stats[name].st_mtime_ns != times.get(name)]
        if any(digest(folder / name) != digests[name] for name in changed):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest, or none of ours
        return False
    if changed:
        facts["times"] = {name: stats[name].st_mtime_ns for name in digests}
        with suppress(OSError):  # of a cache that cannot be written: then it is looked at again
            _write(folder, facts)
    return True


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is complete: `facts`, and what tells each of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = {
        "files": {path.name: path.stat().st_size for path in files},
        "times": {path.name: path.stat().st_mtime_ns for path in files},
        "digests": {path.name: digest(path) for path in files},
    }
    _write(folder, {**facts, **listing})


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty place beside `folder`, gone at the end; first, what killed processes left there goes."""
    prefix = f"{_SCRATCH}{folder.name}-"
    for scrap in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(scrap, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        yield Path(scratch)


def put_in_place(draft: Path, folder: Path) -> None:
    """Move a complete folder out of its scratch folder to its place, in which another may stand."""
    if folder.exists():
        folder.rename(draft.parent / "replaced")  # not before there is something to put in its place
    draft.rename(folder)


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Replace the manifest at once."""
    write_whole(folder / MANIFEST, json.dumps(facts, indent=1))


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes out; the system frees the lock of one that is killed.

    Args:
        folder: the folder that is made.
        doing: what is done there, for whoever has to wait: "fetching x".
    """
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is %s; waiting for it", doing)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
