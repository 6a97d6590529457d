"""R2FT, rejecting rule-based fine-tuning (arXiv 2509.15188): a short stage after supervised fine-tuning.

Each row's true continuation is set against a negative made by rule (`finetune.negatives`) on the same masked
row, so one forward pass gives the log-probabilities of both.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dlm.curves import Draw
from dlm.data.windows import Batch
from dlm.errors import ConfigError, DLMError
from dlm.model import IGNORE, MaskedDiffusionModel
from dlm.noise import fold, key_of
from dlm.noising import Blocks
from dlm.pretrained.names import located
from dlm.prior import TokenPrior
from dlm.trainer import DiffusionTrainer
from finetune.config import NegativeConfig, ObjectiveConfig, R2FTConfig, StartConfig
from finetune.negatives import Contrast, make_negative
from finetune.run import Stage, execute
from finetune.run_folder import RunFolder
from finetune.samples import SampleCallback
from finetune.start import any_prompt, fine_tuned_model, refuse_causal_lm
from finetune.watch import BestWithinTolerance, WatchCallback, draw_r2ft

if TYPE_CHECKING:
    from datasets import Dataset


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


def writable(masked: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """[B, L] bool, positions that a block-causal model may be writing when `masked` [B, L] are masks.

    They are those of the block that holds the first mask; behind it, it never sees masks before its own
    block. Where a block begins with a position that is written first, that position alone.
    """
    place = torch.arange(masked.shape[1], device=masked.device)
    first = torch.where(masked, place, masked.shape[1]).amin(1, keepdim=True)
    inside = place // blocks.size == first // blocks.size
    alone = (first % blocks.size == 0) & (first > 0) & blocks.lead
    return inside & (~alone | (place == first))


class R2FTTrainer(DiffusionTrainer):
    """The trainer of SFT with another loss; validation NELBO stays what it is.

    Args:
        objective: factors of the loss.
        negatives: how negatives are made.
        prior: token counts of the training answers.
        **kwargs: as for `DiffusionTrainer`.
    """

    def __init__(
        self,
        model: Any,
        *,
        objective: ObjectiveConfig,
        negatives: NegativeConfig,
        prior: TokenPrior,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.objective, self.negatives, self.prior = objective, negatives, prior
        self.frequent = prior.top(negatives.frequent).to(self.args.device)
        self.frequent_counts = prior.counts.to(self.args.device)[self.frequent]
        self.reference: torch.nn.Module | None = None
        if objective.reference and not hasattr(model, "disable_adapter"):
            self.reference = copy.deepcopy(model).eval().requires_grad_(False).to(self.args.device)

    # ---- what a batch needs --------------------------------------------------------------------------

    def with_noise(self, batch: Batch, slots: torch.Tensor, total: int, step: int) -> Batch:
        """A batch and its contrast, which depends on (seed, step, place in the global batch) alone."""
        del total
        return self._with_contrast(
            batch, fold(key_of(self.args.seed, "negative", step, device=slots.device), slots)
        )

    def divisor(self, batch: Batch) -> torch.Tensor:
        """The rows of the batch: every row weighs the same."""
        return torch.tensor(len(batch["row"]), device=batch["row"].device)

    def _with_contrast(self, batch: Batch, key: torch.Tensor) -> Batch:
        contrast = self.contrast(batch, key)
        candidates = torch.stack([contrast.targets, contrast.rejected], dim=-1)
        if self.blocks:
            masked = contrast.noisy_ids == self.mask_id
            candidates = candidates.masked_fill(~writable(masked, self.blocks)[..., None], IGNORE)
        return {**batch, "noisy_ids": contrast.noisy_ids, "candidates": candidates}

    def contrast(self, batch: Batch, key: torch.Tensor) -> Contrast:
        """The contrast of a batch under noise keys [B]."""
        device = batch["input_ids"].device
        return make_negative(
            batch["input_ids"],
            batch["prompt_length"],
            batch["length"],
            key,
            mask_id=self.mask_id,
            eos_id=self.data_collator.eos_token_id,
            frequent=self.frequent.to(device),
            frequent_counts=self.frequent_counts,
            rules=self.negatives,
            real=batch["attention_mask"],
        )

    # ---- loss ----------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, inputs: Batch, count: torch.Tensor) -> torch.Tensor:
        """The summed R2FT loss of a micro-batch over the global number of rows."""
        losses, figures = self.rows(model, inputs)
        for i, name in enumerate(FIGURES):
            self.watch(name, figures[:, i].sum() / count)
        return losses.sum() / count

    def rows(self, model: torch.nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] loss of each row, and [B, 4] its `FIGURES`, without gradient."""
        cells = inputs["candidates"] != IGNORE  # [B, L, 2]
        logp = self._logp(model, inputs, cells)
        weight = self._weights(logp.detach(), cells)
        total, n = (logp * weight).sum(1), cells.sum(1)  # [B, 2]
        reference: dict[str, torch.Tensor] = {}
        if self.objective.reference:
            with torch.no_grad(), self._as_reference(model) as frozen:
                held = (self._logp(frozen, inputs, cells) * weight).sum(1)
            reference = {"reference_w": held[:, 0], "reference_l": held[:, 1]}
        objective = self.objective
        loss = r2ft_row_loss(
            total[:, 0], n[:, 0], total[:, 1], n[:, 1],
            beta_w=objective.beta_w, beta_l=objective.beta_l, gamma=objective.gamma,
            beta_a=objective.beta_a, **reference,
        )  # fmt: skip
        true, wrong = mean_logp(logp.detach().sum(1), n).unbind(1)
        figures = torch.stack([true, wrong, true - wrong, (true > wrong).float()], dim=1)
        return loss, figures

    def _logp(self, model: torch.nn.Module, inputs: Batch, cells: torch.Tensor) -> torch.Tensor:
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

    @contextlib.contextmanager
    def _as_reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The frozen model that the run started from: a copy, or the base under the adapter."""
        if self.reference is not None:
            yield self.reference
            return
        plain = self.accelerator.unwrap_model(model)
        with plain.disable_adapter():
            yield plain

    # ---- validation ----------------------------------------------------------------------------------

    def measure(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[B, 8]: nats and cells for the NELBO, then the loss, the figures and a 1 for each row."""
        key = fold(key_of("validation negative", device=batch["row"].device), batch["row"])
        loss, figures = self.rows(model, self._with_contrast(batch, key))
        return torch.cat(
            [super().measure(model, batch), loss[:, None], figures, torch.ones_like(loss)[:, None]], dim=1
        )

    def metrics(self, sums: torch.Tensor, rows: int) -> dict[str, float]:
        """NELBO as in SFT; beside it the R2FT loss and figures over the validation rows."""
        means = (sums[2:] / sums[-1]).tolist()
        return {
            **super().metrics(sums[:2], rows),
            "r2ft": means[0],
            **dict(zip(FIGURES, means[1:], strict=False)),
        }


