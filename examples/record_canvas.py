"""Record a canvas filling, from a real run, as a small animated SVG without scripts.

python -m examples.record_canvas [--model MODEL] [--prompt TEXT] [--output docs/canvas.svg]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from decoding import Sampler
from dlm import load_model

COLUMNS, CELL, LINE = 80, 8.4, 22
"""Characters in a line; width of a character and height of a line, in pixels."""

HOLD = 3.0
"""Seconds for which the finished text stands."""


@dataclass(frozen=True)
class Recording:
    """A run, as the canvas showed it."""

    prompt: str
    pieces: list[str]
    """Text of each token of the finished answer."""
    mask_step: list[int]
    """For each token, the step from which on the canvas held its position."""
    token_step: list[int]
    """For each token, the step that wrote it."""


def record(sampler: Sampler, prompt: str, **settings: Any) -> Recording:
    """Stream an answer and note when each position and each token appeared."""
    events = list(sampler.stream(prompt, **settings))
    mask_id, end_ids = sampler.spec.mask_token_id, sampler.spec.end_token_ids
    ids = list(itertools.takewhile(lambda token: token not in end_ids, events[-1].token_ids))
    seen = [event.token_ids for event in events]
    place = range(len(ids))
    mask_step = [next(i for i, row in enumerate(seen) if len(row) > at) for at in place]
    token_step = [
        next(i for i, row in enumerate(seen) if len(row) > at and row[at] != mask_id) for at in place
    ]
    texts = [str(sampler.tokenizer.decode(ids[:size])) for size in range(len(ids) + 1)]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(texts)]
    return Recording(prompt, pieces, mask_step, token_step)


def placed(pieces: list[str]) -> list[tuple[int, int]]:
    """Line and column of each piece; lines break before a piece that does not fit."""
    places, line, column = [], 0, 0
    for piece in pieces:
        if "\n" in piece or column + len(piece) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += 0 if "\n" in piece else len(piece)
    return places


def _frames(first: int, last: int, seconds: float, total: float) -> str:
    """Key frames of a mask that is there from step `first` to `last`, and of the token written then."""
    begin, end = (100 * step * seconds / total for step in (first, last + 1))
    block = f"0%,{end:.2f}%{{opacity:1}}{end + 0.01:.2f}%,100%{{opacity:0}}"
    if first:
        block = f"0%,{begin:.2f}%{{opacity:0}}{begin + 0.01:.2f}%," + block[3:]
    token = f"0%,{end:.2f}%{{opacity:0}}{end + 0.01:.2f}%,100%{{opacity:1}}"
    name = f"{first}_{last}"
    return (
        f"@keyframes o{name}{{{block}}}.o{name}{{animation-name:o{name}}}"
        f"@keyframes i{last}{{{token}}}.i{last}{{animation-name:i{last}}}"
    )


def drawn(recording: Recording, seconds_per_step: float = 0.25) -> str:
    """The recording as SVG: each mask is a block until a step writes its token."""
    places = placed(recording.pieces)
    steps = max(recording.token_step) + 1
    total = (steps + 1) * seconds_per_step + HOLD
    height = (max(line for line, _ in places) + 4) * LINE
    width = COLUMNS * CELL + 40
    pairs = sorted(set(zip(recording.mask_step, recording.token_step, strict=True)))
    frames = [_frames(first, last, seconds_per_step, total) for first, last in pairs]
    cells = []
    for piece, first, last, (line, column) in zip(
        recording.pieces, recording.mask_step, recording.token_step, places, strict=True
    ):
        text = piece.strip("\n")
        x, y = 20 + column * CELL, (line + 3) * LINE
        size = max(len(text), 1) * CELL - 2
        cells.append(
            f'<rect class="a o{first}_{last}" x="{x + 1:.1f}" y="{y - 15:.0f}" width="{size:.1f}" '
            'height="18" rx="3"/>'
        )
        if text.strip():
            lead = len(text) - len(text.lstrip())
            cells.append(
                f'<text class="a i{last}" x="{x + lead * CELL:.1f}" y="{y:.0f}" '
                f'textLength="{len(text.strip()) * CELL:.1f}">{escape(text.strip())}</text>'
            )
    style = (
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2430}"
        ".p{fill:#4c6fff;font-weight:bold}.n{fill:#6b7280;font-size:12px}rect.a{fill:#c9d2f5}"
        f".a{{animation-duration:{total:.2f}s;animation-iteration-count:infinite;animation-timing-function:linear}}"
        + "".join(frames)
    )
    label = f"{len(recording.pieces)} tokens in {steps} steps"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
            f'aria-label="A canvas of masks being filled: {escape(recording.prompt)}">',
            f"<style>{style}</style>",
            f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#f7f8fc"/>',
            f'<text class="p" x="20" y="{LINE + 6}">{escape(recording.prompt)}</text>',
            f'<text class="n" x="{width - 20:.0f}" y="{LINE + 6}" text-anchor="end">{label}</text>',
            *cells,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Record a run and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="full")
    parser.add_argument("--prompt", default="Give three tips for staying healthy.")
    parser.add_argument("--output", default="docs/canvas.svg", type=Path)
    parser.add_argument("--rate", type=float, default=None)
    arguments = parser.parse_args()
    sampler = Sampler(*load_model(arguments.model, dtype="float32"))
    settings = {} if arguments.rate is None else {"rate": arguments.rate}
    recording = record(sampler, arguments.prompt, max_tokens=96, **settings)
    arguments.output.write_text(drawn(recording), "utf-8")
    print(
        f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB, {len(recording.pieces)} tokens"
    )


if __name__ == "__main__":
    main()
