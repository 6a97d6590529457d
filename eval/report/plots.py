"""Plots of runs: quality against model calls and against kernel size, and where tokens appear when."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm.curves import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, without_frame
from eval.metrics import MEASURES
from eval.run import Results, representatives
from eval.variants import short

LOOKS = tuple(
    zip(
        (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY),
        "osD^vPX",
        ("-", "--", "-.", ":", "-", "--", "-."),
        strict=True,
    )
)
"""Colour, marker and line of each series: any one of them tells series apart."""

SHOWN = ("win", "grade", "score", "right", "nll", "inlier", "relevance", "repetition_4", "empty")
"""Measures that have a panel of their own, where they were measured and differ."""

_COMMON = ("seed", "eos_fill", "trace", "dtype", "window", "max_tokens")

Size = Callable[[Results], float]


def calls(run: Results) -> float:
    """Mean model calls of an answer; NaN where they are not known."""
    estimate = run.means.get("model_calls")
    return estimate.mean if estimate else float("nan")


def size(run: Results) -> float:
    """The kernel or block size; NaN where there is none."""
    settings = run.card.settings
    return float(settings.get("kernel_size") or settings.get("block_size") or "nan")


def _series(run: Results, omitted: Sequence[str]) -> str:
    """Name of a line: the decoder, and the settings that it does not run over."""
    settings = {k: v for k, v in run.card.settings.items() if k not in (*omitted, *_COMMON)}
    words = {"kernel_size": "K", "block_size": "B", "steps": "S"}
    parts = [run.card.decoder or run.card.label] + [
        f"{words.get(k, k)}={short(v)}" for k, v in settings.items()
    ]
    return ", ".join(part for part in parts if part)


def quality_plot(
    runs: Sequence[Results],
    across: Size = calls,
    label: str = "model calls per answer",
    omitted: Sequence[str] = ("steps", "rate"),
) -> Any:
    """Measures over what `across` says, a line for each decoder, with 95 % intervals.

    Systems that were measured at several points have a row of panels each, with equal axes; the others are
    level lines in all of them.

    Returns:
        A matplotlib figure, or None where nothing varies.
    """
    from matplotlib.figure import Figure

    measured = [run for run in runs if not math.isnan(across(run))]
    points: dict[str, set[float]] = defaultdict(set)
    for run in measured:
        points[run.card.system].add(across(run))
    systems = [system for system in points if len(points[system]) > 1]
    names = [name for name in SHOWN if len({run.means[name].mean for run in runs if name in run.means}) > 1]
    if not names or not systems:
        return None
    panels = [(system, name) for system in systems for name in names]
    columns = len(names) if len(systems) > 1 else min(3, len(names))
    lines = [_grouped([run for run in measured if run.card.system == system], omitted) for system in systems]
    looks = dict(
        zip(sorted({series for series_lines in lines for series in series_lines}), _looks(), strict=False)
    )
    levels = [run for run in measured if run.card.system not in systems]
    down = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * down + 0.6), layout="constrained")
    share: Any = "col" if len(systems) > 1 else "none"
    axes = figure.subplots(down, columns, squeeze=False, sharex=share, sharey=share).ravel()
    for panel, (system, name) in zip(axes, panels, strict=False):
        for series, series_lines in lines[systems.index(system)].items():
            _draw_series(panel, sorted(series_lines, key=across), across, name, series, looks[series])
        for run in levels:
            _level(panel, run, name)
    for panel, (system, name) in zip(axes, panels, strict=False):
        _dress(panel, name, label)
        if len(systems) > 1 and name == names[0]:
            panel.set_ylabel(system, fontsize=10, fontweight="bold")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    _legend_below(figure, axes[: len(panels)], 2 * columns)
    return figure


def _legend_below(figure: Any, panels: Iterable[Any], columns: int) -> None:
    """One legend for all panels of a figure."""
    shown: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=min(len(shown), columns), frameon=False,
        fontsize=8,
    )  # fmt: skip


def _grouped(runs: Sequence[Results], omitted: Sequence[str]) -> dict[str, list[Results]]:
    """The runs of each line, by its name."""
    groups: dict[str, list[Results]] = defaultdict(list)
    for run in runs:
        groups[_series(run, omitted)].append(run)
    return dict(sorted(groups.items()))


def swept(runs: Sequence[Results], across: Size, omitted: Sequence[str]) -> list[Results]:
    """The runs on lines that `across` varies along: those of a sweep."""
    lines: dict[tuple[str, str], list[Results]] = defaultdict(list)
    for run in runs:
        if not math.isnan(across(run)):
            lines[run.card.system, _series(run, omitted)].append(run)
    return [run for line in lines.values() if len({across(run) for run in line}) > 1 for run in line]


def _level(panel: Any, run: Results, name: str) -> None:
    """A system that has one point only."""
    if name in run.means:
        scale = 100 if MEASURES[name].percent else 1
        panel.axhline(
            scale * run.means[name].mean, color=GREY, linewidth=1, linestyle=":", label=run.card.name
        )


def _looks() -> Any:
    """Looks without end; beyond the palette, hollow markers."""
    hollow = False
    while True:
        yield from ((*look, hollow) for look in LOOKS)
        hollow = not hollow


def _draw_series(
    panel: Any, runs: Sequence[Results], across: Size, name: str, series: str, look: Any
) -> None:
    colour, marker, line, hollow = look
    scale = 100 if MEASURES[name].percent else 1
    points = [(across(run), run.means[name]) for run in runs if name in run.means]
    x = [a for a, _ in points]
    y = [scale * e.mean for _, e in points]
    error = [
        [scale * max(e.mean - e.low, 0) for _, e in points],
        [scale * max(e.high - e.mean, 0) for _, e in points],
    ]
    panel.errorbar(
        x, y, yerr=error, label=series, color=colour, marker=marker, linestyle=line, markersize=5,
        linewidth=1.3, capsize=2, elinewidth=0.8, markerfacecolor="white" if hollow else colour,
    )  # fmt: skip


def _dress(panel: Any, name: str, label: str) -> None:
    measure = MEASURES[name]
    arrow = {1: " ↑", -1: " ↓", 0: ""}[measure.better]
    panel.set_title(f"{measure.title}{', %' if measure.percent else ''}{arrow}", fontsize=9, loc="left")
    panel.set_xlabel(label, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.set_xscale("log", base=2)
    panel.margins(x=0.1)
    low, high = panel.get_xlim()
    inside = [tick for tick in (2**n for n in range(13)) if low <= tick <= high]
    inside = inside if len(inside) > 1 else [round(low * 1.1), round(high / 1.1)]
    panel.set_xticks(inside, [str(tick) for tick in inside])
    panel.minorticks_off()
    without_frame(panel)
    if panel.get_legend():
        panel.get_legend().remove()


def revealed(runs: Sequence[Results], positions: int = 64, limit: int = 6) -> Any:
    """Steps at which positions get their token: share of answers, by place and part of the steps.

    Returns:
        A matplotlib figure, or None where steps are not known.
    """
    from matplotlib.figure import Figure

    decoded = [run for run in runs if any(answer.reveal_step for answer in run.answers.values())]
    decoded = representatives(decoded, limit)
    if not decoded:
        return None
    columns = min(3, len(decoded))
    rows = math.ceil(len(decoded) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    image: Any = None
    for panel, run in zip(panels, decoded, strict=False):
        image = panel.imshow(
            reveal_shares(run, positions).T, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=0.5,
            extent=(0, positions, 0, 1), interpolation="nearest",
        )  # fmt: skip
        panel.set_title(run.card.name, fontsize=8, loc="left")
        panel.tick_params(labelsize=8)
    for panel in panels[len(decoded) :]:
        panel.set_axis_off()
    figure.supxlabel("place in the answer, tokens", fontsize=9)
    figure.supylabel("part of the steps taken", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    bar.set_label("share of answers", fontsize=8)
    return figure


def reveal_shares(run: Results, positions: int, limit: int = 16) -> np.ndarray:
    """[positions, ≤ most] share of the tokens at a place that appeared in a part of the steps; sums to 1.

    NaN at places that fewer than a tenth of the answers reach.
    """
    bins = min(limit, max((answer.steps for answer in run.answers.values()), default=1) or limit)
    counts = np.zeros((positions, bins))
    for answer in run.answers.values():
        last = max(max(answer.reveal_step, default=0), answer.steps - 1, 1)
        for place, step in enumerate(answer.reveal_step[:positions]):
            if step >= 0:
                counts[place, min(int(bins * step / (last + 1)), bins - 1)] += 1
    total = counts.sum(1, keepdims=True)
    return np.where(total >= max(1, len(run.answers) / 10), counts / np.maximum(total, 1), np.nan)


def ldw(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """The long decoding window: mass on frequent and prompt tokens by distance (arXiv 2509.15188, figure 3).

    Args:
        curves: for each model what `dlm inspect ldw` wrote, by distance: "frequent", "prompt", "end", "rows".
            A line ends where the first prompt has no position any more.
    """
    from matplotlib.figure import Figure

    titles = {
        "frequent": "on the most frequent tokens",
        "prompt": "on tokens of the prompt",
        "end": "on the end",
    }
    figure = Figure(figsize=(10.5, 3.0), layout="constrained")
    panels = figure.subplots(1, 3, squeeze=False).ravel()
    for panel, (field, title) in zip(panels, titles.items(), strict=True):
        for (name, curve), (colour, _, line) in zip(curves.items(), LOOKS, strict=False):
            panel.plot(
                curve[field][: _shared(curve)],
                color=colour,
                linestyle=line,
                linewidth=1.3,
                label=Path(name).name,
            )
        panel.set_title(f"probability {title}", fontsize=9, loc="left")
        panel.set_xlabel("distance from the prompt, tokens", fontsize=8)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        without_frame(panel)
        panel.get_legend().remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _shared(curve: Mapping[str, Sequence[float]]) -> int | None:
    """Distances that every prompt has; None, for all, where the figures do not say how many there are."""
    rows = curve.get("rows")
    return list(rows).count(rows[0]) if rows else None
