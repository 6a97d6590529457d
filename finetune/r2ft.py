"""R2FT, rejecting rule-based fine-tuning (arXiv 2509.15188): a short stage after supervised fine-tuning.

Each row's true continuation is set against a negative made by rule (`finetune.negatives`) on the same masked
row, so one forward pass gives the log-probabilities of both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dlm.curves import Draw
from dlm.data.encode import EncodingReport, encode_rows
from dlm.data.preferences import PreferenceCollator, are_pairs, encode_preferences, load_preferences
from dlm.data.rows import load_rows
from dlm.data.windows import TensorBatch, WindowCollator
from dlm.errors import ConfigError, DataError, DivergedError, DLMError
from dlm.model import IGNORE, MaskedDiffusionModel
from dlm.prior import TokenPrior
from dlm.trainer import DiffusionTrainer
from finetune.config import R2FTConfig, StartConfig
from finetune.contrast import ContrastTrainer
from finetune.contrast_config import ObjectiveConfig
from finetune.preference import PreferenceTrainer
from finetune.run import Stage, execute
from finetune.run_folder import RunFolder
from finetune.samples import SampleCallback
from finetune.start import any_prompt, fine_tuned_model, refuse_causal_lm
from finetune.watch import BestWithinTolerance, WatchCallback, draw_r2ft

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def r2ft_loss(
    logp_w: torch.Tensor,
    n_w: torch.Tensor,
    logp_l: torch.Tensor,
    n_l: torch.Tensor,
    *,
    beta_w: float = 1.0,
    beta_l: float = 1.0,
    gamma: float = 0.0,
    beta_a: float = 0.1,
    reference_w: torch.Tensor | None = None,
    reference_l: torch.Tensor | None = None,
) -> torch.Tensor:
    """-logsigmoid(β_w·ℓ_w/n_w - β_l·ℓ_l/n_l - γ) - β_a·ℓ_w/n_w, averaged over rows (arXiv 2509.15188).

    With a reference, both log-probabilities inside the logsigmoid are taken relative to it, as in DPO
    (arXiv 2305.18290). A row without a negative cell (n_l = 0) has nothing to contrast and keeps its anchor
    only.

    Args:
        logp_w: [B] ℓ_w, summed log-probability of the true tokens at masked cells, nats.
        n_w: [B] how many cells those are.
        logp_l: [B] ℓ_l, summed log-probability of the negative's tokens at the masked cells it covers.
        n_l: [B] how many cells those are.
        beta_w: factor of the true side.
        beta_l: factor of the negative side.
        gamma: margin.
        beta_a: weight of the anchor.
        reference_w: [B] ℓ_w under the frozen reference model, if there is one.
        reference_l: [B] ℓ_l under it.

    Returns:
        Scalar float32.

    Raises:
        ConfigError: when one of the references is given without the other.
    """
    return r2ft_row_loss(
        logp_w, n_w, logp_l, n_l,
        beta_w=beta_w, beta_l=beta_l, gamma=gamma, beta_a=beta_a,
        reference_w=reference_w, reference_l=reference_l,
    ).mean()  # fmt: skip


def r2ft_row_loss(
    logp_w: torch.Tensor,
    n_w: torch.Tensor,
    logp_l: torch.Tensor,
    n_l: torch.Tensor,
    *,
    beta_w: float,
    beta_l: float,
    gamma: float,
    beta_a: float,
    reference_w: torch.Tensor | None = None,
    reference_l: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B] float32, what `r2ft_loss` averages; arguments as there."""
    if (reference_w is None) != (reference_l is None):
        raise ConfigError("a reference needs both its log-probabilities, reference_w and reference_l")
    true, wrong = mean_logp(logp_w, n_w), mean_logp(logp_l, n_l)
    true_gain = true if reference_w is None else true - mean_logp(reference_w, n_w)
    wrong_gain = wrong if reference_l is None else wrong - mean_logp(reference_l, n_l)
    contrast = -F.logsigmoid(beta_w * true_gain - beta_l * wrong_gain - gamma)
    return torch.where(n_l > 0, contrast, 0.0) - beta_a * true


