"""A run from settings to a finished model: rows → windows → trainer → checkpoint.

Every kind of run (supervised fine-tuning, R2FT) is a `Stage`: what it starts from, what its trainer is, what
is watched. What they share is here: the data, resuming, checkpoints, the final model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dlm.adapter import merged
from dlm.checkpoint import computes_bfloat16
from dlm.checkpointing import reading
from dlm.curves import CurveCallback, Draw, draw_curve
from dlm.data.config import DataConfig
from dlm.data.encode import EncodingReport, encode_rows
from dlm.data.encoded import ENCODED_SUFFIX, EncodedRows
from dlm.data.rows import load_rows
from dlm.data.rules import rule_rows
from dlm.data.windows import WindowCollator
from dlm.errors import ConfigError, DataError, DivergedError, first_line, plain, unknown_name
from dlm.lock import alone_in
from dlm.model import MaskedDiffusionModel
from dlm.origin import carry_notice
from dlm.prior import TokenPrior
from dlm.spec import ModelSpec
from dlm.tokenizer import template_name
from dlm.trainer import ENDLESS, DiffusionTrainer, micro_batches
from finetune.config import RunConfig, StartConfig
from finetune.deadline import Deadline
from finetune.run_folder import RunFolder
from finetune.samples import sample_steps
from finetune.start import check_model, prepare

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)

Load = Callable[[str, str], "Dataset"]
"""(source, split) -> rows."""

Encode = Callable[["Dataset", PreTrainedTokenizerBase, int], "tuple[Dataset, EncodingReport]"]
"""(rows, tokenizer, window) -> encoded rows, and their counts."""


class Stage(Generic[Config]):
    """One kind of run.

    Args:
        config: its settings.
    """

    objective: str
    """The objective, in words; recorded with the model."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def start(self) -> StartConfig:
        """Settings of the model that the run starts from."""
        raise NotImplementedError

    @property
    def drawings(self) -> dict[str, Draw]:
        """Plots of the run, by file name."""
        return {"curve.png": draw_curve}

    def load(self, source: str, split: str) -> Dataset:
        """The rows of a source; see `load_rows`."""
        return load_rows(source, split)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int
    ) -> tuple[Dataset, EncodingReport]:
        """The rows as token ids, and their counts; see `encode_rows`."""
        return encode_rows(rows, tokenizer, window)

    def collator(self, tokenizer: PreTrainedTokenizerBase, rows: Dataset | EncodedRows) -> WindowCollator:
        """The collator, which makes batches of encoded rows."""
        del rows
        return collator(self.config.data, tokenizer, self.config.seed)

    def first(
        self, rows: Dataset, resume_from: Path | None
    ) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
        """The model before the run, and its tokenizer."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse, before the data are read, a start that does not exist."""
        if self.start.init:
            check_model(self.start.init, self.config.data.window)

    def prior(self, tokenizer: PreTrainedTokenizerBase, model: Any, rows: Dataset) -> TokenPrior:
        """Token counts of the training answers, stored with the model."""
        return TokenPrior.of(rows, model.config.vocab_size, tuple(tokenizer.all_special_ids))

    def settle(self, trainer: DiffusionTrainer, run: RunFolder) -> None:
        """Take the weights that the run is to end with; the last ones, if nothing is done."""

    def diverged(self, trainer: DiffusionTrainer, run: RunFolder, error: DivergedError) -> None:
        """End a run whose weights are of no use any more; what stands in its checkpoints stays."""
        del trainer, run
        raise error

    def record(self) -> dict[str, Any]:
        """Fields for the model's configuration beside the data and the optimiser."""
        return {"objective": self.objective, "init": self.start.init or "random weights"}

    def trainer(self, model: Any, prior: TokenPrior, **common: Any) -> DiffusionTrainer:
        """The trainer, from what every trainer is given."""
        del prior
        return DiffusionTrainer(model, **common)

    def callbacks(
        self, trainer: DiffusionTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, run: RunFolder
    ) -> Iterable[TrainerCallback]:
        """Callbacks of each validation."""
        raise NotImplementedError


