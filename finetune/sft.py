"""A training run from settings to a finished model: rows → windows → trainer → checkpoint.

Supervised fine-tuning and pretraining are the same run: rows with a prompt never mask it, rows of plain
text have no prompt.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from dlm.adapter import add_adapter, merged
from dlm.backbone import ScratchConfig, from_causal_lm, from_scratch
from dlm.checkpoint import load_model, model_type
from dlm.config import FAMILIES
from dlm.curves import CurveCallback
from dlm.data.encode import EncodingReport, encode_rows
from dlm.data.rows import load_rows
from dlm.data.rules import rule_rows
from dlm.data.windows import WindowCollator
from dlm.errors import ConfigError, DataError, unknown_name
from dlm.model import MaskedDiffusionModel
from dlm.tokenizer import set_template, template_name, train_tokenizer
from dlm.trainer import DiffusionTrainer
from finetune.config import ModelConfig, TrainConfig
from finetune.run_folder import RunFolder
from finetune.samples import SampleCallback

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Run one training to its end and return the folder of the finished model.

    A run that was killed continues from its newest whole checkpoint when it is called again; one that is
    finished is left as it is.

    Raises:
        DLMError: for settings, data or checkpoints that cannot be used, and when the folder holds a run with
            other settings.
    """
    training_arguments(config, evaluate=True)  # a misspelt setting should not cost the time to read the data
    run = RunFolder(config)
    if run.finished:
        logger.info("%s: this run is finished", run.path)
        return run.path
    rows, held_out = split_rows(config)
    model, tokenizer = build_model(config, rows, run.resume_from)
    train_set, report = encode_rows(rows, tokenizer, config.data.window)
    eval_set = encode_rows(held_out, tokenizer, config.data.window)[0] if len(held_out) else None
    logger.info("training rows: %s", report)
    record(model, tokenizer, config, report)
    model = with_adapter(model, config.model)
    trainer = build_trainer(model, tokenizer, config, train_set, eval_set)
    trainer.add_callback(CurveCallback(run.path))
    if config.eval_steps and eval_set is not None:
        trainer.add_callback(SampleCallback(trainer, tokenizer, config, held_out))
    if trainer.accelerator.is_main_process:
        run.begin(report)
    trainer.accelerator.wait_for_everyone()
    if run.resume_from and run.trained:  # killed between the last checkpoint and the final model
        trainer.load_checkpoint(run.resume_from)
    else:
        trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if trainer.ema:
        trainer.ema.copy_to(trainer.model)
    save_final(trainer, config)
    if trainer.accelerator.is_main_process:
        run.finish()
    return run.path


def split_rows(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Rows for training and rows for validation: the last `validation_rows`, which are never trained on."""
    data = config.data
    if data.source == "rules":  # made by rule, with splits of their own
        held_out = rule_rows(max(1, data.validation_rows), config.seed, "validation")
        return rule_rows(data.limit or 20_000, config.seed), held_out.select(range(data.validation_rows))
    rows = load_rows(data.source, data.split)
    rows = rows.select(range(min(data.limit, len(rows)))) if data.limit else rows
    if data.validation_rows >= len(rows):
        raise DataError(
            f"{data.source}: {len(rows)} rows leave none to train on with {data.validation_rows} held out"
        )
    cut = len(rows) - data.validation_rows
    return rows.select(range(cut)), rows.select(range(cut, len(rows)))


def build_model(
    config: TrainConfig, rows: Dataset, resume_from: Path | None = None
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, from random weights or from a checkpoint.

    Args:
        config: settings of the run.
        rows: what a new tokenizer is trained on.
        resume_from: a checkpoint of this run, whose tokenizer is taken instead of training one again.
    """
    window = config.data.window
    if config.model.init:
        model, tokenizer = _from_checkpoint(config.model)
    else:
        model, tokenizer = _from_nothing(config, rows, resume_from)
    if window > model.config.max_positions:
        raise ConfigError(
            f"window {window} is longer than the {model.config.max_positions} positions of the model"
        )
    if config.model.gradient_checkpointing:  # transformers renamed the method during 5.x
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)()
    if config.model.attn_implementation:
        model.set_attn_implementation(config.model.attn_implementation)
    return model, tokenizer


