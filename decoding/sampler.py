"""Text in, text out: texts become rows, the engine writes them, answers are cut where they end."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, Unpack, cast

import torch
from transformers import PreTrainedTokenizerBase

from decoding.canvas import Canvas
from decoding.engine import BrokenTicketError, Engine
from decoding.loop import GROWING_WINDOW
from decoding.presets import Decoder
from decoding.request import How, Plan, Planner
from decoding.rows import Gap, Piece, Prompt, Row, RowMaker, pieces_of, without_span
from decoding.states import run_rows
from dlm.device import sent
from dlm.errors import ConfigError, DLMError
from dlm.noise import key_of
from dlm.tokenizer import Message

BLANK = "░"
"""Stands for a position that is not yet written, in the text of events."""

NEIGHBOURS = 4
"""Given tokens on each side of a gap that have their say on its length."""

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """The answer's tokens, without its EOS, its stop text and what stands behind."""
    finish_reason: str
    """"stop" when the model ended the answer itself or wrote a stop text, "length" when the window did."""
    model_calls: int
    """Model calls that ran this row."""
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared (0 = first); -1 for given ones."""
    steps: int
    """Denoising steps: those that were allowed, or at a rate those that the row took."""
    confidence: list[float | None]
    """For each of `token_ids`, the model's probability of it when it was written (temperature 1, before any
    cut); None for given ones."""


@dataclass(frozen=True)
class Infilled:
    """A text whose gaps have been filled."""

    text: str
    """All of it."""
    gaps: list[str]
    """What was written into each gap; neighbouring gaps count as one."""
    token_ids: list[int]
    model_calls: int
    """Model calls, those for other lengths of the gaps included."""
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared; -1 for given ones."""
    score: float
    """Mean log-probability, in nats, of the tokens in the gaps (each when it was written) and, if lengths
    had to be compared, of the given tokens beside them."""


@dataclass(frozen=True)
class Event:
    """The canvas after one step, for streaming."""

    step: int
    token_ids: list[int]
    """Every position after the prompt that there is now; the mask token where nothing is written."""
    text: str
    """The answer so far, `BLANK` where nothing is written; what follows the last token is left out."""


@dataclass(frozen=True)
class _Task:
    """A row to be decoded, and what it is part of."""

    row: Row
    seed: int
    plan: Plan
    tries: int = 1
    """How many rows its text has, one for each combination of lengths."""


