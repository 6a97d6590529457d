"""Cost of a decoder's path: decoding that is told the answer.

Tokens that are written in one call are drawn independently of each other, and tokens far from what is known
are drawn from a vague distribution. Both lose likelihood, and a decoder that spares the one pays the other.
Here a decoder chooses positions as it always does, and wherever the answer has a token, that token is written
and its probability just before counts. What stands behind the end of the answer is drawn from the model, as
in a real decoding: it costs nothing, since the end token overwrites it, but it is seen until then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from decoding.canvas import Canvas, Row, make_canvas
from decoding.denoiser import Denoiser
from decoding.request import Plan
from decoding.scoring import Scorer
from decoding.step import Batch, raise_first, run_work
from decoding.tokens import TokenRule
from dlm.device import to_device
from dlm.errors import ConfigError

_NO_TRUTH = -1
"""In place of a true token: whatever the model draws."""


@dataclass(frozen=True)
class PathCost:
    """Cost of writing one answer along one path of a decoder."""

    nats: list[float]
    """For each token of the answer, its end token included: -log p(token | what was written before)."""
    calls: int
    """Model calls."""

    @property
    def total(self) -> float:
        """Nats of the whole answer: one draw of a bound on -log p(answer | prompt), see `path_costs`."""
        return sum(self.nats)


def path_costs(
    model: Denoiser,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    plan: Plan,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[PathCost]:
    """The cost of each answer along the path that a decoder takes when it is told what to write.

    The order and the pace are those of the decoder; tokens are drawn from all of the model's distribution
    (temperature 1, nothing cut), whatever the decoder's own token rule. With π the choice of positions, which
    depends on noise and on what is written but not on the tokens that will be, and b what is drawn behind
    the end,

        -log p(x) = -log E_{π,b}[Π p(x_i | written before)] ≤ E_{π,b}[Σ -log p(x_i | written before)]

    by Jensen's inequality, with equality for an order without noise and an answer without end, or from left
    to right. A cost is one draw of the right-hand side: its mean over seeds is the bound.

    Args:
        model: a masked diffusion model.
        rows: prompts and answers as ids; answers that end hold their end token.
        plan: the decoder and its pace, as `Request.resolve` makes it.
        seed: of the noise.
        batch_size: rows at a time.

    Yields:
        One cost for each row, in order.

    Raises:
        ConfigError: for decoders whose choice of positions depends on the tokens drawn (those that mask
            again, and rankings by the confidence of a token that is not the likeliest one), and for answers
            that do not fit.
    """
    decoder = plan.decoder
    if decoder.reveal.revises:
        raise ConfigError(f"decoder {decoder.name!r} masks tokens again: its path has no such cost")
    if decoder.reveal.sees_token and decoder.tokens.temperature > 0:
        raise ConfigError(
            f"decoder {decoder.name!r} ranks positions by the token that it draws there; give temperature=0"
        )
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, batch_size)):
        yield from _batch(model, chunk, plan, seed)


@torch.inference_mode()
def _batch(
    model: Denoiser, rows: Sequence[tuple[Sequence[int], Sequence[int]]], plan: Plan, seed: int
) -> Iterator[PathCost]:
    masked_rows: list[Row] = []
    for prompt, answer in rows:
        room = min(plan.tokens, plan.positions - len(prompt))
        if len(answer) > room:
            raise ConfigError(f"an answer of {len(answer)} tokens does not fit: there is room for {room}")
        masked_rows.append(Row([*prompt, *[plan.mask_id] * room], len(prompt)))
    canvas = make_canvas(masked_rows, [seed] * len(masked_rows), plan)
    truth = torch.full(canvas.ids.shape, _NO_TRUTH)
    for true_ids, (prompt, answer) in zip(truth, rows, strict=True):
        true_ids[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    scorer = _TrueScorer(truth, model, canvas, plan)
    batch = Batch(model, canvas, plan, scorer)
    while not bool(canvas.done.all()):
        raise_first(run_work(model, [batch.step()]))
    for row, (prompt, answer) in enumerate(rows):
        nats = scorer.nats[row, len(prompt) : len(prompt) + len(answer)]
        yield PathCost(nats.tolist(), int(canvas.model_calls[row]))


class _TrueScorer(Scorer):
    """Says that the truth [B, L] was drawn, wherever there is one."""

    def __init__(self, truth: torch.Tensor, model: Denoiser, canvas: Canvas, plan: Plan) -> None:
        super().__init__(model, canvas, plan)
        self.truth = truth
        self.nats = torch.full(truth.shape, torch.nan, dtype=torch.float64)
        """[B, L] of the true tokens when they were last looked at, which is when they were written."""

    def _changed(self, logits: torch.Tensor, *cells: torch.Tensor) -> torch.Tensor:
        """[N, V] for the decoder's choice of positions; those of the model alone are kept for the tokens."""
        self._plain = logits
        return super()._changed(logits, *cells)

    def _columns(
        self, logits: torch.Tensor, row: torch.Tensor, position: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The decoder's own score; the true token or, where there is none, one drawn; its probability."""
        columns = super()._columns(logits, row, position, noise)
        truth, noise = (to_device(x, logits.device) for x in (self.truth[row, position], noise))
        token = TokenRule().choose(self._plain, noise).token
        logp = self._plain.float().log_softmax(1).gather(1, truth.clamp(min=0)[:, None])[:, 0].double()
        self.nats[row, position] = -logp.cpu()
        columns[:, 0] = torch.where(truth == _NO_TRUTH, token, truth).double()
        columns[:, 1] = torch.where(truth == _NO_TRUTH, 1.0, logp.exp())
        return columns
