"""Tokens in the order of a learnt process reward: Doob's h-transform of the confidence order (DPRM)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch

from decoding.reveal.base import REVEAL_NOISE, Decision, Evidence, RevealRule, StepView, needed_for, ranks
from decoding.reveal.order_table import OrderTable
from dlm.errors import ConfigError, check_whole, unknown_name
from dlm.noise import key_of, uniform

Control = Literal["none", "gate", "counts", "shuffled", "entropy"]
"""Experiments that take something away: nothing; the rewards; what tells cells apart; which cell has which
reward; or the table, with the least certain of the shortlist first."""

SHORTLIST, LEAST, PER_TOKEN = 64, 8, 4
"""A shortlist has min(64, max(8, 4k)) positions for k tokens, or all."""

MOST_DRAWS = 256
"""Most candidates of soft best-of-N for one token."""

_FIRST_DRAW = 16
"""Number of the first stream of noise for candidates."""

_SMALLEST = 1e-12


@dataclass(frozen=True)
class ProcessReward(RevealRule):
    """The positions of a shortlist with the highest confidence and process reward.

    With w the window's weight and p the model's probability of the token, the score of a position is

        log(w p) + min(1, n / ready) · G · λ · (1/β) log(E / n)

    n and E being those of its cell in the table (see `OrderTable`), and the last term 0 in an empty cell.
    G is 0 until `warm_up`, rises evenly to 1 at `switch`, and stays there. The shortlist of
    min(64, max(8, 4k)) open positions is drawn in proportion to w p, without replacement; of these the k of
    the highest score are written.

    E/n estimates h, the mean of exp(βR) over answers that wrote a token in the cell. At λ = β, with G = 1 and
    full cells that were learnt in the order without rewards, the exponential of the score is therefore, up to
    a factor, the law that the h-transform of exp(βR) gives the next position.
    With `draws` N that law itself is approached, by soft best-of-N: each position is drawn from N candidates
    (in proportion to w p, with replacement) by the softmax of their process rewards; the error falls as 1/N.

    Attributes:
        table: the rewards; None for none, which leaves the shortlist by confidence.
        control: what is taken away for comparison.
        normalise: rewards count from the mean of all cells, so that an empty cell is an average one. Without
            it empty cells are 0, and rewards that are all positive favour whatever was written before.
        strength: λ.
        ready: tokens from which a cell counts in full.
        warm_up: share of the process before the reward counts at all.
        switch: share of the process from which it counts in full.
        draws: N of soft best-of-N; 0 for the shortlist.
    """

    table: OrderTable | None = None
    control: Control = "none"
    normalise: bool = False
    strength: float = 1.0
    ready: int = 64
    warm_up: float = 0.2
    switch: float = 0.7
    draws: int = 0
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.control not in get_args(Control):
            raise unknown_name("control", str(self.control), get_args(Control))
        check_whole("ready", self.ready)
        check_whole("draws", self.draws, least=0, most=MOST_DRAWS)
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength must be a finite number that is not negative, got {self.strength}")
        if not 0 <= self.warm_up <= self.switch <= 1:
            raise ConfigError(
                f"0 ≤ warm_up ≤ switch ≤ 1 must hold, got warm_up {self.warm_up} and switch {self.switch}"
            )

    @cached_property
    def pull(self) -> torch.Tensor | None:
        """[cells] float64, min(1, n / ready) · λ · (1/β) log(E / n); None without rewards."""
        table = self.table
        if table is None or self.control in ("gate", "entropy"):
            return None
        values, counts = table.values.flatten(), table.counts.flatten()
        if self.control == "counts":
            values = torch.full_like(values, table.overall)
        elif self.control == "shuffled":
            used = counts > 0
            order = uniform(key_of("shuffled", table.digest), torch.arange(int(used.sum()))).argsort()
            values = values.masked_scatter(used, values[used][order])
        if self.normalise:
            values = values - table.overall
        return (counts / self.ready).clamp(max=1) * self.strength * values

    def gate(self, elapsed: torch.Tensor) -> torch.Tensor:
        """G at a share [b] of the process, in [0, 1]."""
        if self.warm_up == self.switch:
            return (elapsed > self.warm_up).double()
        return ((elapsed - self.warm_up) / (self.switch - self.warm_up)).clamp(0, 1)

    def reward(self, view: StepView) -> torch.Tensor:
        """[b, W] float64, the process reward as it counts in this step."""
        if self.table is None or self.pull is None:
            return torch.zeros(view.masked.shape, dtype=torch.float64)
        course = view.course()
        cells = self.table.cells(course.elapsed[:, None], view.score, course.place)
        return self.gate(course.elapsed)[:, None] * self.pull[cells]

    def evidence(self, view: StepView) -> Evidence:
        """See `RevealRule`; no position where nothing is to be written."""
        return Evidence(needed_for(view, view.quota))

    def precedence(self, view: StepView) -> torch.Tensor:
        """[b, W] int64: the shortlist by score, the other open positions by score, then the rest by score."""
        weight = torch.where(view.weight > 0, view.weight.double(), 1.0)
        base = (view.score.double() * weight).clamp(min=_SMALLEST).log()
        reward = self.reward(view)
        score = -view.score.double() if self.control == "entropy" else base + reward
        width = view.masked.shape[1]
        place = ranks(score, descending=True)
        order = place - width * (view.masked.long() + view.open)
        if self.draws:
            return self._drawn(view, base, reward, order)
        listed = shortlist(base, view.open, view.quota, view.noise(REVEAL_NOISE))
        return order - width * listed

    def decide(self, view: StepView) -> Decision:
        """Take the first `quota` positions."""
        rank = ranks(self.precedence(view))
        return Decision(view.masked & (rank < view.quota[:, None]))

    def _drawn(
        self, view: StepView, base: torch.Tensor, reward: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """`order` [b, W] with the positions that soft best-of-N draws before all others."""
        free, order = view.open.clone(), order.clone()
        quota = torch.minimum(view.quota, free.sum(1))
        for token in range(int(quota.max()) if len(quota) else 0):
            first = _FIRST_DRAW + 2 * self.draws * token
            streams = range(first, first + 2 * self.draws)
            noise = torch.stack([view.noise(stream)[:, 0] for stream in streams], dim=1)
            pick = soft_best(base, reward, free, noise)
            picked = (torch.arange(free.shape[1]) == pick[:, None]) & free & (token < quota)[:, None]
            order = torch.where(picked, token - 4 * order.shape[1], order)
            free &= ~picked
        return order


def shortlist(
    base: torch.Tensor, free: torch.Tensor, number: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Draw positions in proportion to exp(base), without replacement (Gumbel top-k).

    Args:
        base: [b, W] float64, log confidences.
        free: [b, W] bool, positions that can be drawn.
        number: [b] int64, tokens k to be written; the shortlist has max(k, min(64, max(8, 4k))) positions.
        noise: [b, W] uniform numbers.

    Returns:
        [b, W] bool.
    """
    size = torch.maximum(number, (PER_TOKEN * number).clamp(LEAST, SHORTLIST))
    race = torch.where(free, base - (-noise.double().log()).log(), -torch.inf)
    rank = ranks(race, descending=True)
    return free & (rank < size[:, None])


def soft_best(
    base: torch.Tensor, reward: torch.Tensor, free: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Soft best-of-N: one of N candidates, by the softmax of their rewards.

    Args:
        base: [b, W] float64, log confidences; candidates are drawn in proportion to their exponentials.
        reward: [b, W] float64.
        free: [b, W] bool, positions that can be drawn; where there is none the result means nothing.
        noise: [b, 2N] uniform numbers, for the candidates and for the choice among them.

    Returns:
        [b] int64 positions.
    """
    where, choice = noise.double().chunk(2, dim=1)
    mass = torch.where(free, (base - base.amax(1, keepdim=True)).exp(), 0.0).cumsum(1)
    total = mass[:, -1:].clone()
    candidates = torch.searchsorted(mass, where * total, right=True).clamp(max=base.shape[1] - 1)
    race = reward.gather(1, candidates) - (-choice.log()).log()
    return candidates.gather(1, race.argmax(1, keepdim=True))[:, 0]
