"""Positions whose tokens depend on each other, by the attention of the model that is to write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlm.attention_weights import AttentionWeights
from dlm.errors import ConfigError, check_whole

EVEN_SHARES = 3.0
"""In a row so short that every position receives much, a sink is one that receives so many even shares."""


@dataclass(frozen=True)
class Dependence:
    """Conflicts between masked positions (dependency graph of DAWN, arXiv 2602.06953).

    With A_ij the attention that the state predicting i pays to j, a mean over all heads of the last layers,
    two positions conflict where max(A_ij, A_ji) ≥ `threshold`. Sinks, which all positions attend to whatever
    they hold, are left out: A_ij is 0 where the mean of A_·j over the row exceeds `sink`, and, in a row of L
    positions, `EVEN_SHARES`/L. (The second keeps short rows from being all sinks; the paper's are long.)

    Attributes:
        threshold: τ in (0, 1].
        layers: so many of the last layers; all, in a model that has fewer.
        sink: largest mean attention of a position that is none.
    """

    threshold: float
    layers: int = 4
    sink: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("threshold", "sink"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                shown = "conflict" if name == "threshold" else name
                raise ConfigError(f"{shown} must lie in (0, 1], got {value}; leave it out for none")
        check_whole("conflict_layers", self.layers)

    def record(self, where: torch.Tensor) -> AttentionWeights:
        """An empty record of the attention between the positions `where` [b, W] of rows 0 to b - 1."""
        count = where.sum(1, keepdim=True)
        order = where.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        positions = torch.where(torch.arange(order.shape[1]) < count, order, -1)
        return AttentionWeights(torch.arange(len(where)), positions, self.layers)

    def conflicts(self, record: AttentionWeights) -> torch.Tensor:
        """[b, K, K] bool, by the positions of a record that the model has filled; on the model's device."""
        bound = (EVEN_SHARES / record.observers).clamp(min=self.sink)
        shares = torch.where((record.incoming > bound)[:, None], 0.0, record.shares)
        return torch.maximum(shares, shares.transpose(1, 2)) >= self.threshold
