"""How long work is going: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines, and from the start to the first: short work says nothing."""

LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} to go{postfix}"
"""A line, in tqdm's names."""


class ProgressLines(tqdm):  # type: ignore[misc]
    """A tqdm bar for logs (nohup, clusters, CI): what it shows goes to the logger, line by line."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Print by way of the logger; see `tqdm`."""
        del file
        return _say


def _say(text: str) -> None:
    if text.strip():
        logger.info(text.strip())


def progress(
    items: Iterable[Any] | None, label: str, total: int | None = None, *, quiet: bool = False, **settings: Any
) -> Any:
    """Items that show how far they are: with a bar on a terminal, in lines where stderr is none.

    Args:
        items: the items; None to count by `update`.
        label: what is going on.
        total: their number, if it is known.
        quiet: show nothing.
        **settings: further ones of tqdm, such as `unit`, `leave` and `initial`.

    Returns:
        A `tqdm`, which is an iterator and a context manager.
    """
    if sys.stderr.isatty():
        return tqdm(items, label, total, disable=quiet, **settings)
    settings |= {"unit": f" {settings.get('unit', 'step')}s", "leave": True, "miniters": 1}
    settings |= {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    return ProgressLines(items, label, total, bar_format=LINE, file=io.StringIO(), disable=quiet, **settings)
