"""The trainer of runs that set good answers against bad ones, whatever the objective.

What every such objective needs is here: negatives by rule, the frozen reference, figures of rows that may
lack one of the two answers. The objectives are `finetune.r2ft` and `finetune.preference`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from dlm.data.windows import TensorBatch
from dlm.noise import fold, key_of
from dlm.noising import Blocks
from dlm.prior import TokenPrior
from dlm.trainer import DiffusionTrainer
from finetune.contrast_config import NegativeConfig, ObjectiveConfig
from finetune.negatives import Contrast, make_negative


class ContrastTrainer(DiffusionTrainer):
    """The trainer of SFT with a loss of two answers; validation NELBO stays what it is.

    Args:
        objective: settings of the loss.
        negatives: how negatives are made.
        prior: token counts of the training answers.
        referred: whether the loss needs the model that the run starts from. It is the base under an adapter;
            without one, a copy is made.
        **kwargs: as for `DiffusionTrainer`.
    """

    FIGURES: ClassVar[tuple[str, ...]]
    """Names of the figures of a row."""

    def __init__(
        self,
        model: Any,
        *,
        objective: ObjectiveConfig,
        negatives: NegativeConfig,
        prior: TokenPrior,
        referred: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.objective, self.negatives, self.prior = objective, negatives, prior
        self.frequent = prior.top(negatives.frequent).to(self.args.device)
        self.frequent_counts = prior.counts.to(self.args.device)[self.frequent]
        self.reference: torch.nn.Module | None = None
        if referred and not hasattr(model, "disable_adapter"):
            self.reference = copy.deepcopy(model).eval().requires_grad_(False).to(self.args.device)

    # ---- what an objective gives ---------------------------------------------------------------------

    def contrasted(self, batch: TensorBatch, key: torch.Tensor) -> TensorBatch:
        """A batch and its contrast, under noise keys [B]."""
        raise NotImplementedError

    def rows(self, model: torch.nn.Module, inputs: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] loss of each row, and [B, F] its `FIGURES`, without gradient; NaN where a row has none."""
        raise NotImplementedError

    # ---- what a batch needs --------------------------------------------------------------------------

    def with_noise(self, batch: TensorBatch, slots: torch.Tensor, total: int, step: int) -> TensorBatch:
        """A batch and its contrast, which depends on (seed, step, place in the global batch) alone."""
        del total
        return self.contrasted(
            batch, fold(key_of(self.args.seed, "negative", step, device=slots.device), slots)
        )

    def with_validation_noise(self, batch: TensorBatch) -> TensorBatch:
        """A batch and its contrast, which depends on the number of each row alone."""
        rows = batch["row"]
        return self.contrasted(batch, fold(key_of("validation negative", device=rows.device), rows))

    def divisor(self, batch: TensorBatch) -> torch.Tensor:
        """The rows of the batch: every row weighs the same."""
        return torch.tensor(len(batch["row"]), device=batch["row"].device)

    def contrast(self, batch: TensorBatch, key: torch.Tensor, blocks: Blocks | None = None) -> Contrast:
        """The contrast of a batch with its negatives by rule, under noise keys [B]."""
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
            blocks=blocks,
        )

    # ---- loss ----------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, inputs: TensorBatch, count: torch.Tensor) -> torch.Tensor:
        """The summed loss of a micro-batch over the global number of rows."""
        losses, figures = self.rows(model, inputs)
        for name, values in zip(self.FIGURES, figures.unbind(1), strict=True):
            self.watch(name, values.nansum(), (~values.isnan()).sum().float())
        return losses.sum() / count

    @contextlib.contextmanager
    def as_reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The frozen model that the run started from: a copy, or the base under the adapter."""
        if self.reference is not None:
            yield self.reference
            return
        plain = self.accelerator.unwrap_model(model)
        with plain.disable_adapter():
            yield plain

    # ---- validation ----------------------------------------------------------------------------------

    def measure(self, model: torch.nn.Module, batch: TensorBatch) -> torch.Tensor:
        """[B, 3 + F]: nats and cells for the NELBO, then the loss and the figures."""
        loss, figures = self.rows(model, self.with_validation_noise(batch))
        return torch.cat([super().measure(model, batch), loss[:, None], figures], dim=1)

    def metrics(self, measured: torch.Tensor) -> dict[str, float]:
        """NELBO as in SFT; beside it the mean loss and figures of the validation rows."""
        names = (self.objective.name, *self.FIGURES)
        means = dict(zip(names, measured[:, 2:].nanmean(0).tolist(), strict=True))
        return super().metrics(measured) | means
