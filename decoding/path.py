"""What the path of a decoder costs: decoding that is told the answer.

Tokens that are written in one call are drawn independently of each other, and tokens far from what is known
are drawn from a vague distribution. Both lose likelihood, and a decoder that spares the one pays the other.
Here a decoder chooses positions as it always does, what is written there is the true token, and what counts
is how probable the model held it just before: the quality of the order alone, apart from what the tokens of
an actual decoding, once wrong, make of all that follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from decoding.canvas import Canvas
from decoding.loop import Lane, work_through
from decoding.request import Plan
from decoding.rows import Row
from decoding.states import Denoiser
from dlm.device import sent
from dlm.errors import ConfigError
from dlm.noise import key_of


@dataclass(frozen=True)
class PathCost:
    """What writing one answer along a decoder's path costs.

    All of `answer` and `behind` together bound -log p(answer | prompt) of the decoder, drawing its tokens at
    temperature 1 from all of the vocabulary, from above: where it writes depends on what is written and on
    noise, never on the tokens to come, so the bound is Jensen's over the orders (as in P2, arXiv 2502.03540).
    """

    answer: list[float]
    """Nats of each token of the answer, its end token included: -log p(token | what was written before)."""
    behind: float
    """Nats of end tokens that were written behind the end of the answer before the end itself was."""
    calls: int
    """Model calls."""


def path_costs(
    model: Denoiser,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    plan: Plan,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[PathCost]:
    """The cost of each answer along the path that a decoder takes when it is told what to write.

    Args:
        model: a masked diffusion model.
        rows: prompts and answers as ids; answers hold their end token.
        plan: the decoder and its pace, as `decoding.request.Planner` makes it.
        seed: of the noise.
        batch_size: rows at a time.

    Yields:
        One cost for each row, in order.

    Raises:
        ConfigError: for rules that take tokens away again, and for answers that do not fit.
    """
    if plan.decoder.reveal.remasks:
        raise ConfigError(f"decoder {plan.decoder.name!r} masks tokens again: its path has no such cost")
    several = iter(rows)
    while some := list(itertools.islice(several, batch_size)):
        yield from _batch(model, some, plan, seed)


@torch.inference_mode()
def _batch(
    model: Denoiser, rows: Sequence[tuple[Sequence[int], Sequence[int]]], plan: Plan, seed: int
) -> Iterator[PathCost]:
    settings, mask_id, eos_id = plan.settings, plan.settings.mask_id, plan.settings.eos_id
    ids, truth, keys = [], [], []
    for prompt, answer in rows:
        room = min(plan.tokens, plan.positions - len(prompt))
        if len(answer) > room:
            raise ConfigError(f"an answer of {len(answer)} tokens does not fit: there is room for {room}")
        ids.append([*prompt, *[mask_id] * room])
        truth.append([*prompt, *answer, *[eos_id] * (room - len(answer))])
        keys.append(key_of(seed, Row(ids[-1], len(prompt), "").digest(mask_id)))
    width = max(map(len, ids))
    canvas = Canvas.of(
        torch.tensor([row + [mask_id] * (width - len(row)) for row in ids]),
        mask_id,
        torch.stack(keys),
        torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None],
        ahead=settings.ahead(plan.decoder),
    )
    known = torch.tensor([row + [eos_id] * (width - len(row)) for row in truth])
    lane = _ToldLane(known, model, canvas, plan)
    while not lane.finished:
        work_through(model, lane.work())
    for row, (prompt, answer) in enumerate(rows):
        nats = -canvas.confidence[row, len(prompt) :].double().log().nan_to_num(nan=0.0)
        own, behind = nats[: len(answer)], nats[len(answer) :]
        yield PathCost(own.tolist(), float(behind.sum()), int(canvas.model_calls[row]))


class _ToldLane(Lane):
    """A lane that writes the truth [B, L] wherever its decoder decides to write."""

    def __init__(self, truth: torch.Tensor, model: Denoiser, canvas: Canvas, plan: Plan) -> None:
        super().__init__(model, canvas, plan.decoder, plan.settings)
        self.truth = truth

    def _drawn_with(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[N, 2] uniform numbers, and the true tokens."""
        truth = self._cut(self.truth, rows)[where]
        return torch.stack([super()._drawn_with(rows, where).double(), truth.double()], dim=1)

    def _looked_at(self, logits: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The score of the token that would have been drawn; the true token, and its probability."""
        noise, truth = given.unbind(1)
        score = super()._looked_at(logits, noise.to(torch.get_default_dtype()))[0]
        token = sent(truth.long(), logits.device)
        chance = logits.float().log_softmax(1).gather(1, token[:, None])[:, 0].exp()
        return torch.stack([score, token.double(), chance.double()])
