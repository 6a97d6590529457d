"""The training curves of a run, as pictures and `history.json` in its folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dlm.atomic import replacing, write_whole

logger = logging.getLogger(__name__)

History = list[dict[str, float]]
"""The trainer's log: one record per logged step or evaluation, each with its `step`."""

Draw = Callable[[History], Any]

BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    "#666666",
)
"""Colours of Okabe and Ito, which the colour-blind can tell apart, and a grey; lines differ in shape too."""


class CurveCallback(TrainerCallback):  # type: ignore[misc]
    """Renews plots at evaluations and checkpoints, and at the end; between them only a twentieth of the time.

    Args:
        folder: where they go.
        drawings: file name of each picture, and how it is drawn from the history as a matplotlib figure.
    """

    def __init__(self, folder: str | Path, drawings: dict[str, Draw]) -> None:
        self.folder, self.drawings = Path(folder), drawings
        self._due = 0.0
        if importlib.util.find_spec("matplotlib") is None:
            logger.warning("matplotlib is not installed: the curves are in history.json alone")
            self.drawings = {}

    def _renew(self, state: Any, last: bool = False) -> None:
        if not (state.is_world_process_zero and state.log_history):
            return
        text = json.dumps(state.log_history, indent=1)
        write_whole(self.folder / "history.json", text)
        begun = time.perf_counter()
        if begun < self._due and not last:
            return
        for name, draw in self.drawings.items():
            with replacing(self.folder / name) as part:
                draw(state.log_history).savefig(part, dpi=150, format=Path(name).suffix[1:])
        time_now = time.perf_counter()
        self._due = time_now + 19 * (time_now - begun)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a validation."""
        self._renew(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint."""
        self._renew(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end."""
        self._renew(state, last=True)


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have `key`."""
    points = [(record["step"], record[key]) for record in history if key in record]
    return [x for x, _ in points], [y for _, y in points]


def draw_curve(history: History) -> Any:
    """Loss and validation NELBO over steps, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    steps, loss = series(history, "loss")
    axes.plot(steps, loss, color=SKY, alpha=0.35, linewidth=1, label="training loss, one log interval")
    marker = "o" if len(steps) == 1 else None  # a line through one point is none
    axes.plot(steps, smooth(loss), color=BLUE, linewidth=1.8, marker=marker, label="training loss, smoothed")
    eval_steps, nelbo = series(history, "eval_nelbo")
    axes.plot(
        eval_steps, nelbo, color=RED, marker="o", markersize=4, linestyle="--", label="validation NELBO"
    )
    axes.set(xlabel="optimiser step", ylabel="nats per answer token (1/t-weighted)")
    without_frame(axes)
    return figure


def without_frame(axes: Any) -> None:
    """The look of all our plots: a light grid, a legend without a box, two spines."""
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without bias at the start."""
    out, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + 1 - weight
        out.append(mean / mass)
    return out