def mean_logp(total: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """[B] float32, ℓ/n; 0 where there is no cell."""
    return total.float() / n.clamp(min=1)


class R2FTTrainer(ContrastTrainer):
    """The trainer of SFT with the R2FT loss; validation NELBO stays what it is.

    Args:
        objective: factors of the loss.
        **kwargs: as for `ContrastTrainer`.
    """

    FIGURES = ("logp_true", "logp_negative", "margin", "accuracy")
    """ℓ_w/n_w; ℓ_l/n_l, their difference, and whether it is positive, of rows that have a negative."""

    def __init__(self, model: Any, *, objective: ObjectiveConfig, **kwargs: Any) -> None:
        super().__init__(model, objective=objective, referred=objective.reference, **kwargs)

    def contrasted(self, batch: TensorBatch, key: torch.Tensor) -> TensorBatch:
        """See `ContrastTrainer`; the rows with masks, and both candidates for each of them."""
        contrast = self.contrast(batch, key, self.blocks)
        candidates = torch.stack([contrast.targets, contrast.rejected], dim=-1)
        return {**batch, "noisy_ids": contrast.noisy_ids, "candidates": candidates}

    def rows(self, model: torch.nn.Module, inputs: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ContrastTrainer`."""
        cells = inputs["candidates"] != IGNORE  # [B, L, 2]
        logp = self._logp(model, inputs, cells)
        weight = self._weights(logp.detach(), cells)
        total, n = (logp * weight).sum(1), cells.sum(1)  # [B, 2]
        reference: dict[str, torch.Tensor] = {}
        if self.objective.reference:
            with torch.no_grad(), self.as_reference(model) as frozen:
                held = (self._logp(frozen, inputs, cells) * weight).sum(1)
            reference = {"reference_w": held[:, 0], "reference_l": held[:, 1]}
        objective = self.objective
        loss = r2ft_row_loss(
            total[:, 0], n[:, 0], total[:, 1], n[:, 1],
            beta_w=objective.beta_w, beta_l=objective.beta_l, gamma=objective.gamma,
            beta_a=objective.beta_a, **reference,
        )  # fmt: skip
        return loss, contrast_figures(logp.detach().sum(1), n)

    def _logp(self, model: torch.nn.Module, inputs: TensorBatch, cells: torch.Tensor) -> torch.Tensor:
        """[B, L, 2] log-probability of both candidates, 0 where there is none; one forward pass."""
        out = model(
            input_ids=inputs["noisy_ids"],
            attention_mask=inputs["attention_mask"],
            targets=inputs["candidates"],
        )
        full = torch.zeros(cells.shape, device=cells.device)
        full[cells.any(-1)] = out.token_logp
        return full

    def _weights(self, logp: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """[B, L, 2] weight of each cell; a side's weights have mean 1 over its cells."""
        weight = cells.float()
        if self.objective.weighting == "confidence":
            negative = cells[..., 1]
            lowest = torch.finfo(logp.dtype).min
            share = torch.where(negative, logp[..., 1], lowest).softmax(1) * negative
            weight[..., 1] = share * negative.sum(1, keepdim=True)
        return weight


def contrast_figures(total: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """[B, 4] the figures of rows, from ℓ and n of both sides [B, 2]; NaN for those that need a negative."""
    true, wrong = mean_logp(total, n).unbind(1)
    figures = torch.stack([true, wrong, true - wrong, (true > wrong).float()], dim=1)
    lacking = torch.cat([torch.zeros_like(n[:, :1]), (n[:, 1:] == 0).expand(-1, 3)], dim=1).bool()
    return figures.masked_fill(lacking, torch.nan)


TRAINERS: dict[str, type[ContrastTrainer]] = {
    "r2ft": R2FTTrainer,
    "ddro": PreferenceTrainer,
    "dpo": PreferenceTrainer,
}
"""Trainers by the name of the objective."""

TITLES = {"r2ft": "R2FT", "ddro": "DDRO", "dpo": "DPO"}


class R2FT(Stage[R2FTConfig]):
    """Setting good answers against bad ones, which are made by rule or come with the rows."""

    def __init__(self, config: R2FTConfig) -> None:
        super().__init__(config)
        answers = "rule-made negatives" if config.rejected == "rules" else "rejected answers of the data"
        self.objective = f"{TITLES[config.objective.name]} ({answers})"

    @property
    def from_data(self) -> bool:
        """True when the rows bring their bad answers."""
        return self.config.rejected == "data"

    def load(self, source: str, split: str) -> Dataset:
        """See `Stage`; with the rejected answers, where they are wanted."""
        if not self.from_data:
            return load_rows(source, split)
        rows = load_preferences(source, split)
        check_preferences(rows, source, self.config.objective.name)
        return rows

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, window: int
    ) -> tuple[Dataset, EncodingReport]:
        """See `Stage`; with the rejected answers, where there are any."""
        encode = encode_preferences if self.from_data else encode_rows
        return encode(rows, tokenizer, window)

    def collator(self, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> WindowCollator:
        """See `Stage`; with the rejected answers, where there are any."""
        plain = super().collator(tokenizer, rows)
        if not self.from_data:
            return plain
        settings = {item.name: getattr(plain, item.name) for item in fields(plain)}
        return PreferenceCollator(**settings, paired="rejected_ids" in rows.column_names)

    @property
    def start(self) -> StartConfig:
        """See `Stage`."""
        return self.config.model

    @property
    def drawings(self) -> dict[str, Draw]:
        """See `Stage`."""
        name = self.config.objective.name
        return {f"{name}.png": partial(draw_r2ft, tolerance=self.config.nelbo_tolerance, objective=name)}

    def first(
        self, rows: Dataset, resume_from: Path | None
    ) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
        """See `Stage`."""
        del resume_from
        model, tokenizer = fine_tuned_model(self.config.model, prompted=any_prompt(rows))
        self.before = model.config.training
        return model, tokenizer

    def record(self) -> dict[str, Any]:
        """See `Stage`."""
        return {
            **super().record(),
            "loss": asdict(self.config.objective),
            "negatives": asdict(self.config.negatives),
            "after": self.before,
        }

    def trainer(self, model: Any, prior: TokenPrior, **common: Any) -> DiffusionTrainer:
        """See `Stage`."""
        objective = self.config.objective
        return TRAINERS[objective.name](
            model, objective=objective, negatives=self.config.negatives, prior=prior, **common
        )

    def check(self) -> None:
        """See `Stage`; an autoregressive model is refused before the data are read."""
        super().check()
        refuse_causal_lm(self.config.model.init)

    def diverged(self, trainer: DiffusionTrainer, run: RunFolder, error: DivergedError) -> None:
        """End the run as its guard does: of the states before, the best is kept, if there is one."""
        if run.best is None:
            raise error
        logger.warning("%s", error)
        if trainer.accelerator.is_main_process:
            run.stop()

    def settle(self, trainer: DiffusionTrainer, run: RunFolder) -> None:
        """Take the weights of the best validated state.

        Raises:
            DLMError: when every validated state had harmed the language.
        """
        if run.best is None:
            share = 100 * self.config.nelbo_tolerance
            raise DLMError(
                f"{run.path}: no validated state kept the NELBO within {share:g} % of the start, so there is "
                "no model to keep (the checkpoints are still there). Try a lower learning_rate, or validate "
                "more often (eval_steps and save_steps), in another output_dir"
            )
        trainer.load_checkpoint(run.best)

    def prior(self, tokenizer: PreTrainedTokenizerBase, model: Any, rows: Dataset) -> TokenPrior:
        """The counts that the checkpoint brings; those of `rows` if it has none."""
        stored = TokenPrior.load(self.config.model.init)
        if stored is None and self.from_data and "good" in rows.column_names:
            rows = rows.select([i for i, good in enumerate(rows["good"]) if good])
        return stored or super().prior(tokenizer, model, rows)

    def callbacks(
        self, trainer: DiffusionTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, run: RunFolder
    ) -> Iterable[TrainerCallback]:
        """The guard of the NELBO, samples to measure and samples to read."""
        return [
            BestWithinTolerance(trainer, run, self.config.nelbo_tolerance, self.config.objective.name),
            WatchCallback(trainer, tokenizer, self.config, held_out),
            SampleCallback(trainer, tokenizer, self.config, held_out),
        ]


def check_preferences(rows: Dataset, source: str, objective: str) -> None:
    """Refuse, with a DataError, single answers for DPO."""
    if objective == "dpo" and not are_pairs(rows):
        raise DataError(
            f"{source}: single answers with a label; DPO compares two answers to one prompt and needs rows "
            "with prompt, chosen and rejected. --objective.name ddro takes single answers"
        )


def r2ft(config: R2FTConfig) -> Path:
    """Run R2FT and return the folder of the best model; see `execute`.

    Raises:
        CheckpointError: when `config.model.init` was never fine-tuned.
    """
    return execute(R2FT(config))
