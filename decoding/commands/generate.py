"""`dlm generate`: prompts in, text out."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from decoding.config import DecodingConfig
from decoding.prompts import read_prompts
from dlm.cli import Command
from dlm.errors import ConfigError, DataError


@dataclass(frozen=True)
class GenerateConfig(DecodingConfig):
    """Settings of `dlm generate`.

    Args:
        prompts: the prompts (the words that are no options); "-" or nothing reads lines from stdin.
        model: folder or hub id of a checkpoint.
        file: file of prompts, one per line; or .json, .jsonl (also .gz) whose rows have "instruction" (and
            "input"), "prompt", "text" or "messages".
        limit: answer only the first so many prompts; 0 for all.
        json: write one JSON object per answer instead of its text.
        batch_size: prompts per model call.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto".
        list_decoders: print the decoders with their options and leave.
    """

    prompts: list[str] = field(default_factory=list)
    model: str = ""
    file: str = ""
    limit: int = 0
    json: bool = False
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    list_decoders: bool = False

    def __post_init__(self) -> None:
        """Check that the settings fit together."""
        super().__post_init__()
        if self.prompts and self.file:
            raise ConfigError("give prompts as words or as --file, not both")
        if not self.model and not self.list_decoders:
            raise ConfigError(
                "--model is missing: the folder or hub id of a checkpoint (dlm train makes one)"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.file not in ("", "-") and not Path(self.file).is_file():
            raise DataError(f"{self.file}: no such file")
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative, got {self.limit}")


def run(config: GenerateConfig) -> int:
    """Answer the prompts, in order, as they are finished."""
    if config.list_decoders:
        from decoding.presets import list_decoders

        for name, line in list_decoders().items():
            print(f"{name}: {line}")
        return 0
    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model

    arguments = config.arguments()
    sampler = Sampler(*load_model(config.model, config.device, config.dtype))
    words = config.prompts not in ([], ["-"])
    prompts: Iterable[Any] = config.prompts if words else read_prompts(config.file)
    if config.limit:
        prompts = itertools.islice(prompts, config.limit)
    outputs = sampler.iter_generate(prompts, batch_size=config.batch_size, **arguments)
    for output in _with_progress(outputs, len(config.prompts) if words else None):
        print(json.dumps(asdict(output), ensure_ascii=False) if config.json else output.text, flush=True)
    return 0


def _with_progress(outputs: Iterable[Any], count: int | None) -> Any:
    """A progress bar on stderr, unless there is one prompt only or stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(outputs, total=count, unit="answer", disable=count == 1 or not sys.stderr.isatty())


COMMAND = Command("answer prompts with a trained model", GenerateConfig, run, positional="prompts")