def _from_nothing(
    config: TrainConfig, rows: Dataset, resume_from: Path | None
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """Random weights and a tokenizer trained on the rows; the bare template where no row has a prompt."""
    if resume_from:
        tokenizer = AutoTokenizer.from_pretrained(resume_from)
    else:
        tokenizer = train_tokenizer(_texts(rows), config.model.vocab_size)
        prompted = any(prompt for prompt in rows["prompt"])
        set_template(tokenizer, config.model.template if prompted else "plain")
    shape = {
        f.name: getattr(config.model, f.name) for f in fields(ScratchConfig) if hasattr(config.model, f.name)
    }
    shape["max_position_embeddings"] = max(2048, config.data.window)
    return from_scratch(ScratchConfig(**shape), tokenizer, config.seed), tokenizer


def _from_checkpoint(config: ModelConfig) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """A causal LM made bidirectional, or a diffusion checkpoint with its own template and shift."""
    if config.init.endswith(".gguf") or model_type(config.init) in FAMILIES:
        return from_causal_lm(config.init, template=config.template, shift=config.shift)
    model, tokenizer = load_model(config.init, device="cpu", dtype="float32")
    logger.info(
        "%s: keeps its template (%s) and shift=%s", config.init, template_name(tokenizer), model.config.shift
    )
    return model, tokenizer


def with_adapter(model: MaskedDiffusionModel, config: ModelConfig) -> Any:
    """The model with a trainable adapter around it, if the settings ask for one."""
    lora = config.lora
    if not lora.r:
        return model
    return add_adapter(
        model, config.init, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets
    )


def save_final(trainer: DiffusionTrainer, config: TrainConfig) -> None:
    """Write the finished model: all its weights, or its adapter unless that is to be merged."""
    if config.model.lora.merge and trainer.accelerator.is_main_process:
        merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(config.output_dir)
        trainer.processing_class.save_pretrained(config.output_dir)
    elif not config.model.lora.merge:
        trainer.save_model(config.output_dir)


def _texts(rows: Dataset) -> Any:
    """What a new tokenizer is trained on: every message and answer."""
    for row in rows:
        yield from (turn["content"] for turn in row["prompt"])
        yield row["answer"]


def record(
    model: MaskedDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    report: EncodingReport,
) -> None:
    """Write into the model's own configuration how it was made and how to sample from it."""
    model.config.training = {
        "init": config.model.init or "random weights",
        "data": {**asdict(config.data), "rows": report.as_dict()},
        "objective": "masked diffusion NELBO (log-linear schedule, SUBS)",
        "template": template_name(tokenizer),
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "ema_decay": config.ema_decay,
    }
    model.config.generation = {"decoder": "conv", "window": config.data.window, "steps": config.sample_steps}


def build_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    train_set: Dataset,
    eval_set: Dataset | None,
) -> DiffusionTrainer:
    """The trainer of a run."""
    data = config.data
    collator = WindowCollator(
        eos_token_id=int(tokenizer.eos_token_id),
        window=data.window,
        grouped=data.windows == "grouped",
        eos_tail=data.eos_tail,
        cut_share=data.cut_share,
        eos_loss_all=data.eos_loss == "all",
        seed=config.seed,
    )
    return DiffusionTrainer(
        model,
        training_arguments(config, evaluate=eval_set is not None),
        data_collator=collator,
        processing_class=tokenizer,
        train_dataset=_numbered(train_set),
        eval_dataset=_numbered(eval_set) if eval_set is not None else None,
        ema_decay=config.ema_decay,
        eval_draws=config.eval_draws,
        keep_checkpoints=config.keep_checkpoints,
    )


def _numbered(rows: Dataset) -> Dataset:
    """Give every row its number, which seeds its noise in validation."""
    return rows.add_column("row", list(range(len(rows)))).with_format("torch")


_SHARED = (
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "logging_steps",
    "save_steps",
    "report_to",
)
"""Settings that transformers knows by the same name."""


def training_arguments(config: TrainConfig, evaluate: bool) -> TrainingArguments:
    """Our settings as transformers' own.

    Raises:
        ConfigError: when `config.trainer` names a field that does not exist, or one that we set.
    """
    ours: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    ours |= {
        "max_steps": config.max_steps or -1,
        "eval_strategy": "steps" if evaluate and config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "save_strategy": "steps",
        **_precision(config.precision),
    }
    known = {f.name for f in fields(TrainingArguments)}
    for name in config.trainer:
        if name not in known:
            raise unknown_name("trainer setting", name, known)
        if name in ours:
            raise ConfigError(
                f"trainer.{name} is not free: the run sets it from its own options (see --help)"
            )
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": 2 * config.per_device_train_batch_size,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.accelerator.is_available(),
        "label_names": ["input_ids"],
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**(defaults | config.trainer | ours))


def _precision(precision: str) -> dict[str, bool]:
    if precision == "auto":
        cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if cuda or torch.cpu._is_avx512_bf16_supported() else "fp32"
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}
