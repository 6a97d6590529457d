"""DPO and DDRO for masked diffusion: good against bad answers by differences of NELBOs.

The log-probability of an answer is not known, only a bound: the mean over masks of Σ w log p of the masked
tokens. What the losses need is the gain of the model over the reference it starts from, s = log p(y) -
log p_ref(y). Both are measured under the same masks, so that their noise cancels, and so are the good and the
bad answer of a row as far as their lengths agree (variance-reduced preference optimisation, VRPO, of
LLaDA 1.5, arXiv 2505.19223). At the start every gain is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from dlm.data.preferences import PreferenceCollator, joined
from dlm.data.windows import TensorBatch
from dlm.diffusion import stratified_times
from dlm.errors import DataError
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.noising import GOLDEN, add_exact_noise
from finetune.contrast import ContrastTrainer
from finetune.contrast_config import ObjectiveConfig
from finetune.density_ratio import bad_loss, good_loss, ratio_loss, widened


@dataclass(frozen=True)
class Gains:
    """Gains s of the answers of rows, in nats, and what each answer weighs; all [B] float."""

    good: torch.Tensor
    """Of the good answer; any number where `good_weight` is 0."""
    bad: torch.Tensor
    """Of the bad answer; any number where `bad_weight` is 0."""
    good_weight: torch.Tensor
    """1 over the share of the rows that have a good answer; 0 where the row has none."""
    bad_weight: torch.Tensor
    """1 over the share of the rows that have a bad answer; 0 where the row has none."""


class PreferenceLoss(Protocol):
    """A loss of gains."""

    def __call__(self, gains: Gains) -> torch.Tensor:
        """[B] the loss of each row; its mean over rows is the objective."""


@dataclass(frozen=True)
class DPO:
    """-logsigmoid(β (s_w - s_l)), the loss of DPO (arXiv 2305.18290); for rows with both answers.

    Attributes:
        beta: strength of the pull towards the reference that the preferences are traded for.
    """

    beta: float = 0.1

    def __call__(self, gains: Gains) -> torch.Tensor:
        """See `PreferenceLoss`."""
        loss = -F.logsigmoid(self.beta * (widened(gains.good) - widened(gains.bad)))
        return gains.good_weight * gains.bad_weight * loss


@dataclass(frozen=True)
class DDRO:
    """E_w[log(1 + 1/ρ) + α log(1 + ρ)] + (1-α) E_l[log(1 + ρ)] + κ KL(p ‖ p_ref); see `density_ratio`.

    Attributes:
        theta: share θ of good answers in the reference.
        alpha: share α of good answers in the denominator of the ratio; 0 for DDRO as it was published.
        kl: weight κ of the divergence from the reference, 1/β in the paper.
        floor: see `density_ratio.log_ratio`.
    """

    theta: float = 0.5
    alpha: float = 0.0
    kl: float = 0.0
    floor: float = 0.05

    def __call__(self, gains: Gains) -> torch.Tensor:
        """See `PreferenceLoss`."""
        ratio = (self.theta, self.alpha, self.floor)
        good, bad = good_loss(gains.good, *ratio), bad_loss(gains.bad, *ratio)
        if self.kl:
            good = good + self.kl * self.theta * ratio_loss(gains.good, self.theta)
            bad = bad + self.kl * (1 - self.theta) * ratio_loss(gains.bad, self.theta)
        return gains.good_weight * good + gains.bad_weight * bad


def loss_of(config: ObjectiveConfig) -> PreferenceLoss:
    """The loss that settings name."""
    if config.name == "dpo":
        return DPO(config.beta)
    return DDRO(config.theta, config.alpha, config.kl, config.floor)


class PreferenceTrainer(ContrastTrainer):
    """The trainer of SFT with a loss of gains; validation NELBO stays what it is, over good answers.

    Bad answers are those of the rows, where the collator brings them, or else made by rule. The row is then
    masked behind a cut, and the answers are the tokens of the stretch that the rule covers: the true ones up
    to the first EOS, and the wrong ones. What lies behind stays masked for both.

    Args:
        objective: settings of the loss.
        **kwargs: as for `ContrastTrainer`.
    """

    FIGURES = ("gain_good", "gain_bad", "margin", "accuracy")
    """s of both answers; their difference and whether it is positive, of rows with both."""

    def __init__(self, model: Any, *, objective: ObjectiveConfig, **kwargs: Any) -> None:
        super().__init__(model, objective=objective, referred=True, **kwargs)
        self.loss_function = loss_of(objective)
        self.good_share = 1.0
        """Share of the training rows that have a good answer: 1 unless answers are unpaired."""
        if self._unpaired:
            self.good_share = share_of_good(self.train_dataset)
            held_out = [] if self.eval_dataset is None else list(self.eval_dataset["good"])
            for good, lost in ((True, "NELBO to watch"), (False, "gain of bad answers to watch")):
                if held_out and good not in held_out:
                    raise DataError(
                        f"none of the {len(held_out)} validation rows is a {'good' if good else 'bad'} "
                        f"answer, so there is no {lost}; shuffle the rows, or raise --data.validation_rows"
                    )

    @property
    def _unpaired(self) -> bool:
        return isinstance(self.data_collator, PreferenceCollator) and not self.data_collator.paired

    # ---- what a batch needs --------------------------------------------------------------------------

    def with_noise(self, batch: TensorBatch, slots: torch.Tensor, total: int, step: int) -> TensorBatch:
        """See `ContrastTrainer`; with the noise levels of the rows."""
        offset = uniform(key_of(self.args.seed, "gain", step, device=slots.device), 0)
        level = stratified_times(offset, slots, total, t_min=0.0)
        return super().with_noise(batch, slots, total, step) | {"level": level}

    def with_validation_noise(self, batch: TensorBatch) -> TensorBatch:
        """See `ContrastTrainer`; with the noise levels of the rows."""
        level = torch.remainder(batch["row"].double() * GOLDEN, 1.0)
        return super().with_validation_noise(batch) | {"level": level}

    def contrasted(self, batch: TensorBatch, key: torch.Tensor) -> TensorBatch:
        """See `ContrastTrainer`; with both answers of the rows."""
        pair = batch if isinstance(self.data_collator, PreferenceCollator) else self.ruled(batch, key)
        return {**pair, "key": fold(key, key_of("gain", device=key.device))}

    def ruled(self, batch: TensorBatch, key: torch.Tensor) -> TensorBatch:
        """Rows whose good and bad answers are the true and the wrong tokens of one masked stretch."""
        contrast = self.contrast(batch, key)
        ids, span = batch["input_ids"], contrast.span
        true = span & (contrast.targets != IGNORE)
        masked = contrast.noisy_ids == self.mask_id
        differing = contrast.rejected != IGNORE
        wrong = torch.where(differing, contrast.rejected, ids)
        answers = {
            "input_ids": torch.where(masked & ~true, self.mask_id, ids),
            "maskable": true,
            "loss_mask": true,
            "good": torch.ones_like(batch["row"], dtype=torch.bool),
            "bad": differing.any(1),
            "rejected_input_ids": torch.where(span, wrong, contrast.noisy_ids),
            "rejected_attention_mask": batch["attention_mask"],
            "rejected_maskable": span,
            "rejected_loss_mask": span,
        }
        return {**batch, **answers}

    # ---- loss ----------------------------------------------------------------------------------------

    def rows(self, model: torch.nn.Module, inputs: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ContrastTrainer`."""
        paired = "rejected_input_ids" in inputs
        gain = self.gain(model, joined(inputs) if paired else inputs)
        good, bad = gain.chunk(2) if paired else (gain, gain)
        has_good, has_bad = inputs["good"], inputs["bad"]
        gains = Gains(good, bad, has_good / self.good_share, has_bad / self.bad_share)
        return self.loss_function(gains), gain_figures(good.detach(), bad.detach(), has_good, has_bad)

    @property
    def bad_share(self) -> float:
        """Share of the training rows that have a bad answer: 1 unless answers are unpaired."""
        return 1 - self.good_share if self._unpaired else 1.0

    def gain(self, model: torch.nn.Module, answers: TensorBatch) -> torch.Tensor:
        """[N] s of each answer, the mean over draws of noise, which model and reference share.

        Args:
            model: the model in training.
            answers: N rows, with `key` and `level`; the draws of a row have evenly spaced numbers of masks.
        """
        draws = self.objective.draws
        return torch.stack([self._gain(model, answers, draw / draws) for draw in range(draws)]).mean(0)

    def _gain(self, model: torch.nn.Module, answers: TensorBatch, shift: float) -> torch.Tensor:
        """[N] s under one draw of masks, whose level is moved by `shift`."""
        level = torch.remainder(answers["level"].double() + shift, 1.0)
        key = fold(answers["key"], round(shift * self.objective.draws))
        noised = add_exact_noise(answers, level, key, self.mask_id, self.blocks)
        cells = noised["targets"] != IGNORE
        token_logp = self.token_logp(model, noised)
        with torch.no_grad(), self.as_reference(model) as frozen:
            held = self.token_logp(frozen, noised)
        per_cell = torch.zeros(cells.shape, device=cells.device)
        per_cell[cells] = token_logp.float() - held.float()
        return (per_cell * noised["weight"]).sum(1)

    # ---- validation ----------------------------------------------------------------------------------

    def measure(self, model: torch.nn.Module, batch: TensorBatch) -> torch.Tensor:
        """See `ContrastTrainer`; of bad answers without a good one, the NELBO does not count."""
        measured = super().measure(model, batch)
        if self._unpaired:
            measured[:, :2] *= batch["good"][:, None]
        return measured

    def metrics(self, measured: torch.Tensor) -> dict[str, float]:
        """See `ContrastTrainer`; with quantiles of the gains, and margin and accuracy of unpaired ones."""
        first = 3 + self.FIGURES.index("gain_good")
        good, bad = (x[~x.isnan()] for x in measured[:, first : first + 2].unbind(1))
        figures = super().metrics(measured)
        if self._unpaired and len(good) and len(bad):
            figures |= {
                "margin": float(good.mean() - bad.mean()),
                "accuracy": float((good[:, None] > bad).double().mean()),
            }
        for name, gains in (("gain_good", good), ("gain_bad", bad)):
            if len(gains):
                figures |= {
                    f"{name}_p{round(100 * share)}": float(gains.quantile(share)) for share in QUANTILES
                }
        return figures


def share_of_good(rows: Any) -> float:
    """Share of good ones among single answers.

    Raises:
        DataError: when all are good, or all bad.
    """
    share = float(sum(rows["good"])) / len(rows)
    if share in (0.0, 1.0):
        kind = "good" if share else "bad"
        raise DataError(
            f"all {len(rows)} training rows are {kind} answers; DDRO needs both kinds, in the training rows "
            "as in those held out, which are the last"
        )
    return share


QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the gains s = log p/p_ref that validation reports."""


def gain_figures(
    good: torch.Tensor, bad: torch.Tensor, has_good: torch.Tensor, has_bad: torch.Tensor
) -> torch.Tensor:
    """[B, 4] the figures of rows, from the gains [B] and whether rows have them; NaN for what they lack."""
    paired = has_good & has_bad
    columns = ((good, has_good), (bad, has_bad), (good - bad, paired), ((good > bad).float(), paired))
    return torch.stack([torch.where(present, value, torch.nan) for value, present in columns], dim=1)
