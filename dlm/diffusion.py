"""The forward process: times, and rows with some of their tokens replaced by the mask token."""

from __future__ import annotations

import torch

from dlm.errors import ConfigError
from dlm.schedule import LogLinear, NoiseSchedule


def stratified_times(
    offset: torch.Tensor, slots: torch.Tensor, total: int, t_min: float = 1e-3
) -> torch.Tensor:
    """Times of the rows of one global batch: one in each of `total` equal strata of (t_min, 1].

    t_k = t_min + (1 - t_min) · frac(offset + k/total) (the low-discrepancy sampler of variational
    diffusion models, arXiv 2107.00630). Every row's own time is uniform, and the batch covers the range
    evenly. `t_min` bounds the 1/t weight, as in MDLM and LLaDA.

    Args:
        offset: scalar in (0, 1), shared by the global batch.
        slots: any shape, the place of each row in the global batch, 0 … total-1; for blocks of rows, places
            between and beyond those, which wrap around.
        total: rows in the global batch, over all processes and accumulated micro-batches.
        t_min: smallest time.

    Returns:
        Float32 times in the shape of `slots`.
    """
    fraction = torch.remainder(offset.double() + slots.double() / total, 1.0)
    return (t_min + (1 - t_min) * fraction).float()


def corrupt(
    x0: torch.Tensor,
    maskable: torch.Tensor,
    t: torch.Tensor,
    mask_id: int,
    generator: torch.Generator | None = None,
    *,
    noise: torch.Tensor | None = None,
    schedule: NoiseSchedule | None = None,
) -> torch.Tensor:
    """Mask each maskable position independently with probability 1 - alpha(t): a sample of q(x_t | x_0).

    Args:
        x0: [B, L] int64, clean rows.
        maskable: [B, L] bool, the positions that may be masked (never the prompt).
        t: [B] float, the time of each row, or [B, L] of each position.
        mask_id: id of the mask token.
        generator: source of the noise when `noise` is not given.
        noise: [B, L] uniform numbers of [0, 1) to use instead.
        schedule: noise schedule, log-linear by default.

    Returns:
        [B, L] int64, x_t.

    Raises:
        ConfigError: when the shapes do not fit.
    """
    if maskable.shape != x0.shape or t.shape not in (x0.shape[:1], x0.shape):
        raise ConfigError(
            f"corrupt needs x0 [B, L], maskable [B, L] and t [B] or [B, L]; got {tuple(x0.shape)}, "
            f"{tuple(maskable.shape)} and {tuple(t.shape)}"
        )
    if noise is None:
        noise = torch.rand(x0.shape, generator=generator, device=generator.device if generator else x0.device)
    probability = (schedule or LogLinear()).mask_probability(t.float())
    probability = probability if t.dim() == 2 else probability[:, None]
    return torch.where(maskable & (noise.to(x0.device) < probability), mask_id, x0)


def corrupt_exactly(
    x0: torch.Tensor, maskable: torch.Tensor, level: torch.Tensor, mask_id: int, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask a fixed number l of the n maskable positions, all sets of l being equally likely.

    With l uniform on 1 … n and weight n/l the mean is the NELBO, with no level left out: among so many masks
    the share l/n is known, where `corrupt` knows its mean only.

    Args:
        x0: [B, L] int64, clean rows.
        maskable: [B, L] bool, the positions that may be masked (never the prompt).
        level: [B] float of [0, 1), which of the n numbers of masks a row has.
        mask_id: id of the mask token.
        noise: [B, L] uniform numbers of [0, 1).

    Returns:
        x_t [B, L] int64, and [B] float32 the share l/n of masks, 1 in a row without maskable positions.
    """
    count = maskable.sum(1).clamp(min=1)
    masks = (1 + (level.double() * count).long()).minimum(count)
    order = torch.where(maskable, noise, 2.0).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1, stable=True)  # of each position among the maskable ones, which come first
    hit = maskable & (rank < masks[:, None])
    return torch.where(hit, mask_id, x0), (masks / count).float()
