"""Records of JSON files: an array, or one record per line, gzipped or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm.errors import DataError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a JSON array or of a JSON Lines file, gzipped or not.

    Raises:
        DataError: naming the line that is not JSON.
    """
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.name:
                yield from _read_lines(path, file)
                return
            records = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); one record per line needs the ending .jsonl"
        ) from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON array of rows, got {type(records).__name__}")
    yield from records


def _read_lines(path: Path, lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error})") from error
