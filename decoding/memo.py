"""What the model was found to think at each position, kept until the row changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.canvas import Canvas, resized
from decoding.tokens import Candidates


class Memo:
    """Scores, and the few candidates of rules that have few, for the rows of one canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self.known = torch.zeros_like(canvas.masked)  # [B, L]
        self.score = torch.zeros(canvas.ids.shape, device=canvas.ids.device)  # [B, L] mass or certainty
        self.probability: torch.Tensor | None = None  # [B, L, k]
        self.ids: torch.Tensor | None = None  # [B, L, k]

    def put_score(self, rows: torch.Tensor, where: torch.Tensor, score: torch.Tensor) -> None:
        """Keep the scores [N] of the positions `where` [b, W] of the rows [b]."""
        row, position = where.nonzero().unbind(1)
        self.score[rows[row], position] = score

    def put_candidates(self, rows: torch.Tensor, where: torch.Tensor, found: Sequence[Candidates]) -> None:
        """Keep the candidates, N in all, of the positions `where` [b, W] of the rows [b]."""
        probability = torch.cat([c.probability for c in found])
        ids = torch.cat([c.ids for c in found if c.ids is not None])
        if self.probability is None or self.ids is None:
            shape = (*self.known.shape, probability.shape[1])
            self.probability, self.ids = probability.new_zeros(shape), ids.new_zeros(shape)
        row, position = where.nonzero().unbind(1)
        self.probability[rows[row], position] = probability
        self.ids[rows[row], position] = ids

    def candidates(self, rows: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and ids, both [N, k], at the positions `where` [b, W] of the rows [b]."""
        assert self.probability is not None
        assert self.ids is not None
        row, position = where.nonzero().unbind(1)
        return self.probability[rows[row], position], self.ids[rows[row], position]

    def forget(self, rows: torch.Tensor, same: torch.Tensor) -> None:
        """The rows [b] have been written to, all but those that are the `same` [b]."""
        self.known[rows] &= same[:, None]

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """The canvas has become another: `rows` of the old one, or the old one with more rows behind it."""
        for name in ("known", "score", "probability", "ids"):
            kept = getattr(self, name)
            if kept is not None:
                kept = kept if rows is None else kept[rows]
                setattr(self, name, resized(kept, *canvas.ids.shape))
