"""Axis 3 of a decoder, the token rule: which token a revealed position receives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dlm.device import to_device
from dlm.errors import MOST_NUMBER, ConfigError, check_whole


@dataclass(frozen=True)
class Choice:
    """The tokens drawn at N positions."""

    token: torch.Tensor
    """[N] int64."""
    probability: torch.Tensor
    """[N] float32, what the model gives to the token (temperature 1, before any cut)."""
    mass: torch.Tensor
    """[N] float32, what it gives to all tokens that the rule keeps."""


@dataclass(frozen=True)
class Candidates:
    """The tokens that may come out at N positions; k of them, or the whole vocabulary."""

    probability: torch.Tensor
    """[N, k] float32, what the model gives to each (temperature 1, before any cut), falling if k < V."""
    ids: torch.Tensor | None
    """[N, k] int64, which tokens they are; None for all in order."""
    share: torch.Tensor
    """[N, k] float32, the probabilities at the rule's temperature, of all that `probability` is of."""
    kept: torch.Tensor
    """[N, k] bool, those that the rule keeps."""

    @property
    def mass(self) -> torch.Tensor:
        """[N], the probability that the rule keeps."""
        return (self.probability * self.kept).sum(1)

    def at(self, rows: torch.Tensor) -> Candidates:
        """The candidates at some positions [N] bool."""
        ids = None if self.ids is None else self.ids[rows]
        return Candidates(self.probability[rows], ids, self.share[rows], self.kept[rows])


CACHED = 200_000
"""Logits that a CPU sums at a time: they stay in its cache."""

SORTED_FIRST = 256
"""Tokens that are sorted first in search of a top-p or min-p set."""

Certainty = Literal["margin", "entropy"]
"""Ways to say how sure a model is at a position, whatever token is drawn, from its own distribution
(temperature 1, before any cut): the probability of the likeliest token less that of the second; exp(-H), H
the entropy in nats."""


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N, 1] float32, log Σ exp."""
    return torch.cat([rows.float().logsumexp(1, keepdim=True) for rows in _portions(logits)])


def certainty(logits: torch.Tensor, kind: Certainty) -> torch.Tensor:
    """[N, V] -> [N] float32 in [0, 1]."""
    if kind == "margin":
        best = (logits.topk(2, dim=1).values.float() - log_normaliser(logits)).exp()
        return best[:, 0] - best[:, 1]
    return torch.cat([_exp_entropy(rows.float()) for rows in _portions(logits)])


def _portions(logits: torch.Tensor) -> Sequence[torch.Tensor]:
    """Logits [N, V] in portions of some positions on a CPU; as they are on any other device."""
    if logits.device.type != "cpu":
        return (logits,)
    return logits.split(max(CACHED // logits.shape[1], 1))  # type: ignore[no-any-return]


def _exp_entropy(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N], exp(-H), H = log Σ exp x - E x."""
    total = logits.logsumexp(1, keepdim=True)
    probability = (logits - total).exp_()
    expected = probability.mul_(logits.clamp(min=-1e30)).sum(1)  # 0 · -inf would be NaN
    return torch.exp(expected - total[:, 0]).clamp(max=1.0)


