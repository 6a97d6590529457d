"""Inputs of a sampler: alone or in a list, each with its seed, errors with their names."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from decoding.gaps import Piece
from decoding.request import is_whole
from dlm.errors import ConfigError

PromptT = TypeVar("PromptT")


def cut_text(name: str, text: Any, cut: Callable[[], list[Piece]]) -> list[Piece]:
    """The pieces of a text, errors beginning with its name."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a text, got {text!r}")
    try:
        return cut()
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def as_list(prompts: Any) -> tuple[bool, Any]:
    """True and a list of one for a lone text or a lone conversation; else False and what was given."""
    if isinstance(prompts, dict):
        raise ConfigError("prompts must be a text, chat messages, or several of them; got one message alone")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise ConfigError(f"prompts must be a text, chat messages, or several of them; got {prompts!r}")
    one = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)
    )
    return one, [prompts] if one else prompts


def with_seeds(prompts: Iterable[PromptT], seed: int | Sequence[int]) -> Iterator[tuple[PromptT, int]]:
    """Each prompt with its seed: one for all, or as many seeds as there are prompts."""
    per_prompt = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
    if not all(map(is_whole, seed if per_prompt else [seed])):  # type: ignore[arg-type]
        raise ConfigError(f"seed must be a whole number, or one for each prompt, got {seed!r}")
    if not isinstance(seed, Sequence):
        yield from zip(prompts, itertools.repeat(operator.index(seed)), strict=False)
        return
    seeds = iter(seed)
    for prompt in prompts:
        each = next(seeds, None)
        if each is None:
            raise ConfigError(f"seed lists {len(seed)} seeds, but there are more prompts")
        yield prompt, int(each)
    if next(seeds, None) is not None:
        raise ConfigError(f"seed lists {len(seed)} seeds, but there are fewer prompts")
