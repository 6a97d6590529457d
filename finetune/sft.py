"""Supervised fine-tuning and pretraining with the masked diffusion objective (MDLM, arXiv 2406.07524).

They are the same run: rows with a prompt never mask it, rows of plain text have no prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase, TrainerCallback

from dlm.model import MaskedDiffusionModel
from dlm.trainer import DiffusionTrainer
from finetune.config import StartConfig, TrainConfig
from finetune.run import Stage, execute
from finetune.run_folder import RunFolder
from finetune.samples import SampleCallback
from finetune.start import first_model

if TYPE_CHECKING:
    from datasets import Dataset


class SFT(Stage[TrainConfig]):
    """Fine-tuning on true answers."""

    objective = "masked diffusion NELBO (log-linear schedule, SUBS)"

    @property
    def start(self) -> StartConfig:
        """See `Stage`."""
        return self.config.model

    def first(
        self, rows: Dataset, resume_from: Path | None
    ) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
        """See `Stage`."""
        return first_model(self.config, rows, resume_from)

    def callbacks(
        self, trainer: DiffusionTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, run: RunFolder
    ) -> Iterable[TrainerCallback]:
        """Sample answers."""
        del run
        return [SampleCallback(trainer, tokenizer, self.config, held_out)]


def train(config: TrainConfig) -> Path:
    """Fine-tune (or pretrain) and return the folder of the finished model; see `execute`."""
    return execute(SFT(config))
