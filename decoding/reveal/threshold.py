"""Everything that is confident enough."""

from __future__ import annotations

from dataclasses import dataclass

from decoding.reveal.base import Decision, StepView, ranked
from decoding.reveal.quota import OwnPaced
from dlm.errors import ConfigError


@dataclass(frozen=True)
class Threshold(OwnPaced):
    """Everything whose confidence reaches τ, and at least the most confident one (Fast-dLLM, 2505.22618).

    Attributes:
        tau: confidence to reach, in (0, 1].
    """

    tau: float = 0.9

    def __post_init__(self) -> None:
        """Check the range of tau."""
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau must lie in (0, 1], got {self.tau}")

    def decide(self, view: StepView) -> Decision:
        """Take confident positions among the open ones, and the best one in any case."""
        best = ranked(view.score, view.weight, view.masked) == 0
        return Decision(view.open & ((view.score >= self.tau) | best))
