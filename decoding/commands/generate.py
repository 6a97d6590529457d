"""`dlm generate`: prompts in, text out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from decoding.config import DecodingConfig
from dlm.cli import Command
from dlm.errors import ConfigError, DataError


@dataclass(frozen=True)
class GenerateConfig(DecodingConfig):
    """Settings of `dlm generate`.

    Args:
        prompts: the prompts (the words that are no options); "-" or nothing reads lines from stdin.
        model: folder or hub id of a checkpoint.
        file: file of prompts, one per line, or .jsonl with "instruction", "prompt", "text" or "messages".
        json: write one JSON object per answer instead of its text.
        batch_size: prompts per model call.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto".
        list_decoders: print the decoders with their options and leave.
    """

    prompts: list[str] = field(default_factory=list)
    model: str = ""
    file: str = ""
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
    prompts = list(config.prompts) if config.prompts not in ([], ["-"]) else None
    source: Iterable[Any] = prompts if prompts is not None else read_prompts(config.file)
    count = len(prompts) if prompts is not None else count_prompts(config.file)
    outputs = sampler.iter_generate(source, batch_size=config.batch_size, **arguments)
    for output in _with_progress(outputs, count):
        print(json.dumps(asdict(output), ensure_ascii=False) if config.json else output.text, flush=True)
    return 0


def _with_progress(outputs: Iterable[Any], count: int | None) -> Any:
    """A progress bar on stderr, unless there is one prompt only or stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(outputs, total=count, unit="answer", disable=count == 1 or not sys.stderr.isatty())


def count_prompts(file: str) -> int | None:
    """How many prompts a file holds; None for stdin."""
    if not file or file == "-":
        return None
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such file")
    with path.open(encoding="utf-8") as lines:
        return sum(1 for line in lines if line.strip())


def read_prompts(file: str) -> Iterator[Any]:
    """Prompts of a file (or of stdin when the name is empty or "-"), one at a time.

    Raises:
        DataError: naming the line that holds no prompt.
    """
    if not file or file == "-":
        yield from _parse_lines(sys.stdin, "stdin", jsonl=False)
        return
    with Path(file).open(encoding="utf-8") as lines:
        yield from _parse_lines(lines, file, jsonl=file.endswith(".jsonl"))


def _parse_lines(lines: Iterable[str], name: str, *, jsonl: bool) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        yield _parse_json(line, f"{name}, line {number}") if jsonl else line.rstrip("\n")


def _parse_json(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("instruction"), str) and row.get("input"):
            return f"{row['instruction']}\n\n{row['input']}"
        for key in ("messages", "instruction", "prompt", "text"):
            if row.get(key):
                return row[key]
    raise DataError(f"{where}: needs 'instruction', 'prompt', 'text' or 'messages'")


COMMAND = Command("answer prompts with a trained model", GenerateConfig, run, positional="prompts")
