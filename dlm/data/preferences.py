"""Good and bad answers: records in, batches with both out.

Two kinds of file are understood, those of trl:

- pairs (DPO): `prompt`, `chosen`, `rejected`;
- single answers (KTO): `prompt`, `completion`, `label`, true for a good answer.

Prompts and answers are texts or lists of chat messages. Where `chosen` and `rejected` are conversations of
several turns, the prompt is what they begin with, and a field `prompt` is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from dlm.data.encode import REFUSED, EncodingReport, encode_row, encode_with, fill_length
from dlm.data.rows import (
    Form,
    OddRowError,
    Record,
    dialogue,
    instruction_text,
    label_of,
    load_rows,
    text_field,
)
from dlm.data.windows import TensorBatch, WindowCollator
from dlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

Messages = list[dict[str, str]]


@cache
def preference_features() -> Features:
    """Columns: `prompt`; `answer`; `rejected`, null if unpaired; `good`, whether `answer` is."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    texts = {"answer": Value("string"), "rejected": Value("string")}
    return Features({"prompt": List(message), **texts, "good": Value("bool")})


def load_preferences(source: str, split: str = "train") -> Dataset:
    """Read and check every row of a file, or data set of the hub, of good and bad answers.

    Args:
        source: as for `load_rows`.
        split: split of a hub data set.

    Returns:
        A `datasets.Dataset` with the columns of `preference_features`, and `row`: the number in the source.

    Raises:
        DataError: as `load_rows`, and when pairs and single answers are mixed.
    """
    rows = load_rows(source, split, Form(parse_preference, preference_features))
    single = [rejected is None for rejected in rows["rejected"]]
    if any(single) and not all(single):
        row = rows["row"][single.index(not single[0])]
        kinds = "a single answer with a label", "a pair of chosen and rejected"
        raise DataError(
            f"{source}, row {row}: {kinds[single[0]]}, where the first row is {kinds[not single[0]]}; "
            "put them into files of their own"
        )
    return rows


def are_pairs(rows: Dataset) -> bool:
    """True when rows of `load_preferences` have two answers each."""
    return rows[0]["rejected"] is not None


def parse_preference(row: Any, source: str, index: int) -> Record:
    """One record in the columns of `preference_features`.

    Raises:
        OddRowError: for nulls, and conversations that do not end with an answer.
        DataError: naming `source`, the row's index and what is wrong with it.
    """
    where = f"{source}, row {index}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    if "chosen" in row and "rejected" in row:
        prompt, answer = _answered_turns(row, "chosen", where)
        rejected_prompt, rejected = _answered_turns(row, "rejected", where)
        if prompt != rejected_prompt:
            raise DataError(f"{where}: 'chosen' and 'rejected' answer different conversations")
        return {"prompt": prompt, "answer": answer, "rejected": rejected, "good": True}
    if "completion" in row and "label" in row:
        prompt, answer = _answered_turns(row, "completion", where)
        return {"prompt": prompt, "answer": answer, "rejected": None, "good": _label(row["label"], where)}
    columns = ", ".join(sorted(map(str, row))) or "nothing"
    raise DataError(
        f"{where}: needs 'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and 'label'; "
        f"it has {columns}"
    )


def _answered_turns(row: Record, key: str, where: str) -> tuple[Messages, str]:
    """The prompt of an answer and its text."""
    if row[key] is None:
        raise OddRowError(f"{where}: '{key}' is null")
    if not isinstance(row[key], list):
        return _prompt(row, key, where), text_field(row, key, where)
    turns = dialogue(row[key], f"{where}: '{key}'")
    if turns[-1]["role"] != "assistant":
        raise OddRowError(f"{where}: the last turn of '{key}' must be the assistant's")
    opening = turns[:-1]
    if turns[0]["role"] == "assistant":  # the turns go on where the prompt ends
        opening = _prompt(row, key, where) + opening
    return opening, turns[-1]["content"]


def _prompt(row: Record, key: str, where: str) -> Messages:
    """The messages of the field `prompt`."""
    if "prompt" not in row:
        raise DataError(f"{where}: '{key}' is an answer alone and needs a 'prompt'")
    if isinstance(row["prompt"], list):
        return dialogue(row["prompt"], f"{where}: 'prompt'")
    return [{"role": "user", "content": instruction_text(row, "prompt", where)}]


