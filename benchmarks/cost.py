"""The cost of an answer, as a function of window, steps, rows and vocabulary; and what a step spends
elsewhere.

First, seconds per answer of 60 tokens with a backbone of 11 M parameters, one size varied at a time around
L = 256, S = 32, one row, V = 16,384, for the plain loop, ours with steps (exact, and on a growing canvas)
and length-free; plotted. Then, with a backbone of SmolLM2-135M's shape, L = 512, S = 64, V = 49,153, the
share of a step's time that is spent outside the model (window weights, normaliser, top-k, sampling,
bookkeeping), for every decoder.

    python -m benchmarks.cost [--rounds 2] [--plot runs/cost.svg] [--model DIR]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.models import EOS, SMOLLM2, VOCAB, Ending, smollm2
from decoding.canvas import Row, make_canvas
from decoding.presets import PRESETS, Decoder
from decoding.request import Request
from decoding.step import denoise
from dlm.checkpoint import DTYPES, load_model
from dlm.config import MaskedDiffusionConfig
from dlm.curves import BLUE, GREEN, ORANGE, PINK, without_frame
from dlm.model import MaskedDiffusionModel
from eval.bench import Problem, Timed, now, time_ways

PROMPT, ANSWER = 40, 60
COLOURS = {"plain": ORANGE, "steps, exact": BLUE, "steps, canvas growing": GREEN, "length-free, rate 2": PINK}


@dataclass(frozen=True)
class Size:
    """Sizes that are varied."""

    window: int = 256
    steps: int = 32
    rows: int = 1
    vocabulary: int = 16_384


LABELS = {"window": "window L", "steps": "steps S", "rows": "rows B", "vocabulary": "vocabulary V"}

AXES: dict[str, list[int]] = {
    "window": [128, 256, 512, 1024],
    "steps": [16, 32, 64, 128],
    "rows": [1, 2, 4, 8],
    "vocabulary": [4_096, 16_384, 49_152, 131_072],
}


def small(vocabulary: int, device: str, dtype: torch.dtype) -> MaskedDiffusionModel:
    """A backbone of 11 M parameters."""
    torch.manual_seed(0)
    shape = {**SMOLLM2, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
             "num_attention_heads": 6, "num_key_value_heads": 6}  # fmt: skip
    config = MaskedDiffusionConfig(
        backbone=shape,
        vocab_size=vocabulary,
        num_tokens=vocabulary,
        mask_token_id=vocabulary - 1,
        eos_token_id=EOS,
    )
    model = MaskedDiffusionModel(config)
    model.to(device, dtype).eval()
    return model


def seconds(size: Size, rounds: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds per answer of each way."""
    model = Ending(small(size.vocabulary, device, dtype), PROMPT + ANSWER)
    prompts = torch.randint(5, size.vocabulary - 5, (size.rows, PROMPT), device=device)
    problem = Problem(model, prompts, size.vocabulary - 1, EOS, size.window, size.steps)
    kernel = size.window // 4 // 2 * 2 + 1
    conv, near = Decoder.named("conv", kernel_size=kernel), Decoder.named("conv", kernel_size=33)
    fixed = Request(decoder=conv, window=size.window, steps=size.steps)
    ways = [
        replace(problem.plain(kernel), name="plain"),
        problem.ours("steps, exact", fixed),
        problem.ours("steps, canvas growing", replace(fixed, canvas="growing")),
        problem.ours("length-free, rate 2", Request(decoder=near, max_tokens=problem.limit, rate=2.0)),
    ]
    runs = time_ways(ways, rounds, device)
    return {name: median(run.seconds for run in each) / size.rows for name, each in runs.items()}


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path, title: str) -> None:
    """One panel for each axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for panel, (axis, points) in zip(axes, found.items(), strict=True):
        for (way, colour), mark in zip(COLOURS.items(), "os^D", strict=True):
            panel.plot(list(points), [p[way] for p in points.values()], f"{mark}-", color=colour, label=way)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(points), [f"{x:,}" for x in points])
        panel.minorticks_off()
        panel.set_xlabel(LABELS[axis])
        without_frame(panel)
        panel.get_legend().remove()
    axes[0].set_ylabel("seconds per answer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def outside(name: str, model: MaskedDiffusionModel, limit: int) -> tuple[float, float]:
    """Seconds per step, and the share of them outside the model, over the first `limit` steps."""
    timed = Timed(model)
    plan = Request(decoder=Decoder.named(name), window=512, steps=64).resolve(model)
    plan = replace(plan, end_tokens=replace(plan.end_tokens, fill=False, early_exit=False))
    row = Row([*range(100, 100 + PROMPT), *[plan.mask_id] * (512 - PROMPT)], PROMPT)
    canvas = make_canvas([row], [1], plan)
    taken, begun = 0, now(model.device)
    with torch.inference_mode():
        for taken, _ in enumerate(denoise(timed, canvas, plan), start=1):
            if taken == limit:
                break
    total = now(model.device) - begun
    return total / taken, 1 - sum(timed.seconds.values()) / total


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=8, help="steps to measure for the share outside")
    parser.add_argument("--plot", type=Path, default=Path("runs/cost.svg"))
    parser.add_argument("--model", default="", help="trained weights for the share outside")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    where = f"{options.dtype}, {torch.get_num_threads()} threads, {options.device}"
    found: dict[str, dict[int, dict[str, float]]] = {}
    print(f"seconds per answer of {ANSWER} tokens, 11M parameters, {where}\n")
    print("| | " + " | ".join(COLOURS) + " |\n" + "|---" * (len(COLOURS) + 1) + "|")
    for axis, values in AXES.items():
        for value in values:
            cost = seconds(replace(Size(), **{axis: value}), options.rounds, options.device, dtype)
            found.setdefault(axis, {})[value] = cost
            cells = " | ".join(f"{cost[way]:.2f}" for way in COLOURS)
            print(f"| {axis} {value:,} | {cells} |", flush=True)
    draw(found, options.plot, f"{ANSWER} tokens behind a prompt of {PROMPT}, 11M parameters, {where}")
    print(f"\nplot: {options.plot}\n")
    shares(options.model, options.device, options.dtype, options.limit)


def shares(path: str, device: str, dtype: str, limit: int) -> None:
    """The time of a step outside the model, for every decoder."""
    weights = path or "random weights"
    print(f"share of a step outside the model, 135M parameters ({weights}), L=512, V={VOCAB}\n")
    model = load_model(path, device, dtype)[0] if path else smollm2(device, DTYPES[dtype])
    print("| decoder | ms per step | outside the model |\n|---|---|---|")
    for name in PRESETS:
        outside(name, model, 2)
        step, share = outside(name, model, limit)
        print(f"| {name} | {1000 * step:.0f} | {100 * share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
