"""The watch over R2FT: the language must not suffer; repetition and high priors should recede."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from decoding.presets import Decoder
from dlm.curves import BLUE, GREEN, GREY, RED, History, series, smooth, without_frame
from dlm.repetition import repetition, stutter
from dlm.trainer import DiffusionTrainer
from finetune.config import R2FTConfig
from finetune.run_folder import RunFolder
from finetune.samples import answers, held_out_prompts

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class BestWithinTolerance(TrainerCallback):  # type: ignore[misc]
    """Keeps the checkpoint with the lowest validation loss among those that did not harm the language.

    The NELBO is measured before the first step. A validation whose NELBO exceeds it by more than the
    tolerance ends the run and is never the best.

    Args:
        trainer: the trainer that is watched.
        run: where an early end is written down.
        tolerance: share by which the NELBO may rise.
        objective: name of the loss in the log, behind "eval_".
    """

    def __init__(
        self, trainer: DiffusionTrainer, run: RunFolder, tolerance: float, objective: str = "r2ft"
    ) -> None:
        self.trainer, self.run, self.tolerance = trainer, run, tolerance
        self.objective = objective

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
        nelbo, loss = metrics["eval_nelbo"], metrics[f"eval_{self.objective}"]
        if not (nelbo <= limit and math.isfinite(loss)):  # NaN is not within the limit either
            logger.warning(
                "validation NELBO %.4f is above %.4f (start %.4f and %.1f %%): the run ends at step %d",
                *(nelbo, limit, start, 100 * self.tolerance, state.global_step),
            )
            control.should_training_stop = True
            if state.is_world_process_zero:
                self.run.stop()
        elif state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step


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


SIDES = {
    "r2ft": (("logp_true", BLUE, "true answer"), ("logp_negative", RED, "negative")),
    "ddro": (("gain_good", BLUE, "good answer"), ("gain_bad", RED, "bad answer")),
    "dpo": (("gain_good", BLUE, "good answer"), ("gain_bad", RED, "bad answer")),
}
"""Curves of the two answers, by objective: key in the log, colour, label."""

UNITS = {"r2ft": ("log-probability", "nats per token")}
"""Title and unit of these, where they are not those of gains."""


def draw_r2ft(history: History, tolerance: float, objective: str = "r2ft") -> Any:
    """Panels over steps, as a matplotlib figure; a grey line marks the step whose weights are kept.

    Four, and two of samples where any were drawn.
    """
    from matplotlib.figure import Figure

    watched = bool(series(history, "sample_repetition")[0])
    figure = Figure(figsize=(13, 7) if watched else (9, 7), layout="constrained")
    panels = figure.subplots(2, 3 if watched else 2, sharex=True)
    sides, margin, *others = panels.flat
    loss, nelbo, *sampled = others
    title, unit = UNITS.get(objective, ("log p / p of the start", "nats per answer"))
    for key, colour, name in SIDES[objective]:
        _draw_curve(sides, history, key, colour, f"{name}, training")
        _points(sides, history, f"eval_{key}", colour, f"{name}, validation")
    sides.set(title=title, ylabel=unit)
    _points(margin, history, "eval_margin", BLUE, "margin, validation (left)")
    margin.set(title="good against bad", ylabel=unit)
    share = margin.twinx()
    _points(share, history, "eval_accuracy", GREEN, "accuracy (right)", "s--")
    share.set(ylabel="share of rows", ylim=(0, 1.05))
    share.spines["top"].set_visible(False)
    _draw_curve(loss, history, "loss", RED, "training")
    _points(loss, history, f"eval_{objective}", RED, "validation")
    loss.set(title=f"{objective.upper()} loss")
    _points(nelbo, history, "eval_nelbo", BLUE, "validation NELBO")
    for value in series(history, "eval_nelbo")[1][:1]:
        nelbo.axhline(
            value * (1 + tolerance), color=RED, linestyle=":", label=f"start + {100 * tolerance:g} %"
        )
    nelbo.set(title="language", ylabel="nats per answer token")
    if watched:
        _draw_samples(sampled, history)
    _mark_best(panels.flat, kept_step(history, tolerance, objective))
    for axes in panels.flat:
        _shared_legend(axes, share if axes is margin else None)
    for axes in panels[1]:
        axes.set(xlabel="optimiser step")
    return figure


def _draw_samples(panels: Sequence[Any], history: History) -> None:
    """Frequency of the tokens that the model wrote in the run, and how often they repeat."""
    prior, repeated = panels
    _points(prior, history, "sample_log_prior", BLUE, "top-k samples, mean")
    for value in series(history, "corpus_log_prior")[1][-1:]:
        prior.axhline(value, color=RED, linestyle=":", label="training answers, median")
    prior.set(title="log prior of tokens", ylabel="nats")
    _points(repeated, history, "sample_repetition", RED, "repeated 4-grams")
    _points(repeated, history, "sample_stutter", GREEN, "words equal to the last", "^:")
    repeated.set(title="repetition in top-k samples", ylabel="share")
    repeated.set_ylim(bottom=0)


def _mark_best(panels: Iterable[Any], best: float | None) -> None:
    """Plain panels, with a line at the step whose weights are kept."""
    for axes in panels:
        if best is not None:
            axes.axvline(best, color=GREY, linewidth=0.8)
        without_frame(axes)


def kept_step(history: History, tolerance: float, objective: str = "r2ft") -> float | None:
    """The validated step with the lowest loss within the tolerance; None if there is none."""
    start, key = series(history, "eval_nelbo")[1][:1], f"eval_{objective}"
    validated = [r for r in history if key in r and r["step"] > 0]
    fit = [r for r in validated if r["eval_nelbo"] <= (1 + tolerance) * start[0]]
    return min(fit, key=lambda r: r[key])["step"] if fit else None


def _draw_curve(axes: Any, history: History, key: str, colour: str, label: str) -> None:
    steps, values = series(history, key)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.1, alpha=0.6, label=label)


def _points(axes: Any, history: History, key: str, colour: str, label: str, line: str = "o-") -> None:
    steps, values = series(history, key)
    axes.plot(steps, values, line, color=colour, markersize=4, label=label)


def _shared_legend(axes: Any, twin: Any) -> None:
    """One legend for both scales."""
    handles, labels = axes.get_legend_handles_labels()
    if twin is not None:
        twin_handles, names = twin.get_legend_handles_labels()
        handles, labels = handles + twin_handles, labels + names
    box = (twin or axes).legend(handles, labels, fontsize=8, framealpha=0.85, edgecolor="none")
    if twin is not None:
        axes.get_legend().remove()
        box.set_loc("center right")
