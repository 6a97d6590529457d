"""Reading: a hub id or a local file in, rows of (prompt messages, answer) out.

Three kinds of row are understood, whatever the file:

- an instruction and its answer under one of the pairs of names in `PAIRS`, and a text that belongs to the
  instruction under `input` or `context`;
- chat: `messages` (or `conversations`), the last turn being the assistant's; `prompt` and `completion` may
  hold messages too;
- text: `text`, no prompt, everything maskable (pretraining).

Chat rows of another shape (a last turn of the user's, tools, pictures), and rows whose instruction, answer or
text is null, are left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.characters import whole_characters
from dlm.data.records import RECORD_SUFFIXES, read_records
from dlm.errors import ConfigError, DataError, first_line

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset, Features

Record = dict[str, Any]


@cache
def features() -> Features:
    """Columns of rows: `prompt` (chat messages, none for plain text) and `answer` (what is learnt)."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    return Features({"prompt": List(message), "answer": Value("string")})


PAIRS = (
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Field names of an instruction and its answer; the first pair that a row has counts."""

SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    "system": "system",
    "developer": "system",
}
"""Roles by the names that data sets give them, in small letters."""


FOR_PREFERENCES = "good and bad answers are for dlm r2ft --rejected data --objective.name ddro or dpo"
"""Advice for rows that hold answers to be avoided."""


READING = 1
"""Raised with every change of what is read from a file, so that what is cached is read again."""


class OddRowError(DataError):
    """A row that does not end with an answer: a chat row of another shape, or a null in place of a text."""


@dataclass(frozen=True)
class Form:
    """One kind of rows.

    Attributes:
        parse: a record, its source and its number -> its columns; an `OddRowError` leaves the row out, any
            other `DataError` ends the reading.
        features: of the columns.
    """

    parse: Callable[[Any, str, int], Record]
    features: Callable[[], Features]

    def columns(self) -> Features:
        """Those, the row's number in its source, and what is odd about it if it is to be left out."""
        from datasets import Features, Value

        return Features({**self.features(), "row": Value("int64"), "odd": Value("string")})

    def checked(self, row: Any, source: str, index: int) -> Record:
        """The columns of a record; nulls where it is odd."""
        try:
            return {**self.parse(row, source, index), "row": index, "odd": ""}
        except OddRowError as error:
            return {**dict.fromkeys(self.features()), "row": index, "odd": str(error)}


def load_rows(source: str, split: str = "train", form: Form | None = None) -> Dataset:
    """Read and check every row of `source`; parsed files are cached by `datasets`.

    Args:
        source: hub id, or path of a .json, .jsonl, .json.gz, .jsonl.gz, .csv, .tsv or .parquet file.
        split: split of a hub data set.
        form: kind of the rows; instructions, chats and texts by default.

    Returns:
        A `datasets.Dataset` with the columns of the form (`features`), and `row`: the number in the source.

    Raises:
        ConfigError: for a split of a file.
        DataError: naming the file and the row that cannot be used, or that most rows are odd.
    """
    from datasets import load_dataset

    path, form = Path(source), form or Form(parse_row, features)
    if source.endswith(RECORD_SUFFIXES) or path.exists():
        if split != "train":
            raise ConfigError(f"split {split!r} is for data sets of the hub; {source} is a file")
        return _without_odd(_load_file(path, form), source)
    try:
        raw = load_dataset(source, split=split)
    except Exception as error:
        raise DataError(
            f"{source}: no such file, and not a data set that the hub could give "
            f"({type(error).__name__}: {error})"
        ) from error
    rows = raw.map(
        lambda row, i: form.checked(dict(row), f"{source}[{split}]", i),
        with_indices=True,
        remove_columns=raw.column_names,
        features=form.columns(),
        desc="Checking rows",
    )
    return _without_odd(rows, source)


def _without_odd(rows: Dataset, source: str) -> Dataset:
    """The rows that can be used; the others are counted, and one is shown."""
    odd = [reason for reason in rows["odd"] if reason]
    if not odd:
        return rows.remove_columns("odd")
    message = f"{len(odd)} of {len(rows)} rows cannot be used, the first: {odd[0]}"
    if len(odd) > len(rows) / 2:
        raise DataError(f"{source}: {message}")
    logger.warning("%s: %s; they are left out", source, message)
    regular = rows.filter(lambda some: [not reason for reason in some], batched=True, input_columns="odd")
    return regular.remove_columns("odd")


def _load_file(path: Path, form: Form) -> Dataset:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.name.endswith(RECORD_SUFFIXES):
        raise DataError(f"{path}: expected one of {', '.join(RECORD_SUFFIXES)}")
    from datasets import Dataset

    stat = path.stat()
    identity = {
        "path": str(path.resolve()), "size": stat.st_size, "modified": stat.st_mtime_ns,
        "version": READING, "form": form,
    }  # fmt: skip
    try:
        return Dataset.from_generator(_generate, features=form.columns(), gen_kwargs=identity)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        reason = first_line(cause if isinstance(cause, Exception) else error)
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _generate(path: str, size: int, modified: int, version: int, form: Form) -> Iterator[Record]:
    """Rows of a file; `size`, `modified` and `version` only serve as the cache's key."""
    del size, modified, version
    index = -1
    for index, row in enumerate(read_records(Path(path))):
        yield form.checked(row, path, index)
    if index < 0:
        raise DataError(f"{path}: holds no rows")


def parse_row(row: Any, source: str, index: int) -> Record:
    """One record as `{"prompt": messages, "answer": text}`.

    Raises:
        OddRowError: for a row that does not end with an answer.
        DataError: naming `source`, the row's index and what is wrong with it.
    """
    where = f"{source}, row {index}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    pair = _pair_of(row)
    for key in ("messages", "conversations"):
        if row.get(key) or (row.get(key) is not None and pair is None):
            return _parse_chat(row[key], where)
    if pair is not None:
        return _parse_pair(row, *pair, where)
    if "text" in row:
        return {"prompt": [], "answer": text_field(row, "text", where)}
    columns = ", ".join(sorted(map(str, row))) or "nothing"
    hint = f"; {FOR_PREFERENCES}" if "chosen" in row and "rejected" in row else ""
    raise DataError(
        f"{where}: needs 'instruction' and 'output', or 'prompt' and 'completion', or 'messages', or 'text'; "
        f"it has {columns}{hint}"
    )


def _pair_of(row: Record) -> tuple[str, str] | None:
    """The first of `PAIRS` that a record has, one with an empty question only where there is no other."""
    present = [pair for pair in PAIRS if pair[0] in row and pair[1] in row]
    return next((pair for pair in present if row[pair[0]]), present[0] if present else None)


def _parse_pair(row: Record, question_key: str, answer_key: str, where: str) -> Record:
    """A row with an instruction and its answer; both may be lists of messages."""
    if answer_key == "completion" and label_of(row.get("label")) is False:
        label = row["label"]
        raise DataError(
            f"{where}: 'label' is {label!r}, so its completion is a bad answer; {FOR_PREFERENCES}"
        )
    question, answer = row[question_key], row[answer_key]
    if isinstance(question, list) and (
        isinstance(answer, list) or all(isinstance(x, dict) for x in question)
    ):
        return _parse_chat([*question, *_turns(answer)], where)
    content = instruction_text(row, question_key, where)
    return {"prompt": [{"role": "user", "content": content}], "answer": text_field(row, answer_key, where)}


def label_of(value: Any) -> bool | None:
    """True for a label of a good answer, False for one of a bad answer; None for what is no such label."""
    name = value.lower() if isinstance(value, str) else value
    return _LABELS.get(name) if isinstance(name, bool | int | str) else None


_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
"""Labels by what files make of them: JSON a boolean or 1 and 0, CSV a text."""


def _turns(answer: Any) -> list[Any]:
    """The turns of an answer: those that it is, or the assistant's one with this content."""
    return answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]


