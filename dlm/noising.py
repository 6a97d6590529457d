"""Batches with noise: noisy ids, times and targets, for training and for validation.

The noise of a training row depends on (seed, step, place in the global batch) only, that of a validation row
on its number and the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dlm.data.windows import TensorBatch
from dlm.diffusion import corrupt, corrupt_exactly, stratified_times
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.schedule import LogLinear, NoiseSchedule
from dlm.spec import ModelSpec

GOLDEN = 0.6180339887498949
"""Offset between neighbours that spreads any number of them evenly over (0, 1)."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of a block-causal model, each with a noise level of its own (BD3LM, arXiv 2503.09573).

    Attributes:
        size: positions per block, counted from the first of the row.
        lead: whether the first position of a block is known when the others are written; then it is never
            masked, and its own loss has weight 1.
    """

    size: int
    lead: bool = False

    @classmethod
    def of(cls, spec: ModelSpec) -> Blocks | None:
        """The blocks of a model; None where every position sees its whole row."""
        size = spec.visibility.block_size
        return None if size is None else cls(size, spec.leads)

    def leads(self, maskable: torch.Tensor) -> torch.Tensor:
        """[B, L] bool, the maskable positions that are written first in their blocks."""
        if not self.lead:
            return torch.zeros_like(maskable)
        place = torch.arange(maskable.shape[1], device=maskable.device)
        return maskable & (place % self.size == 0) & (place > 0)

    def places(self, slots: torch.Tensor, total: int, length: int) -> torch.Tensor:
        """[B, L] float64 places for `stratified_times`: those of the rows [B], moved from block to block."""
        number = torch.arange(length, device=slots.device) // self.size
        return slots[:, None] + total * GOLDEN * number.double()


def draws(
    batch: TensorBatch, slots: torch.Tensor, total: int, key: torch.Tensor, blocks: Blocks | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Randomness of a training batch.

    Args:
        batch: from `WindowCollator`.
        slots: [B] int64, the rows' places in the global batch of `total` rows.
        total: rows in the global batch.
        key: of the noise.
        blocks: those of a block-causal model.

    Returns:
        [B, L] bool the leads of blocks; times [B], or [B, L] in blocks; [B, L] uniform numbers of (0, 1).
    """
    ids, maskable = batch["input_ids"], batch["maskable"]
    lead = blocks.leads(maskable) if blocks else torch.zeros_like(maskable)
    places = blocks.places(slots, total, ids.shape[1]) if blocks else slots
    times = stratified_times(uniform(key, -1), places, total)
    return lead, times, uniform(fold(key, slots)[:, None], torch.arange(ids.shape[1], device=ids.device))


def add_noise(
    batch: TensorBatch,
    slots: torch.Tensor,
    total: int,
    seed: int,
    step: int,
    mask_id: int,
    schedule: NoiseSchedule | None = None,
    blocks: Blocks | None = None,
) -> TensorBatch:
    """A training batch with its noise.

    Args:
        batch: from `WindowCollator`.
        slots: [B] int64, the rows' places in the global batch of `total` rows.
        total: rows in the global batch.
        seed: seed of the run.
        step: optimiser step.
        mask_id: id of the mask token.
        schedule: noise schedule, log-linear by default.
        blocks: those of a block-causal model.

    Returns:
        The batch and `t` [B], or [B, L] in blocks, `noisy_ids` [B, L], `targets` [B, L] (-100 where there is
        no loss) and `weight` [B, L], of each target's -log p in the NELBO.
    """
    key = key_of(seed, "noise", step, device=slots.device)
    ids, maskable = batch["input_ids"], batch["maskable"]
    lead, times, noise = draws(batch, slots, total, key, blocks)
    noisy = corrupt(ids, maskable & ~lead, times, mask_id, noise=noise, schedule=schedule)
    return with_targets(batch, times, (schedule or LogLinear()).weight(times), noisy, mask_id, lead)


def add_eval_noise(
    batch: TensorBatch, draw: int, draws: int, mask_id: int, blocks: Blocks | None = None
) -> TensorBatch:
    """A validation batch with noise that depends on the row's number and on `draw` (of `draws`) alone.

    The numbers of masks of a row are evenly spaced over its draws, and rows are offset against each other by
    the golden ratio. See `add_exact_noise`.
    """
    rows = batch["row"]
    offset = torch.remainder(rows.double() * GOLDEN, 1.0)
    level = torch.remainder(offset + draw / draws, 1.0)
    keys = fold(key_of("validation", draw, device=rows.device), rows)
    return add_exact_noise(batch, level, keys, mask_id, blocks)


def add_exact_noise(
    batch: TensorBatch, level: torch.Tensor, key: torch.Tensor, mask_id: int, blocks: Blocks | None = None
) -> TensorBatch:
    """A batch in which a row, or each of its blocks, has a fixed number of masks (`corrupt_exactly`).

    `t` is their share, so that weights of 1/t give the NELBO. Over uniform levels the weighted -log p of a
    row has the mean of the bound, whatever the schedule. Two rows of the same level, key and maskable
    positions have the same masks.

    Args:
        batch: from `WindowCollator`.
        level: [B] float64 of [0, 1), which number of masks a row has; blocks are offset against each other by
            the square of the golden ratio.
        key: [B] int64, of the noise that chooses the positions.
        mask_id: id of the mask token.
        blocks: those of a block-causal model.

    Returns:
        The batch and what `with_targets` adds.
    """
    ids, maskable = batch["input_ids"], batch["maskable"]
    noise = uniform(key[:, None], torch.arange(ids.shape[1], device=ids.device))
    if blocks is None:
        noisy, share = corrupt_exactly(ids, maskable, level, mask_id, noise)
        return with_targets(batch, share, 1 / share, noisy, mask_id)
    lead = blocks.leads(maskable)
    width = ids.shape[1]

    def cut(x: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B · blocks, size]."""
        padded = F.pad(x, (0, -width % blocks.size))
        return padded.reshape(-1, blocks.size)

    count = -(-width // blocks.size)
    levels = torch.remainder(level[:, None] + GOLDEN**2 * torch.arange(count, device=ids.device), 1.0)
    pieces, shares = corrupt_exactly(cut(ids), cut(maskable & ~lead), levels.flatten(), mask_id, cut(noise))
    noisy = pieces.unflatten(0, (-1, count)).flatten(1)[:, :width]
    share = shares.unflatten(0, (-1, count)).repeat_interleave(blocks.size, dim=1)[:, :width]
    return with_targets(batch, share, 1 / share, noisy, mask_id, lead)


def with_targets(
    batch: TensorBatch,
    t: torch.Tensor,
    weight: torch.Tensor,
    noisy: torch.Tensor,
    mask_id: int,
    lead: torch.Tensor | None = None,
) -> TensorBatch:
    """A batch with its noisy rows, what they are to become, and with what weight.

    Args:
        batch: from `WindowCollator`.
        t: [B] or [B, L] times.
        weight: [B] or [B, L], of a masked token's -log p.
        noisy: [B, L] int64.
        mask_id: id of the mask token.
        lead: [B, L] bool, positions that are predicted though they are visible, with weight 1.
    """
    hit = batch["maskable"] & (noisy == mask_id)
    weight = (weight[:, None] if weight.dim() == 1 else weight).expand(noisy.shape)
    if lead is not None:
        hit, weight = hit | lead, torch.where(lead, 1.0, weight)
    targets = torch.where(hit & batch["loss_mask"], batch["input_ids"], IGNORE)
    return {**batch, "t": t, "noisy_ids": noisy, "targets": targets, "weight": weight}