class Sampler:
    """Generates text with a masked diffusion model.

    Args:
        model: from `dlm.load_model`; anything with `hidden`, `logits` and a config will do.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.mask_id = int(config.mask_token_id)
        self.eos_id = int(config.eos_token_id)
        limit = int(getattr(config, "max_positions", 2**31))
        self.planner = Planner(
            self.mask_id, self.eos_id, limit, dict(getattr(config, "generation", None) or {})
        )
        self.rows = RowMaker(tokenizer, self.mask_id, self.eos_id, bool(getattr(config, "shift", False)))

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        begin: str = "",
        ending: str = "",
        forced: Mapping[int, str] | None = None,
        **how: Unpack[How],
    ) -> list[Output]:
        """Answer prompts; see `iter_generate` for the arguments. A single prompt gives a list of one."""
        given: dict[str, Any] = {"begin": begin, "ending": ending, "forced": forced}
        return list(self.iter_generate(_several(prompts), seed=seed, batch_size=batch_size, **given, **how))

    def iter_generate(
        self,
        prompts: Iterable[Prompt],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        begin: str = "",
        ending: str = "",
        forced: Mapping[int, str] | None = None,
        **how: Unpack[How],
    ) -> Iterator[Output]:
        """Answer prompts, without reading them all first; where one is finished, the next takes its place.

        Args:
            prompts: texts or chat message lists.
            seed: one seed for all rows, or one per prompt. A row's noise depends on its seed and its own
                prompt, never on its batch-mates, so equal prompts under one seed give equal texts.
            batch_size: rows per model call.
            begin: what every answer begins with.
            ending: what every answer ends with (a goal), at the last positions of the window or of
                `max_tokens`, so that the answer has that length; a text as it stands, which usually begins
                with a space.
            forced: texts at given places of the answer, counted in tokens from 0; the answer does not end
                before the last of them.
            **how: see `How`.

        Yields:
            One `Output` per prompt, in order.

        Raises:
            ConfigError: for settings out of range; and for a prompt that does not fit, after the answers to
                those before it.
            DLMError: when the model returns NaN, naming the step and the prompt.
        """
        plan = self._plan(ending, **how)
        given: dict[str, Any] = {"begin": begin, "ending": ending, "forced": forced}

        def tasks() -> Iterator[_Task]:
            for i, (prompt, own) in enumerate(_with_seeds(prompts, seed)):
                row = self.rows.answer(prompt, plan.tokens, plan.positions, f"prompt {i}", **given)
                yield _Task(row, own, plan)

        for task, canvas in self._finished(tasks(), batch_size):
            yield self._output(canvas, task)

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        begin: str = "",
        ending: str = "",
        forced: Mapping[int, str] | None = None,
        **how: Unpack[How],
    ) -> Iterator[Event]:
        """Answer one prompt and show the canvas after every step; arguments as in `iter_generate`."""
        plan = self._plan(ending, **how)
        row = self.rows.answer(
            prompt, plan.tokens, plan.positions, "prompt 0", begin=begin, ending=ending, forced=forced
        )
        engine = Engine(self.model)
        (ticket,) = engine.add(self._canvas([_Task(row, seed, plan)]), plan.decoder, plan.settings)
        going = True
        while going:
            going = ticket not in engine.step()
            canvas = engine.row(ticket)
            ids = canvas.ids[0, row.answer : int(canvas.valid[0].sum())].tolist()
            found = self._stop(canvas, row, plan.stop) if plan.settles or not going else None
            if found is not None:
                ids, going = ids[: found[0]], False
            yield Event(int(canvas.step[0]) - 1, ids, self.show(ids) if found is None else found[1])

    def _plan(self, ending: str, **how: Unpack[How]) -> Plan:
        """A plan; with an ending, for a canvas that has its whole length."""
        plan = self.planner.plan(**how)
        if ending and (how.get("canvas") == "growing" or how.get("margin") is not None):
            raise ConfigError("an ending stands at the end of the canvas, which therefore cannot grow")
        return _whole(plan) if ending else plan

    def infill(
        self,
        texts: str | Iterable[str],
        *,
        prompt: Prompt | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> list[Infilled]:
        """Fill the gaps of texts; see `iter_infill` for the arguments. A single text gives a list of one."""
        several = [texts] if isinstance(texts, str) else texts
        return list(self.iter_infill(several, prompt=prompt, seed=seed, batch_size=batch_size, **how))

    def iter_infill(
        self,
        texts: Iterable[str],
        *,
        prompt: Prompt | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> Iterator[Infilled]:
        """Fill the gaps of texts: `<mask:3>` stands for three tokens, `<mask:2-6>` for two to six.

        What is written around the gaps is never changed, and everything before and behind them is seen; a
        convolutional window opens each gap from both of its sides. Control tokens cannot come out. A space
        before a gap belongs to the gap, since tokens carry the space before them.

        Where a gap's length is open, the text is filled with every length, and the one with the best mean
        log-probability is taken, over the tokens in the gaps (each when it was written) and the given tokens
        beside them (`NEIGHBOURS` on each side, one more model call).

        Args:
            texts: texts with gaps.
            prompt: what the texts are the answer to; by default they stand alone, without a template.
            seed: one seed for all texts, or one per text.
            batch_size: rows per model call.
            **how: see `How`; a text has the length it has, so `window`, `max_tokens`, `eos_fill`, `canvas`,
                `margin` and `stop` are not for it, and without `steps` it is decoded at a `rate`, 1 by
                default.

        Raises:
            ConfigError: for a text without a gap, an empty gap, or a text that is too long for the model.
        """
        named = ((f"text {i}", *pair) for i, pair in enumerate(_with_seeds(texts, seed)))
        pieces = ((name, _named(name, pieces_of, text), own) for name, text, own in named)
        yield from self._fill(pieces, prompt, batch_size, **how)

    def edit(
        self,
        text: str,
        span: str | tuple[int, int],
        *,
        length: int | tuple[int, int] | None = None,
        prompt: Prompt | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> Infilled:
        """Write a span of a text again, seeing what stands on both sides of it.

        Args:
            text: the text; nothing in it is taken for a gap.
            span: the words to write again (which must occur once), or where they begin and end in characters.
            length: tokens that come in their place, or the least and the greatest number; by default as many
                as they have.
            prompt: what the text is the answer to; by default it stands alone.
            seed: seed of the noise.
            batch_size: rows per model call.
            **how: as in `iter_infill`.

        Raises:
            ConfigError: for a span that is not in the text or not clear.
        """
        bounds = (length, length) if isinstance(length, int) else length
        gap = None if bounds is None else Gap(*bounds)
        pieces = without_span(text, span, gap, lambda words: len(self.rows.text(words)))
        return next(self._fill(iter([("the text", pieces, seed)]), prompt, batch_size, **how))

    def _fill(
        self,
        texts: Iterator[tuple[str, list[Piece], int]],
        prompt: Prompt | None,
        batch_size: int,
        **how: Unpack[How],
    ) -> Iterator[Infilled]:
        """Fill texts that have been cut at their gaps."""
        plan = self._infill_plan(**how)

        def tasks() -> Iterator[_Task]:
            for name, pieces, own in texts:
                rows = self.rows.filled(pieces, prompt, plan.positions, name)
                yield from (_Task(row, own, plan, len(rows)) for row in rows)

        filled = self._finished(tasks(), batch_size)
        for first in filled:
            tries = [first, *itertools.islice(filled, first[0].tries - 1)]
            scores = self._scores([canvas for _, canvas in tries])
            best = max(range(len(tries)), key=scores.__getitem__)
            calls = sum(int(canvas.model_calls[0]) for _, canvas in tries) + len(tries) * (len(tries) > 1)
            yield self._infilled(*tries[best], calls, scores[best])

    def _infill_plan(self, **how: Unpack[How]) -> Plan:
        """A plan without a window: the row is as long as its text."""
        for name in ("window", "max_tokens", "eos_fill", "canvas", "margin", "stop"):
            if how.get(name) is not None:
                raise ConfigError(f"{name} means nothing here: a text with gaps has the length it has")
        fixed: How = {**how, "window": self.planner.limit}
        plan = _whole(self.planner.plan(**fixed))
        steps, rate = how.get("steps"), how.get("rate")
        if steps is None and rate is None:
            steps, rate = (self.planner.steps(GROWING_WINDOW), None) if plan.decoder.timed else (None, 1.0)
        settings = replace(plan.settings, steps=steps, rate=rate, fit=GROWING_WINDOW)
        special = getattr(self.tokenizer, "all_special_ids", ())
        return replace(plan, decoder=plan.decoder.without(self.eos_id, *special), settings=settings)

    @torch.inference_mode()
    def _scores(self, tries: Sequence[Canvas]) -> list[float]:
        """How well the gaps are filled, for each try (see `Infilled.score`); one model call for all."""
        written = [canvas.confidence[0][canvas.initial[0]].log() for canvas in tries]
        if len(tries) == 1:
            return [float(written[0].mean())]
        rows = [canvas.ids[0, : int(canvas.end[0])] for canvas in tries]
        near = [_beside(canvas.initial[0, : len(row)]) for canvas, row in zip(tries, rows, strict=True)]
        shown = [torch.where(where, self.mask_id, row) for where, row in zip(near, rows, strict=True)]
        states = run_rows(self.model, torch.cat(shown), [len(row) for row in rows])
        asked = torch.cat(near).nonzero()[:, 0]
        likely = self.model.logits(states[sent(asked, states.device)]).float().log_softmax(1)
        tokens = sent(torch.cat(rows)[asked, None], states.device)
        given = likely.gather(1, tokens)[:, 0].cpu().split([int(x.sum()) for x in near])
        return [float(torch.cat(pair).mean()) for pair in zip(written, given, strict=True)]

    def without(self, texts: Sequence[str], decoder: Decoder | str | None = None, **how: Any) -> Decoder:
        """A decoder that never writes the tokens that these texts are.

        Args:
            texts: one token each.
            decoder: the decoder; by default the one that `how` would be decoded with.
            **how: the rest of the request, as for `generate`.

        Raises:
            ConfigError: for a text that is not exactly one token.
        """
        ids = {text: self.rows.text(text) for text in texts}
        for text, found in ids.items():
            if len(found) != 1:
                raise ConfigError(
                    f"{text!r} is {len(found)} tokens, and must be one (mostly, words begin with a space)"
                )
        return self.planner.plan(decoder, **how).decoder.without(*(found[0] for found in ids.values()))

    @property
    def window(self) -> int:
        """The window of the checkpoint."""
        return self.planner.window

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, template included; a window must be longer."""
        return len(self.rows.prompt(prompt))

    def show(self, ids: list[int]) -> str:
        """Text of a partly written answer, up to its EOS, `BLANK` for each mask."""
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        while ids and ids[-1] == self.mask_id:
            ids = ids[:-1]
        parts = itertools.groupby(ids, key=lambda token: token == self.mask_id)
        return "".join(
            BLANK * len(list(run)) if blank else self._decode(list(run)) for blank, run in parts
        ).strip()

    # ---- from rows to canvases and back --------------------------------------------------------------

    def _finished(self, tasks: Iterator[_Task], batch_size: int) -> Iterator[tuple[_Task, Canvas]]:
        """Decode rows, so many at a time; yields them in order."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        engine = Engine(self.model)
        numbered: Iterator[tuple[int, _Task]] = enumerate(tasks)
        at_work: dict[int, tuple[int, _Task]] = {}
        done: dict[int, tuple[_Task, Canvas]] = {}
        following = 0
        failure: Exception | None = None
        while True:
            new: list[tuple[int, _Task]] = []
            try:
                for item in itertools.islice(numbered, batch_size - len(engine)):
                    new.append(item)
            except Exception as error:  # first let what is at work be finished
                failure, numbered = error, iter(())
            if new:
                plan = new[0][1].plan
                tickets = engine.add(self._canvas([task for _, task in new]), plan.decoder, plan.settings)
                at_work.update(zip(tickets, new, strict=True))
            if not at_work:
                break
            over = set(self._step(engine, at_work))
            over |= {ticket for ticket, (_, task) in at_work.items() if self._stopped(engine, ticket, task)}
            for ticket, canvas in zip(over, engine.remove(*over), strict=True):
                number, task = at_work.pop(ticket)
                done[number] = (task, canvas)
            while following in done:
                yield done.pop(following)
                following += 1
        if failure is not None:
            raise failure

    def _step(self, engine: Engine, at_work: Mapping[int, tuple[int, _Task]]) -> list[int]:
        """One step of all rows; returns those that are done."""
        try:
            return engine.step()
        except BrokenTicketError as error:
            number, task = at_work[error.ticket]
            raise DLMError(
                f"the model returned NaN in step {error.step}, row {number} ({task.row.name})"
            ) from error

    def _stopped(self, engine: Engine, ticket: int, task: _Task) -> bool:
        """Whether a stop text has been written."""
        plan = task.plan
        return (
            bool(plan.stop)
            and plan.settles
            and self._stop(engine.row(ticket), task.row, plan.stop) is not None
        )

    def _stop(self, canvas: Canvas, row: Row, stops: Sequence[str]) -> tuple[int, str] | None:
        """Tokens and text before the first stop text, once everything before it is written."""
        if not stops:
            return None
        ids = canvas.ids[0, row.answer : int(canvas.valid[0].sum())].tolist()
        for end in (self.mask_id, self.eos_id):
            ids = ids[: ids.index(end)] if end in ids else ids
        text = self._decode(ids)
        given = int((~canvas.initial[0, row.answer :]).int().cumprod(0).sum())  # what the answer begins with
        known = len(self._decode(ids[:given])) if given else 0
        found = (text.find(stop, max(0, known - len(stop) + 1)) for stop in stops)
        places = [place for place in found if place >= 0]
        if not places:
            return None
        size = len(ids)
        while size and len(self._decode(ids[:size])) > min(places):
            size -= 1
        return size, text[: min(places)].strip()

    def _canvas(self, tasks: Sequence[_Task]) -> Canvas:
        keys = [key_of(task.seed, task.row.digest(self.mask_id)) for task in tasks]
        rows, plan = [task.row.ids for task in tasks], tasks[0].plan
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.mask_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        valid = torch.arange(width) < lengths[:, None]
        return Canvas.of(
            ids,
            self.mask_id,
            torch.stack(keys),
            valid,
            ahead=plan.settings.ahead(plan.decoder),
            answer=torch.tensor([task.row.answer for task in tasks]),
            ends_from=torch.tensor([task.row.ends_from for task in tasks]),
        )

    def _output(self, canvas: Canvas, task: _Task) -> Output:
        start = task.row.answer
        ids = canvas.ids[0, start : int(canvas.end[0])].tolist()
        stopped = self.eos_id in ids
        end = ids.index(self.eos_id) if stopped else len(ids)
        text = self._decode(ids[:end]).strip()
        found = self._stop(canvas, task.row, task.plan.stop)
        if found is not None:
            (end, text), stopped = found, True
        confidence = canvas.confidence[0, start : start + end].tolist()
        return Output(
            text=text,
            token_ids=ids[:end],
            finish_reason="stop" if stopped else "length",
            model_calls=int(canvas.model_calls[0]),
            reveal_step=canvas.reveal_step[0, start : start + end].tolist(),
            steps=task.plan.settings.steps or int(canvas.step[0]),
            confidence=[None if math.isnan(p) else p for p in confidence],
        )

    def _infilled(self, task: _Task, canvas: Canvas, calls: int, score: float) -> Infilled:
        start, end = task.row.answer, int(canvas.end[0])
        ids, born = canvas.ids[0, start:end].tolist(), canvas.reveal_step[0, start:end].tolist()
        runs = itertools.groupby(zip(ids, born, strict=True), key=lambda pair: pair[1] >= 0)
        gaps = [[token for token, _ in run] for written, run in runs if written]
        return Infilled(
            text=self.tokenizer.decode(ids),
            gaps=[self.tokenizer.decode(gap) for gap in gaps],
            token_ids=ids,
            model_calls=calls,
            reveal_step=born,
            score=score,
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _whole(plan: Plan) -> Plan:
    """The plan for rows that have the length they have: nothing grows, and nothing ends them early."""
    fit = plan.settings.fit or GROWING_WINDOW
    return replace(
        plan, settings=replace(plan.settings, eos_fill=False, early_exit=False, grow=False, fit=fit)
    )


def _beside(gap: torch.Tensor) -> torch.Tensor:
    """[L] bool, the `NEIGHBOURS` given positions on each side of gaps [L]; never the first of the row."""
    position = torch.arange(len(gap))
    near = (position[:, None] - position[gap]).abs().amin(1) <= NEIGHBOURS
    return near & ~gap & (position > 0)


def _named(name: str, call: Callable[[str], T], text: str) -> T:
    """`call(text)`, its errors beginning with a name."""
    try:
        return call(str(text))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _several(prompts: Prompt | Iterable[Prompt]) -> Iterable[Prompt]:
    """A lone text or a lone conversation as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], dict):
        return [cast("list[Message]", prompts)]
    return cast("Iterable[Prompt]", prompts)


def _with_seeds(prompts: Iterable[T], seed: int | Sequence[int]) -> Iterator[tuple[T, int]]:
    """Each prompt with its seed: one for all, or as many seeds as there are prompts."""
    if not isinstance(seed, Sequence):
        yield from zip(prompts, itertools.repeat(operator.index(seed)), strict=False)
        return
    seeds = iter(seed)
    for prompt in prompts:
        own = next(seeds, None)
        if own is None:
            raise ConfigError(f"seed lists {len(seed)} seeds, but there are more prompts")
        yield prompt, int(own)
    if next(seeds, None) is not None:
        raise ConfigError(f"seed lists {len(seed)} seeds, but there are fewer prompts")