def instruction_text(row: Record, key: str, where: str) -> str:
    """The instruction of a row with its input, if that holds more than spaces: what a user says.

    Args:
        row: a record.
        key: name of the instruction.
        where: file and row, for errors.

    Raises:
        DataError: for an instruction or an input that is no text.
    """
    content = text_field(row, key, where)
    for name in ("input", "context"):
        extra = text_field(row, name, where) if row.get(name) is not None else ""
        if extra.strip():
            return f"{content}\n\n{extra}"
    return content


def text_field(row: Record, key: str, where: str) -> str:
    """The text of a field, its broken surrogates replaced.

    Raises:
        OddRowError: for a null.
        DataError: for anything else that is no text.
    """
    value = row[key]
    if value is None:
        raise OddRowError(f"{where}: '{key}' is null")
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be text, got {type(value).__name__} {value!r:.80}")
    return whole_characters(value)


def dialogue(turns: Any, where: str) -> list[dict[str, str]]:
    """The turns of a conversation as chat messages, whatever its speakers are called.

    Raises:
        OddRowError: for what is no list of turns with a role and a text.
    """
    if not isinstance(turns, list) or not turns:
        raise OddRowError(f"{where}: 'messages' must be a list of turns, got {turns!r:.80}")
    return [_parse_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns)]


