"""The settings of training runs, as `dlm train` and `dlm r2ft` take them; importable without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dlm.data.config import DataConfig
from dlm.errors import ConfigError, unknown_name


def _refuse(config: Any, names: Iterable[str], prefix: str, wanted: str) -> None:
    """Refuse settings that would be ignored: those that are not their defaults."""
    for name in names:
        if getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"{prefix}{name} is for {wanted}")


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
    """

    r: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["all", "attention"] = "all"
    merge: bool = False
    fold: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.fold and self.dropout:
            raise ConfigError(f"lora.fold has no place for a dropout, got lora.dropout {self.dropout}")
        if self.r < 0:
            raise ConfigError(f"lora.r must not be negative (0 trains all weights), got {self.r}")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora.alpha must be above 0 and lora.dropout lie in [0, 1), got {self.alpha}, {self.dropout}"
            )
        if not self.r:
            _refuse(
                self, ("alpha", "dropout", "targets", "merge", "fold"), "lora.", "an adapter: give lora.r"
            )


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
        block_lead: with a shift, write the first position of each block before the others of its block.
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
    block_lead: bool = True
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
            _refuse(self, (*sizes, "vocab_size"), "model.", "random weights; model.init brings its own")
        else:
            _refuse(self, ("shift",), "model.", "a causal LM as a start: give model.init")

    def _check_visibility(self) -> None:
        if self.visibility not in ("", "full", "block"):
            raise unknown_name("visibility", self.visibility, ("full", "block"))
        if self.visibility != "block":
            _refuse(self, ("block_size", "block_lead"), "model.", 'model.visibility "block"')
        elif not self.block_lead and not self.shift:
            raise ConfigError("model.block_lead is for models with a shift: without one no position leads")
        elif self.block_size < 1:
            raise ConfigError(
                f"model.visibility 'block' needs model.block_size of at least 1, got {self.block_size}"
            )


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
        max_grad_norm: gradient clipping.
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
        if not self.output_dir:
            raise ConfigError("output_dir must name the folder of the run")
        positive = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "logging_steps",
        )
        for name in (*positive, "save_steps", "eval_draws", "keep_checkpoints", "sample_steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        unsigned = (
            "max_steps",
            "num_train_epochs",
            "max_minutes",
            "save_minutes",
            "eval_steps",
            "eval_rows",
            "warmup_steps",
        )
        for name in (*unsigned, "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.max_minutes and self.lr_scheduler_type != "cosine":
            raise ConfigError(
                f"max_minutes has a cosine of its own: lr_scheduler_type {self.lr_scheduler_type!r} is for "
                "max_steps and num_train_epochs"
            )
        if self.save_minutes and not self.max_minutes:
            raise ConfigError("save_minutes is for runs with max_minutes; give save_steps")

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
        path: share of the rows whose masks lie on the path of a convolutional decoder; 0 for uniform masks.
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
            _refuse(self, ("kernel_size",), "masks.", "masks on a path: give masks.path")


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
        if self.masks.path and self.model.visibility == "block":
            raise ConfigError("masks.path is for models whose positions see the whole row")


@dataclass(frozen=True)
class NegativeConfig:
    """Settings of negatives; a rule with weight 0 is off, weights need not add up to 1.

    Args:
        left: weight of the rule that repeats the tokens before the masked cells.
        right: weight of the rule that repeats the tokens behind them (in text without a prompt).
        prior: weight of the rule that repeats a unit of high-prior tokens.
        mixed: weight of the rule that repeats the tokens before, about half of them high-prior ones instead.
        run: weight of the rule that repeats one single high-prior token; also the rule of rows that have
            nothing to repeat.
        unit_max: longest unit, in tokens.
        span_min: shortest stretch of cells that the negative covers.
        span_max: longest stretch.
        eos_p: probability that an early EOS is put into the negative (a repeated unit may bring one too).
        frequent: how many tokens count as high-prior: the most frequent ones of the training answers.
        in_span: for text without a prompt, the share of rows masked inside a span; the rest outside it.
    """

    left: float = 0.5
    right: float = 0.25
    prior: float = 0.15
    mixed: float = 0.2
    run: float = 0.15
    unit_max: int = 15
    span_min: int = 30
    span_max: int = 50
    eos_p: float = 0.1
    frequent: int = 100
    in_span: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        weights = (self.left, self.right, self.prior, self.mixed, self.run)
        if min(weights) < 0 or self.left + self.prior + self.mixed + self.run == 0:
            raise ConfigError(
                f"weights of rules must not be negative, nor left, prior, mixed and run all 0; got {weights}"
            )
        if self.unit_max < 1 or self.frequent < 1:
            raise ConfigError(
                f"unit_max and frequent must be at least 1, got {self.unit_max} and {self.frequent}"
            )
        if not 1 <= self.span_min <= self.span_max:
            raise ConfigError(f"need 1 <= span_min <= span_max, got {self.span_min} and {self.span_max}")
        for name in ("eos_p", "in_span"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


_OWN = {
    "r2ft": ("beta_w", "beta_l", "gamma", "beta_a", "reference", "weighting"),
    "ddro": ("theta", "alpha", "kl", "floor", "draws"),
    "dpo": ("beta", "draws"),
}
"""Settings of each objective."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of good and bad answers.

    r2ft: -logsigmoid(beta_w l_w/n_w - beta_l l_l/n_l - gamma) - beta_a l_w/n_w, both on one masked row.
    ddro: log(1 + 1/rho) + alpha log(1 + rho) of good answers, (1 - alpha) log(1 + rho) of bad ones, with
    rho = (1 - theta) / ((1 - alpha) p_ref/p + alpha - theta).
    dpo: -logsigmoid(beta (s_w - s_l)), with s = log p/p_ref.

    Args:
        name: "r2ft", "ddro" or "dpo". The last two measure by NELBO against the frozen model that the run
            starts from; without an adapter that is a second copy of the weights.
        beta_w: r2ft: factor of the true answer's mean log-probability.
        beta_l: r2ft: factor of the negative's.
        gamma: r2ft: margin that the difference has to exceed.
        beta_a: r2ft: weight of the anchor, which keeps the true answer likely.
        reference: r2ft: measure both against the frozen model that the run starts from (as DPO does). Costs
            one more forward pass and, without an adapter, a second copy of the weights.
        weighting: r2ft: "none" counts all cells of a negative alike; "confidence" weights them by the
            probability that the model gives them.
        theta: ddro: share of good answers among those of the model that the run starts from.
        alpha: ddro: share of good answers in the denominator of the density ratio; 0 for DDRO as published,
            from theta on the ratio is bounded.
        kl: ddro: weight of the divergence from the reference.
        floor: ddro: ratio of bad to good, with alpha below theta, under which the loss is continued by its
            tangent; bounds the gradient.
        beta: dpo: pull towards the reference; the larger, the closer.
        draws: ddro, dpo: draws of masks for each row of a step; each costs as much again.
    """

    name: Literal["r2ft", "ddro", "dpo"] = "r2ft"
    beta_w: float = 1.0
    beta_l: float = 1.0
    gamma: float = 0.0
    beta_a: float = 0.1
    reference: bool = False
    weighting: Literal["none", "confidence"] = "none"
    theta: float = 0.5
    alpha: float = 0.0
    kl: float = 0.0
    floor: float = 0.05
    beta: float = 0.1
    draws: int = 1

    def __post_init__(self) -> None:
        """Check the name, the ranges, and that no setting belongs to another objective."""
        if self.name not in _OWN:
            raise unknown_name("objective", self.name, _OWN)
        for name in ("beta_w", "beta_l", "beta_a", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.weighting not in ("none", "confidence"):
            raise unknown_name("weighting", self.weighting, ("none", "confidence"))
        if self.beta <= 0 or self.draws < 1:
            raise ConfigError(f"beta must be above 0 and draws at least 1, got {self.beta} and {self.draws}")
        self._check_ratio()
        for owner, names in _OWN.items():
            foreign = [name for name in names if name not in _OWN[self.name]]
            _refuse(self, foreign, "objective.", f"objective.name {owner}, not {self.name}")

    def _check_ratio(self) -> None:
        if not 0 < self.theta < 1 or not 0 <= self.alpha < 1:
            raise ConfigError(
                f"theta must lie in (0, 1) and alpha in [0, 1), got {self.theta} and {self.alpha}"
            )
        if not 0 < self.floor < 1:
            raise ConfigError(f"floor must lie in (0, 1), got {self.floor}")
        if 0 < self.alpha < min(self.theta, self.floor):
            raise ConfigError(
                f"alpha must be 0, or at least floor ({self.floor}) or theta ({self.theta}), for the loss to "
                f"reach the ratio that it is to find; got {self.alpha}"
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
        for name in ("load_best_model_at_end", "metric_for_best_model"):
            if name in self.trainer:
                raise ConfigError(f"trainer.{name} is not free: R2FT chooses the best checkpoint itself")
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
        if self.data.source == "rules" or self.data.source.endswith(".npz"):
            raise ConfigError(
                f'rejected "data" needs data.source with rejected answers; {self.data.source} has none'
            )
        if self.negatives != NegativeConfig():
            raise ConfigError('negatives.… is for rejected "rules"; with "data" no negative is made')
