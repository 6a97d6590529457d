"""A cache of conflicts between the masked positions of each row, as the model's last call showed them."""

from __future__ import annotations

import torch

from decoding.canvas import Canvas, Rows, resized


class ConflictCache:
    """Conflicts of the rows of a canvas; what is stored of a row counts while its scores do."""

    def __init__(self, canvas: Canvas) -> None:
        self.place = torch.full_like(canvas.ids, -1)  # [B, L] number among the row's positions; -1 for none
        self.conflicts = torch.zeros(len(canvas.ids), 0, 0, dtype=torch.bool)  # [B, K, K] by those numbers

    def put(self, rows: torch.Tensor, positions: torch.Tensor, conflicts: torch.Tensor) -> None:
        """Store conflicts [b, K, K] between positions [b, K] of the rows [b]; positions of -1 are none."""
        size, old = positions.shape[1], self.conflicts
        if old.shape[1] < size:
            self.conflicts = old.new_zeros(len(old), size, size)
            self.conflicts[:, : old.shape[1], : old.shape[1]] = old
        self.conflicts[rows, :size, :size] = conflicts
        row, number = (positions >= 0).nonzero().unbind(1)
        self.place[rows] = -1
        self.place[rows[row], positions[row, number]] = number

    def at(self, rows: Rows, position: torch.Tensor, width: int) -> torch.Tensor:
        """[b, width] bool, positions in conflict with the one at `position` [b, 1] of the rows [b]."""
        place, conflicts = self.place[rows, :width], self.conflicts[rows]
        if not conflicts.shape[1]:
            return torch.zeros_like(place, dtype=torch.bool)
        one = place.gather(1, position)
        row = conflicts.gather(1, one.clamp(min=0)[..., None].expand(-1, -1, conflicts.shape[2]))[:, 0]
        return row.gather(1, place.clamp(min=0)) & (place >= 0) & (one >= 0)

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas: `rows` of the old one, or the old one with more rows behind it."""
        if rows is not None:
            self.place, self.conflicts = self.place[rows], self.conflicts[rows]
        size, width = canvas.ids.shape
        self.place = resized(self.place, size, width, -1)
        self.conflicts = resized(self.conflicts, size, self.conflicts.shape[1])
