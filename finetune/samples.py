"""Sample answers at evaluations, so that a run can be read and not only plotted."""

from __future__ import annotations

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
    """Answers a few prompts at every evaluation; appends them to `samples.md` and TensorBoard."""

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
        self.prompts: list[Prompt] = list(config.samples) or [
            row["prompt"]
            for row in held_out.select(range(min(_DEFAULT_COUNT, len(held_out))))
            if row["prompt"]
        ]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decode with `conv` at the run's settings; on the main process only."""
        if not state.is_world_process_zero or not self.prompts:
            return
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
        with (Path(self.config.output_dir) / "samples.md").open("a", encoding="utf-8") as file:
            file.write(f"## Step {state.global_step}\n\n" + "\n".join(parts) + "\n")


def _last_turn(prompt: Prompt) -> str:
    return repr(prompt if isinstance(prompt, str) else prompt[-1]["content"])
