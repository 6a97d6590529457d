"""Fine-tune a base autoregressively on the rows and the schedule of a diffusion run: the baseline.

python -m examples.autoregressive --config recipes/alpaca-smollm2-135m-lora.yaml --output_dir runs/alpaca-ar

Takes the settings of `dlm train` (its model must be a causal LM with an adapter); those of diffusion alone
(EOS tails, cuts, shift) mean nothing here, and the template is the base's own. A killed run goes on from its
newest checkpoint, and a finished one is left alone. The folder then holds the merged model:
dlm eval alpaca_eval --autoregressive runs/alpaca-ar
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dlm.adapter import TARGETS
from dlm.backbone import load_causal_lm
from dlm.cli import Command, script
from dlm.data.encode import encode_rows
from finetune.config import TrainConfig
from finetune.run import split_rows, step_limit, training_arguments

UNSEEN = -100
"""Label of tokens that carry no loss."""


def labels(row: dict[str, Any]) -> dict[str, Any]:
    """The answer's tokens as labels; the prompt's carry no loss."""
    return {"labels": [UNSEEN] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]}


def labelled(rows: Dataset) -> Dataset:
    """Encoded rows as transformers' trainer takes them."""
    return rows.map(labels, desc="Labels").select_columns(["input_ids", "labels", "length"])


@dataclass
class AnswerCollator(DataCollatorForSeq2Seq):  # type: ignore[misc]
    """Pads, and spares the head the positions before which no row of the batch has an answer.

    `logits_to_keep` are the P positions that predict a labelled token of any row, `shift_labels` what follows
    them, [batch, P]: transformers' own loss then is that of all positions.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        """Tensors of a batch, as a causal LM of transformers takes them."""
        batch = super().__call__(features, return_tensors)
        following = batch["labels"][:, 1:]
        kept = (following != UNSEEN).any(0).nonzero().squeeze(1)
        return {**batch, "logits_to_keep": kept, "shift_labels": following[:, kept]}


def train(config: TrainConfig) -> int:
    """Train, merge, save; the exit status."""
    if (Path(config.output_dir) / "config.json").is_file():
        print(f"{config.output_dir} is finished")
        return 0
    model, tokenizer = load_causal_lm(config.model.init)
    lora = config.model.lora
    set_seed(config.seed)
    adapter = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=TARGETS[lora.targets],
        modules_to_save=["norm"],
    )
    rows, held_out = (
        labelled(encode_rows(part, tokenizer, config.data.window)[0])
        for part in split_rows(config.data, config.seed)
    )
    steps = step_limit(config, len(rows), PartialState().num_processes)
    arguments = training_arguments(config, True, steps)
    arguments.train_sampling_strategy, arguments.label_names = "group_by_length", ["labels"]
    arguments.save_total_limit = config.keep_checkpoints
    arguments.prediction_loss_only = True
    trainer = Trainer(
        get_peft_model(model, adapter),
        arguments,
        AnswerCollator(tokenizer, pad_to_multiple_of=8),
        rows,
        held_out.select(range(min(config.eval_rows or len(held_out), len(held_out)))),
        processing_class=tokenizer,
    )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir))
    if trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
    return 0


def main() -> int:
    """Run the program; the exit status."""
    command = Command("fine-tune a base autoregressively: the baseline", TrainConfig, train)
    return script("python -m examples.autoregressive", command)


if __name__ == "__main__":
    sys.exit(main())
