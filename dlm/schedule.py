"""Noise schedules: how much of a row is still visible at time t (1 = all masked, 0 = nothing masked)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dlm.errors import ConfigError


class Alpha(NamedTuple):
    """The share of visible tokens and its rate of change."""

    value: torch.Tensor
    """alpha(t), same shape as t, in [0, 1]."""
    derivative: torch.Tensor
    """d alpha / dt, same shape as t, negative."""


@dataclass(frozen=True)
class LogLinear:
    """The log-linear schedule alpha(t) = 1 - (1 - eps) t of MDLM (arXiv 2406.07524).

    Attributes:
        eps: share of tokens that stays visible at t = 1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Check the range of eps."""
        if not 0 <= self.eps < 1:
            raise ConfigError(f"eps must lie in [0, 1), got {self.eps}")

    def alpha(self, t: torch.Tensor) -> Alpha:
        """Evaluate the schedule at times `t` (any shape, values in [0, 1])."""
        scale = 1 - self.eps
        return Alpha(1 - scale * t, torch.full_like(t, -scale))

    __call__ = alpha

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """Probability 1 - alpha(t) that a position is masked at time t, same shape as t."""
        return 1 - self.alpha(t).value

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """NELBO weight -alpha'(t) / (1 - alpha(t)) of a masked token, same shape as t.

        For this schedule it is exactly 1/t, whatever eps.
        """
        return 1 / t
