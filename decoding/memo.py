"""What the model was found to think at each position, kept until the row changes."""

from __future__ import annotations

import torch

from decoding.canvas import Canvas, resized


class Memo:
    """For each position of a canvas: how sure the model is there, and the token that it would receive.

    The token is drawn when the position is looked at, and stays while the row stays as it is. That is the
    same law as a new draw in every step: nothing that happens before the token is written depends on which
    one it is, or else the row changes in the same step.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.known = torch.zeros_like(canvas.masked)  # [B, L]
        self.score = torch.zeros(canvas.ids.shape)  # [B, L] mass or certainty
        self.token = torch.zeros_like(canvas.ids)  # [B, L]
        self.probability = torch.zeros_like(self.score)  # [B, L] of the token

    def put(
        self,
        rows: torch.Tensor,
        where: torch.Tensor,
        score: torch.Tensor,
        token: torch.Tensor,
        probability: torch.Tensor,
    ) -> None:
        """Keep what was found, [N] each, at the positions `where` [b, W] of the rows [b]."""
        row, position = where.nonzero().unbind(1)
        at = rows[row], position
        self.known[at] = True
        self.score[at], self.token[at], self.probability[at] = score, token, probability

    def forget(self, rows: torch.Tensor, same: torch.Tensor) -> None:
        """The rows [b] have been written to, all but those that are the `same` [b]."""
        self.known[rows] &= same[:, None]

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """The canvas has become another: `rows` of the old one, or the old one with more rows behind it."""
        for name in ("known", "score", "token", "probability"):
            kept = getattr(self, name)
            kept = kept if rows is None else kept[rows]
            setattr(self, name, resized(kept, *canvas.ids.shape))
