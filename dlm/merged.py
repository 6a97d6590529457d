"""Merged copies of the adapters that come with the package, in the user's cache.

Loading such an adapter means reading its base, building one or two adapters on it and merging them. The
merged weights are kept in the type in which they were asked for, and load in a tenth of the time. They are
the same to the bit. A copy counts only while its base, its adapters and the libraries that merge are those
that it was made of, and while its files are whole (`dlm.pretrained.store`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlm.model_names import ADAPTERS
from dlm.pretrained.names import base_path, located
from dlm.pretrained.store import (
    cache,
    digest,
    is_stored,
    manifest,
    put_in_place,
    scratch_folder,
    write_manifest,
)

logger = logging.getLogger(__name__)

MERGED_FORMAT = 1
"""Counts changes of how adapters are merged or copies are written."""


def is_cached(path: str) -> bool:
    """True for an adapter whose merged weights are kept: one that comes with the package."""
    return path in map(located, ADAPTERS)


def find(path: str, dtype: str) -> Path | None:
    """Folder of the merged copy of an adapter, if there is one, whole and not stale.

    Args:
        path: folder of the adapter.
        dtype: type of the weights, by name.
    """
    folder = _place(path, dtype)
    return folder if manifest(folder).get("key") == _key(path) and is_stored(folder) else None


def keep(path: str, dtype: str, save: Callable[[Path], Any]) -> None:
    """Keep merged weights, which `save` writes into a folder; without a word if they cannot be kept now."""
    folder = _place(path, dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=0), scratch_folder(folder) as scratch:
            draft = scratch / folder.name
            save(draft)
            write_manifest(draft, {"key": _key(path)})
            put_in_place(draft, folder)
    except (OSError, Timeout, NotImplementedError) as error:
        logger.debug("%s: merged weights are not kept there (%s)", folder, error)


def _place(path: str, dtype: str) -> Path:
    return cache() / f"merged-{Path(path).name}-{dtype}"


def _key(path: str) -> str:
    """Digest of all that the merged weights depend on."""
    facts: list[Any] = [MERGED_FORMAT, version("torch"), version("peft")]
    while is_cached(path):
        facts += [{file.name: digest(file) for file in sorted(Path(path).iterdir()) if file.is_file()}]
        path = base_path(path)
    folder = Path(path)
    fetched = manifest(folder).get("digests")
    stats = {file.name: file.stat() for file in sorted(folder.iterdir())} if folder.is_dir() else {}
    facts += [fetched or {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
