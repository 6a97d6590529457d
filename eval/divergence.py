"""Distance of a set of texts from a set of references, by the meaning of texts: a relative of MAUVE.

As in MAUVE (arXiv 2102.01454) the states of both sets are put into common bins by k-means, and the two
histograms P and Q are compared by their divergence frontier, the curve of KL(P‖R) and KL(Q‖R) over the
mixtures R = λP + (1-λ)Q. The states are those of a sentence encoder (MAUVE's are GPT-2's), and the frontier
is summed up by its integral (arXiv 2106.07898), which has a closed form and no constant to choose, in place
of the area under its exponential: 0 for equal histograms, 1 for such that share no bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def frontier_integral(p: np.ndarray, q: np.ndarray) -> float:
    """Frontier integral of two distributions, [K] each, in [0, 1].

    2 ∫ λ KL(P‖R_λ) + (1-λ) KL(Q‖R_λ) dλ over λ from 0 to 1, R_λ = λP + (1-λ)Q, which is
    Σ_k (p_k + q_k)/2 - p_k q_k log(p_k/q_k) / (p_k - q_k); equal p_k and q_k add nothing.
    """
    mean = (p + q) / 2
    common = (p > 0) & (q > 0) & ~np.isclose(p, q, rtol=1e-9, atol=0)
    a, b = np.where(common, p, 1.0), np.where(common, q, 0.5)
    shared = np.where(common, a * b * np.log(a / b) / (a - b), np.where((p > 0) & (q > 0), mean, 0.0))
    return float(np.clip((mean - shared).sum(), 0.0, 1.0))


def smoothed(labels: np.ndarray, bins: int) -> np.ndarray:
    """[K] Frequencies of labels with half a text added to each bin (Krichevsky and Trofimov), as MAUVE's."""
    counts = np.bincount(labels.ravel(), minlength=bins) + 0.5
    return np.asarray(counts / counts.sum())


@dataclass(frozen=True)
class Distance:
    """Distance of answers from references.

    Attributes:
        value: `frontier_integral` of the smoothed histograms.
        chance: its mean where answers and references of a question change places by chance: what two sets of
            one law would be apart, with as many texts and bins.
        bins: K.
    """

    value: float
    chance: float
    bins: int


def distance(references: np.ndarray, answers: np.ndarray, draws: int = 200, seed: int = 0) -> Distance:
    """Distance of answers from the references to the same questions.

    The bins are those of k-means over all of them, one for ten references and at least two.

    Args:
        references: [N, D] states.
        answers: [N, S, D] states, S answers to each question.
        draws: exchanges behind `Distance.chance`.
        seed: of k-means and of the exchanges.

    Raises:
        ValueError: for fewer than ten references, which have no histogram.
    """
    from sklearn.cluster import KMeans

    if len(references) < 10:
        raise ValueError(f"a histogram needs at least 10 references, got {len(references)}")
    bins = min(max(round(len(references) / 10), 2), 500)
    states = np.concatenate([references[:, None], answers], axis=1)  # [N, 1 + S, D]
    flat = states.reshape(-1, states.shape[-1])
    bins = min(bins, len(np.unique(flat, axis=0)))
    labels = KMeans(bins, n_init=5, random_state=seed).fit_predict(flat).reshape(states.shape[:2])
    rng = np.random.default_rng(seed)
    rows = np.arange(len(labels))
    values = []
    for draw in range(draws + 1):
        column = (
            np.zeros(len(labels), dtype=int) if draw == 0 else rng.integers(labels.shape[1], size=len(labels))
        )
        unused = np.ones(labels.shape, dtype=bool)
        unused[rows, column] = False
        values.append(frontier_integral(smoothed(labels[rows, column], bins), smoothed(labels[unused], bins)))
    return Distance(values[0], float(np.mean(values[1:])), bins)
