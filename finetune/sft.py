"""Supervised fine-tuning and pretraining with the masked diffusion objective (MDLM, arXiv 2406.07524).

They are the same run: rows with a prompt never mask it, rows of plain text have no prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dlm.data.windows import TensorBatch
from dlm.errors import ConfigError
from dlm.model import IGNORE, MaskedDiffusionModel
from dlm.noise import fold, key_of, uniform
from dlm.objective import weighted_loss
from dlm.prior import TokenPrior
from dlm.trainer import DiffusionTrainer
from finetune.config import MaskConfig, StartConfig, TrainConfig
from finetune.masks import complementary_noise, path_noise
from finetune.run import Stage, execute
from finetune.run_folder import RunFolder
from finetune.samples import SampleCallback
from finetune.start import first_model, random_shape

if TYPE_CHECKING:
    from datasets import Dataset


class SFTTrainer(DiffusionTrainer):
    """The trainer with a choice of masks, and an autoregressive loss beside the NELBO.

    Args:
        masks: see `MaskConfig`.
        **kwargs: as for `DiffusionTrainer`.

    Raises:
        ConfigError: for an autoregressive loss of a model without a shift, whose states see the token that
            they predict.
    """

    def __init__(self, model: Any, *, masks: MaskConfig, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.masks = masks
        if masks.autoregressive and not self.spec.shift:
            raise ConfigError("masks.autoregressive is for models with a shift; others see what they predict")

    def with_noise(self, batch: TensorBatch, slots: torch.Tensor, total: int, step: int) -> TensorBatch:
        """See `DiffusionTrainer`."""
        seed = self.args.seed
        if self.masks.complementary:
            schedule = self.spec.schedule
            return complementary_noise(batch, slots, total, seed, step, self.mask_id, schedule, self.blocks)
        plain = super().with_noise(batch, slots, total, step)
        if not self.masks.path:
            return plain
        chance = uniform(fold(key_of(seed, "path rows", step, device=slots.device), slots), 0)
        on_path = (chance < self.masks.path).nonzero()[:, 0]
        rows = {name: values[on_path] for name, values in batch.items()}
        path = path_noise(
            rows, slots[on_path], total, seed, step, self.mask_id, self.masks.kernel_size, self.blocks
        )
        names = ("t", "noisy_ids", "targets", "weight")
        return plain | {name: plain[name].clone().index_copy_(0, on_path, path[name]) for name in names}

    def loss(self, model: torch.nn.Module, inputs: TensorBatch, count: torch.Tensor) -> torch.Tensor:
        """See `DiffusionTrainer`; with the autoregressive loss per token, if it has a weight."""
        nelbo = super().loss(model, inputs, count)
        if not self.masks.autoregressive:
            return nelbo
        copies = 2 if self.masks.complementary else 1  # of each row; one of them is enough
        ids, valid, cells = (
            inputs[name][: len(inputs[name]) // copies]
            for name in ("input_ids", "attention_mask", "loss_mask")
        )
        targets = torch.where(cells, ids, IGNORE)
        targets[:, 0] = IGNORE  # nothing comes before it
        token_logp = model(input_ids=ids, attention_mask=valid, targets=targets, causal=True).token_logp
        plain = copies * weighted_loss(token_logp, torch.ones_like(token_logp), count)
        self.watch("autoregressive", plain)
        return nelbo + self.masks.autoregressive * plain


class SFT(Stage[TrainConfig]):
    """Fine-tuning on true answers."""

    def check(self) -> None:
        """See `Stage`; and refuse a shape that no model has."""
        super().check()
        if not self.start.init:
            random_shape(self.config)

    objective = "masked diffusion NELBO (SUBS)"

    @property
    def start(self) -> StartConfig:
        """See `Stage`."""
        return self.config.model

    def first(
        self, rows: Dataset, resume_from: Path | None
    ) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
        """See `Stage`."""
        return first_model(self.config, rows, resume_from)

    def trainer(self, model: Any, prior: TokenPrior, **common: Any) -> DiffusionTrainer:
        """See `Stage`."""
        del prior
        return SFTTrainer(model, masks=self.config.masks, **common)

    def record(self) -> dict[str, Any]:
        """See `Stage`; with the masks, where they are not the usual ones."""
        masks = {"masks": asdict(self.config.masks)} if self.config.masks != MaskConfig() else {}
        return {**super().record(), **masks}

    def callbacks(
        self, trainer: DiffusionTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, run: RunFolder
    ) -> Iterable[TrainerCallback]:
        """Sample answers."""
        del run
        return [SampleCallback(trainer, tokenizer, self.config, held_out)]


def train(config: TrainConfig) -> Path:
    """Fine-tune (or pretrain) and return the folder of the finished model; see `execute`."""
    return execute(SFT(config))
