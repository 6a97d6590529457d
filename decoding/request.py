"""A request says what a caller wants; resolved for a model it becomes a plan, complete and frozen.

Importable without torch: commands fill requests before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from dlm.errors import MOST_WHOLE, ConfigError, plain, unknown_name

if TYPE_CHECKING:
    from decoding.pace import EndTokens, Pace
    from decoding.presets import Decoder
    from dlm.spec import DecodingDefaults, ModelSpec

    DecoderLike = str | Decoder
else:
    DecoderLike = str

DEFAULT_RATE = 2.0
"""Tokens per model call on a canvas that grows, when neither the caller nor the checkpoint gives a rate."""

DEFAULT_MAX_TOKENS = 256
"""Longest answer, when neither it nor a window is given."""

DEFAULT_WINDOW = 256
"""Positions of a fixed canvas, when neither the caller nor the checkpoint gives a window."""

MOST_RATE = 1_000_000
"""Most tokens per model call; no row has as many."""

MOST_LOGPROBS = 100
"""Most likeliest tokens noted beside a token."""

MOST_DRAFTS = 16
"""Most drafts in one model call; of more hardly one comes true."""

OPEN_LENGTH = 256
"""Length for which kernels and blocks of open size are chosen where the canvas has no length of its own."""

REUSE_SCOPES = ("prompt", "prefix", "dual")


@dataclass(frozen=True)
class Reuse:
    """Approximate: keys and values of positions whose token stays are kept for some calls.

    What was computed for a position when the rest of the row looked different goes on being attended to.
    A token that has just been written, or a mask that has just been added, is always computed. In a
    bidirectional model all states change with every token, so the texts are other ones.

    Attributes:
        scope: what is kept: "prompt", the given tokens on the left; "prefix", every token that is written
            (prefix cache of Fast-dLLM, arXiv 2505.22618, without its blocks); "dual", also the masks that
            cannot be written in this step.
        refresh: at every so many changes of a row, all its positions are computed; also when the row has
            moved to another engine.
    """

    scope: str = "dual"
    refresh: int = 8

    def __post_init__(self) -> None:
        """Check the name and the number."""
        if self.scope not in REUSE_SCOPES:
            raise unknown_name("reuse", self.scope, REUSE_SCOPES)
        if not is_whole(self.refresh) or self.refresh < 1:
            raise ConfigError(f"refresh must be a whole number of at least 1, got {self.refresh!r}")


def is_whole(value: Any) -> bool:
    """True for a whole number, also one of NumPy; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


Rule = tuple[Callable[[Any], bool], str]
"""A test of a value, and the rest of the sentence "… must …" about one that fails it."""


def _option(*rules: Rule, **bounds: Any) -> Any:
    """A field that is None by default: not given.

    Args:
        rules: for a value that is given, the first that it fails being told.
        bounds: `ge` and `le` of a number, or `choices` among names; the server's schema shows them.
    """
    return field(default=None, metadata={"rules": rules, **bounds})


