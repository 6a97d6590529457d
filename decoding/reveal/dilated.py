"""A fixed order in which neighbours are never written together until their surroundings are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from decoding.reveal.base import Decision, Evidence, StepView
from decoding.reveal.quota import OwnPaced
from dlm.errors import check_whole


@dataclass(frozen=True)
class Dilated(OwnPaced):
    """Dilated unmasking (DUS, arXiv 2506.19037): every n-th position of a block, then those between them.

    A block of B positions takes at most ⌈log_b B⌉ calls: in call j the positions whose place in the block
    is a multiple of ⌊B / b^j⌋ are written, the tokens of one call being as far apart as they can be.

    Attributes:
        base: b, at least 2.
    """

    base: int = 2
    sees_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the base."""
        check_whole("base", self.base, least=2)

    def evidence(self, view: StepView) -> Evidence:
        """No scores, for the order does not depend on the model; see `RevealRule`."""
        return Evidence(torch.zeros_like(view.open), constant=1.0)

    def decide(self, view: StepView) -> Decision:
        """Take the masks on the widest grid that still has some."""
        place = view.scope.cumsum(1) - 1
        size = view.scope.sum(1, keepdim=True)
        reveal = torch.zeros_like(view.masked)
        for j in range(1, math.ceil(math.log(max(int(size.max()), 2), self.base)) + 1):
            stride = (size // self.base**j).clamp(min=1)
            grid = view.open & (place % stride == 0)
            reveal = torch.where(reveal.any(1, keepdim=True), reveal, grid)
        revealed = torch.where(reveal.any(1, keepdim=True), reveal, view.open)
        return Decision(revealed)
