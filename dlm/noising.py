"""Batches with noise: noisy ids, times and targets, for training and for validation.

The noise of a training row depends on (seed, step, place in the global batch) only, that of a validation row
on its number and the draw.
"""

from __future__ import annotations

import torch

from dlm.data.windows import Batch
from dlm.diffusion import corrupt, corrupt_exactly, stratified_times
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.schedule import NoiseSchedule


def add_noise(
    batch: Batch,
    slots: torch.Tensor,
    total: int,
    seed: int,
    step: int,
    mask_id: int,
    schedule: NoiseSchedule | None = None,
) -> Batch:
    """A training batch with its noise.

    Args:
        batch: from `WindowCollator`.
        slots: [B] int64, the rows' places in the global batch of `total` rows.
        total: rows in the global batch.
        seed: seed of the run.
        step: optimiser step.
        mask_id: id of the mask token.
        schedule: noise schedule, log-linear by default.

    Returns:
        The batch and `t` [B], `noisy_ids` [B, L], `targets` [B, L] (-100 where there is no loss).
    """
    key = key_of(seed, "noise", step, device=slots.device)
    times = stratified_times(uniform(key, -1), slots, total)
    ids = batch["input_ids"]
    noise = uniform(fold(key, slots)[:, None], torch.arange(ids.shape[1], device=ids.device))
    noisy = corrupt(ids, batch["maskable"], times, mask_id, noise=noise, schedule=schedule)
    return _with_targets(batch, times, noisy, mask_id)


def add_eval_noise(batch: Batch, draw: int, draws: int, mask_id: int) -> Batch:
    """A validation batch with noise that depends on the row's number and on `draw` (of `draws`) alone.

    A row has a fixed number of masks in each draw (`corrupt_exactly`), and `t` is their share, so that
    weights of 1/t give the NELBO. The numbers of a row are evenly spaced over its draws, and rows are offset
    against each other by the golden ratio.
    """
    rows = batch["row"]
    offset = torch.remainder(rows.double() * 0.6180339887498949, 1.0)
    level = torch.remainder(offset + draw / draws, 1.0)
    ids, maskable = batch["input_ids"], batch["maskable"]
    keys = fold(key_of("validation", draw, device=rows.device), rows)
    noise = uniform(keys[:, None], torch.arange(ids.shape[1], device=ids.device))
    noisy, share = corrupt_exactly(ids, maskable, level, mask_id, noise)
    return _with_targets(batch, share, noisy, mask_id)


def _with_targets(batch: Batch, t: torch.Tensor, noisy: torch.Tensor, mask_id: int) -> Batch:
    hit = batch["maskable"] & (noisy == mask_id) & batch["loss_mask"]
    targets = torch.where(hit, batch["input_ids"], IGNORE)
    return {**batch, "t": t, "noisy_ids": noisy, "targets": targets}