def _parse_chat(turns: Any, where: str) -> Record:
    messages = dialogue(turns, where)
    if messages[-1]["role"] != "assistant":
        raise OddRowError(f"{where}: the last turn must be the assistant's, got {messages[-1]['role']!r}")
    if len(messages) == 1:
        raise OddRowError(f"{where}: only the assistant speaks, so that there is nothing to answer")
    return {"prompt": messages[:-1], "answer": messages[-1]["content"]}


def question_and_answer(turns: Any, where: str) -> tuple[list[dict[str, str]], str]:
    """The turns of a conversation up to the last one of a user, and the assistant's answer to it, or "".

    Raises:
        DataError: for what is no conversation, and one in which only the assistant speaks.
    """
    messages = dialogue(turns, where)
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: a conversation must end with a user's turn, or with the answer to one")
    return messages, answer


ASKING = ("instruction", "prompt", "question", "text")
"""Fields that hold what is asked, where a record is no conversation."""


def asked_and_answer(record: Any, where: str) -> tuple[str | list[dict[str, str]], str]:
    """The prompt of a record, a text or chat messages, and the answer to it, "" where it holds none.

    A text is a prompt by itself; else a conversation counts, before one of `ASKING` with the answer that
    `PAIRS` names.

    Raises:
        DataError: for a record that asks nothing, saying what it needs.
    """
    if isinstance(record, str):
        return whole_characters(record), ""
    row = record if isinstance(record, dict) else {}
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list) and row[key]:
            return question_and_answer(row[key], where)
    pair = _pair_of(row)
    first = [pair[0]] if pair is not None and row[pair[0]] else []
    for key in (*first, *ASKING):  # what is trained on, before what may stand beside it
        answer = row.get(pair[1]) if pair is not None and pair[0] == key else None
        if isinstance(row.get(key), list) and row[key]:
            return question_and_answer([*row[key], *(_turns(answer) if answer else ())], where)
        if isinstance(row.get(key), str) and row[key]:
            answer = answer if isinstance(answer, str) else ""
            return instruction_text(row, key, where), whole_characters(answer)
    for key in ASKING:
        if row.get(key):
            raise DataError(f"{where}: {key!r} must be a text, got {str(row[key])[:60]}")
    raise DataError(f"{where}: needs 'instruction', 'prompt', 'text' or 'messages'")


def _parse_turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise OddRowError(f"{where} must be an object, got {turn!r:.80}")
    name = turn.get("role") or turn.get("from")
    role = SPEAKERS.get(str(name).lower())
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        content = "".join(texts) if len(texts) == len(content) and all(map(_is_text, texts)) else None
    if role is None or not _is_text(content):
        raise OddRowError(
            f"{where} needs a role (system, user, assistant) and a text content, got {name!r} and "
            f"{type(content).__name__}"
        )
    return {"role": role, "content": whole_characters(str(content))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
