"""Axis 1 of a decoder, the window weight: how open each position is at this moment, from 0 (shut) to 1.

A window sees which positions are already written, never the model's opinion. Weight 0 means that the
position can neither be revealed nor change the normaliser, so its logits are not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from dlm.errors import ConfigError, check_whole

OPEN_AHEAD = 56
"""Positions beyond a known token that can open, of a window that names no other number."""

MARGIN = 16
"""Masks that a growing canvas holds beyond those that can open, so that their state sees what is behind."""


class Window:
    """A window; a new one overrides `weights` and whatever else differs from these defaults.

    The defaults: one stage, one time for the whole row, everything may open.
    """

    timed: ClassVar[bool] = False
    """True where positions have times of their own, so that the pace must be a number of steps."""

    def fitted(self, length: int) -> Window:
        """Return this window with sizes that were left open chosen for `length` positions."""
        del length
        return self

    @property
    def ahead(self) -> int:
        """Number of positions beyond a known token that can open; a growing canvas holds a few more."""
        return OPEN_AHEAD

    def weights(
        self, unmasked: torch.Tensor, *, start: torch.Tensor | None = None, stage: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weights in [0, 1]; by default all 1.

        Args:
            unmasked: [B, L] bool, real positions that hold a token (prompt, pinned or revealed).
            start: [B] int64, where each row's answer begins; 0 by default.
            stage: [B] int64, the stage each row is in (its block); by default the first with a mask.

        Returns:
            [B, L] float32.
        """
        del start, stage
        return torch.ones(unmasked.shape, device=unmasked.device)

    def times(
        self, t: torch.Tensor, s: torch.Tensor, start: torch.Tensor, end: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Times of the positions, from the row's times t and s [B] before and after the step.

        Args:
            t: [B] time of the row before the step.
            s: [B] time after it.
            start: [B] int64, where each row's answer begins.
            end: [B] int64, where it ends at the latest.
            length: L.

        Returns:
            Times before and after, [B] or [B, L]; and [B, L] or [B, 1] bool, where the process is under way.
        """
        del start, end, length
        return t, s, torch.ones(len(t), 1, dtype=torch.bool, device=t.device)

    def alone(self, masked: torch.Tensor) -> torch.Tensor | None:
        """[B, L] bool, masks before which no other of their row may be written; None where there are none.

        Args:
            masked: [B, L] bool, the masks of the stage.
        """
        del masked
        return None

    def current(self, masked: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """[B] int64, the stage that a row with the masks [B, L] is in."""
        del masked
        return torch.zeros_like(start)

    def stages(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """[B] int64, how many stages, each with its own time from 1 to 0, a row goes through."""
        del end
        return torch.ones_like(start)

    def scope(self, start: torch.Tensor, stage: torch.Tensor, length: int) -> torch.Tensor:
        """[B, L] bool, the positions that belong to the process of this stage (|M| counts only these)."""
        del stage
        return torch.ones(len(start), length, dtype=torch.bool, device=start.device)


@dataclass(frozen=True)
class _Sized(Window):
    """A window that is so many positions wide."""

    size: int | None = None

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size is not None:
            check_whole(f"{type(self).__name__.lower()} size", self.size)

    def fitted(self, length: int) -> Self:
        """With a size for a canvas of `length` where none was given: a quarter of it."""
        return self if self.size is not None else replace(self, size=max(1, length // 4))

    @property
    def ahead(self) -> int:
        """See `Window`: the whole of it."""
        return self.size or 1

    def _size(self, length: int) -> int:
        return self.fitted(length).size or 1


@dataclass(frozen=True)
class Full(Window):
    """Every position is open: w = 1."""


@dataclass(frozen=True)
class Convolution(Window):
    """Convolutional window (arXiv 2509.15188): w_i = tanh(c · u_i), u_i the tokens within reach of i.

    Attributes:
        kernel_size: K, odd; the reach is r = (K-1)/2 positions to either side. None for the odd number
            next above a quarter of the window (the paper's choice).
        scale: c.
    """

    kernel_size: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check that the kernel has a centre."""
        k = self.kernel_size
        if isinstance(k, int) and (k < 1 or k % 2 == 0):
            near = f"{k - 1} or {k + 1}" if k > 1 else "1 or 3"
            raise ConfigError(f"kernel_size must be odd and positive, got {k}; use {near}")
        if k is not None:
            check_whole("kernel_size", k)
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale must be a finite positive number, got {self.scale}")

    @property
    def ahead(self) -> int:
        """See `Window`: the reach."""
        return ((self.kernel_size or 1) - 1) // 2

    def fitted(self, length: int) -> Convolution:
        """With K for a window of `length` where none was given."""
        return self if self.kernel_size is not None else replace(self, kernel_size=length // 4 // 2 * 2 + 1)

    def weights(
        self, unmasked: torch.Tensor, *, start: torch.Tensor | None = None, stage: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tanh of the number of neighbours that hold a token; see `Window.weights`."""
        del start, stage
        size, length = self.fitted(unmasked.shape[1]).kernel_size, unmasked.shape[1]
        assert size is not None
        reach = min((size - 1) // 2, length)  # beyond the row there is nothing to see
        padded = torch.nn.functional.pad(unmasked.int(), (reach + 1, reach))
        total = padded.cumsum(1, dtype=torch.int32)  # [B, L + 2r + 1]
        weight = total[:, 2 * reach + 1 :] - total[:, :length]
        return torch.tanh(self.scale * weight.float())


@dataclass(frozen=True)
class Block(_Sized):
    """Semi-autoregressive blocks, left to right: w = 1 inside the current block, 0 outside.

    Blocks are counted from the end of the prompt. Each is a stage of its own, with its share of the steps.

    Attributes:
        size: positions per block; None for a quarter of the window.
        aligned: blocks are counted from the first position of the row.
    """

    aligned: bool = False

    def _origin(self, start: torch.Tensor, length: int) -> torch.Tensor:
        """[B] where the block of `start` [B] begins."""
        return start // self._size(length) * self._size(length) if self.aligned else start

    def current(self, masked: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """[B] number of the block that holds the first mask."""
        length = masked.shape[1]
        first = torch.where(masked, torch.arange(length, device=masked.device), length).amin(1)
        return torch.clamp((first - self._origin(start, length)) // self._size(length), min=0)

    def stages(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """[B] number of blocks between the prompt's end and the row's; of a block whose size is known."""
        length = int(end.max())
        return torch.clamp(-((self._origin(start, length) - end) // self._size(length)), min=1)

    def scope(self, start: torch.Tensor, stage: torch.Tensor, length: int) -> torch.Tensor:
        """[B, L] bool, the positions of block number `stage`."""
        position = torch.arange(length, device=start.device)
        origin = self._origin(start, length)[:, None]
        block = torch.div(position - origin, self._size(length), rounding_mode="floor")
        return block == stage[:, None]

    def weights(
        self, unmasked: torch.Tensor, *, start: torch.Tensor | None = None, stage: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One inside the current block; see `Window.weights`."""
        length = unmasked.shape[1]
        if start is None:
            start = torch.zeros(len(unmasked), dtype=torch.int64, device=unmasked.device)
        if stage is None:
            stage = self.current(~unmasked, start)
        return self.scope(start, stage, length).float()


@dataclass(frozen=True)
class Within(Window):
    """Another window, inside the blocks of a block-causal model: nothing opens beyond the current block.

    Blocks are counted from the first position of the row, as the model sees them. Each is a stage of its own.

    Attributes:
        inner: the other window.
        size: positions per block.
        lead: with a shift the first position of a block is predicted by the block before it; it is written
            first, and alone, as Fast-dLLM v2 does. With a number of steps a rule that falls behind writes
            others beside it, so that each block is done in its steps.
    """

    inner: Window
    size: int
    lead: bool = False

    @property
    def _blocks(self) -> Block:
        return Block(self.size, aligned=True)

    def fitted(self, length: int) -> Window:
        """With sizes of the inner window; see `Window`."""
        return replace(self, inner=self.inner.fitted(length))

    @property
    def ahead(self) -> int:
        """See `Window`: a block, so that it is whole from the start."""
        return self.size

    def current(self, masked: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """[B] number of the block that holds the first mask, that of `start` being 0."""
        return self._blocks.current(masked, start)

    def stages(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """[B] number of blocks that hold a position to be written."""
        return self._blocks.stages(start, end)

    def scope(self, start: torch.Tensor, stage: torch.Tensor, length: int) -> torch.Tensor:
        """[B, L] bool, the positions of block number `stage`."""
        return self._blocks.scope(start, stage, length)

    def weights(
        self, unmasked: torch.Tensor, *, start: torch.Tensor | None = None, stage: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weights of the inner window inside the current block; see `Window.weights`."""
        if start is None:
            start = torch.zeros(len(unmasked), dtype=torch.int64)
        block = self.current(~unmasked, start) if stage is None else stage
        inside = self.scope(start, block, unmasked.shape[1])
        weight = self.inner.weights(unmasked, start=start) * inside
        first = self.alone(inside & ~unmasked)
        return weight if first is None else torch.where(first.any(1, keepdim=True), first.float(), weight)

    def alone(self, masked: torch.Tensor) -> torch.Tensor | None:
        """[B, L] bool, the first positions of blocks, with a lead; see `Window`."""
        return masked & (torch.arange(masked.shape[1]) % self.size == 0) if self.lead else None


@dataclass(frozen=True)
class Sliding(_Sized):
    """A window that slides over the row, in which later positions have later times (sliding annealing).

    Its left edge e moves by N/S positions a step, N being those that are to be written. Position number o
    (from 0) has the time clip((o + 1 - e) / size, 0, 1): it begins to be written when the window reaches
    it, and whatever the left edge has passed is written. Described, and found wanting at many tokens a
    step, in appendix E of arXiv 2509.15188.

    Attributes:
        size: positions in the window; None for a quarter of the canvas.
    """

    timed: ClassVar[bool] = True

    def times(
        self, t: torch.Tensor, s: torch.Tensor, start: torch.Tensor, end: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Times of their own for the positions in the window; see `Window.times`."""
        size, count = self._size(length), (end - start)[:, None]
        place = torch.arange(length, device=t.device) + 1 - start[:, None]
        t_local, s_local = (
            ((place - (1 - time.double()[:, None]) * count) / size).clamp(0, 1) for time in (t, s)
        )
        return t_local, s_local, s_local < 1
