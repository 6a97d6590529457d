"""How an answer is decoded: what a caller may say, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from decoding.loop import Settings
from decoding.presets import Decoder
from decoding.states import Reuse
from decoding.window import MARGIN
from dlm.errors import ConfigError, unknown_name

RATE = 2.0
"""Tokens per model call on a canvas that grows, when neither the caller nor the checkpoint gives a rate."""

MAX_TOKENS = 256
"""Longest answer, when neither it nor a window is given."""


class How(TypedDict, total=False):
    """How an answer is decoded.

    Either a canvas that grows, with `max_tokens` as a limit: text and cost do not depend on the limit unless
    the canvas meets it. (It holds what is written and a constant number of masks: `Window.ahead` and the
    margin, 48 for `conv` with its own kernel.) Or a fixed canvas, `window` tokens of prompt and
    answer together, filled in `steps` steps (the setting of the papers) or at a `rate`. The first is the
    default, except for decoders that go by time.
    """

    decoder: Decoder | str | None
    """A `Decoder` or the name of one. If not given, the checkpoint's own; where that has a pace of its own
    but steps or a rate are given, the same order at the pace given."""
    options: Mapping[str, Any] | None
    """Options of a decoder that is named or not given, such as {"temperature": 1.0}. The checkpoint's options
    for its own decoder hold unless they are given here; other decoders start from their presets."""
    window: int | None
    """L; the checkpoint's default if only `steps` is given."""
    steps: int | None
    """S, denoising steps; by default the checkpoint's own, or a quarter of the window; as many as it takes
    for a decoder that has a pace of its own."""
    max_tokens: int | None
    """Longest answer, in tokens; `MAX_TOKENS` by default."""
    rate: float | None
    """Tokens that are written per model call on average, at least 1; `RATE` on a canvas that grows. A step
    writes no more than is open, and never crosses the end of a block. Not for rules that have a pace of their
    own: threshold and entropy bound (adaptive rates), a fixed number per step."""
    eos_fill: bool
    """Once an EOS is written, everything to its right becomes EOS; True by default."""
    stop: str | Sequence[str] | None
    """Texts that end the answer; it is cut before the first of them."""
    canvas: Literal["full", "growing"] | None
    """With `window` and `steps`: "growing" is approximate; the model is shown no more of the window than can
    open soon, while the normaliser counts all of it."""
    margin: int | None
    """Masks that a growing canvas holds beyond those that can open; 16 by default."""
    reuse: Literal["prompt", "prefix", "dual"] | None
    """Approximate: which keys and values are reused (see `Reuse`)."""
    refresh: int | None
    """With `reuse`: every so many calls everything is computed; 8 by default."""


@dataclass(frozen=True)
class Plan:
    """A request with everything filled in."""

    decoder: Decoder
    settings: Settings
    positions: int
    """Longest row, prompt included."""
    tokens: int
    """Longest answer."""
    stop: tuple[str, ...] = ()

    @property
    def settles(self) -> bool:
        """Whether what is written stays, so that a stop text ends the answer as soon as it is there."""
        return not self.decoder.reveal.remasks


