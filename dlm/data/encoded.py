"""Rows that are token ids already, in one small file, for machines that have neither the data nor `datasets`.

    dlm encode --source tatsu-lab/alpaca --model smollm2-135m-instruct --output rows.npz

`--data.source rows.npz` then takes the place of the data. The file holds no text; the tokenizer and the
window have to be those that it was made with, which is checked.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dlm.atomic import replacing
from dlm.errors import DataError
from dlm.tokenizer import encode_prompt

if TYPE_CHECKING:
    from datasets import Dataset

ENCODED_SUFFIX = ".npz"
"""Of files of encoded rows."""

_PROBE = "Say “naïve” 3 times:\n\n- so?  <|im_end|>"
"""Tokenizers that encode this alike, and have the same special tokens, are taken for the same."""


@dataclass(frozen=True)
class EncodedRows(TorchDataset[dict[str, Any]]):
    """Encoded rows in memory, the part of `datasets.Dataset` that a run needs.

    Attributes:
        ids: [N] uint16 or uint32, all rows end to end.
        ends: [n] int64, where each row ends in `ids`.
        lengths: [n] int64, tokens of each row.
        prompt_lengths: [n] int64, tokens before each answer.
        window: longest row, in tokens.
        probe: what the tokenizer makes of `_PROBE`, and its special tokens.
        vocabulary: a digest of its tokens; empty in older files.
    """

    ids: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    prompt_lengths: np.ndarray[Any, Any]
    window: int
    probe: tuple[int, ...]
    vocabulary: str = ""

    @classmethod
    def of(cls, rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int) -> EncodedRows:
        """Pack the rows of `encode_rows`; they need `input_ids` and `prompt_length`."""
        return cls.packed(rows["input_ids"], rows["prompt_length"], tokenizer, window)

    @classmethod
    def packed(
        cls,
        rows: Iterable[list[int]],
        prompt_lengths: Iterable[int],
        tokenizer: PreTrainedTokenizerBase,
        window: int,
    ) -> EncodedRows:
        """Rows of ids, end to end in the smallest type that holds them."""
        arrays = [np.asarray(row, np.int64) for row in rows]
        lengths = np.array([len(row) for row in arrays], np.int64)
        kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        ids = np.concatenate(arrays).astype(kind)
        starts = np.array(list(prompt_lengths), np.int64)
        return cls(ids, lengths.cumsum(), lengths, starts, window, _probe(tokenizer), _digest(tokenizer))

    def save(self, file: str | Path) -> None:
        """Write the rows, compressed."""
        facts_of_rows = {"window": self.window, "probe": self.probe, "vocabulary": self.vocabulary}
        facts = json.dumps(facts_of_rows).encode()
        with replacing(file) as part, part.open("wb") as stream:
            np.savez_compressed(
                stream, ids=self.ids, facts=np.frombuffer(facts, np.uint8),
                lengths=self.lengths.astype(np.uint32), prompt_lengths=self.prompt_lengths.astype(np.uint32),
            )  # fmt: skip

    @classmethod
    def load(cls, file: str | Path) -> EncodedRows:
        """Read the rows.

        Raises:
            DataError: for a file that is not one of these.
        """
        try:
            with np.load(file) as stored:
                facts = json.loads(stored["facts"].tobytes())
                lengths = stored["lengths"].astype(np.int64)
                starts = stored["prompt_lengths"].astype(np.int64)
                ids, probe = stored["ids"], tuple(facts["probe"])
                vocabulary = str(facts.get("vocabulary", ""))
                return cls(ids, lengths.cumsum(), lengths, starts, facts["window"], probe, vocabulary)
        except (
            OSError, EOFError, BadZipFile, zlib.error, ValueError, KeyError, TypeError, RecursionError
        ) as error:  # fmt: skip
            other = not isinstance(error, OSError) and not is_zipfile(file)  # NumPy would have it unpickled
            why = "no archive of NumPy" if other else error
            raise DataError(f"{file}: not a file of encoded rows ({why})") from error

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ends)

    def __getitem__(self, index: int | str) -> Any:
        """A row as the collator takes it, with its number; or the column `length` or `prompt_length`."""
        if isinstance(index, str):
            return {"length": self.lengths, "prompt_length": self.prompt_lengths}[index].tolist()
        end, length = int(self.ends[index]), int(self.lengths[index])
        ids = torch.from_numpy(self.ids[end - length : end].astype(np.int64))
        return {
            "input_ids": ids,
            "prompt_length": int(self.prompt_lengths[index]),
            "length": length,
            "row": index,
        }

    def select(self, indices: Iterable[int]) -> EncodedRows:
        """Some of the rows; they share the ids."""
        selection = np.array(list(indices), np.int64)
        return replace(
            self,
            ends=self.ends[selection],
            lengths=self.lengths[selection],
            prompt_lengths=self.prompt_lengths[selection],
        )

    def answers(self) -> np.ndarray[Any, Any]:
        """[A] the tokens of all answers."""
        spans = zip(self.ends.tolist(), self.lengths.tolist(), self.prompt_lengths.tolist(), strict=True)
        return np.concatenate([self.ids[end - length + start : end] for end, length, start in spans])

    def check(self, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        """Refuse another tokenizer or window than the rows were made with.

        Raises:
            DataError: saying what differs.
        """
        if window != self.window:
            raise DataError(f"these rows were encoded with a window of {self.window} tokens, not {window}")
        same_vocabulary = self.vocabulary in ("", _digest(tokenizer))
        if _probe(tokenizer) != self.probe or not same_vocabulary:
            raise DataError(
                "these rows were encoded with another tokenizer, or another template, than the model's"
            )

    def truncated(self, eos_id: int) -> int:
        """Number of answers cut at the window's end, which therefore have no end token."""
        full = (self.lengths == self.window) & (self.prompt_lengths > 0)  # plain text fills its windows
        return int((full & (self.ids[self.ends - 1] != eos_id)).sum())


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = encode_prompt(tokenizer, [{"role": "user", "content": _PROBE}])
    return (len(tokenizer), int(tokenizer.eos_token_id), int(tokenizer.mask_token_id), *ids)


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all tokens and their ids, which tokenizers that encode a probe alike may not share."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.blake2b(repr(vocabulary).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
