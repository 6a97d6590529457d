"""The generative frontier: nats per token under a reader against the entropy of the texts.

The divergence of the texts' law q from the reader's p is a cross-entropy less an entropy, KL(q‖p) = H(q, p) -
H(q). Nats per token estimate the first alone, and whoever repeats himself or draws at a low temperature makes
them small; so decoders are compared at equal entropy, each on its curve over temperatures (Pynadath, Shi and
Zhang, arXiv 2604.02718; 2606.08417). The entropy is that of unigrams: what the papers compute for want of
H(q), and a bound on it only in the limit, so that it ranks decoders at equal entropy and is no divergence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.statistics import MIN_VALUES, Estimate, jackknife

Array = np.ndarray

REACHED = 0.95
"""Share of the resamples whose curve must reach an entropy for an interval there."""


def entropy(counts: Array) -> Array:
    """[...] Entropy -Σ p log p in nats of the frequencies p = counts / Σ counts; NaN without counts.

    Args:
        counts: [..., V], not negative.
    """
    total = counts.sum(-1, keepdims=True)
    p = np.divide(counts, total, out=np.zeros(np.shape(counts)), where=total > 0)
    nats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return np.where(total[..., 0] > 0, np.abs(nats), np.nan)


def unigram_entropy(ids: Sequence[int], span: int = 0) -> float:
    """Entropy in nats of the frequencies of tokens within one text; NaN for an empty one.

    H(x) = -Σ_v (c_v/n) log(c_v/n), c_v how often token v stands among the n of the text. It is at most log n,
    so that longer texts have more of it; with a span it is the mean over all runs of so many tokens (a
    shorter text is one run), which has the same bound for all lengths.

    Args:
        ids: the text's tokens.
        span: tokens of a run; 0 for the whole text.
    """
    width = min(span or len(ids), len(ids))
    if not width:
        return math.nan
    counts = Counter(ids[:width])
    values = [float(entropy(np.array(list(counts.values()), dtype=float)))]
    for leaving, entering in zip(ids, ids[width:], strict=False):
        counts.subtract([leaving])
        counts[entering] += 1
        values.append(float(entropy(np.array(list(counts.values()), dtype=float))))
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class FrontierSample:
    """Answers of one decoder at one temperature.

    Attributes:
        temperature: of the tokens drawn.
        question: [N] int64, number of the question that each answers.
        nats: [N] nats per token under the reader; NaN for an empty answer, which is left out of all means.
        entropies: [N] `unigram_entropy` of each; their mean is the entropy of the sample ("sequence" and
            "span").
        counts: [N, V] how often each token stands in each answer, where the entropy is that of all texts put
            together ("corpus"); nats per token are then weighted by length, as a cross-entropy of the same
            tokens; else None.
        figures: [N] further figures by name, whose means are shown beside.
    """

    temperature: float
    question: Array
    nats: Array
    entropies: Array
    counts: Array | None = None
    figures: Mapping[str, Array] = field(default_factory=dict)

    def means(self, weights: Array) -> tuple[Array, Array]:
        """[R] entropy and [R] nats per token of the resamples.

        Args:
            weights: [R, Q] how often each question stands in each resample.
        """
        w = weights[:, self.question] * np.isfinite(self.nats)  # [R, N]
        nats = np.nan_to_num(self.nats)
        if self.counts is None:
            return _weighted_mean(w, np.nan_to_num(self.entropies)), _weighted_mean(w, nats)
        pooled = np.concatenate(
            [entropy(part @ self.counts) for part in np.array_split(w, 1 + len(w) // 100)]
        )
        return pooled, _weighted_mean(w * self.counts.sum(1), nats)

    def figure(self, name: str) -> float:
        """Mean of a figure over the answers that have one; NaN where none has."""
        values = self.figures.get(name, np.array([]))
        return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan


def _weighted_mean(weights: Array, values: Array) -> Array:
    """[R] weighted means; NaN where no weight is."""
    total = weights.sum(1)
    out = np.full(len(weights), np.nan)
    np.divide(weights @ values, total, out=out, where=total > 0)
    return out


@dataclass(frozen=True)
class Curve:
    """A decoder's curve over temperatures, for the answers and for resamples of them.

    Attributes:
        entropy: [R, K] at K temperatures; row 0 is that of the answers themselves.
        nats: [R, K] nats per token.
    """

    entropy: Array
    nats: Array

    @classmethod
    def of(cls, samples: Sequence[FrontierSample], weights: Array) -> Curve:
        """Of samples in the order of their temperatures; `weights` as for `FrontierSample.means`."""
        pairs = [sample.means(weights) for sample in samples]
        return cls(np.stack([a for a, _ in pairs], 1), np.stack([b for _, b in pairs], 1))

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest entropy of the answers; NaN where no temperature has any."""
        finite = self.entropy[0][np.isfinite(self.entropy[0])]
        return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)

    def at(self, level: float) -> tuple[Array, Array, Array]:
        """Nats at an entropy by linear interpolation between neighbouring temperatures.

        Where the curve turns and crosses the entropy several times, the least nats count: the frontier is
        what the decoder can do.

        Returns:
            [R] nats, NaN where the curve does not reach the entropy; [R] number of the segment; [R] share of
            the way along it.
        """
        low, high = self.entropy[:, :-1], self.entropy[:, 1:]
        crossed = (np.minimum(low, high) <= level) & (level <= np.maximum(low, high))
        length = np.where(low == high, 1.0, high - low)
        share = np.where(crossed, np.nan_to_num((level - low) / length), 0.0)
        share = np.where(low == high, self.nats[:, 1:] < self.nats[:, :-1], share)  # the lower end
        with np.errstate(invalid="ignore"):
            nats = self.nats[:, :-1] * (1 - share) + self.nats[:, 1:] * share
        nats = np.where(low == high, np.fmin(self.nats[:, :-1], self.nats[:, 1:]), nats)
        nats = np.where(crossed & np.isfinite(nats), nats, np.inf)
        segment, rows = nats.argmin(1), np.arange(len(nats))
        least = nats[rows, segment]
        return np.where(np.isfinite(least), least, np.nan), segment, share[rows, segment]

    def along(self, level: float, values: Sequence[float]) -> float:
        """A figure of each temperature, [K], at an entropy of the answers; NaN outside the curve."""
        nats, segment, share = self.at(level)
        first, second = values[segment[0]], values[segment[0] + 1]
        return math.nan if math.isnan(nats[0]) else first + float(share[0]) * (second - first)


