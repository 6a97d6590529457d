"""Rewards: numbers for texts, by which `decoding.tilted.particles` steers.

A reward is called as the reward functions of trl are, `reward(prompts=[…], completions=[…])`, and returns one
finite number for each text. It must be a function of prompt and text alone, and take unfinished texts too.
Those that need a model of their own are offered by packages that may import one, under the entry points
`dlm.rewards`.

Importable without torch.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from dlm.errors import ConfigError, DLMError, unknown_name
from dlm.repetition import repetition

REWARD_GROUP = "dlm.rewards"
"""Entry points by which packages offer rewards: a name, and a function from the text behind "=" to one."""


class Reward(Protocol):
    """Anything that gives a number to each of several texts; lambdas with these two names will do."""

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> Sequence[float]:
        """Return one finite number for each completion; the greater the better.

        Args:
            prompts: what each text is the answer to, as `Sampler.generate` was given it.
            completions: answers, finished or not.
        """
        ...


@dataclass(frozen=True)
class Length:
    """Closeness to a length: -|words - target| / target, 0 at best.

    Attributes:
        target: words.
    """

    target: int

    def __post_init__(self) -> None:
        """Check the range."""
        if self.target < 1:
            raise ConfigError(f"length must be at least 1 word, got {self.target}")

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return [-abs(len(text.split()) - self.target) / self.target for text in completions]


@dataclass(frozen=True)
class NoRepetition:
    """Minus the share of n-grams of words that are repeats of an earlier one, 0 at best.

    Attributes:
        n: words of an n-gram.
    """

    n: int = 4

    def __post_init__(self) -> None:
        """Check the range."""
        if self.n < 1:
            raise ConfigError(f"no-repetition needs n-grams of at least 1 word, got {self.n}")

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return [-repetition(text, self.n) for text in completions]


@dataclass(frozen=True)
class Matches:
    """1 for a text in which a regular expression is found, else 0.

    Attributes:
        pattern: as of Python's `re`; "." is any character but a line break, "(?s)" in front changes that.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Check that it can be read."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"regex {self.pattern!r} cannot be read: {error}") from error

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """See `Reward`."""
        return [float(re.search(self.pattern, text) is not None) for text in completions]


def _number(name: str, argument: str) -> int:
    """The whole number behind "name=".

    Raises:
        ConfigError: when it is none.
    """
    try:
        return int(argument)
    except ValueError:
        raise ConfigError(f"{name} needs a whole number, as in {name}=100, got {argument!r}") from None


def _compiled(argument: str) -> Matches:
    if not argument:
        raise ConfigError("regex needs a pattern, as in regex='[0-9]+'")
    return Matches(argument)


REWARDS: Mapping[str, Callable[[str], Reward]] = {
    "length": lambda argument: Length(_number("length", argument)),
    "no-repetition": lambda n: NoRepetition(_number("no-repetition", n)) if n else NoRepetition(),
    "regex": _compiled,
}
"""Rewards that need nothing else: from the text behind "=" (empty without one) to a reward."""


def reward_named(spec: str) -> Reward:
    """The reward that a text names.

    Args:
        spec: "name" or "name=argument", of `REWARDS` or of an entry point; or "module:function" for a reward
            of your own, of a module that Python finds here or among the installed packages.

    Raises:
        ConfigError: for an unknown name, listing the choices, and for what cannot be imported or called.
    """
    name, equals, argument = spec.partition("=")
    if name in REWARDS:
        return REWARDS[name](argument)
    offered = {point.name: point for point in entry_points(group=REWARD_GROUP)}
    if name in offered:
        return offered[name].load()(argument)  # type: ignore[no-any-return]
    if ":" in name and not equals:
        return _imported(spec)
    raise unknown_name("reward", name, [*REWARDS, *offered, "module:function"])


def _imported(spec: str) -> Reward:
    """The callable that "module:function" names."""
    module, _, attribute = spec.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file here shadows no package
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"reward {spec!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(reward):
        raise ConfigError(f"reward {spec!r} must be a function of prompts and completions, got {reward!r}")
    return reward  # type: ignore[no-any-return]


def values(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[str], *, nan: bool = False
) -> list[float]:
    """Rewards of texts; with `nan`, texts without one are allowed.

    Raises:
        DLMError: when the reward raises an error, or does not give one finite number for each.
    """
    try:
        numbers = [float(value) for value in reward(prompts=prompts, completions=completions)]
    except DLMError:
        raise
    except Exception as error:
        raise DLMError(f"the reward failed ({type(error).__name__}: {error})") from error
    if len(numbers) != len(completions):
        raise DLMError(
            f"the reward must give a number for each of {len(completions)} texts, gave {len(numbers)}"
        )
    for value, text in zip(numbers, completions, strict=True):
        if not math.isfinite(value) and not (nan and math.isnan(value)):
            raise DLMError(f"the reward must be a finite number, got {value} for {text[:80]!r}")
    return numbers
