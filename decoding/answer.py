"""From a row to text: the finished answer, what is confirmed of an unfinished one, and stop texts.

Pure functions of a canvas of one row. Text is what the tokens say; nothing is stripped.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from decoding.canvas import Canvas
from decoding.request import Plan

BLANK = "░"
"""Stands for a position that is not yet written, in the text of events."""

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The character that stands for bytes which are not yet a whole one."""


BYTES = 4
"""Most bytes of a character in UTF-8."""

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
"""Tokens of one byte, as vocabularies with byte fallback name them (Llama 2)."""


@dataclass(frozen=True)
class Output:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """The answer's tokens, without its end token, its stop text and what stands behind."""
    finish_reason: str
    """"stop" when the model ended the answer itself or wrote a stop text, "length" when the window did; empty
    for a part of an answer (see `partial`)."""
    model_calls: int
    """Model calls that ran this row."""
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared (0 = first); -1 for given ones."""
    steps: int
    """Denoising steps: those that were allowed, or where their number is open those that the row took."""
    confidence: list[float | None]
    """For each of `token_ids`, the model's probability of it when it was written (temperature 1, before any
    cut); None for given ones."""
    top_logprobs: list[list[tuple[int, float]] | None] = field(default_factory=list)
    """For each of `token_ids`, the likeliest tokens and their log-probabilities (natural, temperature 1,
    before any cut) when it was written; None for given ones. Empty unless they were asked for."""
    stop_text: str | None = None
    """The stop text that ended the answer, if one did."""


@dataclass(frozen=True)
class Event:
    """The canvas after one step, for streaming."""

    step: int
    token_ids: list[int]
    """Every position after the prompt that there is now; the mask token where nothing is written."""
    text: str
    """The answer so far, `BLANK` where nothing is written; what follows the last token is left out."""


@dataclass(frozen=True)
class Cut:
    """The part of an answer before a stop text."""

    tokens: int
    """Tokens that lie before it whole."""
    text: str
    """The answer before it."""
    stop: str | None = None
    """The stop text."""


@dataclass
class Detokenizer:
    """Makes text of tokens, without control tokens; remembers the prefix that it has read."""

    tokenizer: PreTrainedTokenizerBase
    _ids: list[int] = field(default_factory=list)
    _text: str = ""
    _begin: int = 0
    _bytes: dict[int, bool] = field(default_factory=dict)

    def text(self, ids: list[int]) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def prefix(self, ids: list[int]) -> str:
        """Text of a prefix that is longer in each call; equal to `text`, but only what is new is decoded.

        `_ids` have been read, and `_text` is theirs, which is `settled`. New tokens are decoded behind those
        from `_begin` on, since a token's text may depend on the one before it.
        """
        size = len(self._ids)
        if ids[:size] != self._ids:
            self._ids, self._text, self._begin, size = [], "", 0, 0
        context = self.text(self._ids[self._begin :]) if size else ""
        new = self.text(ids[self._begin :])[len(context) :]
        if not new or new.endswith(HALF_CHARACTER) or len(self.settled(ids)) < len(ids):
            return self._text + new
        self._ids, self._text, self._begin = ids, self._text + new, size
        return self._text

    def settled(self, ids: list[int]) -> list[int]:
        """The tokens without the bytes at their end.

        A run of `BYTE_TOKEN`s is decoded as a whole: one more may turn all of its characters into U+FFFD.
        """
        size = len(ids)
        while size and self.is_byte(ids[size - 1]):
            size -= 1
        return ids[:size]

    def is_byte(self, token: int) -> bool:
        """True for a `BYTE_TOKEN`."""
        if token not in self._bytes:
            name = getattr(self.tokenizer, "convert_ids_to_tokens", str)
            self._bytes[token] = BYTE_TOKEN.fullmatch(str(name(token))) is not None
        return self._bytes[token]


def answer_ids(canvas: Canvas) -> list[int]:
    """The positions behind the prompt that there are now, masks included."""
    return canvas.ids[0, int(canvas.answer_start[0]) : int(canvas.valid[0].sum())].tolist()


def until_end(ids: list[int], plan: Plan) -> list[int]:
    """Tokens before the first end token."""
    return list(itertools.takewhile(lambda token: token not in plan.end_tokens.end_ids, ids))


def written_prefix(canvas: Canvas, plan: Plan) -> list[int]:
    """Tokens of the answer before its first mask and its first end token."""
    return list(itertools.takewhile(lambda token: token != plan.mask_id, until_end(answer_ids(canvas), plan)))


def find_stop(canvas: Canvas, plan: Plan, detokenizer: Detokenizer) -> Cut | None:
    """The first stop text in what is written without a gap; None if there is none.

    A stop text that lies wholly in what the answer was given to begin or to end with does not count.
    """
    if not plan.stop:
        return None
    ids = written_prefix(canvas, plan)
    text = detokenizer.prefix(ids)
    written = canvas.initial[0, int(canvas.answer_start[0]) :].nonzero()[:, 0].tolist()
    if not written:
        return None
    begin, behind = written[0], written[-1] + 1 if plan.ending else len(ids)  # of the row as it will be
    first = len(detokenizer.text(ids[:begin])) if begin else 0
    last = len(detokenizer.text(ids[:behind])) if behind < len(ids) else len(text)
    bounds = [(stop, max(0, first - len(stop) + 1), last + len(stop) - 1) for stop in plan.stop]
    places = [(text.find(stop, begin, end), stop) for stop, begin, end in bounds]
    places = [(place, stop) for place, stop in places if place >= 0]
    if not places:
        return None
    place, stop = min(places)
    return replace(_aligned_cut(detokenizer, ids, text[:place]), stop=stop)


def _aligned_cut(detokenizer: Detokenizer, ids: list[int], text: str) -> Cut:
    """A beginning of the text of `ids`, with the number of tokens that lie in it whole.

    A text grows with its tokens, except within a run of byte tokens, and that a character whose bytes are not
    all there may be shown as several. So the place is found by halves, at tokens that end no run too early,
    and looked for behind it in the next `BYTES - 1` of these and in the run that follows.
    """

    def fits(size: int) -> bool:
        return len(detokenizer.text(ids[:size])) <= len(text)

    byte = [detokenizer.is_byte(token) for token in ids] + [False]
    ends = [0, *(n for n in range(1, len(ids) + 1) if not (byte[n - 1] and byte[n]))]
    place = bisect.bisect_left(ends, True, lo=1, key=lambda n: not fits(n)) - 1
    last = ends[min(place + BYTES, len(ends) - 1)]
    return Cut(next((n for n in range(last, ends[place], -1) if fits(n)), ends[place]), text)


def confirmed(canvas: Canvas, plan: Plan, detokenizer: Detokenizer) -> str:
    """Text that can no longer change: later texts of the row begin with it.

    It ends before the first mask, at a whole character (a run of byte tokens counts as one), and before
    anything that may yet turn out to be the beginning of a stop text. Under a rule that revises tokens
    nothing is confirmed before the row is done.
    """
    if bool(canvas.done[0]) and int(canvas.failed[0]) < 0:
        return output(canvas, plan, detokenizer).text
    if not plan.keeps_tokens:
        return ""
    cut = find_stop(canvas, plan, detokenizer)
    if cut is not None:
        return cut.text
    text = detokenizer.prefix(detokenizer.settled(written_prefix(canvas, plan))).rstrip(HALF_CHARACTER)
    longest = max(map(len, plan.stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in plan.stop):
            return text[:-size]
    return text


def partial(canvas: Canvas, plan: Plan, detokenizer: Detokenizer) -> Output:
    """The confirmed part of an answer, token by token; its finish reason is empty before the row is done."""
    if bool(canvas.done[0]) and int(canvas.failed[0]) < 0:
        return output(canvas, plan, detokenizer)
    text = confirmed(canvas, plan, detokenizer)
    ids = written_prefix(canvas, plan) if plan.keeps_tokens else []
    return _output(canvas, plan, _aligned_cut(detokenizer, ids, text), "")


def output(canvas: Canvas, plan: Plan, detokenizer: Detokenizer) -> Output:
    """The answer of a row that is done, or that a stop text has ended."""
    ids = canvas.ids[0, int(canvas.answer_start[0]) : int(canvas.end[0])].tolist()
    answer = until_end(ids, plan)
    cut = find_stop(canvas, plan, detokenizer)
    reason = "length" if cut is None and len(answer) == len(ids) else "stop"
    return _output(canvas, plan, cut or Cut(len(answer), detokenizer.text(answer)), reason)


def completed(canvas: Canvas, ids: torch.Tensor, plan: Plan, detokenizer: Detokenizer) -> Output:
    """The answer of a row, were its first tokens `ids` [W] and everything beyond the canvas an end token."""
    filled = canvas.ids.clone()
    filled[0, : len(ids)] = ids
    filled = torch.where(canvas.valid, filled, plan.end_tokens.eos_id)
    return output(replace(canvas, ids=filled, masked=torch.zeros_like(canvas.masked)), plan, detokenizer)


def _output(canvas: Canvas, plan: Plan, part: Cut, finish_reason: str) -> Output:
    """The part of a row's answer that is given."""
    start = int(canvas.answer_start[0])
    where = slice(start, start + part.tokens)
    confidence = canvas.confidence[0, where].tolist()
    alternatives = canvas.alternatives[0, where].tolist() if plan.top_logprobs else []
    return Output(
        text=part.text,
        token_ids=canvas.ids[0, where].tolist(),
        finish_reason=finish_reason,
        model_calls=int(canvas.model_calls[0]),
        reveal_step=canvas.reveal_step[0, where].tolist(),
        steps=plan.pace.total(int(canvas.step[0])),
        confidence=[None if math.isnan(p) else p for p in confidence],
        top_logprobs=[
            None
            if math.isnan(p)
            else [(int(token), logprob) for token, logprob in pairs if logprob > -math.inf]
            for p, pairs in zip(confidence, alternatives, strict=False)
        ],
        stop_text=part.stop,
    )


def event(canvas: Canvas, plan: Plan, detokenizer: Detokenizer) -> Event:
    """The row as it is now."""
    ids, finished = answer_ids(canvas), bool(canvas.done[0])
    cut = find_stop(canvas, plan, detokenizer) if plan.keeps_tokens or finished else None
    step = int(canvas.step[0]) - 1
    if cut is not None:
        return Event(step, ids[: cut.tokens], cut.text)
    text = output(canvas, plan, detokenizer).text if finished else show(ids, plan, detokenizer)
    return Event(step, ids, text)


def show(ids: list[int], plan: Plan, detokenizer: Detokenizer) -> str:
    """Text of a partly written answer up to its end, `BLANK` for each mask.

    Bytes beside a mask that are not yet a whole character are shown as blanks too.
    """
    ids = until_end(ids, plan)
    while ids and ids[-1] == plan.mask_id:
        ids = ids[:-1]
    runs = itertools.groupby(ids, key=lambda token: token == plan.mask_id)
    parts = [BLANK * len(list(run)) if blank else detokenizer.text(list(run)) for blank, run in runs]
    return "".join(parts).replace(HALF_CHARACTER, BLANK)
