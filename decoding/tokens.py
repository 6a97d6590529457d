"""Axis 3 of a decoder, the token rule: which token a revealed position receives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

from decoding import kernels
from dlm.device import sent
from dlm.errors import ConfigError


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
    kept: torch.Tensor
    """[N, k] float32, 1 for those that the rule keeps and 0 for the others."""

    @property
    def mass(self) -> torch.Tensor:
        """[N], the probability that the rule keeps."""
        return (self.probability * self.kept).sum(1)


ROWS = 4
"""Positions whose logits a CPU sums at a time: they stay in its cache."""

NUCLEUS = 256
"""So many tokens are sorted first in search of a top-p or min-p set."""

Certainty = Literal["margin", "entropy"]
"""Ways to say how sure a model is at a position, whatever token is drawn, from its own distribution
(temperature 1, before any cut): the probability of the likeliest token less that of the second; exp(-H), H
the entropy in nats."""


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N, 1] float32, log Σ exp."""
    if logits.is_cuda:
        return logits.float().logsumexp(1, keepdim=True)
    return torch.cat([rows.float().logsumexp(1, keepdim=True) for rows in logits.split(ROWS)])


def top_probabilities(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens: [N, V] -> [N, k] float32 probabilities, falling, and [N, k] ids.

    Probabilities are over the whole vocabulary. Which of several equal logits comes first is not defined.
    """
    values, ids = logits.max(1, keepdim=True) if k == 1 else logits.topk(k, dim=1)
    return (values.float() - log_normaliser(logits)).exp(), ids


def certainty(logits: torch.Tensor, kind: Certainty) -> torch.Tensor:
    """[N, V] -> [N] float32 in [0, 1]."""
    if kind == "margin":
        best = top_probabilities(logits, 2)[0]
        return best[:, 0] - best[:, 1]
    return torch.cat([_exp_entropy(rows.float()) for rows in logits.split(ROWS)])


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
        min_p: of those, keep what has at least this share of the likeliest token's probability; 0 for all
            (arXiv 2407.01082).
        forbidden: ids that never come out; they are shut before anything is cut.
        repetition_penalty: θ of CTRL (arXiv 1909.05858): the logit of a token that is in the row already is
            divided by θ where it is positive, and multiplied by θ where it is not; 1 for none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    forbidden: tuple[int, ...] = ()
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number, not negative (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        object.__setattr__(self, "forbidden", tuple(self.forbidden))
        if any(token < 0 for token in self.forbidden):
            raise ConfigError(f"forbidden must hold token ids, got {self.forbidden}")

    @property
    def keeps_all(self) -> bool:
        """Whether no token is cut, so that the mass is 1 whatever the logits."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    def penalised(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] after the repetition penalty; `seen` [N, V] says which tokens the row holds."""
        logits = logits.float()
        lower = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, lower, logits)

    @property
    def width(self) -> int | None:
        """How many candidates are enough to draw a token and to know the mass; None for the vocabulary."""
        if self.top_k:
            return self.top_k
        return 1 if self.temperature == 0 and self.keeps_all else None

    def choose(self, logits: torch.Tensor, noise: torch.Tensor) -> Choice:
        """Draw one token per position by inverting the cumulative distribution of those kept.

        Args:
            logits: [N, V], -inf at tokens that must not come out.
            noise: [N] float32 uniform numbers of (0, 1); the only randomness.
        """
        logits = self._allowed(logits)
        if self.width is not None:
            k = min(self.width, logits.shape[1])
            if kernels.applies(logits, k):
                cuts = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
                return Choice(*kernels.choose(logits, noise, k, **cuts))
        elif not self.keeps_all:
            return self._choose_of_nucleus(logits.float(), noise)
        return self.draw(self.candidates(logits), noise)

    def candidates(self, logits: torch.Tensor, width: int | None = None) -> Candidates:
        """The tokens that may come out, of those allowed.

        Args:
            logits: [N, V], -inf at tokens that must not come out.
            width: how many at most, the best; by default `width`.
        """
        width = self.width if width is None else width
        if width is None and self.keeps_all:
            return Candidates(
                logits.softmax(1, dtype=torch.float32), None, torch.ones(1, 1, device=logits.device)
            )
        probability, ids = top_probabilities(logits, min(width or logits.shape[1], logits.shape[1]))
        return Candidates(probability, ids, self.kept(probability))

    def kept(self, probability: torch.Tensor) -> torch.Tensor:
        """Which of the k best tokens belong to the top-p and the min-p set.

        Args:
            probability: [N, k] in falling order; top-p counts in shares of their sum.

        Returns:
            [N, k] float32, 1 or 0.
        """
        share = self._tempered(probability)
        return self._within(probability, share / share.sum(1, keepdim=True))

    def _within(self, probability: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """[N, k] float32, 1 where min-p admits the probability and top-p the share, both in falling order."""
        kept = (probability > 0) & (probability >= self.min_p * probability[:, :1])
        if self.top_p < 1:
            kept &= share.cumsum(1) - share < self.top_p
        return kept.float()

    def _choose_of_nucleus(self, logits: torch.Tensor, noise: torch.Tensor) -> Choice:
        """See `choose`, for the top-p and min-p set of the whole vocabulary [N, V].

        Tokens are sorted only as far as the set reaches: where the `NUCLEUS` best do not hold it, 16 times as
        many are looked at, and so on. The result is the same.
        """
        heat = self.temperature or 1.0
        total = log_normaliser(logits)
        heated = total if heat == 1 else log_normaliser(logits / heat)
        token = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        out = Choice(token, torch.zeros_like(noise), torch.zeros_like(noise))
        rows, width, vocab = torch.arange(len(logits), device=logits.device), NUCLEUS, logits.shape[1]
        while len(rows):
            values, ids = logits[rows].topk(min(width, vocab), dim=1)
            probability = (values - total[rows]).exp()
            kept = self._within(probability, (values / heat - heated[rows]).exp())
            held = (kept[:, -1] == 0) | (width >= vocab)
            found = self.draw(Candidates(probability[held], ids[held], kept[held]), noise[rows[held]])
            for name in (x.name for x in fields(Choice)):
                getattr(out, name)[rows[held]] = getattr(found, name)
            rows, width = rows[~held], 16 * width
        return out

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
            index = _invert(self._tempered(probability) * candidates.kept, noise)
        at = index[:, None]
        token = index if ids is None else ids.gather(1, at)[:, 0]
        return Choice(token, probability.gather(1, at)[:, 0], candidates.mass)

    def certainty(self, logits: torch.Tensor, kind: Certainty) -> torch.Tensor:
        """[N, V] -> [N], how sure the model is there, forbidden tokens apart."""
        return certainty(self._allowed(logits), kind)

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with the forbidden tokens shut."""
        if not self.forbidden:
            return logits
        shut = torch.tensor([token for token in self.forbidden if token < logits.shape[1]], dtype=torch.int64)
        return logits.index_fill(1, sent(shut, logits.device), -math.inf)

    def _tempered(self, probability: torch.Tensor) -> torch.Tensor:
        """The distribution at this temperature, unnormalised."""
        if self.temperature in (0.0, 1.0):
            return probability
        return (probability.log() / self.temperature).softmax(1)


def _invert(weight: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[N, k] weights and [N] uniforms -> [N] indices; an index of weight 0 never comes out."""
    cumulative = weight.cumsum(1)
    total = cumulative[:, -1:]
    point = torch.minimum(noise[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=weight.shape[1] - 1)
