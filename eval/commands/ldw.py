"""`dlm inspect ldw`: how a model's predictions decay with the distance from the context."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.atomic import write_whole
from dlm.cli import Command
from dlm.errors import ConfigError
from dlm.progress import progress
from eval.variants import check_sizes

STYLES = {
    "prompt": "#ffffff on #a3241c",
    "frequent": "#000000 on #e69f00",
    "end": "#ffffff on #5f6368",
    "other": "",
}
"""Styles of the kinds of candidate in the table."""


@dataclass(frozen=True)
class LDWConfig:
    """Settings of `dlm inspect ldw`.

    Args:
        checkpoints: models to compare, for instance before and after R2FT (the words that are no options).
        prompt: a prompt to measure on, and to show candidates for.
        file: a file of more prompts, as `dlm generate --file` reads it.
        limit: use only the first so many prompts that fit the window; 0 for all.
        window: L, prompt and answer together; by default the first checkpoint's own.
        top: how many of the most frequent answer tokens count as frequent.
        counts: rows (file, hub id or "rules") to count tokens in, where no checkpoint has its counts with it.
        positions: positions behind the prompt in the table of candidates.
        candidates: candidates per position.
        output: picture of the curves; beside it go the figures (.json) and the tables (.svg). Empty for none.
    """

    checkpoints: list[str] = field(default_factory=list)
    prompt: str = ""
    file: str = ""
    limit: int = 100
    window: int | None = None
    top: int = 100
    counts: str = ""
    positions: int = 24
    candidates: int = 5
    output: str = "ldw.png"

    def __post_init__(self) -> None:
        """Check that there is something to measure."""
        if not self.checkpoints:
            raise ConfigError("name one or more checkpoints: dlm inspect ldw runs/sft runs/r2ft")
        if not self.prompt and not self.file:
            raise ConfigError("give --prompt or --file")
        if self.output and Path(self.output).suffix not in (".png", ".pdf"):
            raise ConfigError(f"output must end in .png or .pdf, got {self.output}")
        if self.output and not Path(self.output).absolute().parent.is_dir():
            raise ConfigError(f"output: no such folder as {Path(self.output).absolute().parent}")
        check_sizes(window=self.window)
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative, got {self.limit}")
        for name in ("top", "positions", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(config: LDWConfig) -> int:
    """Measure, draw, and show the candidates of the first prompt."""
    from rich.console import Console

    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model, stored_positions
    from dlm.data.prompts import read_prompts
    from eval.ldw import candidates, decoding_window, draw_decoding_windows

    console, measured = Console(record=True, markup=False, emoji=False), {}
    texts = [config.prompt] if config.prompt else []
    texts += read_prompts(config.file) if config.file else []
    for path in config.checkpoints:
        positions = stored_positions(path)
        if positions is not None and (config.window or 0) > positions:
            raise ConfigError(
                f"{path}: a window of {config.window} is longer than the model's {positions} positions"
            )
    models = {path: load_model(path, dtype="float32") for path in config.checkpoints}
    first = Sampler(*models[config.checkpoints[0]])
    check_comparable(models)
    window, prior = config.window or first.window, token_prior(config, first.tokenizer)
    fits = (prompt for prompt in texts if first.fits(prompt, window))
    prompts = list(itertools.islice(fits, config.limit or None))
    if not prompts:
        raise ConfigError(f"no prompt leaves room for an answer in a window of {window} tokens")
    for path, (model, tokenizer) in models.items():
        shown = progress(prompts, path, unit="prompt", leave=False)
        measured[path] = decoding_window(model, tokenizer, shown, prior, window=window, top=config.top)
        zone = candidates(
            model, tokenizer, prompts[0], prior,
            window=window, top=config.top, positions=config.positions, k=config.candidates,
        )  # fmt: skip
        console.print(ldw_table(path, zone))
    question = prompts[0] if isinstance(prompts[0], str) else prompts[0][-1]["content"]
    console.print(f"The table shows a fresh canvas behind the prompt {question!r}.", legend(), sep="\n")
    console.print(ldw_summary(measured))
    console.print(counts(next(iter(measured.values())).rows))
    if config.output:
        picture = Path(config.output)
        draw_decoding_windows(measured, config.top).savefig(picture, dpi=150)
        facts = {path: figures.as_dict() for path, figures in measured.items()}
        write_whole(picture.with_suffix(".json"), json.dumps(facts))
        console.save_svg(str(picture.with_suffix(".svg")), title="dlm inspect ldw", clear=False)
        console.print(f"{picture} (and .json, .svg): means over {len(prompts)} prompts")
    return 0


def check_comparable(models: dict[str, Any]) -> None:
    """Refuse models whose token ids mean different things.

    Raises:
        ConfigError: naming the two.
    """
    (path, (_, tokenizer)), *others_loaded = models.items()
    for second_path, (_, second) in others_loaded:
        if second.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(f"{path} and {second_path} have different tokenizers and cannot be compared")


def token_prior(config: LDWConfig, tokenizer: Any) -> Any:
    """The counts that the first checkpoint which has some brings, or counts of the given rows.

    Raises:
        ConfigError: when there are neither.
    """
    from dlm.data.encode import encode_rows
    from dlm.data.rows import load_rows
    from dlm.data.rules import rule_rows
    from dlm.prior import COUNTS_FILE, TokenPrior

    if config.counts:
        source = rule_rows(20_000) if config.counts == "rules" else load_rows(config.counts)
        rows, _ = encode_rows(source, tokenizer, 2048)
        return TokenPrior.of(rows, len(tokenizer), tuple(tokenizer.all_special_ids))
    for path in config.checkpoints:
        prior = TokenPrior.load(path)
        if prior is not None:
            return prior
    raise ConfigError(f"none of the checkpoints has its {COUNTS_FILE}; name the training rows with --counts")


def ldw_table(title: str, zone: list[list[Any]]) -> Any:
    """The candidate zone: a line per position, a coloured cell per candidate."""
    from rich.table import Table
    from rich.text import Text

    out = Table("distance", *(f"{i + 1}." for i in range(len(zone[0]))), title=title, padding=0)
    for distance, row in enumerate(zone):
        cells = [Text(f"{_shown_token(c.text)} {c.probability:.2f}", style=STYLES[c.kind]) for c in row]
        out.add_row(str(distance), *cells)
    return out


def _shown_token(token: str, width: int = 9) -> str:
    """A token as Python would write it, cut so that five of them fit a terminal."""
    shown = repr(token)
    return shown if len(shown) <= width else shown[: width - 2] + "…" + shown[-1]


def legend() -> Any:
    """Legend of the colours."""
    from rich.text import Text

    text = Text()
    for kind, meaning in (
        ("prompt", "in the prompt"),
        ("frequent", "frequent in all answers"),
        ("end", "end"),
    ):
        text.append(f" {meaning} ", style=STYLES[kind]).append("  ")
    return text


def ldw_summary(measured: dict[str, Any]) -> Any:
    """Masses and entropy next to the prompt, where the problem peaks, and far away; over all prompts."""
    from rich.table import Column, Table

    head = ("model", "distance", "prompts", "frequent tokens", "prompt tokens", "end token", "entropy, nats")
    out = Table(Column(head[0], overflow="fold"), *head[1:])
    for path, figures in measured.items():
        last = figures.shared
        for name, low, high in (("0", 0, 1), ("5 to 10", 5, 11), (f"11 to {last - 1}", 11, last)):
            if low < last:
                part = slice(low, min(high, last))
                masses = (figures.frequent, figures.prompt, figures.end)
                shown = [f"{float(mass[part].mean()):.3f}" for mass in masses]
                entropy = f"{float(figures.entropy[part].mean()):.2f}"
                out.add_row(path, name, str(int(figures.rows[0])), *shown, entropy)
    return out


def counts(rows: Any) -> str:
    """Numbers of prompts that have a position at each distance, as "3 up to distance 5, 2 up to 6"."""
    numbers = rows.tolist()
    ends = [i for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n]
    listed = [f"{numbers[i]} up to {i}" for i in ends[:8]]
    tail = f", … {numbers[-1]} up to {ends[-1]}" if len(ends) > 8 else ""
    return f"prompts by distance: {', '.join(listed)}{tail}; table and curves end at {ends[0]}"


COMMAND = Command(
    "measure the long decoding-window problem: frequent and repeated tokens by distance",
    LDWConfig,
    run,
    positional="checkpoints",
)
