"""Frequency of tokens in the training answers: the prior that a model falls back on far from context.

The counts are stored beside the weights of every model that is trained, so that later stages and diagnoses
speak of the same frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from dlm.data.encoded import EncodedRows
from dlm.errors import CheckpointError
from dlm.modes import share
from dlm.pretrained.names import located

if TYPE_CHECKING:
    from datasets import Dataset

COUNTS_FILE = "token_counts.safetensors"


@dataclass(frozen=True)
class TokenPrior:
    """Token frequencies of a set of answers.

    Attributes:
        counts: [V] int64, how often each token occurs.
        special: ids of control tokens (end, mask, chat marks), which `top` leaves out.
    """

    counts: torch.Tensor
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Dataset | EncodedRows, vocab_size: int, special: tuple[int, ...] = ()) -> TokenPrior:
        """Count the answer tokens of encoded rows (`input_ids`, `prompt_length`)."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for answers in _answer_tokens(rows):
            counts += torch.from_numpy(np.bincount(answers, minlength=vocab_size))
        return cls(counts, special)

    def save(self, folder: str | Path) -> None:
        """Write the counts into a model folder."""
        special = torch.tensor(self.special, dtype=torch.int64)
        save_file({"counts": self.counts, "special": special}, Path(folder) / COUNTS_FILE)
        share(folder)

    @classmethod
    def load(cls, folder: str | Path) -> TokenPrior | None:
        """The counts of a model, by its name, folder or hub id; None when there are none.

        Raises:
            CheckpointError: when the file is damaged.
        """
        file = _file(located(folder))
        if file is None:
            return None
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error})") from error
        return cls(stored["counts"], tuple(stored["special"].tolist()))

    def top(self, n: int) -> torch.Tensor:
        """[≤ n] int64, the most frequent ordinary tokens that occur at all, the first of all first."""
        counts = self.counts.clone()
        counts[list(self.special)] = 0
        order = counts.argsort(descending=True, stable=True)[:n]
        return order[counts[order] > 0]

    def log_prior(self) -> torch.Tensor:
        """[V] float32 log relative frequency, one added to every count so that none is -inf."""
        smoothed = self.counts.double() + 1
        return (smoothed / smoothed.sum()).log().float()

    def median_log_prior(self) -> float:
        """Log prior of the median token of the answers: half of the tokens written are rarer."""
        log_prior = self.log_prior()
        order = log_prior.argsort()
        cumulative = self.counts[order].cumsum(0)
        return float(log_prior[order[int((cumulative * 2 < cumulative[-1]).sum())]])


def _answer_tokens(rows: Dataset | EncodedRows) -> Iterator[np.ndarray[Any, Any]]:
    """The tokens of answers, many rows at a time."""
    if isinstance(rows, EncodedRows):
        yield rows.answers()
        return
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        pairs = zip(batch["input_ids"], batch["prompt_length"], strict=True)
        yield np.concatenate([ids[n:] for ids, n in pairs])


def _file(folder: str | Path) -> Path | None:
    """The file of counts, fetched from the hub when `folder` is none."""
    if Path(folder).is_dir():
        file = Path(folder) / COUNTS_FILE
        return file if file.is_file() else None
    missing_is_fine = {
        f"_raise_exceptions_for_{reason}": False
        for reason in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        path = cached_file(str(folder), COUNTS_FILE, **missing_is_fine)
    except OSError:  # no such repository
        return None
    return Path(path) if path else None
