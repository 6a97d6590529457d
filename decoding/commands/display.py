"""Answers shown in a terminal while they are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def plain_console(**settings: Any) -> Console:
    """A console for which texts are texts: "[/x]" and ":bug:" come out as they stand."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **settings)


def watch(console: Console, texts: Iterable[str]) -> str:
    """Show a text as it grows, in place on a terminal and at its end elsewhere; returns the last one.

    Args:
        console: where it is shown.
        texts: each the whole text so far; never read as markup.
    """
    from rich.live import Live
    from rich.text import Text

    last = ""
    if not console.is_terminal:
        for last in texts:  # noqa: B007
            pass
        console.print(Text(last), soft_wrap=True)
        return last
    with Live(console=console, auto_refresh=False) as live:
        for last in texts:
            live.update(Text(last), refresh=True)
    return last
