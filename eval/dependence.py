"""Dependence of tokens by their distance: what knowing one token says of another that is still masked.

Tokens of one call are drawn independently given the text U. What that costs is measured before any text is
drawn, on true answers: for a masked position i that is told and another j at distance d,

    I(d) = E[log p(x_j | U, x_i) - log p(x_j | U)],  |i - j| = d

in nats: for a calibrated model the mutual information of the two tokens. Its sum over the pairs of a call is
the leading term of what drawing them together loses; from the distance on at which it is small, tokens may be
written together. Told tokens stand near the text, where decoders write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from decoding.denoiser import hidden_of_rows
from dlm.errors import ConfigError
from dlm.noise import key_of, uniform
from dlm.spec import ModelSpec
from eval.statistics import Estimate, estimate

Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt and answer as ids."""


@dataclass(frozen=True)
class Gain:
    """Gain in the log-probability of a token when another one is revealed.

    Attributes:
        answer: number of the answer.
        distance: |i - j|, in positions.
        reach: masks between the text and the nearer of the two; 0 at the text's edge.
        nats: log p(x_j | U, x_i) - log p(x_j | U).
    """

    answer: int
    distance: int
    reach: int
    nats: float


@torch.inference_mode()
def gains(
    model: Any,
    rows: Sequence[Pair],
    *,
    reaches: Sequence[int] = (0, 1, 2, 4, 8),
    furthest: int = 16,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[Gain]:
    """Gains on true answers, each behind the prompt and a part of the answer drawn evenly from all lengths.

    With k tokens of an answer visible, the token at k + a is told, for each `a` of `reaches`, and every other
    masked position within `furthest` of it is looked at. That is a row for the text and one for each `a`, in
    packed calls; it is the same for every model and pace.

    Args:
        model: a masked diffusion model.
        rows: prompts and answers; answers that end hold their end token.
        reaches: distances of the told token from the text.
        furthest: longest distance between the two.
        seed: of the parts that are visible.
        batch_size: answers in a model call.

    Yields:
        One gain for each pair.

    Raises:
        ConfigError: for a block-causal model, which never sees masks in two blocks at once.
    """
    spec = ModelSpec.of(model)
    if spec.visibility.block_size is not None:
        raise ConfigError("the model is block-causal: it never sees masks of two blocks, nor a later token")
    mask_id = spec.mask_token_id
    for first in range(0, len(rows), batch_size):
        chunk = list(enumerate(rows[first : first + batch_size], start=first))
        shown: list[list[int]] = []
        trials: list[tuple[int, int, list[int]]] = []  # answer, first mask, positions told
        for number, (prompt, answer) in chunk:
            ids, share = [*prompt, *answer], float(uniform(key_of("dependence", seed, number), 0))
            edge = len(prompt) + int(share * len(answer))
            positions = [edge + a for a in reaches if edge + a < len(ids)]
            trials.append((number, edge, positions))
            text = ids[:edge] + [mask_id] * (len(ids) - edge)
            shown.append(text)
            shown += [[*text[:i], ids[i], *text[i + 1 :]] for i in positions]
        states = iter(_log_probabilities(model, shown, [(p, a) for _, (p, a) in chunk], trials))
        for number, edge, positions in trials:
            alone = next(states)
            for i in positions:
                informed = next(states)
                for j in range(max(edge, i - furthest), min(len(alone), i + furthest + 1)):
                    if j != i:
                        yield Gain(number, abs(i - j), min(i, j) - edge, float(informed[j] - alone[j]))


def _log_probabilities(
    model: Any,
    shown: Sequence[Sequence[int]],
    pairs: Sequence[Pair],
    trials: Sequence[tuple[int, int, list[int]]],
) -> Iterator[torch.Tensor]:
    """[L] float64 for each row shown, the log-probability of the true token at its masks; one model call."""
    lengths = [len(row) for row in shown]
    states = hidden_of_rows(model, torch.tensor([token for row in shown for token in row]), lengths)
    pieces = iter(states.split(lengths))
    for (prompt, answer), (_, edge, positions) in zip(pairs, trials, strict=True):
        truth = torch.tensor([*prompt, *answer])
        for _ in range(1 + len(positions)):
            logp = model.logits(next(pieces)[edge:]).float().log_softmax(-1).cpu()
            behind = logp.gather(1, truth[edge:, None])[:, 0].double()
            yield torch.cat([torch.full((edge,), math.nan, dtype=torch.float64), behind])


def by_distance(measured: Sequence[Gain], reach: int | None = None) -> dict[int, Estimate]:
    """I(d) by distance, with its interval over answers; of all pairs, or those at one `reach`."""
    out: dict[int, Estimate] = {}
    for distance in sorted({gain.distance for gain in measured}):
        gains_here = [g for g in measured if g.distance == distance and reach in (None, g.reach)]
        if gains_here:
            out[distance] = estimate([g.nats for g in gains_here], [str(g.answer) for g in gains_here])
    return out
