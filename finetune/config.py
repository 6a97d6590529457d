"""The settings of training runs, as `dlm train` and `dlm r2ft` take them; importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from dlm.data.config import DataConfig
from dlm.device import QUANTIZED, check_quantized
from dlm.errors import ConfigError, check_whole, plain, refuse_ignored, unknown_name
from finetune.contrast_config import NegativeConfig, ObjectiveConfig


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter in place of training every weight.

    Args:
        r: rank; 0 trains all weights.
        alpha: the update is scaled by alpha / r.
        dropout: dropout before the update.
        targets: "all" linear layers of the backbone, or "attention" (q, k, v).
        merge: save the final model merged; otherwise the adapter alone, which needs its base to be loaded.
        fold: compute with the sum of weight and update instead of side by side. The same function; faster
            where many tokens meet narrow layers, as in small models on a GPU. Without dropout only.
        base_dtype: type of the frozen weights: "float32", or "bfloat16" for half their memory; or "int8" or
            "nf4" for linear layers in 8 or 4 bits (QLoRA). All but the first with precision bf16. What is
            trained stays float32.
    """

    r: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["all", "attention"] = "all"
    merge: bool = False
    fold: bool = False
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"

    def __post_init__(self) -> None:
        """Check the ranges."""
        choices = ("float32", "bfloat16", *QUANTIZED)
        if self.base_dtype not in choices:
            raise unknown_name("lora.base_dtype", str(self.base_dtype), choices)
        if self.base_dtype in QUANTIZED and (self.fold or self.merge):
            raise ConfigError(
                f"lora.{'fold' if self.fold else 'merge'} needs the base's own weights, which base_dtype "
                f"{self.base_dtype} rounds: give base_dtype bfloat16, or merge the adapter with dlm export"
            )
        check_quantized(self.base_dtype)
        if self.fold and self.dropout:
            raise ConfigError(f"lora.fold has no place for a dropout, got lora.dropout {self.dropout}")
        if self.r < 0:
            raise ConfigError(f"lora.r must not be negative (0 trains all weights), got {self.r}")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora.alpha must be above 0 and lora.dropout lie in [0, 1), got {self.alpha}, {self.dropout}"
            )
        if not self.r:
            names = ("alpha", "dropout", "targets", "merge", "fold", "base_dtype")
            refuse_ignored(self, names, "lora.", "an adapter: give lora.r")


@dataclass(frozen=True)
class StartConfig:
    """The model that a run starts from.

    Args:
        init: the checkpoint to start from.
        lora: low-rank adapter; needs `init`.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        attn_implementation: transformers' name of the attention kernel; empty for the best one there is.
        compile: compile the layers (torch.compile): some time at the start, then faster on a GPU.
    """

    init: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    attn_implementation: str = ""
    compile: bool = False

    def __post_init__(self) -> None:
        """Check that an adapter has something to stand on."""
        if self.lora.r and not self.init:
            raise ConfigError("lora needs model.init: random weights cannot be adapted, only trained")


SCHEDULES = ("log-linear", "cosine")
"""Noise schedules by name, see `dlm.schedule`."""

TEMPLATES = ("chatml", "instruct", "plain", "model")
"""Chat templates by name, see `dlm.tokenizer`; "model" is the checkpoint's own."""


