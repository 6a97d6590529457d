"""Answers in the terminal, coloured by the step that revealed each token."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from rich.text import Text

from decoding.answer import Output
from decoding.sampler import Sampler


def style(step: int, steps: int) -> str:
    """A background from dark blue (first step) to yellow (last), with ink that can be read on it."""
    red, green, blue = (int(255 * c) for c in colormaps["viridis"](step / max(1, steps))[:3])
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "black"
    return f"{ink} on rgb({red},{green},{blue})"


def coloured(output: Output, sampler: Sampler) -> Text:
    """An answer, each token on the colour of its step."""
    text, shown = Text(), 0
    for i, step in enumerate(output.reveal_step):
        whole = sampler.tokenizer.decode(output.token_ids[: i + 1])
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # else the next token completes the character
            text.append(whole[shown:], style=style(step, output.steps))
            shown = len(whole)
    return text


def legend(labels: Sequence[object]) -> Text:
    """Colours of the steps: labels from the first step to the last."""
    text = Text("step: ")
    for i, label in enumerate(labels):
        text.append(f" {label} ", style=style(i, len(labels) - 1))
    return text
