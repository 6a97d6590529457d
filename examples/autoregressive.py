"""Fine-tune a base autoregressively on the rows and the schedule of a diffusion run: the baseline.

python -m examples.autoregressive --config recipes/alpaca-smollm2-135m-lora.yaml --output_dir runs/alpaca-ar

Takes the settings of `dlm train` (its model must be a causal LM with an adapter); those of diffusion alone
(EOS tails, cuts, shift) mean nothing here, and the template is the base's own. A killed run goes on from its
newest checkpoint, and a finished one is left alone. The folder then holds the merged model:
dlm eval alpaca_eval --autoregressive runs/alpaca-ar
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Trainer
from transformers.trainer_utils import get_last_checkpoint

from dlm.adapter import TARGETS
from dlm.backbone import load_causal_lm
from dlm.cli import Command, parse
from dlm.data.encode import encode_rows
from dlm.errors import ConfigError
from finetune.config import TrainConfig
from finetune.run import split_rows, training_arguments

UNSEEN = -100
"""Label of tokens that carry no loss."""


def labels(row: dict[str, Any]) -> dict[str, Any]:
    """The answer's tokens as labels; the prompt's carry no loss."""
    return {"labels": [UNSEEN] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]}


def labelled(rows: Dataset) -> Dataset:
    """Encoded rows as transformers' trainer takes them."""
    return rows.map(labels, desc="Labels").select_columns(["input_ids", "labels", "length"])


class AnswerTrainer(Trainer):  # type: ignore[misc]
    """A trainer that predicts the answers' tokens alone: the head never sees the prompts, nor the padding."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Mean cross entropy, in nats, of the labelled tokens, each from the position before it."""
        base = self.accelerator.unwrap_model(model).get_base_model()
        following = inputs["labels"][:, 1:]
        told = following != UNSEEN
        with self.accelerator.autocast():
            states = base.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
            logits = base.lm_head(states[:, :-1][told])
        loss = F.cross_entropy(logits.float(), following[told])
        return (loss, {}) if return_outputs else loss


def main() -> None:
    """Train, merge, save."""
    config = parse("autoregressive", Command("", TrainConfig, lambda _: 0), sys.argv[1:])
    if (Path(config.output_dir) / "config.json").is_file():
        print(f"{config.output_dir} is finished")
        return
    model, tokenizer = load_causal_lm(config.model.init)
    lora = config.model.lora
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=TARGETS[lora.targets], modules_to_save=["norm"]
    )
    rows, held_out = (
        labelled(encode_rows(part, tokenizer, config.data.window)[0])
        for part in split_rows(config.data, config.seed)
    )
    arguments = training_arguments(config, evaluate=True)
    if arguments.world_size > 1 or arguments.gradient_accumulation_steps > 1:
        raise ConfigError("the baseline is trained by one process, without accumulation of gradients")
    arguments.train_sampling_strategy, arguments.label_names = "group_by_length", ["labels"]
    arguments.save_total_limit = config.keep_checkpoints
    arguments.prediction_loss_only = True
    trainer = AnswerTrainer(
        get_peft_model(model, adapter),
        arguments,
        DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        rows,
        held_out.select(range(min(config.eval_rows or len(held_out), len(held_out)))),
        processing_class=tokenizer,
    )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir))
    trainer.model.merge_and_unload().save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main()
