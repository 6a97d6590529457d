"""`dlm infill`: fill the gaps of texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from decoding.prompts import read_prompts
from dlm.cli import Command
from dlm.errors import ConfigError


@dataclass(frozen=True)
class InfillConfig:
    """Settings of `dlm infill`.

    Args:
        texts: texts with gaps such as "The capital of <mask:3> is Paris." (the words that are no options);
            "-" or nothing reads lines from stdin.
        model: folder or hub id of a checkpoint.
        prompt: what the texts are the answer to; empty for texts that stand alone.
        decoder: name of the decoder (see `dlm generate --list-decoders`); the checkpoint's default if empty.
        options: options of the decoder, such as --options.kernel_size 9.
        steps: denoising steps; 0 for a rate.
        rate: tokens written per model call on average, at least 1; 0 for 1, or for steps.
        seed: seed of the noise.
        batch_size: texts per model call.
        json: write one JSON object per text instead of the text.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto".
    """

    texts: list[str] = field(default_factory=list)
    model: str = ""
    prompt: str = ""
    decoder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    rate: float = 0.0
    seed: int = 0
    batch_size: int = 8
    json: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check that the settings fit together."""
        if not self.model:
            raise ConfigError(
                "--model is missing: the folder or hub id of a checkpoint (dlm train makes one)"
            )
        if self.steps < 0 or self.batch_size < 1:
            raise ConfigError(
                f"steps must not be negative and batch_size at least 1, got {self.steps}, {self.batch_size}"
            )
        if self.options and not self.decoder:
            raise ConfigError("options need --decoder, so that it is clear whose options they are")


def run(config: InfillConfig) -> int:
    """Fill the texts, in order."""
    from decoding.presets import Decoder
    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model

    decoder = Decoder.named(config.decoder, **config.options) if config.decoder else None
    sampler = Sampler(*load_model(config.model, config.device, config.dtype))
    texts: Iterable[str] = read_prompts("-") if config.texts in ([], ["-"]) else config.texts
    outputs = sampler.iter_infill(
        texts,
        prompt=config.prompt or None,
        decoder=decoder,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.steps or None,
        rate=config.rate or None,
    )
    for output in outputs:
        print(json.dumps(asdict(output), ensure_ascii=False) if config.json else output.text, flush=True)
    return 0


COMMAND = Command("fill the gaps of texts", InfillConfig, run, positional="texts")
