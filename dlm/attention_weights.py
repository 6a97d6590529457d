"""Attention weights between chosen positions, recorded while a model computes its states.

Kernels of attention do not give their weights away. Here the queries and keys of the last layers, as the
kernels get them (positions rotated, keys shared by groups), are multiplied once more, a few queries at a
time: nothing of the size of a layer's attention is held, and only what concerns the chosen positions is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dlm.attention import Layout, RowKeys, Sight
from dlm.device import Movable, to_device

_SCORES = 2**22
"""Products of queries and keys that are held at once."""


class RowLayout(Layout, Protocol):
    """A layout that gives the queries and keys of each row."""

    def row_keys(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> RowKeys:
        """Queries and keys of a layer, row by row; after `attend` has had the same."""
        ...


@dataclass
class AttentionWeights:
    """Attention between chosen positions of some rows of a call, a mean over heads and the last layers.

    Attributes:
        rows: [b] int64, the rows' numbers in the call; on the host.
        positions: [b, K] int64, the chosen positions of each row, -1 where it has fewer; on the host.
        layers: so many of the last layers count, at most those that the model has.
        shares: [b, K, K] float, by the model's call: (i, j) is the attention that the state which predicts
            the i-th chosen position pays to the j-th. With a shift that is the state before it.
        incoming: [b, K] float: attention that the j-th receives from one position, a mean over all that its
            row has; in a block-causal model over those up to the end of the block of j, so that it
            depends on nothing behind.
        observers: [b, K] int64, over how many positions that mean goes.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    layers: int
    shares: torch.Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    incoming: torch.Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    observers: torch.Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    def add(self, row_keys: RowKeys, scale: float | None, sight: Sight, shift: bool, weight: float) -> None:
        """Add a layer's attention, times `weight`; `sight` is that of the layer."""
        rows = to_device(self.rows, row_keys.query.device)
        query, key, place, valid = (
            x[rows] for x in (row_keys.query, row_keys.key, row_keys.place, row_keys.valid)
        )
        columns = to_device(self.positions.clamp(min=0), query.device)  # [b, K]
        finished = None if row_keys.finished is None else row_keys.finished[rows]
        shares = column_shares(query, key, place, valid, columns, scale, sight, finished)  # [b, A, K]
        ends = valid.sum(1, keepdim=True).expand_as(
            columns
        )  # what counts for each chosen position ends there
        if sight.block_size is not None:
            ends = torch.minimum(ends, (columns // sight.block_size + 1) * sight.block_size)
        counts = (place[..., None] >= 0) & (place[..., None] < ends[:, None])  # [b, A, K]
        incoming = (shares * counts).sum(1) / ends
        predicting = (columns - 1).clamp(min=0) if shift else columns
        query_of = torch.zeros(len(rows), int(key.shape[2]) + 1, dtype=torch.int64, device=query.device)
        order = torch.arange(place.shape[1], device=query.device).expand_as(place)
        query_of.scatter_(1, torch.where(place < 0, key.shape[2], place), order)
        index = query_of.gather(1, predicting)[..., None].expand(-1, -1, columns.shape[1])
        self.shares = _added(self.shares, weight * shares.gather(1, index))
        self.incoming, self.observers = _added(self.incoming, weight * incoming), ends


def _added(total: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """The sum, on the device of the first layer that counts."""
    return total + addend.to(total.device) if total.dim() else addend


def column_shares(
    query: torch.Tensor,
    key: torch.Tensor,
    place: torch.Tensor,
    valid: torch.Tensor,
    columns: torch.Tensor,
    scale: float | None,
    sight: Sight,
    finished: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each query pays to some columns, a mean over heads: Σ_h softmax(q_h k_h^T · scale) / H.

    Args:
        query: [b, H, A, D].
        key: [b, G, W, D], each for H/G heads.
        place: [b, A] int64, the queries' positions; -1 for one that does not count.
        valid: [b, W] bool, keys that the row has.
        columns: [b, K] int64, positions of keys.
        scale: of the products; D^-1/2 by default.
        sight: what a position sees.
        finished: [b, A] bool, queries that see nothing behind themselves; None for none.

    Returns:
        [b, A, K], at least float32.
    """
    b, heads, count, width = query.shape
    groups, positions = key.shape[1], torch.arange(key.shape[2], device=query.device)
    kind = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(kind)[:, :, None].transpose(-1, -2)  # [b, G, 1, D, W]
    index = columns[:, None].expand(-1, count, -1)
    shares = []
    for part in torch.arange(count).split(max(1, _SCORES // (b * heads * len(positions)))):
        a = slice(int(part[0]), int(part[-1]) + 1)
        queries = query[:, :, a].to(kind).view(b, groups, heads // groups, -1, width)
        scores = (queries @ keys) * (width**-0.5 if scale is None else scale)
        visible = sight.mask(place[:, a], positions, None if finished is None else finished[:, a])
        visible = valid[:, None] if visible is None else visible & valid[:, None]
        visible = visible | (place[:, a] < 0)[..., None]  # so that no sum is empty
        share = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
        shares.append(share.gather(2, index[:, a]))
    return torch.cat(shares, dim=1)


@dataclass(frozen=True)
class Recorded(Movable):
    """A layout whose attention is recorded in the last layers.

    Attributes:
        layout: says who attends to whom.
        records: filled as the layers are computed.
        depth: layers of the model.
        shift: whether a state predicts the position behind it.
    """

    layout: RowLayout
    records: Sequence[AttentionWeights]
    depth: int
    shift: bool

    @property
    def sight(self) -> Sight:
        """See `Layout`."""
        return self.layout.sight

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """See `Layout`."""
        out = self.layout.attend(layer, query, key, value, scale, sight)
        due = [record for record in self.records if layer >= self.depth - record.layers]
        row_keys = self.layout.row_keys(layer, query, key) if due else None
        for record in due:
            assert row_keys is not None
            record.add(row_keys, scale, sight or self.sight, self.shift, 1 / min(record.layers, self.depth))
        return out