@dataclass(frozen=True)
class ModelConfig(StartConfig):
    """Source of the first weights.

    Args:
        init: causal LM (folder, hub id or .gguf; Llama, Mistral, Qwen2, Qwen3, GPT-2) or diffusion checkpoint
            to start from; empty for random weights.
        template: chat template to record with the model: "chatml", "instruct", "plain" (bare text, for
            pretraining), or "model" for the checkpoint's own. A diffusion checkpoint keeps its own.
        shift: whether the state at i-1 predicts token i, for a causal LM as a start.
        schedule: noise schedule, "log-linear" or "cosine"; by default the checkpoint's, or log-linear.
        visibility: "full", every position sees its whole row, or "block", its own block and the earlier ones
            (BD3LM); by default the checkpoint's, or full.
        block_size: positions per block, for visibility "block".
        block_lead: with a shift, write the first position of each block before the others of its block; by
            default as in a checkpoint with blocks, or true.
        causal_context: positions of finished blocks see nothing behind themselves, as in the causal LM; by
            default as in a checkpoint with blocks, or false.
        hidden_size: width of a random model.
        num_hidden_layers: layers of a random model.
        num_attention_heads: heads of a random model.
        intermediate_size: feed-forward width of a random model.
        vocab_size: size of the tokenizer that is trained for a random model.
    """

    template: str = "chatml"
    shift: bool = True
    schedule: str = ""
    visibility: Literal["", "full", "block"] = ""
    block_size: int = 0
    block_lead: bool | None = None
    causal_context: bool | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1408
    vocab_size: int = 16384

    def __post_init__(self) -> None:
        """Check that nothing is given that the checkpoint brings with it."""
        super().__post_init__()
        if self.template not in TEMPLATES:
            raise unknown_name("template", self.template, TEMPLATES)
        if self.schedule not in ("", *SCHEDULES):
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        self._check_visibility()
        if self.init:
            sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            refuse_ignored(
                self, (*sizes, "vocab_size"), "model.", "random weights; model.init brings its own"
            )
        else:
            refuse_ignored(self, ("shift",), "model.", "a causal LM as a start: give model.init")

    def _check_visibility(self) -> None:
        if self.visibility not in ("", "full", "block"):
            raise unknown_name("visibility", self.visibility, ("full", "block"))
        if self.visibility != "block":
            blocks = ("block_size", "block_lead", "causal_context")
            refuse_ignored(self, blocks, "model.", 'model.visibility "block"')
        elif self.block_lead is not None and not (self.shift and self.init):
            raise ConfigError("model.block_lead is for models with a shift: without one no position leads")
        elif self.block_size < 1:
            raise ConfigError(
                f"model.visibility 'block' needs model.block_size of at least 1, got {self.block_size}"
            )


_ENDS = "a run ends with its last weights, and R2FT with those that its guard chooses"
_CONTINUES = "a run that goes on must be the one that was interrupted"
_UNUSED = "it has no effect here"
TAKEN = {
    "load_best_model_at_end": _ENDS, "metric_for_best_model": _ENDS,
    "save_only_model": _CONTINUES, "ignore_data_skip": _CONTINUES,
    "save_total_limit": "keep_checkpoints says how many", "data_seed": "seed is that of the rows too",
    "train_sampling_strategy": "data.windows says how rows are ordered",
    "resume_from_checkpoint": "a run goes on from its own last checkpoint (resume)",
    "label_smoothing_factor": _UNUSED, "remove_unused_columns": _UNUSED,
    "dataloader_drop_last": "every row is trained on and measured",
}  # fmt: skip
"""Fields of transformers' TrainingArguments that are not free, and why."""

