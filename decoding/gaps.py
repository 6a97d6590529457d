"""Texts with gaps, and spans that are written again; importable without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from decoding.request import is_whole
from dlm.errors import ConfigError

GAP = re.compile(r"<mask(?::(\d{1,7})(?:-(\d{1,7}))?)?>")
"""A gap in a text that is to be filled: its number of tokens, the least and the greatest, or neither."""

OPEN_GAP = 32
"""Longest text that is tried for a gap that does not say its length."""


@dataclass(frozen=True)
class Gap:
    """A number of tokens to be written, between two bounds."""

    least: int
    most: int
    coarse: bool = False
    """Try few of the lengths, each a fifth longer than the last, in place of all."""

    @property
    def count(self) -> int:
        """The number of `lengths`."""
        return len(self.lengths) if self.coarse else self.most - self.least + 1

    @property
    def lengths(self) -> list[int]:
        """The lengths that are tried, rising."""
        if not self.coarse:
            return list(range(self.least, self.most + 1))
        lengths = [self.least]
        while lengths[-1] < self.most:
            lengths.append(min(self.most, max(lengths[-1] + 1, lengths[-1] * 6 // 5)))
        return lengths

    @classmethod
    def of(cls, length: int | tuple[int, int]) -> Gap:
        """A gap of so many tokens, or of a number between two.

        Raises:
            ConfigError: for what is neither.
        """
        bounds: Any = (length, length) if is_whole(length) else length
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(map(is_whole, bounds)):
            raise ConfigError(f"length must be a number of tokens or two such as (2, 6), got {length!r}")
        least, most = map(int, bounds)
        return cls(least, most)

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.least < 1:
            raise ConfigError(f"a gap needs at least one token, got {self.least}")
        if self.most < self.least:
            raise ConfigError(f"a gap of {self.least} to {self.most} tokens has no length")


Piece = str | Gap

MANY = 10**9
"""As far as combinations of lengths are counted."""


def combinations(pieces: Sequence[Piece]) -> int:
    """Ways to choose the lengths of the gaps, counted up to `MANY`; none of them is made."""
    total = 1
    for piece in pieces:
        total = min(MANY, total * (piece.count if isinstance(piece, Gap) else 1))
    return total


def pieces_of(text: str, open_until: int = OPEN_GAP) -> list[Piece]:
    """A text cut at its gaps, which are written `<mask:3>`, `<mask:2-6>` or `<mask>`.

    Args:
        text: the text.
        open_until: greatest length of a gap written `<mask>`.

    Raises:
        ConfigError: for a text without a gap, or a gap that can have no length.
    """
    parts = GAP.split(text)
    if len(parts) == 1:
        raise ConfigError("there is no gap; write one as <mask:3> (three tokens), <mask:2-6> or <mask>")
    pieces: list[Piece] = [parts[0]]
    for low, high, text_behind in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        gap = Gap(1, open_until, True) if low is None else Gap(int(low), int(high or low))
        pieces += [gap, text_behind]
    return pieces


def place_of(text: str, span: str) -> tuple[int, int]:
    """(begin, end) of words that occur once in a text, in characters.

    Raises:
        ConfigError: for words that do not occur, or occur several times.
    """
    begin = text.find(span) if span else -1
    if begin < 0 or text.find(span, begin + 1) >= 0:  # the second may overlap with the first
        times = "does not occur" if begin < 0 else "occurs several times"
        raise ConfigError(f"the span {span!r} {times} in the text; give its place as (begin, end)")
    return begin, begin + len(span)


def without_span(
    text: str, span: str | tuple[int, int], gap: Gap | None, count: Callable[[str], int]
) -> list[Piece]:
    """A text from which a span is taken away, to be written again.

    Args:
        text: the text.
        span: the words to write again (which must occur once), or where they begin and end in characters.
        gap: how many tokens come in their place; None for as many as they have.
        count: number of tokens of a text.

    Raises:
        ConfigError: for a span that does not occur, occurs several times, or lies outside the text.
    """
    if not isinstance(span, str | tuple | list):
        raise ConfigError(f"a span is words of the text or their place as (begin, end), got {span!r}")
    if isinstance(span, str):
        span = place_of(text, span)
    if len(span) != 2 or not all(map(is_whole, span)):
        raise ConfigError(f"a span is words of the text or their place as (begin, end), got {span!r}")
    begin, end = span
    if not 0 <= begin < end <= len(text):
        raise ConfigError(f"the span ({begin}, {end}) does not lie in a text of {len(text)} characters")
    space = 1 if text[max(begin - 1, 0) : begin] == " " else 0  # the space before a gap belongs to it
    size = count(text[begin - space : end])
    return [text[:begin], gap or Gap(size, size), text[end:]]


def cut_text(name: str, text: Any, cut: Callable[[], list[Piece]]) -> list[Piece]:
    """The pieces of a text, errors beginning with its name."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a text, got {text!r}")
    try:
        return cut()
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
