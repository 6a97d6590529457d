"""Tokens that are confident and whose distribution has come to rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from decoding.reveal.base import Decision, StepView, ranked, state_with
from decoding.reveal.quota import OwnPaced
from decoding.tokens import TokenRule, log_normaliser
from dlm.errors import ConfigError, check_whole

TRACKED = 8
"""Likeliest tokens of a position whose probabilities are kept until the next call."""


@dataclass(frozen=True)
class Stability(OwnPaced):
    """Everything that is confident and stable, and at least the most confident one (KLASS, arXiv 2511.05664).

    A position is stable when the divergence KL(p_now ‖ p_before) between its distributions in neighbouring
    calls stayed below ε in each of the last n calls. The divergence is taken over the `TRACKED` likeliest
    tokens of the call before and "any other token", which bounds that of the whole vocabulary from below.

    Attributes:
        tau: confidence to reach, in (0, 1].
        epsilon: ε, in nats.
        history: n, comparisons in a row.
    """

    tau: float = 0.9
    epsilon: float = 0.01
    history: int = 2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau must lie in (0, 1], got {self.tau}")
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon must be above 0, got {self.epsilon}")
        check_whole("history", self.history)

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Tracked tokens, their probabilities (0 at first) and comparisons passed; see `RevealRule`."""
        return {
            "tracked": torch.zeros(rows, length, TRACKED, dtype=torch.int64),
            "probability": torch.zeros(rows, length, TRACKED),
            "stable": torch.zeros(rows, length, dtype=torch.int64),
        }

    def observe(
        self, logits: torch.Tensor, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> dict[str, torch.Tensor]:
        """The likeliest tokens, their probabilities, and comparisons passed; see `RevealRule`."""
        logits = tokens.allowed(logits)
        total = log_normaliser(logits)
        current = (logits.gather(1, state["tracked"]).float() - total).exp()
        best = logits.topk(min(TRACKED, logits.shape[1]), dim=1)
        missing = 0, TRACKED - best.indices.shape[1]
        steady = divergence(current, state["probability"]).float() < self.epsilon
        return {
            "tracked": pad(best.indices, missing),
            "probability": pad((best.values.float() - total).exp(), missing),
            "stable": torch.where(steady, state["stable"] + 1, 0),
        }

    def decide(self, view: StepView) -> Decision:
        """Take what is confident and stable, and the most confident position in any case."""
        best = ranked(view.score, view.weight, view.masked) == 0
        steady = view.observed["stable"] >= self.history
        reveal = view.open & (((view.score >= self.tau) & steady) | best)
        before = {name: view.state[name] for name in ("tracked", "probability", "stable")}
        return Decision(reveal, state=state_with(view.open, view.observed, before))


def divergence(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """KL(current ‖ previous), k tokens and "any other", [N, k] -> [N]; infinite where `previous` is all 0."""
    pairs = []
    for probability in (current.double(), previous.double()):
        remainder = (1 - probability.sum(1, keepdim=True)).clamp(min=1e-12)
        pairs.append(torch.cat([probability.clamp(min=1e-12), remainder], dim=1))
    gap = (pairs[0] * (pairs[0] / pairs[1]).log()).sum(1).clamp(min=0)
    return torch.where(previous.sum(1) > 0, gap, torch.inf)
