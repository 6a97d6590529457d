"""Decoders by name: each published method is one choice on each of the three axes."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from decoding.reveal import (
    Ancestral,
    Dilated,
    Editing,
    EntropyBound,
    ProcessReward,
    Quota,
    Remask,
    RevealRule,
    Separated,
    Stability,
    Threshold,
)
from decoding.reveal.base import NEEDS
from decoding.reveal.order_table import OrderTable
from decoding.reveal.process_reward import Control
from decoding.reveal.quota import Order
from decoding.reveal.verified import Verified, WideIn
from decoding.tokens import TokenRule
from decoding.window import Block, Convolution, Full, Sliding, Window, Within
from dlm.errors import ConfigError, plain, unknown_name
from dlm.spec import ModelSpec

AT_A_PACE = " at a pace"
"""Behind the name of a decoder that has given up its own pace."""

MOST_GUIDANCE = 1e6
"""Greatest weight of guidance."""


@dataclass(frozen=True)
class Decoder:
    """A complete decoding strategy; frozen, and free of any state.

    Attributes:
        window: which positions are open.
        reveal: which of them are written in a step.
        tokens: what is written.
        name: for reports.
        guidance: weight g of classifier-free guidance, 0 for none; costs a second model call without the
            prompt (see `decoding.scoring.guided`).
    """

    window: Window = field(default_factory=Full)
    reveal: RevealRule = field(default_factory=Ancestral)
    tokens: TokenRule = field(default_factory=TokenRule)
    name: str = "custom"
    guidance: float = 0.0

    def __post_init__(self) -> None:
        """Check the range of the guidance."""
        if not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ConfigError(f"guidance must lie between 0 and {MOST_GUIDANCE:g}, got {self.guidance}")
        if self.window.timed and self.reveal.revises:
            raise ConfigError("a sliding window has no phases: it cannot go with a rule that remasks")
        if self.window.timed and self.reveal.by_time:
            raise ConfigError("a sliding window has times of its own: its quota is spread evenly")
        if self.guidance and "shadows" in self.reveal.requires:
            raise ConfigError("verify asks the model itself; give no guidance")

    @property
    def timed(self) -> bool:
        """True when it goes by time, so that the pace must be a number of steps and not a rate."""
        return self.window.timed or self.reveal.timed

    @property
    def random(self) -> bool:
        """False where no seed changes a text: the likeliest token is taken, and no position drawn."""
        return self.tokens.temperature != 0 or self.reveal.random

    def fitted(self, length: int, spec: ModelSpec) -> Decoder:
        """This decoder for rows of `length` positions, inside the blocks of a model that is block-causal.

        Sizes of the window that were left open are chosen for the length.

        Raises:
            ConfigError: for a sliding window, which has no blocks, and for verification under a model
                whose tokens cannot be verified.
        """
        if "shadows" in self.reveal.requires and not spec.visibility.verifiable:
            raise ConfigError(NEEDS["shadows"])
        window, size = self.window.fitted(length), spec.visibility.block_size
        if size is not None and not isinstance(window, Within):
            if window.timed:
                raise ConfigError(
                    f"decoder {self.name!r} slides, and the model sees no further than blocks of {size}"
                )
            window = Within(window, size, lead=spec.shift and spec.visibility.lead)
        return self if window is self.window else replace(self, window=window)

    def goes_with(self, spec: ModelSpec) -> bool:
        """True where a model of this specification can be decoded so (see `fitted`)."""
        try:
            self.fitted(spec.positions, spec)
        except ConfigError:
            return False
        return True

    @property
    def preset(self) -> str:
        """Name of the preset that it comes from, at whatever pace."""
        return self.name.removesuffix(AT_A_PACE)

    def with_given_pace(self) -> Decoder:
        """This decoder, or where it has a pace of its own, the same order at a pace that is given."""
        if self.reveal.paced:
            return self
        return replace(self, reveal=self.reveal.with_given_pace(), name=self.name + AT_A_PACE)

    def without(self, *tokens: int) -> Decoder:
        """This decoder with some token ids forbidden."""
        forbidden = (*self.tokens.forbidden, *tokens)
        return replace(self, tokens=replace(self.tokens, forbidden=forbidden))

    @classmethod
    def named(cls, name: str, **options: Any) -> Decoder:
        """The preset `name` with some of its options changed.

        Raises:
            ConfigError: (a ValueError) for an unknown name or option, listing the choices, and for a value
                out of range.
        """
        choices = presets()
        if name not in choices:
            raise unknown_name("decoder", name, choices)
        preset = choices[name]
        for option in options:
            if option not in preset.options:
                raise unknown_name(f"option of decoder {name!r}:", option, preset.options)
        options = {option: plain(value) for option, value in options.items()}
        for option, value in options.items():
            _check_kind(name, option, value, preset)
            if isinstance(preset.options[option], float) and type(value) is int:
                options[option] = float(value)  # larger ones are too big for a tensor's whole numbers
        values = {**preset.options, **options}
        changed = {option for option, value in values.items() if value != preset.options[option]}
        try:
            window, reveal = preset.build(**{option: values[option] for option in _options(preset.build)})
            for wrapper in WRAPPERS:
                wrapped = {option: values[option] for option in _options(wrapper)}
                reveal = wrapper(reveal, changed, **wrapped)
            tokens = replace(preset.tokens, **{option: values[option] for option in TOKENS})
            return cls(window, reveal, tokens, name, values["guidance"])
        except TypeError as error:
            raise ConfigError(f"decoder {name!r}: {error}") from error


Axes = tuple[Window, RevealRule]

LEFT_OPEN = ("kernel_size", "block_size", "size", "per_step")
"""Options that None leaves to be chosen, also where their default is a number."""

MOST_OPTION = 10**30
"""Greatest whole number that an option of a decoder can be; floats hold it."""

TOKENS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
"""Options of the token rule, which every preset has."""

WRAPPERS: tuple[Callable[..., RevealRule], ...] = (Separated.around, Verified.around)
"""Rules around a preset's rule, the inner one first. Each has options, its keywords, which every preset has
too. It is given the rule and the names of the options that are not as in the preset, and returns the rule
itself where they ask for nothing."""


def _options(build: Callable[..., Any]) -> dict[str, Any]:
    """Options of a function, the parameters that have a default, with these."""
    parameters = inspect.signature(build).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


@dataclass(frozen=True)
class Preset:
    """A named decoder and what `--list-decoders` says about it.

    Attributes:
        summary: what it does, in a few words.
        paper: where it comes from.
        build: options -> window and reveal rule; each option has a default.
        tokens: the token rule, whose `TOKENS` are options as well.
        exact: True when texts follow the model's own distribution as steps become finer; others change the
            order in which positions are written, or cut what tokens may come out, on purpose.
        wrapped: defaults of options of `WRAPPERS`, where they are others.
    """

    summary: str
    paper: str
    build: Callable[..., Axes]
    tokens: TokenRule = field(default_factory=TokenRule)
    exact: bool = False
    wrapped: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def described(self) -> str:
        """What it does, its paper, and whether it is exact."""
        return f"{self.summary} ({self.paper}; {'exact' if self.exact else 'approximate'})"

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """Option names and their defaults."""
        around = {name: value for wrapper in WRAPPERS for name, value in _options(wrapper).items()}
        tokens = {name: getattr(self.tokens, name) for name in TOKENS}
        every = _options(self.build) | tokens | {"guidance": 0.0} | around | dict(self.wrapped)
        return MappingProxyType(every)


def _check_kind(name: str, option: str, value: Any, preset: Preset) -> None:
    """Refuse a value that is no number where the default is one, and no switch where the default is one."""
    default = preset.options[option]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"option {option} of decoder {name!r} must be true or false, got {value!r}")
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    optional = value is None and (default is None or option in LEFT_OPEN)
    numeric = isinstance(default, int | float) or isinstance(value, bool)
    if numeric and not number and not optional:
        raise ConfigError(f"option {option} of decoder {name!r} must be a number, got {value!r}")
    if number and isinstance(value, int) and abs(value) > MOST_OPTION:
        raise ConfigError(f"option {option} of decoder {name!r} must be a number within ±{MOST_OPTION:.0e}")


def _ancestral() -> Axes:
    return Full(), Ancestral()


def _semi_ar(block_size: int | None = None) -> Axes:
    return Block(block_size), Ancestral()


def _llada(
    block_size: int = 0,
    per_step: int | None = None,
    order: Literal["confidence", "margin", "entropy"] = "confidence",
) -> Axes:
    return Block(block_size) if block_size else Full(), Quota(per_step, order)


def _dream(order: Order = "cut-entropy") -> Axes:
    return Full(), Quota(order=order, spread="remaining")


def _margin(per_step: int | None = None, kernel_size: int | None = 0) -> Axes:
    return _convolution_or_full(kernel_size), Quota(per_step, "margin")


def _conv(kernel_size: int | None = None, scale: float = 1.0) -> Axes:
    return Convolution(kernel_size, scale), Ancestral()


def _llada_conv(kernel_size: int | None = None, scale: float = 1.0, per_step: int | None = None) -> Axes:
    return Convolution(kernel_size, scale), Quota(per_step)


def _sliding(size: int | None = None) -> Axes:
    return Sliding(size), Ancestral()


def _block_threshold(block_size: int | None = None, tau: float = 0.9) -> Axes:
    return Block(block_size, aligned=True), Threshold(tau)


def _wino(block_size: int = 0, tau: float = 0.6) -> Axes:
    return Block(block_size) if block_size else Full(), WideIn(tau)


def _dilated(block_size: int | None = None, base: int = 2) -> Axes:
    return Block(block_size), Dilated(base)


def _dprm(
    table: OrderTable | str | Path | None = None,
    kernel_size: int | None = 0,
    control: Control = "none",
    normalise: bool = False,
    strength: float = 1.0,
    ready: int = 64,
    warm_up: float = 0.2,
    switch: float = 0.7,
    draws: int = 0,
) -> Axes:
    order = None if table is None else OrderTable.named(table)
    return _convolution_or_full(kernel_size), ProcessReward(
        order, control, normalise, strength, ready, warm_up, switch, draws
    )


def _convolution_or_full(kernel_size: int | None) -> Window:
    """A convolution, or with kernel size 0 none."""
    return Full() if kernel_size == 0 else Convolution(kernel_size)


def under_kernel(rule: Callable[..., RevealRule]) -> Callable[..., Axes]:
    """A builder whose options are a rule's own, and the kernel size of its window (0 for no kernel)."""

    def build(kernel_size: int | None = 0, **options: Any) -> Axes:
        return _convolution_or_full(kernel_size), rule(**options)

    kernel = inspect.signature(build).parameters["kernel_size"]
    parameters = [*inspect.signature(rule).parameters.values(), kernel]
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    build.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return build


