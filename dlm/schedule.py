"""Noise schedules: how much of a row is still visible at time t (1 = all masked, 0 = nothing masked)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from dlm.errors import ConfigError, unknown_name


class Alpha(NamedTuple):
    """The share of visible tokens and its rate of change."""

    value: torch.Tensor
    """alpha(t), same shape as t, in [0, 1]."""
    derivative: torch.Tensor
    """d alpha / dt, same shape as t, negative."""


class NoiseSchedule(ABC):
    """A decreasing function alpha(t) from 1 at t = 0 to about 0 at t = 1.

    Training masks with probability 1 - alpha(t) and weights with -alpha'(t) / (1 - alpha(t)); decoding walks
    the same curve backwards.
    """

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> Alpha:
        """Evaluate the schedule at times `t` (any shape, values in [0, 1])."""

    def __call__(self, t: torch.Tensor) -> Alpha:
        """Evaluate the schedule; see `alpha`."""
        return self.alpha(t)

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """Probability 1 - alpha(t) that a position is masked at time t, same shape as t."""
        return 1 - self.alpha(t).value

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """NELBO weight -alpha'(t) / (1 - alpha(t)) of a masked token, same shape as t."""
        alpha = self.alpha(t)
        return -alpha.derivative / (1 - alpha.value)

    def mask_share(self, t: torch.Tensor) -> torch.Tensor:
        """Mask probability at time t over that at time 1: where decoding begins, everything is masked."""
        return self.mask_probability(t) / self.mask_probability(torch.ones_like(t))

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in a configuration file."""

    def as_dict(self) -> dict[str, Any]:
        """Name and settings, as a configuration file holds them."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class LogLinear(NoiseSchedule):
    """The log-linear schedule alpha(t) = 1 - (1 - eps) t of MDLM (arXiv 2406.07524).

    Attributes:
        eps: share of tokens that stays visible at t = 1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Check the range of eps."""
        if not 0 <= self.eps < 1:
            raise ConfigError(f"eps must lie in [0, 1), got {self.eps}")

    @property
    def name(self) -> str:
        """See `NoiseSchedule`."""
        return "log-linear"

    def alpha(self, t: torch.Tensor) -> Alpha:
        """Evaluate the schedule at times `t` (any shape, values in [0, 1])."""
        scale = 1 - self.eps
        return Alpha(1 - scale * t, torch.full_like(t, -scale))

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Exactly 1/t, whatever eps; see `NoiseSchedule`."""
        return 1 / t

    def mask_share(self, t: torch.Tensor) -> torch.Tensor:
        """Exactly t, whatever eps; see `NoiseSchedule`."""
        return t


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """The cosine schedule alpha(t) = 1 - sin(pi t / 2): few masks for long (MaskGIT, arXiv 2202.04200)."""

    @property
    def name(self) -> str:
        """See `NoiseSchedule`."""
        return "cosine"

    def alpha(self, t: torch.Tensor) -> Alpha:
        """Evaluate the schedule at times `t` (any shape, values in [0, 1])."""
        angle = t * (math.pi / 2)
        return Alpha(1 - torch.sin(angle), -(math.pi / 2) * torch.cos(angle))


_SCHEDULES: dict[str, type[NoiseSchedule]] = {"log-linear": LogLinear, "cosine": Cosine}


def schedule_named(name: str = "log-linear", **settings: Any) -> NoiseSchedule:
    """The schedule with this name and these settings.

    Raises:
        ConfigError: for an unknown name or setting.
    """
    if name not in _SCHEDULES:
        raise unknown_name("schedule", name, _SCHEDULES)
    try:
        return _SCHEDULES[name](**settings)
    except TypeError as error:
        raise ConfigError(f"schedule {name!r}: {error}") from error