def execute(stage: Stage[Any]) -> Path:
    """Run a stage to its end and return the folder of the finished model.

    A run that was killed continues from its newest whole checkpoint when it is called again; one that is
    finished is left as it is.

    Raises:
        DLMError: for settings, data or checkpoints that cannot be used, and when the folder holds a run with
            other settings, or another process is at work in it.
    """
    config: RunConfig = stage.config
    arguments = training_arguments(config, True, ENDLESS)  # before the data are read
    base_dtype = stage.start.lora.base_dtype
    if base_dtype != "float32" and not arguments.bf16:
        raise ConfigError(f"model.lora.base_dtype {base_dtype} computes in bfloat16: give precision bf16")
    run = RunFolder(config)
    if run.finished:
        logger.info("%s: this run is finished", run.path)
        return run.path
    stage.check()
    with alone_in(run.path) if PartialState().is_main_process else nullcontext():
        return _execute(stage, RunFolder(config))


def _execute(stage: Stage[Any], run: RunFolder) -> Path:
    """Run a stage in a folder that no other process writes to."""
    config: RunConfig = stage.config
    if run.finished:  # by another process, meanwhile
        return run.path
    rows, held_out = split_rows(config.data, config.seed, stage.load)
    with reading(run.resume_from):
        model, tokenizer = stage.first(rows, run.resume_from)
    train_set, report = stage.encode(rows, tokenizer, config.data.window)
    eval_set = validation_set(config, held_out, tokenizer, stage.encode)
    logger.info("training rows: %s", report)
    record(model, tokenizer, config, report, stage.record())
    model = prepare(model, stage.start, config.data.window, config.seed)
    trainer = build_trainer(stage, model, tokenizer, train_set, eval_set, run)
    if config.eval_steps and eval_set is not None:
        for callback in stage.callbacks(trainer, tokenizer, held_out, run):
            trainer.add_callback(callback)
    trainer.add_callback(CurveCallback(run.path, stage.drawings))  # last: it draws what the others measured
    if trainer.accelerator.is_main_process:
        run.begin(report)
    trainer.accelerator.wait_for_everyone()
    if run.resume_from and run.trained:  # killed between the last checkpoint and the final model
        trainer.load_checkpoint(run.resume_from)
    else:
        if trainer.args.max_steps <= config.warmup_steps and config.lr_scheduler_type != "constant":
            logger.warning(_WITHIN_WARMUP, "will end", trainer.args.max_steps, config.warmup_steps)
        try:
            trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
        except DivergedError as error:
            stage.diverged(trainer, run, error)
        if config.max_minutes and trainer.state.global_step <= config.warmup_steps < trainer.args.max_steps:
            logger.warning(_WITHIN_WARMUP, "has ended", trainer.state.global_step, config.warmup_steps)
    trainer.accelerator.wait_for_everyone()
    stage.settle(trainer, run)
    if trainer.ema:
        trainer.ema.copy_to(trainer.model)
    save_final(trainer, stage.start, run.path)
    if trainer.accelerator.is_main_process:
        run.finish()
    return run.path


_WITHIN_WARMUP = (
    "the run %s within its warm-up, at step %d, before --warmup_steps %d: its learning rate is never "
    "reached; a tenth of the steps is usual"
)