_GREEDY, _TOP_20, _NUCLEUS = TokenRule(temperature=0.0), TokenRule(top_k=20), TokenRule(top_p=0.9)

PRESETS: dict[str, Preset] = {
    "categorical": Preset(
        "ancestral sampling over the whole window", "MDLM, 2406.07524", _ancestral, exact=True
    ),
    "top-k": Preset("ancestral, each position's k best tokens", "2509.15188, section 4", _ancestral, _TOP_20),
    "semi-ar": Preset(
        "ancestral and top-k, block after block from the left", "2503.09573; 2509.15188", _semi_ar, _TOP_20
    ),
    "llada": Preset(
        "the most confident tokens first, a fixed number a step", "LLaDA, 2502.09992", _llada, _GREEDY
    ),
    "dream": Preset(
        "the tokens of least entropy first, floor(|M| (1 - s/t)) a step", "Dream, 2508.15487", _dream, _GREEDY
    ),
    "margin": Preset(
        "the tokens first whose lead over the second best is widest", "2502.06768", _margin, _GREEDY
    ),
    "conv": Preset("ancestral and top-k under a convolutional window", "2509.15188", _conv, _TOP_20),
    "llada-conv": Preset(
        "the most confident tokens under a convolutional window", "2509.15188", _llada_conv, _GREEDY
    ),
    "sliding": Preset(
        "ancestral and top-k in a window that slides over the row",
        "2509.15188, appendix E",
        _sliding,
        _TOP_20,
    ),
    "threshold": Preset(
        "all tokens above a confidence, at least one a step",
        "Fast-dLLM, 2505.22618",
        under_kernel(Threshold),
        _GREEDY,
    ),
    "block-threshold": Preset(
        "all tokens above a confidence, block after block of the row",
        "Fast-dLLM v2, 2509.26328",
        _block_threshold,
        _GREEDY,
    ),
    "wino": Preset(
        "all tokens above a low confidence, verified in the next calls",
        "WINO, 2507.18578",
        _wino,
        _GREEDY,
        wrapped={"verify": 0.9, "verify_all": True},
    ),
    "entropy-bound": Preset(
        "as many tokens as their entropies allow, at least one a step",
        "2505.24857",
        under_kernel(EntropyBound),
        _GREEDY,
    ),
    "stability": Preset(
        "all tokens that are confident and no longer change",
        "KLASS, 2511.05664",
        under_kernel(Stability),
        _GREEDY,
    ),
    "editing": Preset(
        "a threshold for masks, and one at which written tokens are replaced",
        "LLaDA 2.1",
        under_kernel(Editing),
        _GREEDY,
    ),
    "dilated": Preset(
        "every n-th token of a block, then those between", "DUS, 2506.19037", _dilated, _GREEDY
    ),
    "dprm": Preset("the most confident of a shortlist, by a learnt table of rewards", "DPRM", _dprm, _GREEDY),
    "remdm": Preset(
        "ancestral, with a loop that remasks written tokens",
        "ReMDM, 2503.00307",
        under_kernel(Remask),
        _NUCLEUS,
    ),
}


