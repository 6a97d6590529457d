"""`dlm train`: fine-tune (or pretrain) a masked diffusion model."""

from __future__ import annotations

from dlm.cli import Command
from finetune.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Train and say where the model is."""
    from finetune.sft import train

    folder = train(config)
    written = [name for name in ("curve.png", "samples.md") if (folder / name).is_file()]
    there = ", ".join(["model", "tokenizer", *written])
    print(f"{folder}: {there}. Try: dlm generate --model {folder} 'Your prompt'")
    return 0


COMMAND = Command("train a masked diffusion model on Alpaca rows, chat rows or plain text", TrainConfig, run)
