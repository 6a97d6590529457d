"""The end of a row: the effect of end tokens on the positions behind them, and when a row is complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ended:
    """Rows [b, W] after end tokens have had their effect."""

    ids: torch.Tensor
    """[b, W] int64."""
    masked: torch.Tensor
    """[b, W] bool, positions still to be written."""
    complete: torch.Tensor
    """[b] bool, rows in which nothing is left to write."""


@dataclass(frozen=True)
class Ending:
    """The effect of end tokens.

    Attributes:
        eos_id: the end token that is written.
        end_ids: all tokens that end an answer, sorted.
        fill: everything right of an end token becomes `eos_id`.
        early_exit: a row is complete when everything before its first end token is written (exact, where
            written tokens stay: no later step could change the answer).
        closes: a canvas that grows takes no more masks once there is an end token.
    """

    eos_id: int
    end_ids: tuple[int, ...]
    fill: bool = True
    early_exit: bool = True
    closes: bool = True

    def is_end(self, ids: torch.Tensor) -> torch.Tensor:
        """Mark the end tokens, bool in the shape of `ids`."""
        if len(self.end_ids) == 1:
            return ids == self.end_ids[0]
        return torch.isin(ids, torch.tensor(self.end_ids))

    def apply(self, ids: torch.Tensor, masked: torch.Tensor, free: torch.Tensor) -> Ended:
        """Let the end tokens that have been written have their effect.

        Args:
            ids: [b, W] int64.
            masked: [b, W] bool, positions still to be written.
            free: [b, W] bool, positions that are not given; only there can an answer end.
        """
        ended = self.is_end(ids) & free & ~masked
        if self.fill:
            behind = (ended.cumsum(1) - ended.int() > 0) & free
            ids, masked = torch.where(behind, self.eos_id, ids), masked & ~behind
        complete = ~masked.any(1)
        if self.early_exit:
            first = torch.where(ended.any(1), ended.int().argmax(1), -1)
            waiting = (masked & (torch.arange(ids.shape[1]) < first[:, None])).any(1)
            complete = complete | ((first >= 0) & ~waiting)
            rest = complete[:, None] & masked
            ids, masked = torch.where(rest, self.eos_id, ids), masked & ~rest
        return Ended(ids, masked, complete)

    def closed(self, ended: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """[b] bool, rows that take no more masks: `ended` [b] hold an end token, `done` [b] are finished."""
        return ended if self.closes else ended & done & self.early_exit