@dataclass(frozen=True)
class TokenRule:
    """Categorical sampling with the usual cuts, all arithmetic in float32.

    Attributes:
        temperature: 1 leaves the distribution as it is, 0 takes the most likely token.
        top_k: keep exactly this many of the most likely real tokens; 0 for all.
        top_p: of those, keep the smallest set whose (renormalised) probability reaches this; 1 for all.
        min_p: of those, keep what has at least this share of the likeliest token's probability, after the
            temperature; 0 for all (arXiv 2407.01082).
        forbidden: ids that never come out; they are shut before anything is cut.
        repetition_penalty: θ of CTRL (arXiv 1909.05858): the logit of a token that is in the row already is
            divided by θ where it is positive, and multiplied by θ where it is not; 1 for none.
        presence_penalty: taken from the logit of a token that the row has written already (as OpenAI's API);
            0 for none.
        frequency_penalty: taken from the logit of a token once for each time that the row has written it;
            0 for none.
        logit_bias: numbers added to the logits of token ids, before any penalty; a mapping, or pairs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    forbidden: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperature != 0 and not 1e-6 <= self.temperature <= MOST_NUMBER:
            raise ConfigError(
                f"temperature must be 0 (the likeliest token) or at least 1e-6, and at most {MOST_NUMBER:g}, "
                f"got {self.temperature}"
            )
        check_whole("top_k", self.top_k, least=0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not 1 / MOST_NUMBER <= self.repetition_penalty <= MOST_NUMBER:
            raise ConfigError(
                f"repetition_penalty must be above 0 and at most {MOST_NUMBER:g}, "
                f"got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MOST_NUMBER:
                raise ConfigError(f"{name} must lie within ±{MOST_NUMBER:g}, got {getattr(self, name)}")
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        if any(token < 0 for token in self.forbidden):
            raise ConfigError(f"forbidden must hold token ids, got {self.forbidden}")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))

    @property
    def keeps_all(self) -> bool:
        """True when no token is cut, so that the mass is 1 whatever the logits."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    @property
    def penalises(self) -> bool:
        """True when logits depend on the tokens that the row holds."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def penalised(self, logits: torch.Tensor, present: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Logits after the penalties: repetition, then frequency and presence.

        Args:
            logits: [N, V].
            present: [N, V] bool, tokens that the row holds, those of the prompt included.
            written: [N, V], how often the row has written each token.
        """
        logits, theta = logits.float(), self.repetition_penalty
        if theta != 1:
            logits = torch.where(present, torch.where(logits > 0, logits / theta, logits * theta), logits)
        return logits - self.frequency_penalty * written - self.presence_penalty * (written > 0)

    def biased(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] after `logit_bias`."""
        pairs = [(token, bias) for token, bias in self.logit_bias if token < logits.shape[1]]
        if not pairs:
            return logits
        ids = to_device(torch.tensor([token for token, _ in pairs]), logits.device)
        bias = to_device(torch.tensor([bias for _, bias in pairs]), logits.device)
        return logits.float().index_add(1, ids, bias.expand(len(logits), -1))

    @property
    def width(self) -> int | None:
        """Number of candidates that are enough to draw a token and to know the mass; None for all."""
        if self.top_k:
            return self.top_k
        return 1 if self.temperature == 0 and self.keeps_all else None

    def choose(self, logits: torch.Tensor, noise: torch.Tensor) -> Choice:
        """Draw one token per position by inverting the cumulative distribution of those kept.

        Args:
            logits: [N, V], -inf at tokens that must not come out.
            noise: [N] float32 uniform numbers of (0, 1); the only randomness.
        """
        logits = self.allowed(logits)
        if self.width is not None:
            return self.draw(self.candidates(logits), noise)
        if not self.keeps_all:
            return self._choose_of_nucleus(logits, noise)
        return self.draw(self.candidates(logits), noise)

    def candidates(self, logits: torch.Tensor, width: int | None = None) -> Candidates:
        """The tokens that may come out, of those allowed.

        Args:
            logits: [N, V], -inf at tokens that must not come out.
            width: how many, the best ones, when shares are to be of the whole vocabulary; by default the
                `top_k` best, whose shares are among themselves, or all.
        """
        heat = self.temperature or 1.0
        if width is None and self.width is None:
            probability = logits.softmax(1, dtype=torch.float32)
            share = probability if heat == 1 else (logits.float() / heat).softmax(1)
            return Candidates(probability, None, share, torch.ones_like(share, dtype=torch.bool))
        k = min(width or self.width or 0, logits.shape[1])
        values, ids = logits.max(1, keepdim=True) if k == 1 else logits.topk(k, dim=1)
        total, heated = log_normaliser(logits), values.float() if heat == 1 else values.float() / heat
        if width is None:
            among = heated.logsumexp(1, keepdim=True)
        else:
            among = total if heat == 1 else log_normaliser(logits.float() / heat)
        probability, share = (values.float() - total).exp(), (heated - among).exp()
        return Candidates(probability, ids, share, self._within(values, share))

    def _within(self, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """[N, k] bool, where min-p and top-p admit the share, in falling order of logits."""
        inside = values > -torch.inf
        if self.min_p:
            inside = inside & (share >= self.min_p * share[:, :1])
        return inside & (share.cumsum(1) - share < self.top_p) if self.top_p < 1 else inside

    def _choose_of_nucleus(self, logits: torch.Tensor, noise: torch.Tensor) -> Choice:
        """See `choose`, for the top-p and min-p set of the whole vocabulary [N, V].

        On a CPU tokens are sorted only as far as the set reaches: where the `SORTED_FIRST` best do not hold
        it, 16 times as many are looked at, and so on. The result is the same. A GPU sorts all.
        """
        vocab = logits.shape[1]
        if logits.device.type != "cpu":
            return self.draw(self.candidates(logits, vocab), noise)
        rows, width = torch.arange(len(logits)), SORTED_FIRST
        places: list[torch.Tensor] = []
        parts: list[Choice] = []
        while not parts or len(rows):
            candidates = self.candidates(logits, width)
            held = ~candidates.kept[:, -1] | (width >= vocab)
            parts.append(self.draw(candidates.at(held), noise[held]))
            places.append(rows[held])
            rows, logits, noise, width = rows[~held], logits[~held], noise[~held], 16 * width
        order = torch.cat(places).argsort()
        return Choice(
            torch.cat([part.token for part in parts])[order],
            torch.cat([part.probability for part in parts])[order],
            torch.cat([part.mass for part in parts])[order],
        )

    def draw(self, candidates: Candidates, noise: torch.Tensor) -> Choice:
        """See `choose`.

        Args:
            candidates: of N positions.
            noise: [N] uniform numbers of (0, 1).
        """
        probability, ids = candidates.probability, candidates.ids
        if self.temperature == 0:
            index = probability.argmax(1)
        else:
            index = _invert(candidates.share * candidates.kept, noise)
        column = index[:, None]
        token = index if ids is None else ids.gather(1, column)[:, 0]
        return Choice(token, probability.gather(1, column)[:, 0], candidates.mass)

    def likeliest(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """Likeliest tokens that may come out, and their log-probabilities: [N, V] -> [N, count, 2] float64.

        At temperature 1, before any cut, the likeliest first. Of a vocabulary that is smaller the last ones
        are -inf.
        """
        logits = self.allowed(logits)
        values, ids = logits.float().topk(min(count, logits.shape[1]), dim=1)
        pairs = torch.stack([ids.double(), (values - log_normaliser(logits)).double()], dim=2)
        missing = torch.tensor([0.0, -math.inf], dtype=torch.float64, device=logits.device)
        return torch.cat([pairs, missing.expand(len(pairs), count - pairs.shape[1], 2)], dim=1)

    def certainty(self, logits: torch.Tensor, kind: Certainty) -> torch.Tensor:
        """[N, V] -> [N], how sure the model is there, forbidden tokens apart."""
        return certainty(self.allowed(logits), kind)

    def cut_certainty(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, V] -> [N] exp(-H) of the distribution that tokens are drawn from, cut and tempered."""
        logits = self.allowed(logits)
        if self.keeps_all:
            return certainty(logits.float() / (self.temperature or 1.0), "entropy")
        candidates = self.candidates(logits, None if self.top_k else logits.shape[1])
        share = candidates.share * candidates.kept
        share = share / share.sum(1, keepdim=True)
        return torch.exp(torch.xlogy(share, share).sum(1)).clamp(max=1.0)

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] with the forbidden tokens shut."""
        if not self.forbidden:
            return logits
        shut = torch.tensor([token for token in self.forbidden if token < logits.shape[1]], dtype=torch.int64)
        return logits.index_fill(1, to_device(shut, logits.device), -math.inf)


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """Token ids with finite numbers, in order, from a mapping or pairs; JSON's keys are texts."""
    try:
        biases = {} if bias is None else dict(bias)
        wrong = [
            x for x in biases if isinstance(x, bool) or not (isinstance(x, str) or hasattr(x, "__index__"))
        ]
        pairs = sorted((int(token), float(number)) for token, number in biases.items())
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"logit_bias must map token ids to numbers, got {bias!r}") from error
    if wrong:
        raise ConfigError(f"logit_bias must map token ids to numbers, got {wrong[0]!r} for an id")
    if any(token < 0 or not abs(number) <= MOST_NUMBER for token, number in pairs):
        raise ConfigError(f"logit_bias must map token ids to numbers within ±{MOST_NUMBER:g}, got {bias!r}")
    return tuple(pairs)


def _invert(weight: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[N, k] weights and [N] uniforms -> [N] indices; an index of weight 0 never comes out."""
    cumulative = weight.cumsum(1)
    total = cumulative[:, -1:]
    point = torch.minimum(noise[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=weight.shape[1] - 1)
