"""Output folders: one process at a time in each, and whether they can be written to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dlm.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""The file in the folder; the system frees the lock of a process that is killed, and the file stays."""


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made first.

    Raises:
        ConfigError: when another process is at work in it, or it cannot be written to.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file, and a folder is wanted")
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is writing there; wait for its end, or choose another folder"
        ) from None
    except NotImplementedError:  # a file system without locks
        logger.warning("%s: its file system knows no locks; see that no other process writes there", folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error})") from error
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: str | Path) -> None:
    """Refuse an output folder that could not be made or written to, without making it.

    Raises:
        ConfigError: naming what stands in the way.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{folder}: cannot be written to ({place} is no folder)")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written to (no right to write in {place})")