DECODER_GROUP = "dlm.decoders"
"""Entry points by which other packages offer presets: the decoder's name, and where its `Preset` is."""


def presets() -> Mapping[str, Preset]:
    """All decoders by name: `PRESETS`, and those that installed packages offer.

    Raises:
        ConfigError: for one that cannot be imported, is no `Preset`, or has the name of another.
    """
    return {**PRESETS, **_offered_on(tuple(sys.path))}


@lru_cache(maxsize=1)
def _offered_on(path: tuple[str, ...]) -> Mapping[str, Preset]:
    """Presets that packages on a path of Python offer; read once, as that takes longer than a step."""
    del path
    offered: dict[str, Preset] = {}
    for point in entry_points(group=DECODER_GROUP):
        where = f"decoder {point.name!r} of {point.dist.name if point.dist else point.value}"
        try:
            preset = point.load()
        except Exception as error:
            raise ConfigError(f"{where} cannot be imported ({type(error).__name__}: {error})") from error
        if not isinstance(preset, Preset):
            raise ConfigError(f"{where}: {point.value} is no Preset (decoding.presets), but {preset!r}")
        if point.name in PRESETS or point.name in offered:
            raise ConfigError(f"{where} has the name of another decoder; uninstall it, or rename it")
        offered[point.name] = preset
    return MappingProxyType(offered)