def _whole(least: int, most: int = MOST_WHOLE) -> Any:
    """A field for a whole number of at least 0 or 1."""
    wish = "be a whole number of at least 1" if least else "be a whole number, not negative"
    return _option((lambda value: is_whole(value) and value >= least, wish), ge=least, le=most)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_decoder(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else hasattr(type(value), "preset")


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def _is_place(value: Any) -> bool:
    return is_whole(value) or bool(re.fullmatch(r"-?\d{1,9}", str(value)))


DECODER: Rule = (_is_decoder, "be a name or a Decoder")
RATE: Rule = (_is_rate, "be at least 1 token per model call")
SWITCH: Rule = (lambda value: isinstance(value, bool), "be true or false")
TEXT: Rule = (_is_text, "be a text")
STOPS: Rule = (
    lambda value: isinstance(value, Sequence) and all(map(_is_text, value)),
    "be a text or several",
)
NAMED: Rule = (
    lambda value: isinstance(value, Mapping) and all(map(_is_text, value)),
    "be names with values",
)
PLACES: tuple[Rule, ...] = (
    (lambda value: isinstance(value, Mapping), "be places with texts"),
    (lambda value: all(map(_is_text, value.values())), "hold texts"),
    (lambda value: all(map(_is_place, value)), "name places by number"),
)


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Hold a value to the rules and bounds of its field.

    Raises:
        ConfigError: naming the field and what it must be.
    """
    for right, wish in metadata["rules"]:
        if not right(value):
            raise ConfigError(f"{name} must {wish}, got {value!r}")
    if "le" in metadata and value > metadata["le"]:
        raise ConfigError(f"{name} must be at most {metadata['le']}, got {value!r}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise unknown_name(name, value, metadata["choices"])


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """The settings of model calls; a field that is None is not given.

    Args:
        reuse: "prompt", "prefix" or "dual" reuses keys and values (approximate).
        refresh: with reuse, the number of changes of the row after which everything is computed again; 8 by
            default.
        drafts: guesses of what the row will be next that each model call computes too, at most 16: fewer
            calls, the same text. They are shared by the rows of a batch; with more rows than drafts there are
            none. 0 by default.
    """

    reuse: str | None = _option(TEXT, choices=REUSE_SCOPES)
    refresh: int | None = _whole(1)
    drafts: int | None = _whole(0, MOST_DRAFTS)


@dataclass(frozen=True, kw_only=True)
class CanvasSettings:
    """The settings of a canvas; a field that is None is not given.

    Args:
        max_tokens: longest answer, on a canvas that grows as it is written; 256 by default.
        window: tokens of prompt and answer together, on a fixed canvas; by default the checkpoint's, if
            it has one.
        stop: a text that ends an answer, which is cut before it; several as '["one", "two"]', or by giving
            it again. One that lies wholly in `begin` or `ending` does not count.
        eos_fill: once an end token is written, everything to its right becomes the end token; by default as
            the checkpoint's authors have it, else on.
        canvas: the masks that the model is shown from the start. "full": all of them, `max_tokens` behind the
            prompt (with steps that is the default). "growing": in a window with steps, those that can be
            written soon (approximate).
        margin: masks that a growing canvas holds beyond those that can open; 16 by default.
    """

    max_tokens: int | None = _whole(1)
    window: int | None = _whole(1)
    stop: str | list[str] | None = _option(STOPS)
    eos_fill: bool | None = _option(SWITCH)
    canvas: str | None = _option(TEXT, choices=("full", "growing"))
    margin: int | None = _whole(0)


@dataclass(frozen=True)
class DecoderRequest(CallSettings):
    """The part of a request that any text can have, one with gaps too; a field that is None is not given.

    Args:
        decoder: name of the decoder (`dlm generate --list-decoders` and a server's /v1/decoders list them);
            by default the checkpoint's own. If that has a pace of its own and steps or a rate are given, its
            order is kept at that pace.
        options: options of the decoder by name: {"temperature": 1}, or --options.temperature 1. Those of the
            checkpoint hold for its own decoder.
        rate: tokens written per model call on average, at least 1. By default 1 in gaps; else the
            checkpoint's rate, or 2 on a canvas that grows. Not for decoders with a pace of their own.
        steps: denoising steps, in place of a rate. On a fixed canvas there are by default those of the
            checkpoint, or a quarter of the window. At most 16 for each position are taken.
    """

    decoder: DecoderLike | None = _option(DECODER)
    options: dict[str, Any] | None = _option(NAMED)
    rate: float | None = _option(RATE, ge=1, le=MOST_RATE)
    steps: int | None = _whole(1)

    def __post_init__(self) -> None:
        """Check each field by itself, and what does not go together for any model."""
        for item in fields(self):
            if "rules" in item.metadata and (value := getattr(self, item.name)) is not None:
                if type(value) not in (bool, int, float) and isinstance(value, Real):  # NumPy's
                    value = plain(value)
                    object.__setattr__(self, item.name, value)
                _check(item.name, value, item.metadata)
        if self.options is not None:
            options = {name: plain(value) for name, value in self.options.items()}  # the caller's may change
            object.__setattr__(self, "options", options)
        if self.rate is not None and self.steps is not None:
            raise ConfigError("give either steps or a rate, not both")
        if self.refresh is not None and self.reuse is None:
            raise ConfigError("refresh says how often reused keys and values are computed; give reuse")
        self.reuse_settings()

    def reuse_settings(self) -> Reuse | None:
        """The reuse of keys and values that is asked for; None for none."""
        if self.reuse is None:
            return None
        return Reuse(self.reuse) if self.refresh is None else Reuse(self.reuse, self.refresh)

    def check_decoder(self) -> None:
        """Refuse an unknown decoder or option before a model is loaded.

        Raises:
            ConfigError: naming the choices.
        """
        from decoding.presets import Decoder, option_names

        if isinstance(self.decoder, str):
            Decoder.named(self.decoder, **(self.options or {}))
        for name in self.options or {}:
            if name not in option_names():
                raise unknown_name("option of decoders:", name, option_names())


@dataclass(frozen=True)
class Request(DecoderRequest, CanvasSettings):
    """A wish for an answer: how it is to be decoded; a field that is None is not given.

    Either a canvas that grows, with `max_tokens` as a limit: text and cost do not depend on the limit unless
    the canvas meets it. Or a fixed canvas, `window` tokens of prompt and answer together, filled in `steps`
    steps (the setting of the papers) or at a `rate`. The first is the default, except for decoders that go
    by time. The fields of a `DecoderRequest` come first.

    Args:
        begin: text that the answer begins with.
        ending: text that the answer ends with, at the last positions of the window or of max_tokens.
        forced: texts at places of the answer, counted in tokens from 0: {"7": " Paris"}, or
            --forced.7 " Paris".
        top_logprobs: note this many of the likeliest tokens beside each token that is written, at most 100.
    """

    TEXTS: ClassVar[tuple[str, ...]] = ("stop", "begin", "ending", "forced")
    """Fields that may be any text, which the command line takes as it is."""

    begin: str | None = _option(TEXT)
    ending: str | None = _option(TEXT)
    forced: dict[Any, str] | None = _option(*PLACES)
    top_logprobs: int | None = _whole(0, MOST_LOGPROBS)

    def __post_init__(self) -> None:
        """Check each field by itself, and what does not go together for any model."""
        super().__post_init__()
        if self.forced is not None:
            object.__setattr__(self, "forced", dict(self.forced))  # the caller's may change
        fixed = self.window is not None or (self.steps is not None and not self.full)
        if self.max_tokens is not None and fixed:
            raise ConfigError("max_tokens is a limit for a canvas that grows; it has no window and no steps")
        if "" in self.stop_texts:
            raise ConfigError("a stop text must not be empty")
        if self.ending and self.eos_fill:
            raise ConfigError("an ending stands behind the end of the answer; give no eos_fill")
        if self.ending and (self.canvas == "growing" or self.margin is not None):
            raise ConfigError("an ending stands at the end of the canvas, which therefore cannot grow")

    @property
    def full(self) -> bool:
        """True where all `max_tokens` masks are there from the start: canvas "full", or with steps.

        Steps need a canvas of fixed length. A window has one anyway; of that this says nothing.
        """
        by_steps = self.canvas is None and self.max_tokens is not None and self.steps is not None
        return self.canvas == "full" or by_steps

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @classmethod
    def of(cls, beside: Sequence[str] = (), /, **given: Any) -> Request:
        """Build a request from keyword arguments.

        Args:
            beside: names of other arguments, which an error may offer too.
            **given: the fields.

        Raises:
            ConfigError: for an unknown name, with the nearest right one.
        """
        names = [field.name for field in fields(Request)]
        for name in given:
            if name not in names:
                raise _unknown_field(name, [*names, *beside])
        return cls(**given)

    @classmethod
    def read_from(cls, settings: Any) -> Request:
        """The request part of other settings, such as those of commands; fields they lack are not given."""
        names = {field.name for field in fields(Request)} & {field.name for field in fields(settings)}
        return Request(**{name: getattr(settings, name) for name in names})

    def resolve(self, model: Any) -> Plan:
        """Fill in what was left open, from the model's own defaults.

        Args:
            model: anything with a `spec` (or a configuration, see `ModelSpec.of`), or a spec.

        Raises:
            ConfigError: for settings that are out of range for the model or do not go together.
        """
        from dlm.spec import ModelSpec

        spec = ModelSpec.of(model)
        return self.as_published(spec)._resolved(spec)

    def as_published(self, spec: ModelSpec) -> Request:
        """The request with the canvas and the ends of the checkpoint's authors, where its decoder is theirs.

        They set out a number of masks behind the prompt, or a window, and a number of steps; for another
        `max_tokens` the steps are in proportion. Their stop texts hold for any decoder.
        """
        published, changes = spec.defaults, dict[str, Any]()
        if self.stop is None and published.stop is not None:
            changes["stop"] = list(published.stop)
        name = self.decoder if self.decoder is None or isinstance(self.decoder, str) else self.decoder.preset
        if name in (None, published.decoder):
            if self.eos_fill is None and published.eos_fill is not None:
                changes["eos_fill"] = published.eos_fill
            if published.canvas == "full" and self.window is None and self.canvas != "growing":
                changes |= self._published_canvas(published)
        return replace(self, **changes) if changes else self

    def _published_canvas(self, published: DecodingDefaults) -> dict[str, Any]:
        """Fields of the canvas of the checkpoint's authors, at the length of this request."""
        published_length = published.max_tokens or published.window or DEFAULT_MAX_TOKENS
        length, steps = self.max_tokens or published_length, self.steps
        if steps is None and self.rate is None and published.steps is not None:
            steps = -(-published.steps * length // published_length)
        if self.max_tokens is None and published.max_tokens is None:
            return {"window": length, "steps": steps}
        return {"canvas": "full", "max_tokens": length, "steps": steps}

    def _resolved(self, spec: ModelSpec) -> Plan:
        """See `resolve`."""
        decoder = self.decoder_for(spec)
        extent = self._extent(decoder, spec)
        decoder = decoder.fitted(extent.length or OPEN_LENGTH, spec)
        pace = self.pace_for(decoder, spec, extent.steps, spec.defaults.rate or DEFAULT_RATE)
        pace = pace.within(extent.length or spec.positions)
        self._check_canvas(extent, pace)
        ends = not self.ending
        fill = ends and self.eos_fill is not False
        effects = {"fill": fill, "early_exit": ends and not decoder.reveal.revises}
        return self._plan(spec, decoder, pace, extent, **effects, closes=fill or not pace.bounded)

    def resolve_gaps(self, model: Any, forbidden: Iterable[int] = ()) -> Plan:
        """Fill in what was left open, for texts that have the length they have: nothing grows or ends early.

        Without steps and rate, one token is written per call (or at the decoder's own pace).

        Args:
            model: as in `resolve`.
            forbidden: tokens that cannot come out, besides those that end an answer.

        Raises:
            ConfigError: for fields that mean nothing here, beyond what `resolve` refuses.
        """
        meaningful = {entry.name for entry in fields(DecoderRequest)}
        for name in (entry.name for entry in fields(Request)):
            if name not in meaningful and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} means nothing here: it is for answers, and this is a text with gaps"
                )
        from dlm.spec import ModelSpec

        spec = ModelSpec.of(model)
        decoder = self.decoder_for(spec).fitted(OPEN_LENGTH, spec).without(*spec.end_token_ids, *forbidden)
        steps = (spec.defaults.steps or OPEN_LENGTH // 4) if decoder.timed else None
        extent = _Extent(spec.positions, spec.positions, None, None, grows=False)
        pace = self.pace_for(decoder, spec, steps, rate=1.0)
        return self._plan(spec, decoder, pace, extent, fill=False, early_exit=False, closes=True)

    def _plan(self, spec: ModelSpec, decoder: Decoder, pace: Pace, extent: _Extent, **effects: bool) -> Plan:
        """The plan of what has been chosen, and of the fields that are taken as they are."""
        from decoding.pace import EndTokens
        from decoding.window import MARGIN

        return Plan(
            decoder=decoder,
            pace=pace,
            end_tokens=EndTokens(spec.eos_token_id, tuple(sorted(spec.end_token_ids)), **effects),
            mask_id=spec.mask_token_id,
            margin=None if not extent.grows else MARGIN if self.margin is None else self.margin,
            reuse=self.reuse_settings(),
            positions=extent.positions,
            tokens=extent.tokens,
            stop=self.stop_texts,
            begin=self.begin or "",
            ending=self.ending or "",
            forced=tuple(sorted((int(place), text) for place, text in (self.forced or {}).items())),
            top_logprobs=self.top_logprobs or 0,
            drafts=self.drafts or 0,
        )

    def _extent(self, decoder: Decoder, spec: ModelSpec) -> _Extent:
        """The size of the canvas."""
        defaults = spec.defaults
        fixed = self.window is not None or self.steps is not None or (decoder.timed and self.rate is None)
        if self.max_tokens is not None or not fixed:
            tokens = self.max_tokens or defaults.max_tokens or DEFAULT_MAX_TOKENS
            masks = self.max_tokens if self.full else None
            return _Extent(spec.positions, tokens, masks, None, grows=masks is None and not self.ending)
        window = self.window or min(defaults.window or DEFAULT_WINDOW, spec.positions)
        if not 1 <= window <= spec.positions:
            raise ConfigError(
                f"window must lie between 1 and the model's {spec.positions} positions, got {window}"
            )
        steps = defaults.steps or max(1, window // 4)
        return _Extent(window, window, window, steps, grows=self.canvas == "growing")

    def pace_for(self, decoder: Decoder, spec: ModelSpec, steps: int | None, rate: float) -> Pace:
        """Steps or a rate where they are given, the decoder's own pace, or else `steps` or `rate`."""
        from decoding.pace import OwnPace, Rate, Steps

        if self.rate is not None and not decoder.reveal.paced:
            raise ConfigError(f"decoder {decoder.name!r} says itself how many tokens it writes; give no rate")
        if self.steps is not None:
            return Steps(self.steps, spec.schedule)
        if not decoder.reveal.paced:
            return OwnPace()
        if self.rate is None and steps is not None:
            return Steps(steps, spec.schedule)
        return Rate(float(rate if self.rate is None else self.rate))

    def _check_canvas(self, extent: _Extent, pace: Pace) -> None:
        """Refuse what does not go with a canvas that grows, or with one that does not."""
        if extent.steps is None:  # it has no window
            if self.full and self.max_tokens is None:
                raise ConfigError('canvas "full" needs a window, or max_tokens')
            if self.margin is not None and self.full:
                raise ConfigError("a margin is for a canvas that grows: with max_tokens, one at a rate")
            return
        if self.canvas == "growing" and not pace.bounded:
            raise ConfigError('canvas "growing" with a rate is what max_tokens gives; give it, or steps')
        if self.margin is not None and self.canvas != "growing":
            raise ConfigError('a margin is for a canvas that grows; give max_tokens, or canvas="growing"')

    def decoder_for(self, spec: ModelSpec) -> Decoder:
        """The decoder that is given, named, or the checkpoint's own (at a pace, if one is given)."""
        from decoding.presets import Decoder

        if isinstance(self.decoder, Decoder):
            if self.options:
                raise ConfigError("options are for a decoder that is named; this one has been built already")
            return self.decoder
        default_name = spec.defaults.decoder
        defaults = spec.defaults.options if self.decoder in (None, default_name) else {}
        decoder = Decoder.named(self.decoder or default_name, **{**defaults, **(self.options or {})})
        if self.decoder is not None or (self.rate is None and self.steps is None):
            return decoder
        for option in self.options or {}:
            remaining = {k: v for k, v in (self.options or {}).items() if k != option}
            reduced = Decoder.named(default_name, **{**defaults, **remaining})
            paced = decoder.with_given_pace()
            if reduced != decoder and reduced.with_given_pace() == paced != decoder:
                raise ConfigError(
                    f"option {option} of decoder {default_name!r} sets a pace of its own: "
                    "give no rate and no steps"
                )
        return decoder.with_given_pace()


def _unknown_field(name: str, names: list[str]) -> ConfigError:
    """An error for a keyword that is no field, which says where an option of a decoder belongs."""
    from decoding.presets import option_names

    if name in option_names():
        return ConfigError(f"unknown argument {name!r}: it is an option of decoders, options={{{name!r}: …}}")
    return unknown_name("argument", name, names)


@dataclass(frozen=True)
class _Extent:
    """The size of a canvas, before the rows are known."""

    positions: int
    """Longest row, prompt included."""
    tokens: int
    """Longest answer."""
    length: int | None
    """Positions for which sizes and steps are chosen; None where it is open."""
    steps: int | None
    """Steps of a window for which none are given; None where there is no window."""
    grows: bool
    """True where masks are added as the row is written."""


@dataclass(frozen=True)
class Plan:
    """A request with everything filled in; nobody changes it.

    Attributes:
        decoder: the three choices, with all sizes chosen.
        pace: how time passes.
        end_tokens: what they do.
        mask_id: id of the mask token.
        margin: masks that a growing canvas holds beyond those that can open; None where the canvas is whole.
        reuse: which keys and values are reused; None for exact decoding.
        positions: longest row, prompt included.
        tokens: longest answer.
        stop: texts that end an answer.
        begin, ending, forced: given parts of the answer.
        top_logprobs: number of likeliest tokens noted beside each token that is written.
        drafts: guesses of what rows will be that a model call computes too.
        ahead: masks that a growing canvas begins with; None where the canvas is whole.
        batch_key: what rows must have in common to share the arithmetic of a step.
    """

    decoder: Decoder
    pace: Pace
    end_tokens: EndTokens
    mask_id: int
    margin: int | None = None
    reuse: Reuse | None = None
    positions: int = 2**31
    tokens: int = 2**31
    stop: tuple[str, ...] = ()
    begin: str = ""
    ending: str = ""
    forced: tuple[tuple[int, str], ...] = ()
    top_logprobs: int = 0
    drafts: int = 0
    ahead: int | None = field(init=False, repr=False)
    batch_key: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the decoder can go at this pace."""
        if not self.pace.bounded and self.decoder.timed:
            raise ConfigError(f"decoder {self.decoder.name!r} goes by time: it needs steps, not a rate")
        if self.reuse is not None and self.decoder.reveal.requires:
            raise ConfigError("conflict and verify look at whole rows; give no reuse")
        if self.drafts and (self.reuse is not None or self.decoder.reveal.requires):
            raise ConfigError("drafts do not go with reuse, conflict and verify")
        ahead = None if self.margin is None else max(1, self.decoder.window.ahead + self.margin)
        exact = self.decoder, self.pace, self.end_tokens, ahead, self.mask_id, self.top_logprobs
        object.__setattr__(self, "ahead", ahead)
        object.__setattr__(self, "batch_key", (*exact, self.reuse, self.drafts))

    def within(self, masks: int) -> Plan:
        """This plan, for a row of so many masks: with no more steps than they can use (`Steps.within`)."""
        pace = self.pace.within(masks)
        return self if pace is self.pace else replace(self, pace=pace)

    @property
    def keeps_tokens(self) -> bool:
        """True when what is written stays, so that text can be confirmed and a stop text ends the answer."""
        return not self.decoder.reveal.revises
