"""`dlm eval dependence`: what a token says of another that is still masked, by their distance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.atomic import write_whole
from dlm.cli import Command
from dlm.device import PlaceConfig
from dlm.errors import ConfigError
from dlm.progress import progress

if TYPE_CHECKING:
    from eval.dependence import Gain
    from eval.report.tables import Table


@dataclass(frozen=True)
class DependenceConfig(PlaceConfig):
    """Settings of `dlm eval dependence`.

    Tokens of one call do not see each other. On true answers, with a part of them visible, one masked token
    is told, and what that adds to the log-probability of the others is written down by distance: how far
    apart the tokens of a call should be (the option `gap` of every decoder).

    Args:
        models: folders or hub ids of masked diffusion models, "default", "full-sft" (the words that are no
            options).
        data: rows whose answers are looked at, a file or hub id.
        last: only the last so many of them: those that training held out.
        limit: the first so many of these that fit; 0 for all.
        max_tokens: longest answer.
        furthest: longest distance between two tokens.
        seed: random seed of the visible parts of the answers.
        batch_size: answers per model call.
        output: folder for the figures (dependence.json), the table (.md) and the plot (.svg).
    """

    models: list[str] = field(default_factory=list)
    data: str = "tatsu-lab/alpaca"
    last: int = 1000
    limit: int = 100
    max_tokens: int = 128
    furthest: int = 16
    seed: int = 0
    batch_size: int = 8
    output: str = "runs/dependence"

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.models:
            raise ConfigError("name one or more checkpoints: dlm eval dependence full-sft full")
        for name, least in (("last", 1), ("limit", 0), ("max_tokens", 1), ("furthest", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self.check_place()


def run(config: DependenceConfig) -> int:
    """Measure each model, and show and write the table."""
    from rich.console import Console

    from dlm.lock import alone_in

    with alone_in(config.output):
        gains_by_model = {path: measured_dependence(path, config) for path in config.models}
        shown = dependence_table(gains_by_model)
        Console(width=None if Console().is_terminal else 120, markup=False, emoji=False).print(shown.rich())
        print(*write_dependence(Path(config.output), gains_by_model, shown), sep="\n")
    return 0


def measured_dependence(path: str, config: DependenceConfig) -> list[Gain]:
    """The gains of one model."""
    from dlm.checkpoint import load_model
    from dlm.spec import ModelSpec
    from eval.dependence import gains
    from eval.paths import held_out

    model, tokenizer = load_model(path, config.device, config.dtype, prepacked=True)
    room = ModelSpec.of(model).positions
    rows = held_out(config.data, config.last, config.limit, tokenizer, room, config.max_tokens)
    going = gains(model, rows, furthest=config.furthest, seed=config.seed, batch_size=config.batch_size)
    return list(progress(going, path, unit="pair", leave=False))


def dependence_table(gains_by_model: dict[str, list[Gain]]) -> Table:
    """Nats by distance, for each model: all pairs, and those at the edge of the text."""
    from eval.dependence import by_distance
    from eval.report.tables import Table

    columns: list[tuple[str, dict[int, Any]]] = []
    for path, gained in gains_by_model.items():
        columns += [(path, by_distance(gained)), (f"{path}, at the text", by_distance(gained, reach=0))]
    distances = sorted({distance for _, column in columns for distance in column})
    rows = [[str(d), *(_interval_cell(column.get(d)) for _, column in columns)] for d in distances]
    title = "Dependence: nats that a told token adds to another's log-probability, by distance"
    return Table(title, ["distance", *(name for name, _ in columns)], rows)


def _interval_cell(value: Any) -> str:
    if value is None:
        return ""
    half = value.high - value.mean
    return f"{value.mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def write_dependence(folder: Path, gains_by_model: dict[str, list[Gain]], shown: Table) -> list[Path]:
    """Figures, table and plot."""
    import json
    from dataclasses import asdict

    from eval.dependence import by_distance
    from eval.formats import without_nan

    folder.mkdir(parents=True, exist_ok=True)
    figures, words, picture = (folder / f"dependence.{end}" for end in ("json", "md", "svg"))
    estimates = {
        path: {str(d): asdict(value) for d, value in by_distance(gained).items()}
        for path, gained in gains_by_model.items()
    }
    write_whole(figures, json.dumps(without_nan(estimates), indent=1))
    write_whole(words, f"## {shown.title}\n\n{shown.markdown()}\n")
    draw_dependence(gains_by_model).savefig(picture)
    return [figures, words, picture]


def draw_dependence(gains_by_model: dict[str, list[Gain]]) -> Any:
    """Nats over distance as a matplotlib figure, a line for each model, its interval shaded."""
    from matplotlib.figure import Figure

    from dlm.curves import without_frame
    from eval.dependence import by_distance
    from eval.report.plots import LOOKS

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (path, gained) in enumerate(gains_by_model.items()):
        colour, marker, line = LOOKS[i % len(LOOKS)]
        values = by_distance(gained)
        x = list(values)
        axes.plot(x, [v.mean for v in values.values()], marker + line, color=colour, markersize=4, label=path)
        low, high = ([getattr(v, end) for v in values.values()] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="distance of the two tokens", ylabel="nats")
    without_frame(axes)
    return figure


COMMAND = Command(
    "what a masked token says of another, by their distance", DependenceConfig, run, positional="models"
)
