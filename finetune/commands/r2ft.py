"""`dlm r2ft`: reject repetition and high-prior tokens, or bad answers of a file, after fine-tuning."""

from __future__ import annotations

from dlm.cli import Command
from finetune.config import R2FTConfig


def run(config: R2FTConfig) -> int:
    """Train and say where the model is."""
    from finetune.r2ft import r2ft

    folder = r2ft(config)
    made = f"model, tokenizer, {config.objective.name}.png, samples.md"
    print(f"{folder}: {made}. See: dlm inspect ldw {config.model.init} {folder}")
    return 0


COMMAND = Command("reject repetition, or bad answers, after train (R2FT, DDRO, DPO)", R2FTConfig, run)
