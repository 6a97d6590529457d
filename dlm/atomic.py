"""Files that are replaced at once: whoever reads one finds the old or the new, also after a kill."""

from __future__ import annotations

import os
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


def write_whole(file: str | Path, text: str, errors: str = "strict") -> None:
    """Write a file of UTF-8 text, see `replacing`; `errors` as `open` takes it."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", errors=errors)
