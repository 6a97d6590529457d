"""The errors a user can cause. Each message names the offending value and what would be right.

The command line turns a `DLMError` into one line on stderr and exit status 1; everything else is a bug
and keeps its traceback under `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class DLMError(Exception):
    """Root of the errors that this toolkit raises on purpose."""


class ConfigError(DLMError, ValueError):
    """A setting has a value that cannot work, or a name that does not exist."""


class DataError(DLMError, ValueError):
    """A data file or one of its rows cannot be used; the message names the file and the row."""


class CheckpointError(DLMError, OSError):
    """A checkpoint is missing, truncated, or of an unsupported family."""


class DivergedError(DLMError):
    """Training came to numbers that are none: its weights are of no use any more."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """A `ConfigError` for an unknown `name`: the nearest right one first, then all the choices."""
    names = sorted(choices)
    return ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, names)} Choices: {', '.join(names)}")


MOST_WHOLE = 2**31 - 1
"""Greatest whole number that an option can have."""

MOST_NUMBER = 1e18
"""Greatest number that is added to logits or multiplies them; float32 holds what comes out."""


def plain(value: Any) -> Any:
    """A number of another kind, such as NumPy's, as Python's own; anything else as it is."""
    if type(value) in (bool, int, float):
        return value
    try:
        return (
            int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value
        )
    except OverflowError:
        return value


def check_whole(name: str, value: Any, least: int = 1, most: int = MOST_WHOLE) -> None:
    """Refuse a value that is no whole number from `least` to `most`; true and false are none.

    Raises:
        ConfigError: naming it and its bounds.
    """
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        bound = f"of at least {least}" if least else "that is not negative"
        raise ConfigError(f"{name} must be a whole number {bound}, got {value!r}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")


def refuse_ignored(config: Any, names: Iterable[str], prefix: str, wanted: str) -> None:
    """Refuse settings that would be ignored: those that are not their defaults.

    Args:
        config: an instance of a dataclass of settings.
        names: fields that have no effect.
        prefix: what comes before their names on a command line.
        wanted: what they are for.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in names:
        if getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"{prefix}{name} is for {wanted}")


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this project."""
    return f'pip install ".[{extra}]" in the folder of dlm'


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A question that names the nearest of `choices`, after a space; nothing when none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
