"""`dlm eval path`: what the order in which decoders write costs, on true answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decoding.config import request_hint
from dlm.cli import Command
from dlm.device import PlaceConfig
from dlm.errors import ConfigError
from dlm.progress import progress
from eval.variants import Variant, check_sizes, variants

if TYPE_CHECKING:
    from eval.paths import PathFolder, PathRun


@dataclass(frozen=True)
class PathConfig(PlaceConfig):
    """Settings of `dlm eval path`.

    Every decoder chooses its positions as always; the true tokens are written there, and what the model
    thought of them counts. No answer is generated, so that no reader and no judge is needed. Tokens are those
    of the model at temperature 1, with nothing cut: the order and the pace are what is compared.

    Args:
        models: folders or hub ids of masked diffusion models, "default", "full-sft" (the words that are no
            options).
        data: rows whose answers are written, a file or hub id.
        last: only the last so many of them: those that training held out.
        limit: the first so many of these that fit; 0 for all.
        decoders: decoders to compare, such as "conv,semi-ar(block_size=32),top-k"; the checkpoint's own if
            empty.
        window: tokens of prompt and answer together, on a fixed canvas; by default the checkpoint's.
        steps: denoising steps, several as "16,32" or as shares of the window, "L/16,L/4"; with them, or with
            a window, the canvas is fixed.
        max_tokens: longest answer on a canvas that grows; 256 by default.
        rate: tokens per model call, several as "1,2"; for a canvas that grows.
        seed: of the noise; equal for all decoders.
        batch_size: rows per model call.
        output: folder for the figures (paths.json), the table (.md) and the plot (.svg); what was measured
            there under the same settings is not measured again.
    """

    models: list[str] = field(default_factory=list)
    data: str = "tatsu-lab/alpaca"
    last: int = 1000
    limit: int = 200
    decoders: str = ""
    window: int | None = None
    steps: str = ""
    max_tokens: int | None = None
    rate: str = ""
    seed: int = 0
    batch_size: int = 16
    output: str = "runs/paths"

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.models:
            raise ConfigError("name one or more checkpoints: dlm eval path full-sft full")
        for name, least in (("last", 1), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_sizes(window=self.window, max_tokens=self.max_tokens)
        self.check_place()
        self.variants()

    def variants(self) -> list[Variant]:
        """The decoders at their paces."""
        pace = {name: getattr(self, name) for name in ("window", "steps", "max_tokens", "rate")}
        return variants(self.decoders, **pace)


def run(config: PathConfig) -> int:
    """Measure each model with each decoder, and show the table."""
    from rich.console import Console

    from dlm.lock import alone_in
    from eval.paths import PathFolder, path_table

    common = {name: getattr(config, name) for name in ("data", "last", "limit", "seed")}
    with alone_in(config.output):
        folder = PathFolder(config.output, common)
        runs = measured_path(config, folder)
        Console(width=None if Console().is_terminal else 120, markup=False, emoji=False).print(
            path_table(runs).rich()
        )
        print(*folder.publish(), sep="\n")
    return 0


def measured_path(config: PathConfig, folder: PathFolder) -> list[PathRun]:
    """The runs, model after model; those that the folder holds already are not made again."""
    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model, stored_spec
    from dlm.origin import fingerprint
    from eval.path import path_costs
    from eval.paths import PathRun, held_out

    choices, runs = config.variants(), []
    for path in config.models:
        spec = stored_spec(path)
        for variant in choices if spec is not None else ():
            variant.request().resolve(spec)
    for path in config.models:
        sampler = Sampler(*load_model(path, config.device, config.dtype, prepacked=True))
        plans = [sampler.plan(variant.request()) for variant in choices]
        room, tokens = min(plan.positions for plan in plans), min(plan.tokens for plan in plans)
        rows = held_out(config.data, config.last, config.limit, sampler.tokenizer, room, tokens)
        common = f"{fingerprint(path)} {_facts_digest([rows, config.dtype])}"
        folder.forget(path, common)
        for variant, plan in zip(choices, plans, strict=True):
            mark = f"{common} {_facts_digest(variant.recorded)}"  # costs under another one are measured again
            line, words = variant.split(plan.decoder.name)
            run = folder.runs.get((path, line, words))
            if run is None or (run.fingerprint, len(run.costs)) != (mark, len(rows)):
                going = path_costs(sampler.model, rows, plan, seed=config.seed, batch_size=config.batch_size)
                shown = progress(going, f"{path}, {line}, {words}", len(rows), unit="answer", leave=False)
                run = PathRun(path, line, words, mark, list(shown))
                folder.save(run)
            runs.append(run)
    return runs


def _facts_digest(facts: Any) -> str:
    """Sixteen letters that tell settings apart."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


COMMAND = Command(
    "what the order in which decoders write costs, on true answers",
    PathConfig,
    run,
    positional="models",
    hint=request_hint,
)