def split_rows(data: DataConfig, seed: int, load: Load = load_rows) -> tuple[Dataset, Dataset]:
    """Rows for training and rows for validation: the last `validation_rows`, which are never trained on.

    Those of a source are read by `load`. Of a file of encoded rows they are `EncodedRows`.
    """
    if data.source == "rules":  # made by rule, with splits of their own
        if data.split != DataConfig.split:
            raise ConfigError("rules makes its own rows: give no --data.split")
        held_out = rule_rows(max(1, data.validation_rows), seed, "validation")
        return rule_rows(data.limit or 20_000, seed), held_out.select(range(data.validation_rows))
    encoded = data.source.endswith(ENCODED_SUFFIX)
    if encoded and data.split != DataConfig.split:
        raise ConfigError(f"{data.source}: encoded rows have no splits; give no --data.split")
    rows: Any = EncodedRows.load(data.source) if encoded else load(data.source, data.split)
    rows = rows.select(range(min(data.limit, len(rows)))) if data.limit else rows
    if data.validation_rows >= len(rows):
        raise DataError(
            f"{data.source}: {len(rows)} rows leave none to train on with {data.validation_rows} held out; "
            "lower --data.validation_rows"
        )
    cut = len(rows) - data.validation_rows
    return rows.select(range(cut)), rows.select(list(range(cut, len(rows))))


def validation_set(
    config: RunConfig,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode = encode_rows,
) -> Dataset | None:
    """The encoded rows that the run validates on; None where it does not validate, or there are none.

    Raises:
        DataError: when none of them can be used.
    """
    subset = held_out.select(range(min(config.eval_rows or len(held_out), len(held_out))))
    if not len(subset):
        return None
    try:
        return encode(subset, tokenizer, config.data.window)[0]
    except DataError as error:
        problem = f"{config.data.source}: of the validation rows (the last {len(held_out)}), {error}"
        if config.eval_steps:
            without = ", or --eval_steps 0" if config.MAY_SKIP_VALIDATION else ""
            raise DataError(
                f"{problem}; choose a longer --data.window, or other --data.validation_rows{without}"
            ) from error
        logger.warning("%s; the run goes on without them", problem)
        return None


def save_final(trainer: DiffusionTrainer, start: StartConfig, folder: Path) -> None:
    """Write the finished model: all its weights, or its adapter unless that is to be merged."""
    if not (start.lora.r and start.lora.merge):
        trainer.save_model(str(folder))
    elif trainer.accelerator.is_main_process:
        merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.prior is not None:
            trainer.prior.save(folder)
    if start.init and trainer.accelerator.is_main_process:
        carry_notice(start.init, folder)


def record(
    model: MaskedDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    report: EncodingReport,
    stage: dict[str, Any],
) -> None:
    """Write into the model's own configuration how it was made and how to sample from it.

    A model that had defaults of decoding before the run has them still.
    """
    model.config.training = {
        **stage,
        "data": {**asdict(config.data), "rows": report.as_dict()},
        "schedule": ModelSpec.of(model).schedule.as_dict(),
        "template": template_name(tokenizer),
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "ema_decay": config.ema_decay,
    }
    if not model.config.generation:
        steps = sample_steps(config, ModelSpec.of(model))
        model.config.generation = {"decoder": "conv", "window": config.data.window, "steps": steps}


