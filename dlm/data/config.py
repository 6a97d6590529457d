"""The settings of the data side; importable without torch, so that `dlm train --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlm.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Settings of the data: the source of the rows, and the windows made of them.

    Args:
        source: hub id (tatsu-lab/alpaca), a file (.json, .jsonl, also .gz; .csv, .tsv, .parquet) of
            instruction rows (instruction, input, output; prompt, completion; question, answer; …), chat rows
            (messages) or plain rows (text), or "rules" for the built-in tasks.
        split: split of a hub data set.
        limit: use only the first so many rows; 0 for all.
        validation_rows: rows held out from the end for validation.
        window: length L of a training window in tokens, prompt included.
        windows: "fixed" fills every row with EOS up to the window (the paper); "grouped" batches rows of
            similar length, each with a random EOS tail (much cheaper).
        eos_tail: longest random EOS tail of a grouped row, in tokens.
        cut_share: share of instruction rows whose window ends somewhere inside the answer, as it does on a
            canvas that grows.
        eos_loss: "first" puts the loss on the answer and its first EOS, "all" also on the EOS padding.
    """

    source: str = "tatsu-lab/alpaca"
    split: str = "train"
    limit: int = 0
    validation_rows: int = 500
    window: int = 256
    windows: Literal["fixed", "grouped"] = "fixed"
    eos_tail: int = 64
    cut_share: float = 0.0
    eos_loss: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.window < 8:
            raise ConfigError(f"window must be at least 8 tokens, got {self.window}")
        for name in ("limit", "validation_rows", "eos_tail"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.cut_share <= 1:
            raise ConfigError(f"cut_share must lie in [0, 1], got {self.cut_share}")
        if self.cut_share and self.windows == "fixed":
            raise ConfigError("cut_share needs windows: grouped, whose rows have ends of their own")
        if self.eos_tail != DataConfig.eos_tail and self.windows == "fixed":
            raise ConfigError("eos_tail needs windows: grouped; fixed windows are filled with EOS")
        for name, choices in (("windows", ("fixed", "grouped")), ("eos_loss", ("first", "all"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