EPOCHS = 3.0
"""Passes over the rows of a run without any limit."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of every training run.

    Args:
        output_dir: folder of the run: checkpoints, logs, curve, samples, and the final model.
        data: where the rows come from.
        max_steps: optimiser steps; 0 for no such limit. The first limit that is reached ends the run.
        num_train_epochs: passes over the rows; 0 for no such limit, or for 3 if there is no other.
        max_minutes: minutes, resumed ones counted; 0 for no such limit. The learning rate then follows a
            cosine over the share that is spent of whichever limit is nearest. For one process.
        per_device_train_batch_size: rows per device and micro-batch.
        gradient_accumulation_steps: micro-batches per optimiser step.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: schedule, by transformers' name.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        max_grad_norm: norm to which gradients are clipped; 0 for none.
        precision: "bf16" or "fp16" autocast, "fp32", or "auto": bf16 where the hardware has it.
        ema_decay: decay of the averaged weights; 0 for none.
        seed: seed of everything random.
        logging_steps: steps between logged losses.
        eval_steps: steps between validations (NELBO and samples); 0 for none.
        eval_rows: how many of the held-out rows are measured at each validation, the first ones; 0 for all.
        eval_draws: noise levels per validation row.
        save_steps: steps between checkpoints.
        save_minutes: with max_minutes, minutes between further checkpoints; 0 for none.
        keep_checkpoints: whole checkpoints to keep.
        samples: prompts that are answered at each validation; empty for the first held-out rows.
        sample_steps: denoising steps of those answers; in blocks, at least one for each block.
        resume: continue from the newest whole checkpoint in `output_dir`, if there is one.
        report_to: "tensorboard", "wandb", "none" …, as transformers takes it.
        trainer: any other field of transformers' TrainingArguments, by name.
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        {
            *("output_dir", "resume", "report_to", "eval_steps", "eval_rows", "eval_draws", "save_steps"),
            *("logging_steps", "keep_checkpoints", "save_minutes", "samples", "sample_steps"),
        }
    )
    """Settings that may change between a run and its continuation: they do not touch the final weights."""

    MAY_SKIP_VALIDATION: ClassVar[bool] = True
    """True where a run may go without validation."""

    output_dir: str
    data: DataConfig = field(default_factory=DataConfig)
    max_steps: int = 0
    num_train_epochs: float = 0.0
    max_minutes: float = 0.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    ema_decay: float = 0.0
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int = 250
    eval_rows: int = 0
    eval_draws: int = 4
    save_steps: int = 250
    save_minutes: float = 0.0
    keep_checkpoints: int = 2
    samples: list[str] = field(default_factory=list)
    sample_steps: int = 32
    resume: bool = True
    report_to: str = "tensorboard"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._check_numbers()
        if not self.output_dir:
            raise ConfigError("output_dir must name the folder of the run")
        positive = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "logging_steps",
        )
        for name in (*positive, "save_steps", "eval_draws", "keep_checkpoints", "sample_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        unsigned = (
            "max_steps",
            "num_train_epochs",
            "max_minutes",
            "save_minutes",
            "eval_steps",
            "eval_rows",
            "warmup_steps",
            "max_grad_norm",
        )
        for name in (*unsigned, "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in self.trainer:
            if name in TAKEN:
                raise ConfigError(f"trainer.{name} is not free: {TAKEN[name]}")
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.max_minutes and self.lr_scheduler_type != "cosine":
            raise ConfigError(
                f"max_minutes has a cosine of its own: lr_scheduler_type {self.lr_scheduler_type!r} is for "
                "max_steps and num_train_epochs"
            )
        if self.save_minutes and not self.max_minutes:
            raise ConfigError("save_minutes is for runs with max_minutes; give save_steps")

    def _check_numbers(self) -> None:
        """Refuse what is no number where the default is one; numbers of NumPy become Python's."""
        for item in fields(self):
            if type(item.default) not in (int, float):
                continue
            value = plain(getattr(self, item.name))
            whole = type(item.default) is int
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                kind = "a whole number" if whole else "a number"
                raise ConfigError(f"{item.name} must be {kind}, got {value!r}")
            object.__setattr__(self, item.name, value)

    @property
    def epochs(self) -> float:
        """Passes over the rows at most; infinite where other limits end the run."""
        unlimited = math.inf if self.max_steps or self.max_minutes else EPOCHS
        return self.num_train_epochs or unlimited


