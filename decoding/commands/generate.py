"""`dlm generate`: prompts in, text out."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from decoding.config import LoadConfig, decoder_option
from decoding.request import Request
from dlm.cli import Command
from dlm.data.prompts import read_prompts
from dlm.errors import ConfigError, DataError

LAWS = """\
exact: texts follow the model's own distribution as steps become finer; at --rate 1 they do at once (the
first-hitting sampler, 2409.02908). approximate: tokens are cut or positions ordered, on purpose.
Whatever the decoder, --canvas growing (with a window) and --reuse (2505.22618) approximate it further.
"""


@dataclass(frozen=True)
class GenerateConfig(Request, LoadConfig):
    """Settings of `dlm generate`.

    Args:
        prompts: the prompts (the words that are no options); "-" or nothing reads lines from stdin.
        file: file of prompts, one per line; or .json, .jsonl (also .gz) whose rows have "instruction" (and
            "input"), "prompt", "text" or "messages".
        limit: answer only the first so many prompts; 0 for all.
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
        forbidden: tokens that never come out, as texts such as '[" delve"]', which must be one token each.
        json: write one JSON object per answer instead of its text.
        batch_size: prompts per model call.
        list_decoders: print the decoders with their options and leave.
    """

    prompts: list[str] = field(default_factory=list)
    file: str = ""
    limit: int = 0
    seed: int = 0
    forbidden: list[str] = field(default_factory=list)
    json: bool = False
    batch_size: int = 8
    list_decoders: bool = False

    meant = staticmethod(decoder_option)

    def __post_init__(self) -> None:
        """Check that the settings fit together."""
        Request.__post_init__(self)
        if self.prompts and self.file:
            raise ConfigError("give prompts as words or as --file, not both")
        if not self.list_decoders:
            LoadConfig.__post_init__(self)
        self.check_reuse(self.reuse)
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

        print(LAWS)
        for name, line in list_decoders().items():
            print(f"{name}: {line}")
        return 0
    from decoding.sampler import Sampler

    request = Request.read_from(config)
    request.check_decoder()
    sampler = Sampler(*config.load())
    if config.forbidden:
        decoder = sampler.without(config.forbidden, request=request)
        request = replace(request, decoder=decoder, options=None)
    words = config.prompts not in ([], ["-"])
    prompts: Iterable[Any] = config.prompts if words else read_prompts(config.file)
    if config.limit:
        prompts = itertools.islice(prompts, config.limit)
    outputs = sampler.iter_generate(prompts, request=request, seed=config.seed, batch_size=config.batch_size)
    for output in _with_progress(outputs, len(config.prompts) if words else None):
        print(json.dumps(asdict(output), ensure_ascii=False) if config.json else output.text, flush=True)
    return 0


def _with_progress(outputs: Iterable[Any], count: int | None) -> Any:
    """A progress bar on stderr, unless there is one prompt only or stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(outputs, total=count, unit="answer", disable=count == 1 or not sys.stderr.isatty())


COMMAND = Command("answer prompts with a trained model", GenerateConfig, run, positional="prompts")
