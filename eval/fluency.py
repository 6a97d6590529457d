"""Generative perplexity: how likely answers are under an autoregressive model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dlm.progress import progress
from dlm.tokenizer import Message


class Reader:
    """An autoregressive model that reads answers.

    Args:
        path: hub id, folder or .gguf file of a causal language model.
        device: where it runs.
        dtype: of the weights.
    """

    def __init__(self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from dlm.backbone import load_causal_lm

        self.model: Any
        self.model, self.tokenizer = load_causal_lm(path, dtype)
        self.model.to(device).eval()

    @torch.inference_mode()
    def nats_per_token(self, talk: list[Message], answer: str) -> float:
        """Mean negative log-likelihood of an answer's tokens given the conversation; NaN for an empty one."""
        if not answer.strip():
            return float("nan")
        ids, begins = self._encoded(talk, answer)
        logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, begins - 1 : -1]
        target = torch.tensor(ids[begins:], device=logits.device)
        nats: torch.Tensor = torch.nn.functional.cross_entropy(logits.float(), target)
        return float(nats)

    def _encoded(self, talk: list[Message], answer: str) -> tuple[list[int], int]:
        """The conversation and the answer as ids, cut where the model ends; and where the answer begins."""
        from dlm.tokenizer import encode_prompt, encode_text

        limit = int(getattr(self.model.config, "max_position_embeddings", 2**31))
        answer_ids = encode_text(self.tokenizer, answer)[: limit // 2]
        begin = encode_prompt(self.tokenizer, talk) if self.tokenizer.chat_template else []
        begin = (begin or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id])[
            -(limit - len(answer_ids)) :
        ]
        return begin + answer_ids, len(begin)

    def read(self, talks: Sequence[list[Message]], answers: Sequence[str], label: str = "") -> list[float]:
        """`nats_per_token` of many answers."""
        pairs = zip(talks, answers, strict=True)
        return [
            self.nats_per_token(talk, answer)
            for talk, answer in progress(pairs, label, len(answers), unit="answer")
        ]


@dataclass(frozen=True)
class Band:
    """Perplexities that are usual for human answers: μ ± 2σ.

    Attributes:
        mean: μ.
        deviation: σ.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, nats: Sequence[float]) -> Band | None:
        """From the nats per token of the answers that the model was trained on, or of references.

        None where fewer than two of them can be read, or one is beyond numbers.
        """
        finite = [x for x in nats if not math.isnan(x)]
        if len(finite) < 2 or max(finite) > 300:
            return None
        perplexity = np.exp(finite)
        return cls(float(perplexity.mean()), float(perplexity.std()))

    def holds(self, nats: float) -> bool:
        """True when an answer is an inlier (arXiv 2509.15188); an empty one (NaN) is not."""
        return not math.isnan(nats) and abs(math.exp(min(nats, 700.0)) - self.mean) <= 2 * self.deviation
