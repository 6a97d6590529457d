"""Rows of tokens: a prompt and the masks of its answer, or a text with gaps."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dlm.errors import ConfigError
from dlm.tokenizer import Message, as_messages, encode_prompt, encode_text

Prompt = str | list[Message]
"""A text (one user turn) or chat messages."""

GAP = re.compile(r"<mask:(\d{1,7})(?:-(\d{1,7}))?>")
"""A gap in a text that is to be filled: its number of tokens, or the least and the greatest."""

MOST_LENGTHS = 256
"""How many combinations of lengths the gaps of one text may have."""


@dataclass(frozen=True)
class Row:
    """One row, before it becomes part of a canvas."""

    ids: list[int]
    """The mask token where something is to be written."""
    answer: int
    """Where the answer begins; what stands before it is the prompt."""
    name: str
    """For errors: "prompt 3", "text 0"."""
    ends_from: int = 0
    """The first position at which an end token may be written."""

    def digest(self, mask_id: int) -> bytes:
        """Identifies the given tokens of the row, whatever the length of the window."""
        known = [token for token in self.ids if token != mask_id]
        return hashlib.blake2b(repr(known).encode(), digest_size=8).digest()


@dataclass(frozen=True)
class Gap:
    """A number of tokens to be written, between two bounds."""

    least: int
    most: int

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.least < 1:
            raise ConfigError(f"a gap needs at least one token, got {self.least}")
        if self.most < self.least:
            raise ConfigError(f"a gap of {self.least} to {self.most} tokens has no length")


Piece = str | Gap


def pieces_of(text: str) -> list[Piece]:
    """A text cut at its gaps, which are written `<mask:3>` or `<mask:2-6>`.

    Raises:
        ConfigError: for a text without a gap, or a gap that can have no length.
    """
    parts = GAP.split(text)
    if len(parts) == 1:
        raise ConfigError("there is no gap; write one as <mask:3> (three tokens) or <mask:2-6>")
    pieces: list[Piece] = [parts[0]]
    for least, most, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        pieces += [Gap(int(least), int(most or least)), rest]
    return pieces


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
    if isinstance(span, str):
        if text.count(span) != 1 or not span:
            times = "does not occur" if span not in text or not span else "occurs several times"
            raise ConfigError(f"the span {span!r} {times} in the text; give its place as (begin, end)")
        span = (text.index(span), text.index(span) + len(span))
    begin, end = span
    if not 0 <= begin < end <= len(text):
        raise ConfigError(f"the span ({begin}, {end}) does not lie in a text of {len(text)} characters")
    before = 1 if text[max(begin - 1, 0) : begin] == " " else 0  # the space before a gap belongs to it
    size = count(text[begin - before : end])
    return [text[:begin], gap or Gap(size, size), text[end:]]


class RowMaker:
    """Makes rows from texts.

    Args:
        tokenizer: the model's.
        mask_id: id of the mask token.
        eos_id: id of the end token.
        shift: whether the model's state at i-1 predicts token i, so that a row cannot begin with a mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_id: int, eos_id: int, shift: bool) -> None:
        self.tokenizer, self.mask_id, self.eos_id, self.shift = tokenizer, mask_id, eos_id, shift

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, template included."""
        return encode_prompt(self.tokenizer, as_messages(prompt))

    def text(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a control token is text."""
        return encode_text(self.tokenizer, text)

    def answer(
        self,
        prompt: Prompt,
        tokens: int,
        positions: int,
        name: str,
        begin: str = "",
        ending: str = "",
        forced: Mapping[int, str] | None = None,
    ) -> Row:
        """A prompt, and masks for its answer.

        Args:
            prompt: text or messages.
            tokens: longest answer; less where the positions do not suffice.
            positions: longest row.
            name: for errors.
            begin: what the answer begins with.
            ending: what it ends with, at its last positions and followed by the end token.
            forced: texts at places of the answer, which are counted in tokens from 0; no end token is written
                before the last of them.

        Raises:
            ConfigError: for a prompt that does not fit, and for given tokens that do not fit or overlap.
        """
        before = self.prompt(prompt)
        if len(before) >= positions:
            raise ConfigError(
                f"{name}: the prompt has {len(before)} tokens and the window {positions}; "
                f"the window must be at least {len(before) + 1}"
            )
        answer = [self.mask_id] * min(tokens, positions - len(before))
        last = [*self.text(ending), self.eos_id] if ending else []
        if begin and forced and 0 in forced:
            raise ConfigError("begin and forced both name place 0")
        given = [(0, self.text(begin)), *((at, self.text(text)) for at, text in (forced or {}).items())]
        for at, ids in [*given, (len(answer) - len(last), last)]:
            if at < 0 or at + len(ids) > len(answer):
                raise ConfigError(
                    f"{name}: {len(ids)} given tokens at place {at} do not fit in an answer of {len(answer)}"
                )
            if any(token != self.mask_id for token in answer[at : at + len(ids)]):
                raise ConfigError(f"{name}: the given tokens at place {at} overlap with others")
            answer[at : at + len(ids)] = ids
        if self.mask_id not in answer:
            raise ConfigError(
                f"{name}: the given tokens leave nothing to write in an answer of {len(answer)}"
            )
        places = [at + len(ids) for at, ids in given[1:] if ids]
        until = len(answer) if last else max(places, default=0)
        return Row(before + answer, len(before), name, len(before) + until if until else 0)

    def filled(self, pieces: Sequence[Piece], prompt: Prompt | None, positions: int, name: str) -> list[Row]:
        """The rows of a text with gaps: one for each combination of lengths that the gaps can have.

        A space before a gap belongs to the gap, since tokens carry the space before them.

        Raises:
            ConfigError: for a text that is too long, and for too many combinations.
        """
        gaps = [piece for piece in pieces if isinstance(piece, Gap)]
        lengths = [range(gap.least, gap.most + 1) for gap in gaps]
        several = 1
        for each in lengths:
            several *= len(each)
        if several > MOST_LENGTHS:
            raise ConfigError(
                f"{name}: its gaps have {several} combinations of lengths; at most {MOST_LENGTHS}"
            )
        before = self.prompt(prompt) if prompt is not None else []
        return [self._filled(pieces, sizes, before, positions, name) for sizes in itertools.product(*lengths)]

    def _filled(
        self, pieces: Sequence[Piece], sizes: Sequence[int], before: list[int], positions: int, name: str
    ) -> Row:
        ids: list[int] = []
        left = iter(sizes)
        for i, piece in enumerate(pieces):
            if isinstance(piece, Gap):
                size = next(left)
                if len(before) + len(ids) + size <= positions:
                    ids += [self.mask_id] * size
                    continue
                raise ConfigError(f"{name} is longer than the model's {positions} positions")
            next_is_gap = i + 1 < len(pieces)
            ids += self.text(piece.removesuffix(" ") if next_is_gap else piece)
        if len(before) + len(ids) > positions:
            raise ConfigError(f"{name} is longer than the model's {positions} positions")
        if not before and ids[0] == self.mask_id and self.shift:
            before = [self.eos_id]  # the state before the first token has to come from somewhere
        return Row(before + ids, len(before), name)
