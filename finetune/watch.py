"""What is watched during R2FT: whether the language suffers, whether repetition and high priors recede."""

from __future__ import annotations

import logging
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from decoding.measures import repetition, stutter
from decoding.presets import Decoder
from dlm.curves import History, plain, series, smooth
from dlm.trainer import DiffusionTrainer
from finetune.config import R2FTConfig
from finetune.run_folder import RunFolder
from finetune.samples import answers, held_out_prompts

logger = logging.getLogger(__name__)


class BestWithinTolerance(TrainerCallback):  # type: ignore[misc]
    """Keeps the checkpoint with the lowest validation R2FT loss among those that did not harm the language.

    The NELBO is measured before the first step. A validation whose NELBO exceeds it by more than the
    tolerance ends the run and is never the best.

    Args:
        trainer: the trainer that is watched.
        run: where an early end is written down.
        tolerance: share by which the NELBO may rise.
    """

    def __init__(self, trainer: DiffusionTrainer, run: RunFolder, tolerance: float) -> None:
        self.trainer, self.run, self.tolerance = trainer, run, tolerance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate the model that the run starts from."""
        if state.global_step == 0:
            self.trainer.evaluate()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare with the start and with the best so far."""
        if not metrics or state.global_step == 0:
            return
        start = series(state.log_history, "eval_nelbo")[1][0]
        limit = (1 + self.tolerance) * start
        nelbo, loss = metrics["eval_nelbo"], metrics["eval_r2ft"]
        if nelbo > limit:
            logger.warning(
                "validation NELBO %.4f is above %.4f (start %.4f and %.1f %%): R2FT ends at step %d",
                *(nelbo, limit, start, 100 * self.tolerance, state.global_step),
            )
            control.should_training_stop = True
            if state.is_world_process_zero:
                self.run.stop()
        elif state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so when there is nothing to keep."""
        if state.best_global_step is None or not state.best_global_step:
            logger.warning(
                "no validated step kept the NELBO within %.1f %% of the start; the last weights are saved. "
                "Try a lower learning_rate, or validate more often (eval_steps, save_steps)",
                100 * self.tolerance,
            )


class WatchCallback(TrainerCallback):  # type: ignore[misc]
    """Answers held-out prompts with top-k sampling and logs how repetitive and how common the tokens are."""

    def __init__(
        self,
        trainer: DiffusionTrainer,
        tokenizer: PreTrainedTokenizerBase,
        config: R2FTConfig,
        held_out: Dataset,
    ) -> None:
        self.trainer, self.tokenizer, self.config = trainer, tokenizer, config
        self.prompts = held_out_prompts(trainer, tokenizer, config, held_out, config.watch)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample and log; on the main process only."""
        if not state.is_world_process_zero or not self.prompts or self.trainer.is_fsdp_enabled:
            return
        outputs = answers(self.trainer, self.tokenizer, self.config, self.prompts, Decoder.named("top-k"))
        assert self.trainer.prior is not None
        log_prior = self.trainer.prior.log_prior()
        tokens = [token for output in outputs for token in output.token_ids]
        figures = {
            "sample_repetition": fmean(repetition(output.text) for output in outputs),
            "sample_stutter": fmean(stutter(output.text) for output in outputs),
        }
        if tokens:
            figures["sample_log_prior"] = float(log_prior[tokens].mean())
            figures["corpus_log_prior"] = self.trainer.prior.median_log_prior()
        self.trainer.log(figures)


BLUE, SKY, RED, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#666666"
"""Colours of Okabe and Ito, which the colour-blind can tell apart."""


def draw_r2ft(history: History, tolerance: float) -> Any:
    """Four panels over steps, as a matplotlib figure: log-probabilities, margin, NELBO, samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    for key, colour, name in (("logp_true", BLUE, "true answer"), ("logp_negative", RED, "negative")):
        steps, values = series(history, key)
        top_left.plot(steps, smooth(values), color=colour, linewidth=1.2, label=f"{name}, training")
        _points(top_left, history, f"eval_{key}", colour, f"{name}, validation")
    top_left.set(ylabel="log-probability per token, nats")
    _points(top_right, history, "eval_margin", BLUE, "margin (left scale)")
    top_right.set(ylabel="margin, nats per token")
    share = top_right.twinx()
    _points(share, history, "eval_accuracy", GREEN, "true answer likelier: accuracy (right scale)", "s--")
    share.set(ylabel="share of rows", ylim=(0, 1.05))
    share.spines["top"].set_visible(False)
    _points(bottom_left, history, "eval_nelbo", BLUE, "validation NELBO")
    start = series(history, "eval_nelbo")[1][:1]
    for value in start:
        limit = value * (1 + tolerance)
        bottom_left.axhline(limit, color=GREY, linestyle=":", label=f"start + {100 * tolerance:g} %")
    bottom_left.set(xlabel="optimiser step", ylabel="nats per answer token")
    _points(bottom_right, history, "sample_log_prior", BLUE, "mean log prior of top-k samples (left)")
    for value in series(history, "corpus_log_prior")[1][-1:]:
        bottom_right.axhline(value, color=GREY, linestyle=":", label="median of the training answers (left)")
    bottom_right.set(xlabel="optimiser step", ylabel="log prior, nats")
    repeated = bottom_right.twinx()
    _points(repeated, history, "sample_repetition", RED, "repeated 4-grams (right)", "s--")
    _points(repeated, history, "sample_stutter", GREEN, "stuttered words (right)", "^:")
    repeated.set(ylabel="share of 4-grams, of words")
    repeated.set_ylim(bottom=0)
    repeated.spines["top"].set_visible(False)
    for axes, twin in ((top_left, None), (top_right, share), (bottom_left, None), (bottom_right, repeated)):
        plain(axes)
        _legend(axes, twin)
    return figure


def _points(axes: Any, history: History, key: str, colour: str, label: str, line: str = "o-") -> None:
    steps, values = series(history, key)
    axes.plot(steps, values, line, color=colour, markersize=4, label=label)


def _legend(axes: Any, twin: Any) -> None:
    """One legend for both scales, above the panel, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if twin is not None:
        more, names = twin.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    if axes.get_legend():
        axes.get_legend().remove()
    axes.legend(
        handles, labels, frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