def build_trainer(
    stage: Stage[Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset | EncodedRows,
    eval_set: Dataset | EncodedRows | None,
    run: RunFolder | None = None,
) -> DiffusionTrainer:
    """The trainer of a run, or, with its folder, of what is left of it."""
    config: RunConfig = stage.config
    processes = PartialState().num_processes
    if run:
        parts = accumulation(config, run.resume_from, processes)
        config = replace(config, gradient_accumulation_steps=parts)
    steps = step_limit(config, len(train_set), processes)
    deadline = Deadline(run, config, steps) if run and config.max_minutes else None
    prior = stage.prior(tokenizer, model, train_set)
    trainer = stage.trainer(
        model,
        prior,
        args=training_arguments(config, eval_set is not None, steps),
        data_collator=stage.collator(tokenizer, train_set),
        processing_class=tokenizer,
        train_dataset=_numbered(train_set),
        eval_dataset=_numbered(eval_set) if eval_set is not None else None,
        ema_decay=config.ema_decay,
        eval_draws=config.eval_draws,
        keep_checkpoints=config.keep_checkpoints,
        pace=deadline.pace if deadline else None,
    )
    trainer.prior = prior
    if deadline:
        trainer.add_callback(deadline)
    return trainer


def accumulation(config: RunConfig, resume_from: Path | None, processes: int) -> int:
    """Micro-batches that each process accumulates, so that a step has as many rows as when the run began.

    Raises:
        ConfigError: when they cannot be dealt out to this number of processes.
    """
    parts = micro_batches(resume_from) if resume_from else None
    if parts is None or parts == config.gradient_accumulation_steps * processes:
        return config.gradient_accumulation_steps
    if parts % processes:
        raise ConfigError(
            f"{resume_from}: a step of this run has {parts} batches of {config.per_device_train_batch_size} "
            f"rows, which {processes} processes cannot share; go on with a number that divides {parts}"
        )
    logger.warning(
        "the run began with another number of processes: %d now accumulate %d batches each, so that a step "
        "has the same rows", processes, parts // processes,
    )  # fmt: skip
    return parts // processes


def collator(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> WindowCollator:
    """Collator that makes windows of encoded rows."""
    return WindowCollator(
        eos_token_id=int(tokenizer.eos_token_id),
        window=data.window,
        grouped=data.windows == "grouped",
        eos_tail=data.eos_tail,
        cut_share=data.cut_share,
        eos_loss_all=data.eos_loss == "all",
        seed=seed,
    )


def _numbered(rows: Dataset | EncodedRows) -> Dataset | EncodedRows:
    """Give every row its number, which seeds its noise in validation."""
    if isinstance(rows, EncodedRows):
        return rows  # which have one
    return rows.add_column("row", list(range(len(rows)))).with_format("torch")


def step_limit(config: RunConfig, rows: int, processes: int) -> int:
    """Optimiser steps at most, of a run over so many rows: those of `max_steps`, or of its passes."""
    batches = rows / config.per_device_train_batch_size / processes
    steps = math.ceil(math.ceil(batches) / config.gradient_accumulation_steps)
    if processes > 1:  # which leave out what does not fill the last step, see `EpochSampler`
        steps = int(batches / config.gradient_accumulation_steps) or steps
    limits = [config.max_steps or ENDLESS, config.epochs * steps]
    return math.ceil(min(limits))


_SHARED = (
    "output_dir",
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


def training_arguments(config: RunConfig, evaluate: bool, max_steps: int) -> TrainingArguments:
    """Our settings as transformers' own, for a run of so many steps.

    Raises:
        ConfigError: when `config.trainer` names a field that does not exist, or one that we set.
    """
    ours: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    ours |= {
        "max_steps": max_steps,
        "num_train_epochs": config.num_train_epochs,
        "eval_strategy": "steps" if evaluate and config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "logging_nan_inf_filter": False,  # it would log 0 for a loss that is none
        "save_strategy": "steps",
        **_precision(config.precision),
    }
    known = {f.name: type(f.default) for f in fields(TrainingArguments)}
    for name, value in config.trainer.items():
        if name not in known:
            raise unknown_name("trainer setting", name, known)
        number = isinstance(plain(value), int | float) and not isinstance(value, bool)
        if known[name] in (int, float) and not number:
            raise ConfigError(f"trainer.{name} must be a number, got {value!r}")
        if name in ours:
            raise ConfigError(
                f"trainer.{name} is not free: the run sets it from its own options (see --help)"
            )
    reports = [name.strip() for name in config.report_to.split(",")]
    alone = len(reports) == 1 and reports[0] in ("all", "none")
    for name in () if alone else reports:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("report_to", name, ("all", "none", *INTEGRATION_TO_CALLBACK))
    ours["report_to"] = reports[0] if alone else reports
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": 2 * config.per_device_train_batch_size,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.accelerator.is_available(),
        "label_names": ["input_ids"],
        "ddp_find_unused_parameters": False,
    }
    try:
        return TrainingArguments(**(defaults | config.trainer | ours))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses these settings: {first_line(error)}") from error


def _precision(precision: str) -> dict[str, bool]:
    if precision == "auto":
        cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if cuda or computes_bfloat16() else "fp32"
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}
