"""Stage `paths`: nats per token of held-out answers along the paths of decoders, for the package's models."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu import r2ft, train
from benchmarks.gpu.context import Context, MaterialError
from benchmarks.gpu.material import built
from benchmarks.objectives import Paced, cost, held_out, label
from dlm.checkpoint import load_model
from dlm.errors import DLMError
from finetune.config import TrainConfig

RATES = (2.0, 4.0, 8.0, 1.0)
LINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("conv", {"kernel_size": 9}),
    ("conv", {"kernel_size": 9, "gap": 2}),
    ("conv", {"kernel_size": 9, "gap": 3}),
    ("conv", {"kernel_size": 17}),
    ("conv", {"kernel_size": 17, "gap": 3}),
    ("conv", {"kernel_size": 33, "gap": 5}),
    ("conv", {"kernel_size": 33, "conflict": 0.03}),
    ("conv", {"kernel_size": 33, "conflict": 0.05}),
    ("top-k", {}),
    ("top-k", {"gap": 3}),
    ("top-k", {"conflict": 0.03}),
    ("semi-ar", {"block_size": 16}),
    ("semi-ar", {"block_size": 16, "gap": 3}),
    ("llada-conv", {"kernel_size": 9, "temperature": 0.0}),
    ("llada-conv", {"kernel_size": 9, "temperature": 0.0, "gap": 3}),
)


def run(context: Context) -> None:
    """Every decoder at every rate, the middle rates first, by every model that is there."""
    models = {"full-sft": "full-sft", "full": "full"}
    if context.tiny:
        models = {"sft": str(train.folder_of(context))}
    models |= {
        f"{name} here": str(path)
        for name, path in (("sft", train.folder_of(context)), ("r2ft", r2ft.folder_of(context)))
        if (path / "adapter_config.json").is_file() and not context.tiny
    }
    count, longest = (4, 12) if context.tiny else (128, 128)
    slowest = 0.0
    for name, path in models.items():
        try:
            model, tokenizer = load_model(path, context.device.type)
        except DLMError as error:
            raise MaterialError(f"{path}: {error}") from error
        config: TrainConfig = built(TrainConfig, train.settings(context, 1.0, compiled=False))
        pairs = held_out(config, tokenizer, count, longest)
        for rate in RATES[:1] if context.tiny else RATES:
            for line in LINES[:3] if context.tiny else LINES:
                decoder: Paced = (*line, rate)
                words = f"{name}, {label(*decoder)}, {_options(line[1])}".rstrip(", ")
                if context.skip("paths", words, 1.5 * slowest + 1):
                    continue
                begun = time.monotonic()
                nats, tokens = cost(model, tokenizer, pairs, decoder, longest, 0)
                slowest = max(slowest, time.monotonic() - begun)
                context.report.add("paths", words, nats=nats, tokens_per_call=tokens, answers=len(pairs))


def _options(choices: dict[str, Any]) -> str:
    """Sizes of a window."""
    return ", ".join(f"{key} {value}" for key, value in choices.items() if key.endswith("_size"))
