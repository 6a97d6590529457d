"""Answers in the terminal, coloured by the step that revealed each token."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from rich.text import Text

from decoding.sampler import Output, Sampler


def style(step: int, steps: int) -> str:
    """A background from dark blue (first step) to yellow (last), with ink that can be read on it."""
    red, green, blue = (int(255 * c) for c in colormaps["viridis"](step / max(1, steps))[:3])
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "black"
    return f"{ink} on rgb({red},{green},{blue})"


def coloured(output: Output, sampler: Sampler) -> Text:
    """An answer, each token on the colour of its step."""
    text = Text()
    for token, step in zip(output.token_ids, output.reveal_step, strict=True):
        text.append(sampler.tokenizer.decode([token]), style=style(step, output.steps))
    return text


def legend(labels: Sequence[object]) -> Text:
    """Which colour is which step: labels from the first step to the last."""
    text = Text("step: ")
    for i, label in enumerate(labels):
        text.append(f" {label} ", style=style(i, len(labels) - 1))
    return text