@dataclass(frozen=True)
class Planner:
    """Fills in what a caller left open.

    Attributes:
        mask_id: id of the mask token.
        eos_id: id of the end token.
        limit: the model's positions.
        defaults: the checkpoint's own (`decoder`, `options`, `window`, `steps`, `max_tokens`, `rate`).
    """

    mask_id: int
    eos_id: int
    limit: int
    defaults: Mapping[str, Any]

    @property
    def window(self) -> int:
        """The checkpoint's window."""
        return int(self.defaults.get("window", 256))

    def steps(self, window: int) -> int:
        """Denoising steps, when neither they nor a rate are given."""
        return int(self.defaults.get("steps", max(1, window // 4)))

    def plan(
        self,
        decoder: Decoder | str | None = None,
        options: Mapping[str, Any] | None = None,
        window: int | None = None,
        steps: int | None = None,
        max_tokens: int | None = None,
        rate: float | None = None,
        eos_fill: bool = True,
        stop: str | Sequence[str] | None = None,
        canvas: str | None = None,
        margin: int | None = None,
        reuse: str | None = None,
        refresh: int | None = None,
    ) -> Plan:
        """A plan; see `How` for the arguments.

        Raises:
            ConfigError: for settings that are out of range or do not go together.
        """
        chosen = self._decoder(decoder, options or {})
        if decoder is None and (rate is not None or steps is not None):
            chosen = chosen.at_pace()
        if max_tokens is not None and (window is not None or steps is not None):
            raise ConfigError("max_tokens is a limit for a canvas that grows; it has no window and no steps")
        if rate is not None and steps is not None:
            raise ConfigError("give either steps or a rate, not both")
        if rate is not None and not chosen.reveal.paced:
            raise ConfigError(f"decoder {chosen.name!r} says itself how many tokens it writes; give no rate")
        if canvas not in (None, "full", "growing"):
            raise unknown_name("canvas", canvas, ("full", "growing"))
        kept = _reuse(reuse, refresh)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stops:
            raise ConfigError("a stop text must not be empty")
        free = window is None and steps is None and not (chosen.timed and rate is None)
        common: dict[str, Any] = {"eos_fill": eos_fill, "reuse": kept, "margin": _margin(margin)}
        if max_tokens is not None or free:
            if canvas == "full":
                raise ConfigError('canvas "full" needs a window; with max_tokens the canvas grows')
            tokens = self._tokens(max_tokens)
            own = float(self.defaults.get("rate", RATE)) if rate is None else rate
            settings = Settings(None, self.eos_id, self.mask_id, rate=own, grow=True, **common)
            return Plan(chosen, settings, self.limit, tokens, stops)
        window = self.window if window is None else window
        if not 1 <= window <= self.limit:
            raise ConfigError(
                f"window must lie between 1 and the model's {self.limit} positions, got {window}"
            )
        steps, rate = self._pace(chosen, window, steps, rate)
        grows = canvas == "growing"
        if grows and steps is None:
            raise ConfigError('canvas "growing" with a rate is what max_tokens gives; give it, or steps')
        if margin is not None and not grows:
            raise ConfigError('a margin is for a canvas that grows; give max_tokens, or canvas="growing"')
        settings = Settings(steps, self.eos_id, self.mask_id, rate=rate, grow=grows, fit=window, **common)
        return Plan(chosen, settings, window, window, stops)

    def _pace(
        self, decoder: Decoder, window: int, steps: int | None, rate: float | None
    ) -> tuple[int | None, float | None]:
        """Steps or a rate for a fixed canvas."""
        if rate is not None or steps is not None:
            return steps, rate
        if decoder.reveal.paced:
            return self.steps(window), None
        return None, 1.0  # nobody looks at it: calls are made until all is written

    def _decoder(self, decoder: Decoder | str | None, options: Mapping[str, Any]) -> Decoder:
        """The decoder that is given, named, or the checkpoint's own."""
        if isinstance(decoder, Decoder):
            if options:
                raise ConfigError("options are for a decoder that is named; this one has been built already")
            return decoder
        own = self.defaults.get("decoder", "conv")
        usual = self.defaults.get("options", {}) if decoder in (None, own) else {}
        return Decoder.named(decoder or own, **{**usual, **options})

    def _tokens(self, max_tokens: int | None) -> int:
        """The limit of an answer."""
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        return int(self.defaults.get("max_tokens", MAX_TOKENS)) if max_tokens is None else max_tokens


def _margin(margin: int | None) -> int:
    return MARGIN if margin is None else margin


def _reuse(scope: str | None, refresh: int | None) -> Reuse | None:
    """Which keys and values are reused."""
    if scope is None:
        if refresh is not None:
            raise ConfigError("refresh says how often reused keys and values are computed; give reuse")
        return None
    return Reuse(scope) if refresh is None else Reuse(scope, refresh)  # type: ignore[arg-type]
