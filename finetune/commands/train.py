"""`dlm train`: fine-tune (or pretrain) a masked diffusion model."""

from __future__ import annotations

from dlm.cli import Command
from finetune.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Train and say where the model is."""
    from finetune.sft import train

    folder = train(config)
    print(
        f"{folder}: model, tokenizer, curve.png, samples.md. Try: dlm generate --model {folder} 'Your prompt'"
    )
    return 0


COMMAND = Command("train a masked diffusion model on Alpaca rows, chat rows or plain text", TrainConfig, run)
