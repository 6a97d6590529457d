"""Prompts from files: lines of text, or JSON records of the usual kinds."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dlm.data.records import RECORD_SUFFIXES, decoded, read_records, read_text
from dlm.data.rows import asked_and_answer
from dlm.errors import DataError


def read_prompts(file: str) -> Iterator[Any]:
    """Prompts of a file (or of stdin when the name is empty or "-"), one at a time.

    Raises:
        DataError: naming the row that holds no prompt, or the file (or stdin) that holds none.
    """
    empty = True
    for prompt in _prompts(file):
        empty = False
        yield prompt
    if empty:
        raise DataError(f"{_name(file)}: holds no prompts")


def _prompts(file: str) -> Iterable[Any]:
    """Prompts of a file, or of stdin, however few."""
    if file in ("", "-"):
        return _filled_lines(stdin_lines())
    if file.endswith(RECORD_SUFFIXES):
        records = enumerate(read_records(Path(file)))
        return (asked_and_answer(record, f"{file}, row {i}")[0] for i, record in records)
    return _filled_lines(io.StringIO(read_text(Path(file)), newline=None))


def _name(file: str) -> str:
    """The name of a file in errors."""
    return "stdin" if file in ("", "-") else file


def read_whole(file: str) -> str:
    """The text of a file (of stdin when the name is "-") without white space at its end, as one prompt.

    Raises:
        DataError: for a file that cannot be read, or holds nothing.
    """
    text = ("".join(stdin_lines()) if file == "-" else read_text(Path(file))).rstrip()
    if not text:
        raise DataError(f"{_name(file)}: empty, so there is no prompt")
    return text


def stdin_lines() -> Iterator[str]:
    """Lines of stdin as UTF-8, whatever the terminal's encoding, without a byte order mark.

    Raises:
        DataError: for bytes that are no UTF-8.
    """
    lines: Iterable[bytes | str] = getattr(sys.stdin, "buffer", sys.stdin)
    for i, line in enumerate(lines, start=1):
        yield decoded(line, f"stdin, line {i}") if isinstance(line, bytes) else line


def _filled_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines that are not empty, without their ends."""
    return (line.rstrip("\r\n") for line in lines if line.strip())
