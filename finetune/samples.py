"""Sample answers at evaluations, so that a run can be read and not only plotted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from decoding.answer import Output
from decoding.presets import Decoder
from decoding.row_maker import Prompt
from decoding.sampler import Sampler
from dlm.atomic import write_whole
from dlm.data.encoded import EncodedRows
from dlm.spec import ModelSpec
from dlm.trainer import DiffusionTrainer
from finetune.config import RunConfig
from finetune.run_folder import SAMPLES

if TYPE_CHECKING:
    from datasets import Dataset

_DEFAULT_COUNT = 4


def held_out_prompts(
    trainer: DiffusionTrainer,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    source: list[Prompt] | list[str] | Dataset | EncodedRows,
    count: int,
) -> list[Prompt]:
    """The first `count` prompts that leave room for an answer; nothing for each row of plain text.

    Encoded rows have no text, and so no prompts.
    """
    sampler = Sampler(trainer.model, tokenizer)
    if isinstance(source, EncodedRows):
        return []
    prompts: Iterable[Prompt] = (
        source if isinstance(source, list | tuple) else (row["prompt"] or "" for row in source)
    )
    fits = (prompt for prompt in prompts if sampler.fits(prompt, config.data.window - 1))
    return list(itertools.islice(fits, count))


def sample_steps(config: RunConfig, spec: ModelSpec) -> int:
    """Steps of an answer: `config.sample_steps`, and in blocks at least one for each of the window."""
    size = spec.visibility.block_size
    blocks = 1 if size is None else math.ceil(config.data.window / size)
    return max(config.sample_steps, blocks)


def answers(
    trainer: DiffusionTrainer,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    prompts: list[Prompt],
    decoder: Decoder,
) -> list[Output]:
    """Answers of the model in training (averaged weights, if any) at the run's precision and settings."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = model.training
    model.eval()
    try:
        with trainer.averaged_weights(), trainer.accelerator.autocast():
            return Sampler(model, tokenizer).generate(
                prompts,
                decoder=decoder,
                window=config.data.window,
                steps=sample_steps(config, ModelSpec.of(model)),
                seed=range(config.seed, config.seed + len(prompts)),  # equal prompts have other answers
            )
    finally:
        model.train(training)


class SampleCallback(TrainerCallback):  # type: ignore[misc]
    """Answers a few prompts at every evaluation and writes them to `samples.md`.

    Prompts that leave no room for an answer in the window are left out; rows of plain text are sampled from
    nothing.
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        held_out: Dataset,
    ) -> None:
        self.trainer, self.tokenizer, self.config = trainer, tokenizer, config
        source, count = config.samples or held_out, len(config.samples) or _DEFAULT_COUNT
        self.prompts = held_out_prompts(trainer, tokenizer, config, source, count)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decode with `conv` at the run's settings; on the main process only."""
        if not state.is_world_process_zero or not self.prompts or self.trainer.is_fsdp_enabled:
            return  # a sharded model cannot be sampled by one process
        outputs = answers(self.trainer, self.tokenizer, self.config, self.prompts, Decoder.named("conv"))
        parts = [
            f"- **{_last_turn(prompt)}**\n\n  {output.text!r} ({output.finish_reason})\n"
            for prompt, output in zip(self.prompts, outputs, strict=True)
        ]
        heading = f"## Step {state.global_step}\n\n"
        file = Path(self.config.output_dir) / SAMPLES
        earlier_text = file.read_text("utf-8", "replace").split(heading)[0] if file.is_file() else ""
        write_whole(file, earlier_text + heading + "\n".join(parts) + "\n")


def _last_turn(prompt: Prompt) -> str:
    return repr(prompt if isinstance(prompt, str) else prompt[-1]["content"])
