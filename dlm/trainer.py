"""Training: a `transformers.Trainer` whose loss is the NELBO and whose every random number is counted.

The noise of a row depends on (seed, step, place in the global batch) only. Two processes therefore see the
noise that one process with twice the batch would see, and a resumed run repeats the interrupted one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from dlm.checkpointing import LOG_STATE, keep_last, last_checkpoint, log_state, mark_complete, reading
from dlm.data.windows import EpochSampler, TensorBatch, WindowCollator
from dlm.ema import EMA
from dlm.errors import ConfigError, DivergedError
from dlm.model import IGNORE
from dlm.noising import Blocks, add_eval_noise, add_noise
from dlm.objective import weighted_loss
from dlm.prior import TokenPrior
from dlm.progress import SECONDS_BETWEEN_LINES, in_lines
from dlm.spec import ModelSpec

logger = logging.getLogger(__name__)

ENDLESS = 10**7
"""Steps of a run that something else ends."""

_COUNT = " count"
"""Behind the name of a watched figure: what its sum is divided by."""


class DiffusionTrainer(Trainer):  # type: ignore[misc]
    """Trains a `MaskedDiffusionModel` on batches of `WindowCollator`.

    What comes from transformers: devices, DDP and FSDP (through accelerate), mixed precision, gradient
    accumulation, optimisers, schedules, logging, resuming. What is added: the objective, stratified times
    over the global batch, validation NELBO with fixed noise, an optional EMA, checkpoints that are only
    taken for whole when they are whole.

    Args:
        ema_decay: decay of an exponential moving average of the weights, 0 for none. The average is what
            evaluations, samples and the final model use.
        eval_draws: noise levels at which each validation row is measured.
        keep_checkpoints: complete checkpoints to keep; older ones are deleted.
        pace: factor of the learning rate after so many steps; by default, the schedule that `args` name.

    Attributes:
        prior: token counts of the training answers, if they are to be stored with the model.
    """

    data_collator: WindowCollator

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        data_collator: WindowCollator,
        ema_decay: float = 0.0,
        eval_draws: int = 4,
        keep_checkpoints: int = 2,
        pace: Callable[[int], float] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.dataloader_persistent_workers:
            raise ConfigError("dataloader_persistent_workers cannot be: they keep the first epoch's tails")
        args.remove_unused_columns = False
        args.save_total_limit = None  # ours: a checkpoint counts once it is complete
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.is_fsdp_enabled and ema_decay:
            raise ConfigError("ema_decay does not work with FSDP, which shards the weights; set it to 0")
        self.eval_draws = eval_draws
        self.keep_checkpoints = keep_checkpoints
        self.pace = pace
        self.ema = EMA(self.model, ema_decay) if ema_decay else None
        self.model_accepts_loss_kwargs = True  # our loss is already divided by the count of the whole step
        self._parameters = sum(p.numel() for p in self.model.parameters())
        self._tokens, self._since = 0, time.perf_counter()
        self._watched: dict[str, torch.Tensor] = {}
        self._watched_since = 0
        self._resumed_log: dict[str, Any] = {}
        self.prior: TokenPrior | None = None
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(TokenLines if in_lines() else TokenProgress)
        self.add_callback(_Bookkeeping(self))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of transformers, unless the run has a pace of its own."""
        if self.pace is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, self.pace)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- order of rows -------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        group = self._global_rows() if self.data_collator.grouped else 1
        multiple = self._global_rows() if self.args.world_size > 1 else 1
        self._sampler = EpochSampler(list(dataset["length"]), group, seed=self.args.seed, multiple=multiple)
        return self._sampler

    def _global_rows(self) -> int:
        return int(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler and collator which epoch begins."""
        self.data_collator.epoch = epoch
        self._sampler.set_epoch(epoch)

    # ---- noise and loss ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[TensorBatch], num_batches: int, device: torch.device
    ) -> tuple[list[TensorBatch], torch.Tensor | None]:
        """The micro-batches of one optimiser step, with their noise, and what their loss is divided by.

        The divisor spans all processes, so that every token of the global batch weighs the same.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = [len(batch["input_ids"]) for batch in batches]
        total = world * sum(rows)
        step = self.state.global_step
        noised = []
        for i, batch in enumerate(batches):
            first = world * sum(rows[:i]) + rank * rows[i]
            slots = torch.arange(first, first + rows[i], device=batch["input_ids"].device)
            noised.append(self.with_noise(batch, slots, total, step))
        if not batches:
            return [], None
        count = torch.stack([self.divisor(batch) for batch in noised]).sum().to(device)
        return noised, self.accelerator.reduce(count, reduction="sum")

    def with_noise(self, batch: TensorBatch, slots: torch.Tensor, total: int, step: int) -> TensorBatch:
        """A batch and everything random that its loss needs; see `add_noise` for the arguments."""
        return add_noise(
            batch, slots, total, self.args.seed, step, self.mask_id, self.spec.schedule, self.blocks
        )

    def divisor(self, batch: TensorBatch) -> torch.Tensor:
        """Scalar, what a batch adds to the number that the global loss is divided by: its loss cells."""
        return batch["loss_mask"].sum()

    @property
    def spec(self) -> ModelSpec:
        """Properties of the model."""
        return ModelSpec.of_config(self.accelerator.unwrap_model(self.model).config)

    @property
    def blocks(self) -> Blocks | None:
        """Blocks of the model, if it is block-causal."""
        return Blocks.of(self.spec)

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self.spec.mask_token_id

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: TensorBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of a micro-batch, scaled so that micro-batches and processes add up to the global mean."""
        del return_outputs
        self._tokens += inputs["attention_mask"].sum() * self.accelerator.num_processes
        count = num_items_in_batch if num_items_in_batch is not None else self.divisor(inputs)
        # DDP averages gradients over processes; the sum over them is what the global count divides.
        return self.loss(model, inputs, count) * int(self.accelerator.num_processes)

    def loss(self, model: torch.nn.Module, inputs: TensorBatch, count: torch.Tensor) -> torch.Tensor:
        """The summed loss of a micro-batch over the global `count` (see `divisor`)."""
        weight = inputs["weight"][inputs["targets"] != IGNORE]  # first: the host waits for what is before it
        return weighted_loss(self.token_logp(model, inputs), weight, count)

    def token_logp(self, model: torch.nn.Module, inputs: TensorBatch) -> torch.Tensor:
        """[N] log-probability of each target, in row-major order; blocks see the clean ones before them."""
        clean = {"clean_ids": inputs["input_ids"]} if self.blocks else {}
        out = model(
            input_ids=inputs["noisy_ids"], attention_mask=inputs["attention_mask"],
            targets=inputs["targets"], **clean,
        )  # fmt: skip
        return out.token_logp  # type: ignore[no-any-return]

    def start_clock(self) -> None:
        """Measure the training speed from now on."""
        self._tokens, self._since = 0, time.perf_counter()

    def watch(self, name: str, total: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """Add to a figure that is logged with the loss: the sum of totals over that of counts.

        Args:
            name: key in the log.
            total: scalar, this process's share; processes and micro-batches add up.
            count: scalar, what the sum is divided by, added up likewise; by default the number of steps. A
                figure whose counts add up to 0 is left out of the log.
        """
        parts = {name: total} if count is None else {name: total, name + _COUNT: count}
        for key, value in parts.items():
            self._watched[key] = self._watched.get(key, torch.zeros_like(value)) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training speed (tokens of all processes, padding excluded) and what was watched."""
        if "loss" in logs:
            time_now = time.perf_counter()
            logs["tokens_per_second"] = round(float(self._tokens) / (time_now - self._since), 1)
            self.start_clock()
            logs |= self._watched_means()
            self._watched, self._watched_since = {}, self.state.global_step
        super().log(logs, start_time)

    def _watched_means(self) -> dict[str, float]:
        """The watched figures since the last log line."""
        steps = max(1, self.state.global_step - self._watched_since)
        sums = self._watched_sums()
        counts = {name: sums.get(name + _COUNT, steps) for name in sums if not name.endswith(_COUNT)}
        return {name: sums[name] / count for name, count in counts.items() if count}

    def _watched_sums(self) -> dict[str, float]:
        """Sums since the last log line, over all processes."""
        return {
            name: float(self.accelerator.reduce(total.clone(), reduction="sum"))
            for name, total in self._watched.items()
        }

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        """Log, evaluate and save as transformers does, but nothing of a run that has diverged."""
        control, last = self.control, self.state.global_step >= self.state.max_steps
        if control.should_log or control.should_evaluate or control.should_save or last:
            loss = float(self.accelerator.reduce(tr_loss.detach().clone(), reduction="mean"))
            self.check_finite("loss", loss)
            if grad_norm is not None and not self.args.fp16:  # there a step with inf is left out
                self.check_finite("gradient norm", float(grad_norm))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def check_finite(self, name: str, value: float) -> None:
        """Refuse a figure that is no number.

        Raises:
            DivergedError: naming it, the step, and the checkpoint before it.
        """
        if math.isfinite(value):
            return
        if self.state.global_step == 0:
            raise DivergedError(
                f"before the first step the {name} is {value}: the model that the run starts from is "
                "damaged, or overflows at this --precision"
            )
        last = last_checkpoint(self.args.output_dir)
        raise DivergedError(
            f"training has diverged: at step {self.state.global_step} the {name} is {value}. Try a lower "
            f"--learning_rate (now {self.args.learning_rate:g}) in another --output_dir; "
            + (f"the checkpoint before it is {last}" if last else "there is no checkpoint before it")
        )

    def floating_point_ops(self, inputs: TensorBatch) -> int:
        """6 × parameters × positions: the usual estimate for one training step."""
        return int(6 * inputs["input_ids"].numel() * self._parameters)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers does; its time and its random numbers are none of the training's."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self._apart(), torch.random.fork_rng(devices):
            return dict(super().evaluate(*args, **kwargs))

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Time spent here does not count in the training speed."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    # ---- validation ----------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[TensorBatch]:
        """Validation rows in windows that are the same at every evaluation, whatever the epoch."""
        training = self.data_collator
        self.data_collator = replace(training, epoch=0)
        try:
            return cast("DataLoader[TensorBatch]", super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator = training

    def evaluation_loop(
        self,
        dataloader: DataLoader[TensorBatch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Validation NELBO: every row at `eval_draws` fixed noise levels, the same at each evaluation."""
        del description, prediction_loss_only, ignore_keys
        model = self.model_wrapped if self.is_in_train else self._wrap_model(self.model, training=False)
        model.eval()
        measured: list[torch.Tensor] = []
        self.callback_handler.eval_dataloader = dataloader
        with torch.no_grad(), self.averaged_weights():
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    figures = self.accelerator.gather_for_metrics(self.measure(model, batch).contiguous())
                measured.append(figures.double().cpu())
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rows = torch.cat(measured)
        named = {f"{metric_key_prefix}_{name}": value for name, value in self.metrics(rows).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(rows))

    def measure(self, model: torch.nn.Module, batch: TensorBatch) -> torch.Tensor:
        """[B, M] float, figures of each validation row that `metrics` makes sense of; here nats and cells."""
        draws = torch.stack([self._row_nats(model, batch, draw) for draw in range(self.eval_draws)])
        return torch.stack([draws.mean(0), batch["loss_mask"].sum(1).float()], dim=1)

    def metrics(self, measured: torch.Tensor) -> dict[str, float]:
        """Validation figures, from the [n, M] float64 of `measure` for all rows."""
        nats, cells = measured[:, :2].sum(0)
        nelbo = float(nats / cells)
        return {"loss": nelbo, "nelbo": nelbo, "perplexity_bound": math.exp(min(nelbo, 700.0))}

    def _row_nats(self, model: torch.nn.Module, batch: TensorBatch, draw: int) -> torch.Tensor:
        """[B] weighted negative log-likelihood of each row at its noise level number `draw`."""
        noised = add_eval_noise(batch, draw, self.eval_draws, self.mask_id, self.blocks)
        cells = noised["targets"] != IGNORE
        per_cell = torch.zeros(cells.shape, device=cells.device)
        per_cell[cells] = -self.token_logp(model, noised).float()
        return (per_cell * noised["weight"]).sum(1)

    def averaged_weights(self) -> Any:
        """A context in which the model holds its averaged weights, if there are any."""
        return self.ema.applied(self.model) if self.ema else contextlib.nullcontext()

    # ---- checkpoints ---------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self._apart():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        pending = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        watched = self._watched_sums()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            log = {
                "loss_sum": float(pending),
                "loss_total": self._total_loss_scalar,
                "since_step": self._globalstep_last_logged,
                "watched": watched,
                "watched_since": self._watched_since,
                "parts": self.args.gradient_accumulation_steps * max(1, self.args.world_size),
                "rows": len(self._sampler),
                "given": len(self._sampler.lengths),
            }
            (folder / LOG_STATE).write_text(json.dumps(log), encoding="utf-8")
            if self.ema:
                self.ema.save(folder)
            mark_complete(folder, self.state.global_step)
            keep_last(self.args.output_dir, self.keep_checkpoints, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as transformers does, with the token counts."""
        super()._save(output_dir, state_dict)
        if self.prior is not None and self.args.should_save:
            self.prior.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.ema:
                self.ema.load(resume_from_checkpoint)
        self._resumed_log = log_state(resume_from_checkpoint)
        parts = self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        if self._resumed_log.get("parts") not in (None, parts):
            raise ConfigError(
                f"{resume_from_checkpoint}: a step of this run has {self._resumed_log['parts']} "
                f"micro-batches, not {parts}; go on with as many processes as it began with"
            )

        sampler = self._get_train_sampler()
        given, before = len(sampler.lengths), self._resumed_log.get("given") or 0
        if before and before != given:
            raise ConfigError(
                f"{resume_from_checkpoint}: this run had {before} rows, and now {given}; go on with the "
                "same data"
            )
        rows, earlier = len(sampler), self._resumed_log.get("rows") or 0
        if earlier and earlier != rows and self.args.max_steps * self._global_rows() > min(rows, earlier):
            raise ConfigError(
                f"{resume_from_checkpoint}: an epoch of this run has {earlier} rows, and now {rows}; go on "
                "with the same data, and as many processes as it began with"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Take the weights (and the average) of a checkpoint, without training on."""
        self._load_from_checkpoint(str(folder))

    def continue_log(self) -> None:
        """Go on with the mean loss that was being collected when the checkpoint was written."""
        if self._resumed_log:
            self._tr_loss += self._resumed_log["loss_sum"]
            if self._resumed_log["loss_total"] is not None:  # the mean of the whole run, at its end
                self._total_loss_scalar += self._resumed_log["loss_total"]
                self._initial_global_step = 0
            self._globalstep_last_logged = self._resumed_log["since_step"]
            share = 1 / self.accelerator.num_processes  # the stored sums are those of all processes
            self._watched = {
                name: torch.tensor(value * share, device=self.args.device)
                for name, value in self._resumed_log["watched"].items()
            }
            self._watched_since = self._resumed_log["watched_since"]
            self._resumed_log = {}


def micro_batches(checkpoint: str | Path) -> int | None:
    """Micro-batches in a step of the run that wrote a checkpoint, over all its processes; None if unknown."""
    parts: int | None = log_state(checkpoint).get("parts")
    return parts


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Epochs to the sampler and the collator, weights to the EMA, the pending loss to a resumed log."""

    def __init__(self, trainer: DiffusionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint brings those that the run had; they may change.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        state.eval_steps = args.eval_steps or state.eval_steps
        self.trainer.continue_log()
        self.trainer.start_clock()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self.trainer.check_finite("validation NELBO", (metrics or {}).get("eval_nelbo", 0.0))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema:
            self.trainer.ema.update(self.trainer.model)


class TokenProgress(ProgressCallback):  # type: ignore[misc]
    """The trainer's progress bar with the newest figures behind it, instead of a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Renew the figures."""
        if self.training_bar is not None and logs:
            self._shown |= _figures(logs)
            self.training_bar.set_postfix(self._shown)


class TokenLines(TrainerCallback):  # type: ignore[misc]
    """The newest figures in lines, where there is no terminal: at validations, and now and then between."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._due = 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Say the figures, if it is time."""
        fresh = _figures(logs or {})
        if not (fresh and state.is_world_process_zero):
            return
        self._shown |= fresh
        if "val" in fresh or time.monotonic() >= self._due:
            figures = ", ".join(f"{name} {value}" for name, value in self._shown.items())
            total = f" of {state.max_steps}" if state.max_steps < ENDLESS else ""
            logger.info("step %d%s: %s", state.global_step, total, figures)
            self._due = time.monotonic() + SECONDS_BETWEEN_LINES


_SHOWN = {"loss": "loss", "val": "eval_nelbo", "lr": "learning_rate", "tok/s": "tokens_per_second"}
"""Name in what is shown -> name in the log."""


def _figures(logs: dict[str, Any]) -> dict[str, str]:
    """The figures of a record of the log that are shown."""
    return {name: f"{logs[key]:.4g}" for name, key in _SHOWN.items() if key in logs}
