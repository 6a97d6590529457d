"""Sample answers at evaluations, so that a run can be read and not only plotted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from decoding.presets import Decoder
from decoding.sampler import Prompt, Sampler
from dlm.trainer import DiffusionTrainer
from finetune.config import TrainConfig

_DEFAULT_COUNT = 4


class SampleCallback(TrainerCallback):  # type: ignore[misc]
    """Answers a few prompts at every evaluation and writes them to `samples.md`.

    Prompts that leave no room for an answer in the window are left out; rows of plain text are sampled from
    nothing. Sampling never ends a run.
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        held_out: Dataset,
    ) -> None:
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.config = config
        sampler = Sampler(trainer.model, tokenizer)
        asked: Iterable[Prompt] = config.samples or (row["prompt"] or "" for row in held_out)
        fits = (prompt for prompt in asked if sampler.prompt_length(prompt) < config.data.window - 1)
        self.prompts = list(itertools.islice(fits, len(config.samples) or _DEFAULT_COUNT))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decode with `conv` at the run's settings; on the main process only."""
        if not state.is_world_process_zero or not self.prompts or self.trainer.is_fsdp_enabled:
            return  # a sharded model cannot be sampled by one process
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        with self.trainer.averaged_weights():
            outputs = Sampler(model, self.tokenizer).generate(
                self.prompts,
                decoder=Decoder.named("conv"),
                window=self.config.data.window,
                steps=self.config.sample_steps,
                seed=self.config.seed,
            )
        model.train(training)
        parts = [
            f"- **{_last_turn(prompt)}**\n\n  {output.text!r} ({output.finish_reason})\n"
            for prompt, output in zip(self.prompts, outputs, strict=True)
        ]
        heading = f"## Step {state.global_step}\n\n"
        file = Path(self.config.output_dir) / "samples.md"
        before = file.read_text(encoding="utf-8").split(heading)[0] if file.exists() else ""
        file.write_text(before + heading + "\n".join(parts) + "\n", encoding="utf-8")


def _last_turn(prompt: Prompt) -> str:
    return repr(prompt if isinstance(prompt, str) else prompt[-1]["content"])
