"""A bound on the entropies of the tokens of one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from decoding.reveal.base import Decision, StepView, ranked
from decoding.reveal.quota import Order, OwnPaced
from decoding.tokens import Choice, TokenRule
from dlm.errors import ConfigError


@dataclass(frozen=True)
class EntropyBound(OwnPaced):
    """The most positions that a bound on their entropies allows (EB-sampler, arXiv 2505.24857).

    Open positions are taken in order of certainty · weight (without a convolution: from the least entropy
    up), the first always, while the sum of the entropies of those before stays within γ: a bound on what is
    lost by drawing them independently.

    Attributes:
        gamma: γ, in nats.
    """

    gamma: float = 0.1
    order: ClassVar[Order] = "entropy"
    sees_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range of gamma."""
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"gamma must be a finite number that is not negative, got {self.gamma}")

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """[N] exp(-H), H the entropy; see `RevealRule`."""
        del choice, state
        return tokens.certainty(logits, "entropy")

    def decide(self, view: StepView) -> Decision:
        """Take the longest admissible prefix of the positions, ordered by certainty · weight."""
        rank = ranked(view.score, view.weight, view.open)
        entropy = torch.where(view.open, -view.score.double().clamp(min=1e-300).log(), math.inf)
        ordered = torch.zeros_like(entropy).scatter(1, rank, entropy)  # [b, W] by rank
        preceding = ordered.cumsum(1) - ordered  # inf - inf is NaN behind the open ones, and not within γ
        return Decision(view.open & (preceding <= self.gamma).gather(1, rank))