def _label(value: Any, where: str) -> bool:
    if value is None:
        raise OddRowError(f"{where}: 'label' is null")
    good = label_of(value)
    if good is None:
        raise DataError(f"{where}: 'label' must be true (a good answer) or false, got {value!r:.80}")
    return good


# ---- encoding ----------------------------------------------------------------------------------------


def encode_preferences(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int
) -> tuple[Dataset, EncodingReport]:
    """Tokenise rows of `load_preferences`; cached as by `encode_rows`, and with its errors.

    A row is kept if all its answers can be used.

    Returns:
        A data set with `input_ids`, `prompt_length` and `length`, as of `encode_rows` (`length` is that of
        the longer answer); of pairs also `rejected_ids`, of single answers `good`; and the counts.
    """
    encoded, report = encode_with(_encode_pairs, rows, tokenizer, window)
    return encoded.remove_columns("good" if are_pairs(rows) else "rejected_ids"), report


def _encode_pairs(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, window: int
) -> dict[str, list[Any]]:
    names = ("input_ids", "prompt_length", "length", "rejected_ids", "good", "fate")
    out: dict[str, list[Any]] = {name: [] for name in names}
    limit = fill_length(tokenizer, window)
    for i, number in enumerate(batch.get("row", indices)):
        texts = [text for text in (batch["answer"][i], batch["rejected"][i]) if text is not None]
        try:
            answers = [encode_row(batch["prompt"][i], t, tokenizer, window, limit)[0] for t in texts]
        except ConfigError as error:
            answers = [([], 0, f"{REFUSED}{number}: {error}")]
        fates = [fate for _, _, fate in answers if fate != "whole"]
        ids, boundary, _ = answers[0]
        longest = max(len(tokens) for tokens, _, _ in answers)
        fate = next((fate for fate in fates if fate != "truncated"), "truncated" if fates else "whole")
        for name, value in zip(
            names, (ids, boundary, longest, answers[-1][0], batch["good"][i], fate), strict=True
        ):
            out[name].append(value)
    return out


# ---- batches -----------------------------------------------------------------------------------------


@dataclass
class PreferenceCollator(WindowCollator):
    """Batches of good and bad answers.

    Attributes:
        paired: whether rows have two answers (`rejected_ids`), or one and its label (`good`).
    """

    paired: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> TensorBatch:
        """Collate.

        Args:
            rows: of `encode_preferences`, and `row`.

        Returns:
            As `WindowCollator`, of the good answer of a pair; `good` and `bad` [B] bool, whether the row has
            such an answer; of pairs, `rejected_*` of all `ANSWER`, in windows of the same width.
        """
        batch = super().__call__(rows)
        if not self.paired:
            good = torch.tensor([bool(row["good"]) for row in rows])
            return {**batch, "good": good, "bad": ~good}
        rejected_batch = super().__call__([{**row, "input_ids": row["rejected_ids"]} for row in rows])
        width = max(batch["input_ids"].shape[1], rejected_batch["input_ids"].shape[1])
        all_rows = torch.ones(len(rows), dtype=torch.bool)
        widened = {name: self._padded(batch, name, width) for name in ANSWER}
        rejected = {f"rejected_{name}": self._padded(rejected_batch, name, width) for name in ANSWER}
        return {**batch, **widened, **rejected, "good": all_rows, "bad": all_rows}

    def _padded(self, batch: TensorBatch, name: str, width: int) -> torch.Tensor:
        """[B, width] with padding that nobody attends to."""
        fill = self.eos_token_id if name == "input_ids" else False
        return F.pad(batch[name], (0, width - batch[name].shape[1]), value=fill)


ANSWER = ("input_ids", "attention_mask", "maskable", "loss_mask")
"""Tensors of a batch that belong to one answer."""


def joined(batch: TensorBatch) -> TensorBatch:
    """Both answers of B rows as 2B rows, the good ones first; what belongs to the row comes twice."""
    shared = (name for name in batch if name not in ANSWER and not name.startswith("rejected_"))
    answers = {name: torch.cat([batch[name], batch[f"rejected_{name}"]]) for name in ANSWER}
    return answers | {name: torch.cat([batch[name], batch[name]]) for name in shared}