@dataclass(frozen=True)
class MaskConfig:
    """Masks of training, and what is trained beside them.

    Args:
        complementary: every row comes twice, with some tokens masked and with the others; twice the cost.
        path: share of the rows whose masks lie on the path of a convolutional decoder, block by block in a
            block-causal model; 0 for uniform masks.
        kernel_size: of that decoder's convolution, odd.
        autoregressive: weight of an autoregressive loss on the same rows, under causal attention; a step
            costs twice as much.
    """

    complementary: bool = False
    path: float = 0.0
    kernel_size: int = 9
    autoregressive: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges, and that no two ask for other masks of one row."""
        if not 0 <= self.path <= 1:
            raise ConfigError(f"masks.path must lie in [0, 1], got {self.path}")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ConfigError(f"masks.kernel_size must be odd and at least 3, got {self.kernel_size}")
        if self.autoregressive < 0:
            raise ConfigError(f"masks.autoregressive must not be negative, got {self.autoregressive}")
        if self.path and self.complementary:
            raise ConfigError("masks.path and masks.complementary both choose the masks of a row: give one")
        if not self.path:
            refuse_ignored(self, ("kernel_size",), "masks.", "masks on a path: give masks.path")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run of supervised fine-tuning or pretraining.

    Args:
        model: where the weights come from.
        masks: which tokens are masked, and what is trained beside that.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        """Check that the masks fit the model."""
        super().__post_init__()
        if self.masks.autoregressive and not self.model.init:
            raise ConfigError(
                "masks.autoregressive is for models with a shift: give a model.init that has one"
            )


@dataclass(frozen=True)
class R2FTConfig(RunConfig):
    """A run that sets good answers against bad ones, after supervised fine-tuning: R2FT, DDRO or DPO.

    Args:
        model: the fine-tuned checkpoint to start from (`model.init`), and the adapter if there is to be one.
        objective: the loss.
        rejected: source of the bad answers: "rules" makes them, "data" takes those of the rows, which have
            prompt, chosen and rejected, or prompt, completion and label (trl's formats).
        negatives: how negatives are made by rule.
        nelbo_tolerance: training stops at the first validation whose NELBO exceeds that of the start by more
            than this share.
        watch: held-out prompts that are answered with top-k sampling at each validation, to watch repetition
            and token frequencies; 0 for none.
    """

    FREE: ClassVar[frozenset[str]] = RunConfig.FREE - {
        "eval_steps",
        "eval_rows",
        "eval_draws",
        "save_steps",
    } | {"watch"}
    """Validation decides which weights are kept here, so its settings are not free."""

    MAY_SKIP_VALIDATION: ClassVar[bool] = False

    model: StartConfig = field(default_factory=StartConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rejected: Literal["rules", "data"] = "rules"
    negatives: NegativeConfig = field(default_factory=NegativeConfig)
    max_steps: int = 250
    learning_rate: float = 5e-6
    warmup_steps: int = 25
    eval_steps: int = 50
    save_steps: int = 50
    nelbo_tolerance: float = 0.02
    watch: int = 16

    def __post_init__(self) -> None:
        """Check the ranges, and that the best checkpoint can be kept."""
        super().__post_init__()
        if not self.model.init:
            raise ConfigError("model.init must name the fine-tuned checkpoint to start from")
        self._check_rejected()
        if self.nelbo_tolerance < 0 or self.watch < 0:
            raise ConfigError(
                f"nelbo_tolerance and watch must not be negative, got {self.nelbo_tolerance}, {self.watch}"
            )
        if self.eval_steps == 0 or self.data.validation_rows == 0:
            raise ConfigError("R2FT stops by validation: eval_steps and data.validation_rows must not be 0")
        if self.trainer.get("eval_delay"):
            raise ConfigError("trainer.eval_delay is not free: R2FT chooses among validated states")
        if self.save_steps != self.eval_steps:
            raise ConfigError(
                f"every validated state is saved, so that the best one can be kept: save_steps must equal "
                f"eval_steps, got {self.save_steps} and {self.eval_steps}"
            )

    def _check_rejected(self) -> None:
        if self.rejected not in ("rules", "data"):
            raise unknown_name("rejected", self.rejected, ("rules", "data"))
        if self.rejected == "rules":
            return
        if self.objective.name == "r2ft":
            raise ConfigError(
                'rejected "data" is for objective.name ddro or dpo: r2ft sets a negative made by rule '
                "against the true tokens of the same masked row"
            )
        if self.data.source in ("rules", DataConfig().source) or self.data.source.endswith(".npz"):
            raise ConfigError(
                'rejected "data" needs data.source with rejected answers (a file with prompt, chosen '
                f"and rejected); {self.data.source} has none"
            )
        if self.negatives != NegativeConfig():
            raise ConfigError('negatives.… is for rejected "rules"; with "data" no negative is made')