FIGURES = ("logp_true", "logp_negative", "margin", "accuracy")
"""ℓ_w/n_w, ℓ_l/n_l, their difference, and the share of rows in which it is positive."""


class R2FT(Stage[R2FTConfig]):
    """Rejecting repetition and high-prior tokens."""

    objective = "R2FT (rule-made negatives)"

    @property
    def start(self) -> StartConfig:
        """See `Stage`."""
        return self.config.model

    @property
    def drawings(self) -> dict[str, Draw]:
        """See `Stage`."""
        return {"r2ft.png": partial(draw_r2ft, tolerance=self.config.nelbo_tolerance)}

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
        return R2FTTrainer(
            model, objective=self.config.objective, negatives=self.config.negatives, prior=prior, **common
        )

    def check(self) -> None:
        """See `Stage`; an autoregressive model is refused before the data are read."""
        super().check()
        refuse_causal_lm(self.config.model.init)

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
        stored = TokenPrior.load(located(self.config.model.init))
        return stored or super().prior(tokenizer, model, rows)

    def callbacks(
        self, trainer: DiffusionTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, run: RunFolder
    ) -> Iterable[TrainerCallback]:
        """The guard of the NELBO, samples to measure and samples to read."""
        return [
            BestWithinTolerance(trainer, run, self.config.nelbo_tolerance),
            WatchCallback(trainer, tokenizer, self.config, held_out),
            SampleCallback(trainer, tokenizer, self.config, held_out),
        ]


def r2ft(config: R2FTConfig) -> Path:
    """Run R2FT and return the folder of the best model; see `execute`.

    Raises:
        CheckpointError: when `config.model.init` was never fine-tuned.
    """
    return execute(R2FT(config))
