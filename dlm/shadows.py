"""Shadows: positions beside a row that ask what the model would say of a token if it were not there.

A call over rows that are packed end to end computes some positions more. Nothing attends to them, so that the
row's own states stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dlm.device import Movable, to_device


@dataclass
class Shadows:
    """Shadows of some positions, and the states that predict their tokens without having seen them.

    The shadow of position p is a mask with the position id p. It attends to itself and to all of the row but
    p, as far as the model sees, and to no other shadow (verification of WINO, arXiv 2507.18578). So its
    prediction is that of the row with a mask at p, except that the other positions have seen the token at p:
    exact in one layer, an approximation in more.

    In a model with a shift the state before p predicts it, and has seen p too. There the shadow is a pair, a
    copy of p - 1 and the mask at p, which attend to each other, to themselves, and to all of the row but
    p - 1 and p; the state is that of the copy.

    Attributes:
        rows: [S] int64, the rows' numbers in the call; on the host.
        positions: [S] int64, where the tokens stand; at least 1 in a model with a shift. On the host.
        states: [S, D], by the model's call.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    states: torch.Tensor = field(default_factory=lambda: torch.zeros(()), init=False)


@dataclass(frozen=True)
class RowShadows(Movable):
    """A row and its shadows behind it, n positions in all."""

    length: int
    """Of the row itself."""
    place: torch.Tensor
    """[n] int64, position ids; on the device."""
    visible: torch.Tensor
    """[n, n] bool, True where one attends to the other; on the device."""


@dataclass(frozen=True)
class Shadowed:
    """Rows packed end to end, some with shadows behind them; N positions of rows and E of shadows."""

    ids: torch.Tensor
    """[N + E] int64; on the host."""
    place: torch.Tensor
    """[N + E] int64, position ids; on the host."""
    lengths: list[int]
    """Of the rows with their shadows."""
    real: torch.Tensor
    """[N] int64, where the rows' own positions lie; on the host."""
    read: list[torch.Tensor]
    """For each of the `Shadows`, [S] int64, where its states lie; on the host."""
    layouts: dict[int, RowShadows]
    """By number of the row, for those that have shadows."""

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        lengths: Sequence[int],
        shadows: Sequence[Shadows],
        mask_id: int,
        shift: bool,
        device: torch.device,
    ) -> Shadowed:
        """Put shadows behind the rows [N], whose lengths are `lengths`."""
        owner = torch.cat([shadow.rows for shadow in shadows])
        position = torch.cat([shadow.positions for shadow in shadows])
        read, size = torch.zeros_like(owner), 1 + shift
        parts: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        real: list[torch.Tensor] = []
        layouts, begin = {}, 0
        for number, row in enumerate(ids.split(list(lengths))):
            own_rows = (owner == number).nonzero()[:, 0]
            at, length = position[own_rows], len(row)
            place = torch.stack([at - 1, at], 1).flatten() if shift else at
            extra = torch.full_like(place, mask_id)
            if shift:
                extra[::2] = row[at - 1]
            parts += [row, extra]
            places += [torch.arange(length), place]
            real.append(begin + torch.arange(length))
            read[own_rows] = begin + length + size * torch.arange(len(own_rows))
            begin += length + len(place)
            if len(own_rows):
                layouts[number] = _layout(length, place, size, device)
        return cls(
            torch.cat(parts),
            torch.cat(places),
            [length + size * int((owner == number).sum()) for number, length in enumerate(lengths)],
            torch.cat(real),
            list(read.split([len(shadow.rows) for shadow in shadows])),
            layouts,
        )


def _layout(length: int, place: torch.Tensor, size: int, device: torch.device) -> RowShadows:
    """The row of `length` with shadows of `size` positions each, whose position ids are `place` [E]."""
    total = length + len(place)
    group = torch.arange(len(place)) // size
    hidden = place.view(-1, size)[group]  # [E, size], what each position of a shadow does not see
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:length, :length] = True
    visible[length:, :length] = (hidden[..., None] != torch.arange(length)).all(1)
    visible[length:, length:] = group[:, None] == group
    return RowShadows(
        length, to_device(torch.cat([torch.arange(length), place]), device), to_device(visible, device)
    )
