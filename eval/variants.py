"""Variants that a sweep compares, decoders at a pace, as a command line names them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding.request import Request
from dlm.errors import ConfigError

SIZES = ("kernel_size", "block_size")
"""Options that give the size of a decoder's window."""


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        decoder: name of the preset; empty for the checkpoint's own.
        options: of the preset.
        pace: window and steps, or max_tokens and rate, and what else is given; as for `Sampler.generate`.
    """

    decoder: str
    options: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, Any]:
        """The options as a run records them: of an order table its contents, whatever its name."""
        if "table" not in self.options:
            return self.options
        from decoding.reveal.order_table import OrderTable

        return {**self.options, "table": OrderTable.named(self.options["table"]).digest}

    @property
    def label(self) -> str:
        """Short, and fit for a folder's name."""
        return ",".join(part for part in self.split("default") if part)

    def split(self, default: str) -> tuple[str, str]:
        """Decoder with options, and pace; `default` is what the checkpoint's decoder is called."""
        return ",".join([self.decoder or default, *_labels(self.options)]), ",".join(_labels(self.pace))

    def request(self, **common: Any) -> Request:
        """The request for the sampler, with further fields."""
        request = Request(decoder=self.decoder or None, options=self.options or None, **self.pace, **common)
        request.check_decoder()
        return request


def _labels(settings: dict[str, Any]) -> list[str]:
    words = {"kernel_size": "K", "block_size": "B", "window": "L", "steps": "S", "max_tokens": "max"}
    return [f"{words.get(name, name)}={short(value)}" for name, value in settings.items()]


def short(value: Any) -> str:
    """A value in a label: a number, a word, or the name of a file."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, str | Path):
        return Path(value).stem if str(value).endswith((".json", ".safetensors")) else str(value)
    return str(value).lower()


def parse_decoders(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names with options: "conv,semi-ar(block_size=64),top-k(top_k=10,temperature=0.8)".

    Raises:
        ConfigError: for what cannot be read.
    """
    decoders = []
    for part in re.split(r",(?![^(]*\))", text) if text else [""]:
        shape = re.fullmatch(r"\s*([\w-]*)\s*(?:\((.*)\))?\s*", part)
        if shape is None or (text and not shape[1]):
            raise ConfigError(f"decoders: cannot read {part!r}; write name or name(option=value,…)")
        options = {}
        for pair in (shape[2] or "").split(",") if shape[2] else []:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"decoders: {pair!r} is not option=value")
            options[name.strip()] = _option_value(shape[1], name.strip(), value)
        decoders.append((shape[1], options))
    return decoders


def _option_value(decoder: str, option: str, text: str) -> Any:
    """The value of an option: a number, or a word where the decoder takes words there."""
    from decoding.presets import presets

    default = presets()[decoder].options.get(option) if decoder in presets() else None
    if isinstance(default, bool) and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if isinstance(default, str) or option == "table":
        return text.strip()
    return number(text, option)


def number(text: str, name: str, window: int = 0) -> int | float:
    """A number, or a share of the window, such as "L/16".

    Raises:
        ConfigError: for anything else.
    """
    share = re.fullmatch(r"\s*L(?:\s*/\s*(\d+))?\s*", text)
    if share and window and share[1] != "0":
        return max(window // int(share[1] or 1), 1)
    try:
        value = float(text)
    except ValueError as error:
        hint = "; shares of L need --window" if share and not window else ""
        raise ConfigError(f"{name}: {text.strip()!r} is not a number{hint}") from error
    if not math.isfinite(value):
        raise ConfigError(f"{name}: must be finite, got {text.strip()}")
    return int(value) if value == int(value) else value


def whole_numbers(values: Sequence[float], name: str) -> list[int]:
    """The values as whole numbers of at least 1.

    Raises:
        ConfigError: for others.
    """
    wrong = [value for value in values if value != int(value) or value < 1]
    if wrong:
        raise ConfigError(f"{name} must be whole numbers of at least 1, got {wrong[0]:g}")
    return [int(value) for value in values]


def listed(text: str, name: str, window: int = 0) -> list[int | float]:
    """Numbers with commas between them; an empty text is no number."""
    return [number(part, name, window) for part in text.split(",")] if text.strip() else []


def variants(
    decoders: str,
    *,
    window: int | None = None,
    steps: str = "",
    max_tokens: int | None = None,
    rate: str = "",
    kernel: str = "",
    top_k: str = "",
) -> list[Variant]:
    """All combinations; `kernel` is the size of whatever a decoder has, a kernel or blocks.

    A decoder that has none, or cuts nothing, appears once.

    Raises:
        ConfigError: for what cannot be read, unknown names, kernels of even size, and for sizes or cuts that
            none of the decoders has.
    """
    out: list[Variant] = []
    paces = list(_paces(window, steps, max_tokens, rate))
    values, cuts = (
        whole_numbers(listed(kernel, "kernel", window or 0), "kernel"),
        whole_numbers(listed(top_k, "top_k"), "top_k"),
    )
    sizes = list(zip(values, ("L" in part for part in kernel.split(",")), strict=False))
    for name, options in parse_decoders(decoders):
        for size_options, pace in itertools.product(_option_grid(name, sizes, cuts), paces):
            variant = Variant(name, {**size_options, **options}, pace)
            variant.request()
            if variant not in out:
                out.append(variant)
    for option, given, names in (("kernel", sizes, SIZES), ("top_k", cuts, ("top_k",))):
        if given and not any(name in variant.options for variant in out for name in names):
            raise ConfigError(f"--{option}: none of the decoders that --decoders names has one to set")
    return out


def check_sizes(**sizes: float | None) -> None:
    """Refuse sizes below 1; None is not given.

    Raises:
        ConfigError: naming the size.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}; leave it out for the default")


def _paces(window: int | None, steps: str, max_tokens: int | None, rate: str) -> Iterator[dict[str, Any]]:
    fixed, rates = whole_numbers(listed(steps, "steps", window or 0), "steps"), listed(rate, "rate")
    if any(value < 1 for value in rates):
        raise ConfigError(f"rate must be at least 1 token per model call, got {min(rates):g}")
    if fixed and (rates or max_tokens):
        raise ConfigError("give --steps (in a window) or --rate (length-free, up to --max_tokens), not both")
    if window and max_tokens:
        raise ConfigError("give --window (a fixed canvas) or --max_tokens (one that grows), not both")
    common = {"window": window} if window else {}
    common |= {"max_tokens": max_tokens} if max_tokens else {}
    if not fixed and not rates:
        yield common
    yield from ({**common, "steps": value} for value in fixed)
    yield from ({**common, "rate": float(value)} for value in rates)


def _option_grid(
    name: str, sizes: Sequence[tuple[int, bool]], cuts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The options that a decoder has, at every size and cut asked for.

    Kernels are odd: a share of the window, which sizes have True with them, is for them the next odd number.
    """
    from decoding.presets import presets
    from dlm.errors import unknown_name

    if name and name not in presets():
        raise unknown_name("decoder", name, presets())
    defaults = presets()[name].options if name else {}
    size_name = next((x for x in SIZES if defaults.get(x, 0) != 0), None)
    for size, cut in itertools.product([*sizes] if sizes else [None], [*cuts] if cuts else [None]):
        options: dict[str, Any] = {}
        if size is not None and size_name:
            value, share = size
            options[size_name] = value | 1 if share and size_name == "kernel_size" else value
        if cut is not None and "top_k" in defaults and defaults["top_k"] != 0:
            options["top_k"] = cut
        yield options