def list_decoders() -> dict[str, str]:
    """One line for each decoder: what it does, its paper, whether it is exact, its options."""
    lines = {}
    for name, preset in presets().items():
        options = ", ".join(f"{k}={v}" for k, v in preset.options.items())
        lines[name] = f"{preset.described}. Options: {options}"
    return lines


def decoders_in_words() -> str:
    """All decoders with their options, for a terminal; options that all of them have are said once."""
    every = [preset.options for preset in presets().values()]
    shared = [name for name in every[0] if all(name in options for options in every)]
    values = {name: [options[name] for options in every] for name in shared}
    usual = {name: max(given, key=given.count) for name, given in values.items()}
    lines = []
    for name, preset in presets().items():
        own = {k: v for k, v in preset.options.items() if k not in usual or v != usual[k]}
        lines.append(f"{name}: {preset.described}" + _below(own))
    rest = "Every decoder has these options too, and these values where no others stand:"
    return "\n".join([*lines, "", rest + _below(usual)])


def _below(options: Mapping[str, Any]) -> str:
    """Options on lines of their own, indented; "" for none."""
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return "\n" + textwrap.indent(textwrap.fill(words, 100), "    ") if words else ""


def option_names() -> set[str]:
    """Names of all options that some decoder has."""
    return {option for preset in presets().values() for option in preset.options}
