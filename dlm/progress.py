"""How long work is going: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines, and from the start to the first: short work says nothing."""

LINE, LINE_WITHOUT_TOTAL = (
    "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} to go{postfix}",
    "{desc}: {n_fmt} {unit}, {elapsed} gone{postfix}",
)
"""A line, in tqdm's names."""


class ProgressLines(tqdm):  # type: ignore[misc]
    """A tqdm bar for logs (nohup, clusters, CI): what it shows goes to the logger, line by line."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Print by way of the logger, nothing twice; see `tqdm`."""
        del file
        last = ""

        def say(text: str) -> None:
            nonlocal last
            if (line := text.strip()) not in ("", last):
                logger.info(line)
                last = line

        return say


def in_lines() -> bool:
    """True where progress is to be lines: there is no terminal, and somebody listens to the log."""
    return sys.stderr is not None and not sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


def progress(
    items: Iterable[Any] | None, label: str, total: int | None = None, *, quiet: bool = False, **settings: Any
) -> Any:
    """Items that show how far they are: with a bar, or in lines where stderr is no terminal (`in_lines`).

    Args:
        items: the items; None to count by `update`.
        label: what is going on.
        total: their number, if it is known.
        quiet: show nothing.
        **settings: further ones of tqdm, such as `unit`, `leave` and `initial`.

    Returns:
        A `tqdm`, which is an iterator and a context manager.
    """
    if not in_lines():
        return tqdm(items, label, total, disable=quiet or sys.stderr is None, **settings)
    total = len(items) if total is None and isinstance(items, Sized) else total
    unit = settings.get("unit", "step")
    settings |= {"unit": unit + ("es" if unit.endswith("ch") else "s"), "leave": True, "miniters": 1}
    settings |= {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    line = LINE_WITHOUT_TOTAL if total is None else LINE
    return ProgressLines(items, label, total, bar_format=line, file=io.StringIO(), disable=quiet, **settings)
