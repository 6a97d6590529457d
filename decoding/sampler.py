"""Text in, text out: the verbs of decoding, on an engine of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any, Literal, TypeVar, overload

from transformers import PreTrainedTokenizerBase

from decoding.answer import Detokenizer, Event, Output, show
from decoding.canvas import Canvas, Row
from decoding.course import Trace
from decoding.denoiser import Denoiser
from decoding.engine import Engine, Update
from decoding.gaps import Gap, Piece, cut_text, pieces_of, without_span
from decoding.infill import Infilled, gap_scores, likeliest, rows_with_gaps
from decoding.presets import Decoder
from decoding.request import DEFAULT_WINDOW, Plan, Request, is_whole
from decoding.row_maker import Prompt, RowMaker, TooLongError
from decoding.tilted.particles import steer
from decoding.tilted.tilt import TILT_FIELDS, Tilt
from dlm.errors import ConfigError, check_whole
from dlm.spec import ModelSpec

Span = str | tuple[int, int]
"""Words of a text, or where they begin and end in characters."""

PromptT = TypeVar("PromptT")


class Sampler:
    """Generates text with a masked diffusion model.

    Every call has an engine of its own, so one sampler may be used by several threads.

    Args:
        model: from `dlm.load_model`; anything with `hidden`, `logits` and a `spec` (or a config) will do.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Denoiser, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = ModelSpec.of(model)
        self.rows = RowMaker(tokenizer, self.spec, self.spec.positions)

    @overload
    def generate(
        self, prompts: Prompt, *, request: Request | None = None, seed: int | Sequence[int] = 0,
        batch_size: int = 16, n: Literal[1] = 1, **fields: Any,
    ) -> Output: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Prompt | Iterable[Prompt], *, request: Request | None = None,
        seed: int | Sequence[int] = 0, batch_size: int = 16, n: int = 1, **fields: Any,
    ) -> list[Output]: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        n: int = 1,
        **fields: Any,
    ) -> Output | list[Output]:
        """Answer one prompt, or several in a list; see `iter_generate` for the arguments.

        Returns:
            One `Output` for a text or a conversation, a list of them for a list of prompts or an `n` above 1.
        """
        one, batch = _as_list(prompts)
        settings: dict[str, Any] = {"request": request, "seed": seed, "batch_size": batch_size, "n": n}
        outputs = self.iter_generate(batch, **settings, **fields)
        return next(outputs) if one and n == 1 else list(outputs)

    def iter_generate(
        self,
        prompts: Iterable[Prompt],
        *,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        n: int = 1,
        **fields: Any,
    ) -> Iterator[Output]:
        """Answer prompts, without reading them all first; where one is finished, the next takes its place.

        Args:
            prompts: texts or chat message lists.
            request: how they are decoded; or give its fields as keyword arguments.
            seed: one seed for all rows, or one per prompt. A row's noise depends on its seed and its own
                prompt, never on the rows beside it, so equal prompts under one seed give equal texts.
            batch_size: rows per model call, or with a reward those of one prompt if they are more.
            n: answers to each prompt, under its seed, that seed + 1, and so on.
            **fields: the fields of a `Request`: decoder, options, max_tokens, rate, window, steps, stop, …
                Beside them or a request, those of a `Tilt`: reward, particles, beta, … Each answer is then
                drawn from p(x) exp(reward(x) / beta) / Z, approximately.

        Yields:
            `n` outputs per prompt, in order; with a reward each is a `TiltedOutput`.

        Raises:
            ConfigError: for settings out of range, and several answers of a decoder that draws nothing, which
                would be equal; and for a prompt that does not fit, after the answers to
                those before it.
            DLMError: when the model returns NaN, naming the step and the prompt.
        """
        tilt, fields = Tilt.among(fields) if TILT_FIELDS & fields.keys() else (None, fields)
        plan = self.plan(request, **fields)
        _check_samples(n, plan)
        check_whole("batch_size", batch_size)
        rows = (
            (self.rows.answer_row(prompt, plan, f"prompt {i}"), prompt, first_seed + number)
            for i, (prompt, first_seed) in enumerate(_with_seeds(prompts, seed))
            for number in range(n)
        )
        if tilt is not None:
            return steer(Engine(self.model, self.tokenizer), plan, tilt, rows, batch_size)
        finished = self._finished(((row, plan, seed) for row, _, seed in rows), batch_size)
        return (_answer_of(update) for update in finished)

    def iter_traced(
        self,
        prompts: Iterable[Prompt],
        *,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **fields: Any,
    ) -> Iterator[tuple[Output, Trace]]:
        """Answer prompts as `iter_generate` does, each with the trace of how it was written."""
        plan = self.plan(request, **fields)
        rows = (
            (self.rows.answer_row(prompt, plan, f"prompt {i}"), plan, own_seed)
            for i, (prompt, own_seed) in enumerate(_with_seeds(prompts, seed))
        )
        check_whole("batch_size", batch_size)
        finished = self._finished(rows, batch_size)
        return ((_answer_of(update), Trace.of(update.canvas, plan)) for update in finished)

    @overload
    def stream(
        self, prompts: Prompt, *, request: Request | None = None, seed: int | Sequence[int] = 0,
        **fields: Any,
    ) -> Iterator[Event]: ...  # fmt: skip

    @overload
    def stream(
        self, prompts: Iterable[Prompt], *, request: Request | None = None, seed: int | Sequence[int] = 0,
        **fields: Any,
    ) -> Iterator[list[Event]]: ...  # fmt: skip

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        **fields: Any,
    ) -> Iterator[Event] | Iterator[list[Event]]:
        """Answer one prompt, or several in a list, and show the canvas after every step.

        Arguments as in `iter_generate`; all prompts are answered together.

        Yields:
            An `Event` for a text or a conversation; for a list of prompts a list of events, one for each, in
            which a finished answer stays as it is.
        """
        one, batch = _as_list(prompts)
        events = self._stream(batch, self.plan(request, **fields), seed)
        return (event for (event,) in events) if one else events

    @overload
    def infill(
        self, texts: str, *, prompt: Prompt | None = None, request: Request | None = None,
        seed: int | Sequence[int] = 0, batch_size: int = 16, **fields: Any,
    ) -> Infilled: ...  # fmt: skip

    @overload
    def infill(
        self, texts: Iterable[str], *, prompt: Prompt | None = None, request: Request | None = None,
        seed: int | Sequence[int] = 0, batch_size: int = 16, **fields: Any,
    ) -> list[Infilled]: ...  # fmt: skip

    def infill(
        self,
        texts: str | Iterable[str],
        *,
        prompt: Prompt | None = None,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **fields: Any,
    ) -> Infilled | list[Infilled]:
        """Fill the gaps of one text, or of several in a list; see `iter_infill` for the arguments.

        Returns:
            One `Infilled` for a text, a list of them for a list of texts.
        """
        settings: dict[str, Any] = {"prompt": prompt, "request": request, "seed": seed, **fields}
        one, batch = _as_list(texts)
        filled = self.iter_infill(batch, batch_size=batch_size, **settings)
        return next(filled) if one else list(filled)

    def iter_infill(
        self,
        texts: Iterable[str],
        *,
        prompt: Prompt | None = None,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **fields: Any,
    ) -> Iterator[Infilled]:
        """Fill the gaps of texts: `<mask:3>` stands for three tokens, `<mask:2-6>` for two to six.

        `<mask>` says no length: a few are tried up to `decoding.gaps.OPEN_GAP`, each a fifth above the last.

        What is written around the gaps is never changed, and everything before and behind them is seen; a
        convolutional window opens each gap from both of its sides. Control tokens cannot come out. A space
        before a gap belongs to the gap, since tokens carry the space before them.

        Where a gap's length is open, the text is filled with every length, and the likeliest is taken: the
        sum of the log-probabilities of the tokens in the gaps (each when it was written) and of the given
        tokens beside them (`decoding.infill.NEIGHBOURS` on each side, one more model call).

        Args:
            texts: texts with gaps.
            prompt: what the texts are the answer to; by default they stand alone, without a template.
            request: how they are decoded; or give its fields as keyword arguments.
            seed: one seed for all texts, or one per text.
            batch_size: rows per model call.
            **fields: decoder, options, steps, rate, reuse, refresh. A text has the length it has; other
                fields of a `Request` are refused. One token is written per call by default.

        Raises:
            ConfigError: for a text without a gap, an empty gap, or a text that is too long for the model.
        """
        plan = self.rows.plan_gaps(_request(request, fields))
        return self._filled(texts, pieces_of, prompt, plan, seed, batch_size)

    @overload
    def edit(
        self, texts: str, span: Span, *, length: int | tuple[int, int] | None = None,
        prompt: Prompt | None = None, request: Request | None = None, seed: int | Sequence[int] = 0,
        batch_size: int = 16, **fields: Any,
    ) -> Infilled: ...  # fmt: skip

    @overload
    def edit(
        self, texts: Iterable[str], span: Span, *, length: int | tuple[int, int] | None = None,
        prompt: Prompt | None = None, request: Request | None = None, seed: int | Sequence[int] = 0,
        batch_size: int = 16, **fields: Any,
    ) -> list[Infilled]: ...  # fmt: skip

    def edit(
        self,
        texts: str | Iterable[str],
        span: Span,
        *,
        length: int | tuple[int, int] | None = None,
        prompt: Prompt | None = None,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **fields: Any,
    ) -> Infilled | list[Infilled]:
        """Write a span of one text again, or of several in a list; see `iter_edit` for the arguments.

        Returns:
            One `Infilled` for a text, a list of them for a list of texts.
        """
        settings: dict[str, Any] = {"prompt": prompt, "request": request, "seed": seed, **fields}
        one, batch = _as_list(texts)
        edited = self.iter_edit(batch, span, length=length, batch_size=batch_size, **settings)
        return next(edited) if one else list(edited)

    def iter_edit(
        self,
        texts: Iterable[str],
        span: Span,
        *,
        length: int | tuple[int, int] | None = None,
        prompt: Prompt | None = None,
        request: Request | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **fields: Any,
    ) -> Iterator[Infilled]:
        """Write a span of texts again, seeing what stands on both sides of it.

        Args:
            texts: the texts; nothing in them is taken for a gap.
            span: the words to write again (which must occur once), or where they begin and end in characters.
            length: tokens that come in their place, or the least and the greatest number; by default as many
                as they have.
            prompt: what the texts are the answer to; by default they stand alone.
            request: how they are decoded; or give its fields as keyword arguments.
            seed: one seed for all texts, or one per text.
            batch_size: rows per model call.
            **fields: as in `iter_infill`.

        Raises:
            ConfigError: for a span that is not in a text or not clear.
        """
        plan = self.rows.plan_gaps(_request(request, fields))
        gap = None if length is None else Gap.of(length)
        cut = partial(without_span, span=span, gap=gap, count=self.text_length)
        return self._filled(texts, cut, prompt, plan, seed, batch_size)

    def without(
        self,
        texts: str | Sequence[str],
        decoder: Decoder | str | None = None,
        *,
        request: Request | None = None,
        **fields: Any,
    ) -> Decoder:
        """A decoder that never writes the tokens that these texts are.

        Args:
            texts: one token each; or one text.
            decoder: the decoder; by default the one that the rest of the request would be decoded with.
            request: the rest of the request; or its fields as keyword arguments.
            **fields: as in `iter_generate`.

        Raises:
            ConfigError: for a text that is not exactly one token.
        """
        arguments = {**fields, **({} if decoder is None else {"decoder": decoder})}
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"tokens are given as texts, got {texts!r}")
        ids = {text: self.rows.text(text) for text in texts}
        for text, token_ids in ids.items():
            if len(token_ids) != 1:
                raise ConfigError(
                    f"{text!r} is {len(token_ids)} tokens, and must be one (mostly, words begin with a space)"
                )
        return (
            _request(request, arguments)
            .decoder_for(self.spec)
            .without(*(token_ids[0] for token_ids in ids.values()))
        )

    def plan(self, request: Request | None = None, **fields: Any) -> Plan:
        """The plan that a request, or its fields, come to for this model."""
        return _request(request, fields).resolve(self.spec)

    @property
    def window(self) -> int:
        """The window of the checkpoint."""
        return self.spec.defaults.window or DEFAULT_WINDOW

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, template included; a window must be longer."""
        return len(self.rows.prompt(prompt))

    def fits(self, prompt: Prompt, window: int) -> bool:
        """True for a prompt that leaves room for an answer in a window of so many tokens."""
        try:
            return self.prompt_length(prompt) < window
        except TooLongError:
            return False

    def text_length(self, text: str) -> int:
        """Tokens of a plain text.

        Raises:
            ConfigError: for one that cannot fit in the model's positions by its number of characters alone.
        """
        return len(self.rows.text(text))

    def show(self, ids: list[int]) -> str:
        """Text of a partly written answer, up to its end, with a blank for each mask."""
        return show(ids, self.plan(), Detokenizer(self.tokenizer))

    def _stream(
        self, prompts: Iterable[Prompt], plan: Plan, seed: int | Sequence[int]
    ) -> Iterator[list[Event]]:
        """Events of several prompts after every step, in order."""
        engine = Engine(self.model, self.tokenizer)
        places: dict[int, int] = {}  # of the tickets
        for i, (prompt, own_seed) in enumerate(_with_seeds(prompts, seed)):
            places[engine.submit(self.rows.answer_row(prompt, plan, f"prompt {i}"), plan, own_seed)] = i
        events: dict[int, Event] = {}
        while len(engine):
            for update in engine.step():
                place = places[update.ticket]
                update.raise_error(f"row {place} (prompt {place})")
                events[place] = update.event
            yield [events[place] for place in sorted(events)]

    def _finished(self, rows: Iterator[tuple[Row, Plan, int]], batch_size: int) -> Iterator[Update]:
        """Decode rows with their plans and seeds, so many at a time; yields their last updates in order."""
        engine = Engine(self.model, self.tokenizer)
        done: dict[int, Update] = {}
        names: dict[int, str] = {}
        following, failure = 0, None
        while True:
            try:
                for row, plan, seed in itertools.islice(rows, batch_size - len(engine)):
                    names[engine.submit(row, plan, seed)] = row.name
            except Exception as error:  # first let what is at work be finished
                failure, rows = error, iter(())
            if not len(engine):
                break
            for update in engine.step():
                update.raise_error(f"row {update.ticket} ({names[update.ticket]})")
                if update.finished:
                    done[update.ticket] = update
                    del names[update.ticket]
            while following in done:
                yield done.pop(following)
                following += 1
        if failure is not None:
            raise failure

    def _filled(
        self,
        texts: Iterable[str],
        cut: Callable[[str], list[Piece]],
        prompt: Prompt | None,
        plan: Plan,
        seed: int | Sequence[int],
        batch_size: int,
    ) -> Iterator[Infilled]:
        """Fill texts that `cut` takes to pieces at their gaps."""
        check_whole("batch_size", batch_size)
        pieces = (
            (f"text {i}", cut_text(f"text {i}", text, partial(cut, text)), own_seed)
            for i, (text, own_seed) in enumerate(_with_seeds(texts, seed))
        )
        return self._fill(pieces, prompt, plan, batch_size)

    def _fill(
        self,
        texts: Iterator[tuple[str, list[Piece], int]],
        prompt: Prompt | None,
        plan: Plan,
        batch_size: int,
    ) -> Iterator[Infilled]:
        """Fill texts that have been cut at their gaps."""
        tries: list[int] = []

        def rows() -> Iterator[tuple[Row, Plan, int]]:
            for name, pieces, seed in texts:
                candidates = rows_with_gaps(self.rows, pieces, prompt, plan, name)
                tries.append(len(candidates))
                yield from ((row, clamped, seed) for row, clamped in candidates)

        finished = self._finished(rows(), batch_size)
        for number in itertools.count():
            first = next(finished, None)
            if first is None:
                return
            other_lengths = itertools.islice(finished, tries[number] - 1)
            canvases: list[Canvas] = [first.canvas, *(update.canvas for update in other_lengths)]
            scores = gap_scores(self.model, canvases, plan, batch_size)
            yield likeliest(canvases, scores, self.tokenizer)[1]


def _answer_of(update: Update) -> Output:
    """The answer of a finished row."""
    output = update.output
    assert output is not None
    return output


_ARGUMENTS = ("request", "seed", "batch_size", "n", *sorted(TILT_FIELDS))
"""Names that a wrong one may have meant, besides the fields of a request."""

_ELSEWHERE = {"n": "generate and iter_generate", "batch_size": "generate, infill, edit and their iter_ forms"}
"""Arguments that some verbs take and others do not, and which do."""


def _request(request: Request | None, fields: dict[str, Any]) -> Request:
    """The request given, or one made of its fields."""
    if TILT_FIELDS & fields.keys() and Tilt.among(fields)[0] is not None:
        raise ConfigError("a reward steers whole answers: it is for generate and iter_generate alone")
    for name, verbs in _ELSEWHERE.items():
        if name in fields:
            raise ConfigError(f"{name} means nothing here: it is an argument of {verbs}")
    if request is None:
        return Request.of(_ARGUMENTS, **fields)
    if not isinstance(request, Request):
        raise ConfigError(f"request must be a Request, or give its fields as arguments; got {request!r}")
    if fields:
        raise ConfigError(f"give a request or its fields, not both: {', '.join(fields)}")
    return request


def _check_samples(n: int, plan: Plan) -> None:
    """Refuse a number of answers to each prompt that means nothing."""
    check_whole("n", n)
    if n > 1 and not plan.decoder.random:
        raise ConfigError(
            f"decoder {plan.decoder.name!r} draws nothing at random, so {n} answers would be equal; give it "
            "a temperature: --options.temperature 0.7, or options={'temperature': 0.7}"
        )


def _as_list(prompts: Any) -> tuple[bool, Any]:
    """True and a list of one for a lone text or a lone conversation; else False and what was given."""
    if isinstance(prompts, dict):
        raise ConfigError("prompts must be a text, chat messages, or several of them; got one message alone")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise ConfigError(f"prompts must be a text, chat messages, or several of them; got {prompts!r}")
    one = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)
    )
    return one, [prompts] if one else prompts


def _with_seeds(prompts: Iterable[PromptT], seed: int | Sequence[int]) -> Iterator[tuple[PromptT, int]]:
    """Each prompt with its seed: one for all, or as many seeds as there are prompts.

    Raises:
        ConfigError: for seeds that are none, or not as many as a list of prompts has.
    """
    given: Any = seed.tolist() if hasattr(seed, "tolist") else seed  # an array, or a tensor
    if is_whole(given):
        return zip(prompts, itertools.repeat(int(given)), strict=False)
    seeds = list(given) if isinstance(given, Sequence) else None
    if seeds is None or not all(map(is_whole, seeds)):
        raise ConfigError(f"seed must be a whole number, or one for each prompt, got {seed!r}")
    if isinstance(prompts, Sized) and len(prompts) != len(seeds):
        wrong = "more" if len(prompts) > len(seeds) else "fewer"
        raise ConfigError(f"seed lists {len(seeds)} seeds, but there are {wrong} prompts")
    return _paired(prompts, seeds)


def _paired(prompts: Iterable[PromptT], seed: Sequence[int]) -> Iterator[tuple[PromptT, int]]:
    """Each prompt with its own seed."""
    seeds = iter(seed)
    for prompt in prompts:
        number = next(seeds, None)
        if number is None:
            raise ConfigError(f"seed lists {len(seed)} seeds, but there are more prompts")
        yield prompt, int(number)
    if next(seeds, None) is not None:
        raise ConfigError(f"seed lists {len(seed)} seeds, but there are fewer prompts")
