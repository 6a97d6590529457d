"""The pictures of docs/decoding.md, drawn by the strategies themselves.

python docs/make_pictures.py [FOLDER] [--model MODEL]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from decoding import Decoder, Sampler, TokenRule
from decoding.reveal import Ancestral, Dilated, EntropyBound, Quota, RevealRule, StepView, Threshold
from decoding.window import Block, Convolution, Full, Sliding, Window
from dlm import load_model

LENGTH, PROMPT = 48, 8
INK, OPEN, WRITTEN, SHUT = "#1f2430", "#4c6fff", "#9aa3b2", "#e6e9f0"
WINDOWS: dict[str, Window] = {
    "Full": Full(),
    "Convolution(kernel_size=9)": Convolution(9, scale=0.4),
    "Block(12)": Block(12),
    "Sliding(12)": Sliding(12),
}
RULES: dict[str, RevealRule] = {
    "Ancestral (one draw)": Ancestral(),
    "Quota, 4 a step": Quota(4),
    "Threshold(0.7)": Threshold(0.7),
    "EntropyBound(0.5)": EntropyBound(0.5),
    "Dilated(2), first round": Dilated(2),
}


def windows(path: Path) -> None:
    """Weights of four windows on one row: a prompt, six tokens behind it, two given ones further on."""
    unmasked = torch.zeros(1, LENGTH, dtype=torch.bool)
    unmasked[0, : PROMPT + 6] = True
    unmasked[0, 34:36] = True
    start, end = torch.tensor([PROMPT]), torch.tensor([LENGTH])
    figure, axes = plt.subplots(4, 1, figsize=(8, 4.6), sharex=True)
    for axis, (name, window) in zip(axes, WINDOWS.items(), strict=True):
        weight = window.weights(unmasked, start=start)[0]
        if window.timed:  # the share of the way that each position has gone
            t = torch.tensor([0.8])
            weight = (1 - window.times(t, t, start, end, LENGTH)[0][0]).float()
        shown = torch.where(unmasked[0], 0.0, weight).tolist()
        _bars(axis, [1.0] * LENGTH, SHUT)
        _bars(axis, unmasked[0].float().tolist(), WRITTEN)
        _bars(axis, shown, OPEN)
        _bare(axis, name)
    axes[-1].set_xlabel("position (grey: a token is there; blue: how open the mask is)")
    _save(figure, path)


def rules(path: Path) -> None:
    """Positions that each rule writes, for one and the same confidence."""
    generator = torch.Generator().manual_seed(4)
    confidence = torch.rand(1, 32, generator=generator) ** 1.5
    draws = torch.rand(1, 32, generator=generator)
    figure, axes = plt.subplots(len(RULES) + 1, 1, figsize=(8, 4.8), sharex=True)
    _bars(axes[0], confidence[0].tolist(), WRITTEN)
    _bare(axes[0], "confidence")
    for axis, (name, rule) in zip(axes[1:], RULES.items(), strict=True):
        everything = torch.ones(1, 32, dtype=torch.bool)
        view = StepView(
            masked=everything,
            weight=torch.ones(1, 32),
            t=torch.tensor([1.0]),
            s=torch.tensor([0.875]),
            quota=torch.tensor([4]),
            written=~everything,
            noise=lambda stream: draws,
            score=torch.ones(1, 32) if isinstance(rule, Ancestral) else confidence,
            scope=everything,
        )
        chosen = rule.decide(view).reveal[0].float()
        _bars(axis, [1.0] * 32, SHUT)
        _bars(axis, chosen.tolist(), OPEN)
        _bare(axis, name)
    axes[-1].set_xlabel("position (blue: written in this step)")
    _save(figure, path)


def tokens(path: Path) -> None:
    """What five token rules leave of one distribution."""
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.2, 0.9, 0.5, 0.2, 0.0, -0.4, -0.8, -1.2, -1.6]])
    some = {
        "categorical": TokenRule(),
        "top_k=4": TokenRule(top_k=4),
        "top_p=0.8": TokenRule(top_p=0.8),
        "min_p=0.2": TokenRule(min_p=0.2),
        "temperature=0.5": TokenRule(temperature=0.5),
    }
    figure, axes = plt.subplots(1, len(some), figsize=(8, 1.9), sharey=True)
    for axis, (name, rule) in zip(axes, some.items(), strict=True):
        candidates = rule.candidates(logits, None if rule.keeps_all or rule.top_k else logits.shape[1])
        kept = (candidates.share * candidates.kept)[0]
        kept = torch.nn.functional.pad(kept / kept.sum(), (0, logits.shape[1] - len(kept)))
        _bars(axis, logits.softmax(1)[0].tolist(), "#c9cfdb")
        _bars(axis, kept.tolist(), OPEN, 0.5)
        axis.set_title(name, fontsize=9, color=INK)
        _bare(axis)
    figure.supxlabel("token (pale: the model; blue: what is drawn from)", fontsize=9)
    _save(figure, path)


def order(path: Path, model: str) -> None:
    """Step at which each position of a window was written, by four decoders, with a real model."""
    sampler = Sampler(*load_model(model, dtype="float32"))
    prompt = "Give three tips for staying healthy."
    length = sampler.prompt_length(prompt)
    some: dict[str, dict[str, Any]] = {
        "categorical": {},
        "semi-ar": {"block_size": 16},
        "llada": {},
        "conv": {"kernel_size": 9},
    }
    figure, axes = plt.subplots(len(some), 1, figsize=(8, 3.6), sharex=True)
    for axis, (name, options) in zip(axes, some.items(), strict=True):
        decoder = Decoder.named(name, **options)
        written_at = torch.full((64,), -1)
        for event in sampler.stream(prompt, decoder=decoder, window=length + 64, steps=16, eos_fill=False):
            ids = torch.tensor(event.token_ids)
            written_at[(ids != sampler.spec.mask_token_id) & (written_at < 0)] = event.step
        for step in range(17):
            colour = plt.get_cmap("viridis")(1 - step / 16)
            _bars(axis, (written_at == step).float().tolist(), colour, 1.0)
        _bare(axis, name)
    axes[-1].set_xlabel("position of the answer (yellow: written in the first step, dark: in the last)")
    _save(figure, path)


def _bars(axis: Any, heights: list[float], colour: Any, width: float = 0.9) -> None:
    """Bars as a single path, which keeps the file small."""
    boxes = [
        Outline([(x, 0), (x + width, 0), (x + width, y), (x, y), (x, 0)], closed=True)
        for x, y in ((place - width / 2, round(height, 3)) for place, height in enumerate(heights))
        if y > 0
    ]
    if boxes:
        path = Outline.make_compound_path(*boxes)
        axis.add_patch(PathPatch(path, facecolor=colour, linewidth=0))
        axis.autoscale_view()


def _bare(axis: Any, name: str = "") -> None:
    axis.set_yticks([])
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines[:].set_visible(False)
    if name:
        axis.set_title(name, fontsize=9, loc="left", color=INK, pad=2)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Draw all pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="docs/pictures", type=Path)
    parser.add_argument("--model", default="full")
    arguments = parser.parse_args()
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dlm", "font.family": "sans-serif"})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    windows(arguments.folder / "windows.svg")
    rules(arguments.folder / "rules.svg")
    tokens(arguments.folder / "tokens.svg")
    order(arguments.folder / "order.svg", arguments.model)


if __name__ == "__main__":
    main()
