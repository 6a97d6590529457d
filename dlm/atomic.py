"""Files that are replaced at once: whoever reads one finds the old or the new, also after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path beside a file to be written in its place, in a folder that is made where it is missing.

    When the block ends, the new file takes the place of the old one. After an error the old one stays, and
    what was written beside it goes.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """An empty folder to be filled, made where it is missing; after an error, what was written goes again.

    A SIGTERM in the main thread is such an error.
    """
    folder = Path(folder)
    existing = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _terminated_by_exception():
            yield folder
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not existing:
            folder.rmdir()
        raise


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM raises `SystemExit` inside, where it would end the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def write_whole(file: str | Path, text: str, errors: str = "strict") -> None:
    """Write a file of UTF-8 text, see `replacing`; `errors` as `open` takes it."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", errors=errors)