def resamples(questions: int, count: int, seed: int = 0) -> Array:
    """[1 + count, questions] how often each question stands in a resample; row 0 is all of them once."""
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), count)
    return np.concatenate([np.ones((1, questions), dtype=drawn.dtype), drawn])


def left_out(questions: int) -> Array:
    """[1 + questions, questions] weights without one question each; row 0 is all of them once.

    The entropy of pooled texts falls where a question is drawn twice, so that a bootstrap's interval may miss
    the value itself; the jackknife's does not.
    """
    return np.concatenate([np.ones((1, questions), dtype=int), 1 - np.eye(questions, dtype=int)])


def interval(values: Array, questions: int, level: float = 0.95, *, jackknifed: bool = False) -> Estimate:
    """Value of the answers (row 0) and its interval from the other rows.

    They are resamples, whose percentiles count; or with `jackknifed` those of `left_out`. NaN ends where
    there are fewer than `MIN_VALUES` questions, or fewer than `REACHED` of the resamples (all that are left
    out) have a value: near the end of a curve an interval of those that reach so far would be too narrow.
    """
    value, drawn = float(values[0]), values[1:]
    if jackknifed:
        half = jackknife(drawn.tolist(), level)
        return Estimate(value, value - half, value + half, questions)
    finite = drawn[np.isfinite(drawn)]
    if math.isnan(value) or questions < MIN_VALUES or len(finite) < max(REACHED * len(drawn), 1):
        return Estimate(value, math.nan, math.nan, questions)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), questions)


def shared_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Entropies that every curve reaches, but for those without any; None where there are none."""
    ranges = [curve.range for curve in curves if not math.isnan(curve.range[0])]
    low, high = max((r[0] for r in ranges), default=math.nan), min((r[1] for r in ranges), default=math.nan)
    return (low, high) if low <= high else None


def levels(curves: Sequence[Curve]) -> list[float]:
    """Three entropies to compare at: quarters of the range that all share, else of the first curve's."""
    reached = [curve.range for curve in curves if not math.isnan(curve.range[0])]
    low, high = shared_range(curves) or (*reached, curves[0].range)[0]
    return [low + share * (high - low) for share in (0.25, 0.5, 0.75)]


@dataclass(frozen=True)
class Comparison:
    """A decoder at one entropy.

    Attributes:
        entropy: where.
        nats: per token; NaN where the curve does not reach so far.
        difference: from the first decoder's on the same resamples of questions; None for the first.
    """

    entropy: float
    nats: Estimate
    difference: Estimate | None


def at_levels(
    curves: Mapping[str, Curve], entropies: Sequence[float], questions: int, *, jackknifed: bool = False
) -> dict[str, list[Comparison]]:
    """Each decoder at each entropy, and against the first decoder.

    Args:
        curves: by name, of the same resamples.
        entropies: where.
        questions: how many there are.
        jackknifed: whether the curves are of `left_out` questions.
    """
    first = next(iter(curves))
    base = {level: curves[first].at(level)[0] for level in entropies}
    out: dict[str, list[Comparison]] = {}
    for name, curve in curves.items():
        interpolated = [(level, curve.at(level)[0]) for level in entropies]
        out[name] = [
            Comparison(
                level,
                interval(nats, questions, jackknifed=jackknifed),
                None if name == first else interval(nats - base[level], questions, jackknifed=jackknifed),
            )
            for level, nats in interpolated
        ]
    return out
