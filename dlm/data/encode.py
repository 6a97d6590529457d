"""Encoding: rows of text to token ids with an exact boundary between prompt and answer."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from dlm.data.encoded import EncodedRows
from dlm.errors import ConfigError, DataError
from dlm.tokenizer import encode_prompt, encode_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_VERSION = 3
"""Raised when rows are encoded differently, so that old caches are not taken."""

REFUSED = "row "
"""Begins the fate of a row that the chat template refuses; its number and the reason follow."""

_PIECE = 200_000
"""Characters of plain text that are tokenised at a time."""

_SPACE = re.compile(r"(?<=\S) (?=\S)")
"""A single space between two words."""


@dataclass(frozen=True)
class EncodingReport:
    """Counts of rows used and dropped; written to the run folder and printed."""

    read: int
    kept: int
    dropped_empty: int
    """Rows whose answer is empty."""
    dropped_long_prompt: int
    """Rows whose prompt fills the window, so that nothing is left to learn."""
    truncated: int
    """Rows whose answer was cut at the window's end (they carry no EOS)."""
    dropped_refused: int = 0
    """Rows whose conversation the chat template refuses."""

    def __str__(self) -> str:
        return (
            f"{self.read} rows read, {self.kept} kept, {self.dropped_empty} dropped (empty answer), "
            f"{self.dropped_long_prompt} dropped (prompt longer than the window), {self.truncated} truncated"
            + (f", {self.dropped_refused} dropped (refused by the template)" if self.dropped_refused else "")
        )

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


def encode_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int
) -> tuple[Dataset, EncodingReport]:
    """Tokenise rows; cached by `datasets` under the rows, the tokenizer and the window.

    An instruction row becomes prompt + answer + EOS, cut at `window`. A text row (empty prompt) becomes as
    many windows as it fills, so that nothing of it is lost. `EncodedRows` are checked and given back.

    Returns:
        A data set with `input_ids` (list of int), `prompt_length` and `length` (int, tokens), and the counts.

    Raises:
        DataError: when no row is left, or the chat template refuses most of them.
    """
    if isinstance(rows, EncodedRows):
        rows.check(tokenizer, window)
        return rows, EncodingReport(len(rows), len(rows), 0, 0, rows.truncated(int(tokenizer.eos_token_id)))
    return encode_with(_encode_batch, rows, tokenizer, window)


def encode_with(
    encode: Callable[..., dict[str, list[Any]]],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
) -> tuple[Dataset, EncodingReport]:
    """Tokenise rows batch by batch; cached by `datasets` under the rows, the tokenizer, window and function.

    Args:
        encode: (batch, indices, tokenizer, window) -> columns, among them `fate`: "whole" or "truncated" of a
            row that is kept, "empty", "long_prompt", or `REFUSED` and the reason.
        rows: what it is given.
        tokenizer: of the model.
        window: longest row, in tokens.

    Returns:
        The other columns of the rows that are kept, and the counts; errors as of `encode_rows`.
    """
    key = _fingerprint(rows, tokenizer, window, f"{encode.__module__}.{encode.__name__}")
    encoded = rows.map(
        encode,
        batched=True,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "window": window},
        remove_columns=rows.column_names,
        new_fingerprint=key,
        desc="Tokenising",
    )
    fates = encoded["fate"]
    count = {name: sum(fate == name for fate in fates) for name in ("empty", "long_prompt", "truncated")}
    refused = [fate for fate in fates if fate.startswith(REFUSED)]
    _report_refused(refused, len(rows))
    usable = encoded.filter(
        lambda fate: [f in ("whole", "truncated") for f in fate],
        batched=True,
        input_columns="fate",
        new_fingerprint=f"{key}-kept",
        desc="Dropping rows",
    )
    if len(usable) == 0:
        raise DataError(f"none of the {len(rows)} rows can be used with a window of {window} tokens")
    dropped = count["empty"], count["long_prompt"], count["truncated"], len(refused)
    report = EncodingReport(len(rows), len(usable), *dropped)
    return usable.remove_columns("fate"), report


def _fingerprint(rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int, function: str) -> str:
    """Name of encoded rows in the cache."""
    parts = [
        _VERSION,
        rows._fingerprint,
        window,
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        sorted(tokenizer.all_special_tokens),
        tokenizer.backend_tokenizer.to_str(),
        function,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _report_refused(refused: list[str], total: int) -> None:
    """Say how many rows the template refuses, and show one.

    Raises:
        DataError: when they are most of the rows.
    """
    if not refused:
        return
    message = f"{len(refused)} of {total} rows cannot be rendered, the first: {refused[0]}"
    if len(refused) > total / 2:
        raise DataError(f"{message}; dlm train --model.template chooses another template")
    logger.warning("%s; they are left out", message)


def _encode_batch(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, window: int
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"input_ids": [], "prompt_length": [], "length": [], "fate": []}
    limit = fill_length(tokenizer, window)
    numbers = batch.get("row", indices)
    for number, prompt, answer in zip(numbers, batch["prompt"], batch["answer"], strict=True):
        try:
            encoded = encode_row(prompt, answer, tokenizer, window, limit)
        except ConfigError as error:
            encoded = [([], 0, f"{REFUSED}{number}: {error}")]
        for ids, boundary, fate in encoded:
            out["input_ids"].append(ids)
            out["prompt_length"].append(boundary)
            out["length"].append(len(ids))
            out["fate"].append(fate)
    return out


def fill_length(tokenizer: PreTrainedTokenizerBase, window: int) -> int:
    """The number of characters that fill a window in any case."""
    return window * 2 * max(map(len, tokenizer.get_vocab()))


def encode_row(
    prompt: list[dict[str, str]], answer: str, tokenizer: PreTrainedTokenizerBase, window: int, limit: int
) -> list[tuple[list[int], int, str]]:
    """(ids, prompt length, fate) of each window that a row gives; one, unless it is long plain text.

    Of a prompt, or an answer to one, what lies behind `limit` characters is not tokenised: it has no place.
    """
    if not answer.strip():
        return [([], 0, "empty")]
    if sum(len(turn["content"]) for turn in prompt) > limit:
        return [([], 0, "long_prompt")]
    prompt_ids = encode_prompt(tokenizer, prompt) if prompt else []
    if len(prompt_ids) >= window:
        return [([], 0, "long_prompt")]
    inside = encode_text(tokenizer, answer[:limit]) if prompt else _encode_long(tokenizer, answer)
    ids = [*prompt_ids, *inside, tokenizer.eos_token_id]
    if prompt:
        return [(ids[:window], len(prompt_ids), "truncated" if len(ids) > window else "whole")]
    return [(ids[start : start + window], 0, "whole") for start in range(0, len(ids), window)]


def _encode_long(tokenizer: PreTrainedTokenizerBase, text: str, size: int = _PIECE) -> list[int]:
    """Token ids of a text of any length, in pieces, so that memory does not grow with it.

    Pieces end before a space between two words where the tokens around it are the same with and without the
    cut; only a word without end is cut anywhere.
    """
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = _cut_place(tokenizer, text, start, start + size) if len(text) - start > size else len(text)
        ids += encode_text(tokenizer, text[start:end])
        start = end
    return ids


def _cut_place(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    """The last good place for a cut before `end`; `end` if there is none in what stands before it."""
    for match in itertools.islice(_SPACE.finditer(text[start:end][::-1]), 50):
        place = end - match.end()
        left, right = text[max(start, place - 100) : place], text[place : place + 100]
        if place > start and encode_text(tokenizer, left + right) == [
            *encode_text(tokenizer, left),
            *encode_text(tokenizer, right),
        ]:
            return place
    return end
