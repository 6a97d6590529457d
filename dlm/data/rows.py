"""Reading: a hub id or a local file in, rows of (prompt messages, answer) out.

Three kinds of row are understood, whatever the file:

- Alpaca: `instruction`, optional `input`, `output`;
- chat: `messages` (or `conversations`), the last turn being the assistant's;
- text: `text`, no prompt, everything maskable (pretraining).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.data.records import SUFFIXES, read_records
from dlm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]


@cache
def features() -> Features:
    """Columns of rows: `prompt` (chat messages, none for plain text) and `answer` (what is learnt)."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    return Features({"prompt": List(message), "answer": Value("string")})


def load_rows(source: str, split: str = "train") -> Dataset:
    """Read and check every row of `source`; parsed files are cached by `datasets`.

    Args:
        source: hub id, or path of a .json, .jsonl, .json.gz or .jsonl.gz file.
        split: split of a hub data set.

    Returns:
        A `datasets.Dataset` with the columns of `features`.

    Raises:
        DataError: naming the file and the row that cannot be used.
    """
    from datasets import load_dataset

    path = Path(source)
    if source.endswith(SUFFIXES) or path.exists():
        return _load_file(path)
    try:
        raw = load_dataset(source, split=split)
    except Exception as error:
        raise DataError(
            f"{source}: no such file, and not a data set that the hub could give "
            f"({type(error).__name__}: {error})"
        ) from error
    return raw.map(
        lambda row, i: parse_row(dict(row), f"{source}[{split}]", i),
        with_indices=True,
        remove_columns=raw.column_names,
        features=features(),
        desc="Checking rows",
    )


def _load_file(path: Path) -> Dataset:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: expected one of {', '.join(SUFFIXES)}")
    from datasets import Dataset

    stat = path.stat()
    identity = {"path": str(path.resolve()), "size": stat.st_size, "modified": stat.st_mtime_ns}
    try:
        return Dataset.from_generator(_generate, features=features(), gen_kwargs=identity)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        raise


def _generate(path: str, size: int, modified: int) -> Iterator[Row]:
    """Rows of a file; `size` and `modified` only serve as the cache's key."""
    del size, modified
    for index, row in enumerate(read_records(Path(path))):
        yield parse_row(row, path, index)


def parse_row(row: Any, source: str, index: int) -> Row:
    """One record as `{"prompt": messages, "answer": text}`.

    Raises:
        DataError: naming `source`, the row's index and what is wrong with it.
    """
    where = f"{source}, row {index}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _parse_chat(row[key], where)
    if "instruction" in row and "output" in row:
        instruction, output = _text(row, "instruction", where), _text(row, "output", where)
        extra = _text(row, "input", where) if row.get("input") is not None else ""
        content = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return {"prompt": [{"role": "user", "content": content}], "answer": output}
    if "text" in row:
        return {"prompt": [], "answer": _text(row, "text", where)}
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise DataError(f"{where}: needs 'instruction' and 'output', or 'messages', or 'text'; it has {found}")


def _text(row: Row, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be text, got {type(value).__name__} {value!r}")
    return value


def _parse_chat(turns: Any, where: str) -> Row:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'messages' must be a list of turns, got {turns!r}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: turn {number} must be an object, got {turn!r}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(
                f"{where}: turn {number} needs a role (system, user, assistant) and a text content"
            )
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's, got {messages[-1]['role']!r}")
    return {"prompt": messages[:-1], "answer": messages[-1]["content"]}
