"""Written tokens that may be replaced when the model has become sure of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from decoding.reveal.base import Decision, Evidence, StepView, ranked
from decoding.reveal.quota import OwnPaced
from dlm.errors import ConfigError, check_whole


@dataclass(frozen=True)
class Editing(OwnPaced):
    """Joint threshold: masks and written tokens are looked at together (LLaDA 2.1; SGLang's joint threshold).

    A mask whose confidence reaches τ is written, and at least the most confident one. A written token of the
    stage gives way to another one whose confidence reaches τ_edit; each position does so at most `edits`
    times, so that decoding ends. A row ends when nothing is masked and no token gives way.

    Attributes:
        tau: confidence that a mask needs, in (0, 1].
        tau_edit: confidence that replaces a written token, in (0, 1].
        edits: how often a position may be replaced.
    """

    tau: float = 0.9
    tau_edit: float = 0.9
    edits: int = 1
    revises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("tau", "tau_edit"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        check_whole("edits", self.edits, least=0)

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Number of replacements at each position; see `RevealRule`."""
        return {"replaced": torch.zeros(rows, length, dtype=torch.int64)}

    def _editable(self, view: StepView) -> torch.Tensor:
        return view.written & (view.state["replaced"] < self.edits)

    def evidence(self, view: StepView) -> Evidence:
        """Ask for the open masks and the tokens that may still be replaced."""
        return Evidence(view.open | self._editable(view))

    def decide(self, view: StepView) -> Decision:
        """Write confident masks and replace tokens that the model would no longer write."""
        best = ranked(view.score, view.weight, view.masked) == 0
        reveal = view.open & ((view.score >= self.tau) | best)
        differs = view.token != view.ids
        replace = self._editable(view) & differs & (view.score >= self.tau_edit)
        return Decision(
            reveal,
            replace=replace,
            settled=~(replace | reveal).any(1),  # what was written in this step is looked at once more
            state={"replaced": view.state["replaced"] + replace},
        )
