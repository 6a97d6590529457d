"""Prompts from files: lines of text, or JSON records of the usual kinds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dlm.data.records import SUFFIXES, read_records
from dlm.errors import DataError


def read_prompts(file: str) -> Iterator[Any]:
    """Prompts of a file (or of stdin when the name is empty or "-"), one at a time.

    Raises:
        DataError: naming the row that holds no prompt.
    """
    if file in ("", "-"):
        yield from _lines(sys.stdin)
        return
    path = Path(file)
    if file.endswith(SUFFIXES):
        for index, record in enumerate(read_records(path)):
            yield _prompt(record, f"{file}, row {index}")
        return
    with path.open(encoding="utf-8") as lines:
        yield from _lines(lines)


def _lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines that are not empty, without their ends."""
    return (line.rstrip("\n") for line in lines if line.strip())


def _prompt(record: Any, where: str) -> Any:
    """The prompt in a JSON record: a text, or chat messages."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        if isinstance(record.get("instruction"), str) and record.get("input"):
            return f"{record['instruction']}\n\n{record['input']}"
        for key in ("messages", "instruction", "prompt", "text"):
            if record.get(key):
                return record[key]
    raise DataError(f"{where}: needs 'instruction', 'prompt', 'text' or 'messages'")
