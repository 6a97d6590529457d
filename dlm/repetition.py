"""Measures of texts that need no judge."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that are repeats of an earlier one; 0 for fewer than n words."""
    words = text.split()
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def stutter(text: str) -> float:
    """Share of words that repeat the word before them ("the the"); 0 for fewer than two words."""
    words = text.split()
    pairs = list(pairwise(words))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
