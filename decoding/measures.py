"""Measures of texts that need no judge."""

from __future__ import annotations

from collections import Counter


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that are repeats of an earlier one; 0 for fewer than n words."""
    words = text.split()
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0
