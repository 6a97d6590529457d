"""What the next steps would do if the model said again what it said last: how drafts are made."""

from __future__ import annotations

from dataclasses import replace

import torch

from decoding.canvas import Canvas
from decoding.drafts import Guess
from decoding.reveal.base import Evidence
from decoding.scoring import Scorer, Work


class Recalling(Scorer):
    """Answers from what another scorer has found of the rows, whatever they are now; asks no model.

    Args:
        scorer: the other one.
        canvas: copies [c] of its rows.
        source: [c] int64, the rows that they are of.
        rank: [c] int64, which of the likeliest tokens of its positions a row is given: 0 the likeliest.
    """

    def __init__(self, scorer: Scorer, canvas: Canvas, source: torch.Tensor, rank: torch.Tensor) -> None:
        super().__init__(scorer.model, canvas, replace(scorer.plan, drafts=0, top_logprobs=0))
        tokens, logp = scorer.likeliest[source, :, rank].unbind(-1)
        self.token, self.probability, self.score = tokens.long(), logp.exp().float(), scorer.score[source]
        self.found = scorer.entries.cached[source]
        self.known = torch.ones(len(source), dtype=torch.bool)
        """[c] False for rows that were asked for what is not known."""

    def compute(self, rows: torch.Tensor, asked: Evidence, guess: Guess | None = None) -> Work:
        """Note which rows [b] are asked for more than is known; never waits for the model."""
        del guess
        self.known[rows] &= ~(asked.scored & ~self.found[rows, : asked.scored.shape[1]]).any(1)
        yield from ()
