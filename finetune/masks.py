"""Masks of training beyond the uniform ones: along the path of a decoder, and in complementary pairs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from decoding.window import Convolution
from dlm.data.windows import TensorBatch
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.noising import Blocks, draws, with_targets
from dlm.schedule import LogLinear, NoiseSchedule


def path_noise(
    batch: TensorBatch,
    slots: torch.Tensor,
    total: int,
    seed: int,
    step: int,
    mask_id: int,
    kernel_size: int,
    blocks: Blocks | None = None,
) -> TensorBatch:
    """A training batch with masks as a convolutional decoder meets them on its way to the true answer.

    See `path_masks`. In blocks each block has a path of its own, from the clean text before it, which begins
    behind the lead; the lead is predicted with weight 1. Arguments as for `dlm.noising.add_noise`.
    """
    key = key_of(seed, "path", step, device=slots.device)
    length = batch["input_ids"].shape[1]
    size, reach = (blocks.size, min(kernel_size // 2, length)) if blocks else (length, 0)
    count = -(-length // size)
    places = blocks.places(slots, total, length)[:, ::size] if blocks else slots[:, None].double()
    share = torch.remainder(uniform(key, -1).double() + places / total, 1.0)  # [B, blocks]
    lead = blocks.leads(batch["maskable"]) if blocks else torch.zeros_like(batch["maskable"])

    def pieces(x: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B · blocks, reach + size]: each block behind as many positions as its kernel reaches."""
        return F.pad(x, (reach, -length % size)).unfold(1, reach + size, size).flatten(0, 1)

    def row(x: torch.Tensor) -> torch.Tensor:
        """[B · blocks, reach + size] -> [B, L], without what was put before the blocks."""
        return x[:, reach:].reshape(-1, count * size)[:, :length]

    cells = pieces(batch["maskable"] & ~lead)
    cells[:, :reach] = False  # of the block before, and clean
    position = torch.arange(count, device=slots.device)[:, None] * size - reach
    position = position + torch.arange(reach + size, device=slots.device)
    masked, weight = path_masks(
        cells,
        pieces(batch["attention_mask"].bool()),
        share.flatten(),
        fold(key, slots).repeat_interleave(count),
        position.repeat(len(slots), 1),
        kernel_size,
    )
    masked, weight = row(masked), row(weight)
    noisy = torch.where(masked, mask_id, batch["input_ids"])
    t = 1 - share.float()
    t = t.repeat_interleave(size, dim=1)[:, :length] if blocks else t[:, 0]
    out = with_targets(batch, t, weight, noisy, mask_id, lead)
    return {**out, "targets": torch.where(out["weight"] > 0, out["targets"], IGNORE)}


def path_masks(
    cells: torch.Tensor,
    real: torch.Tensor,
    share: torch.Tensor,
    key: torch.Tensor,
    position: torch.Tensor,
    kernel_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks on the paths of a convolutional decoder, and the weights of their -log p.

    Positions are written one by one, drawn in proportion to the window weight w (first hitting with equal
    confidence). With n positions to write and k of them written,

        -log p(x) ≤ n · E_k E_path[Σ_i w_i / Σ_j w_j · -log p(x_i | x_t)]

    with k uniform on 0 … n-1: the bound of that order. Only masks with a weight are predicted. One position
    after another is written, so that no noise schedule has a part in it.

    Args:
        cells: [N, W] bool, the positions to write.
        real: [N, W] bool, positions that hold a token; those that are no cells are known from the start.
        share: [N] float of [0, 1), which of the n numbers k is.
        key: [N] int64, noise keys.
        position: [N, W] int64, which of its key's random numbers each position has.
        kernel_size: of the convolution, odd.

    Returns:
        [N, W] bool masks, and [N, W] float32 weights n · w / Σ w. One written token after the other is drawn,
        on the host.
    """
    device = cells.device
    masked, real, share, key, position = (x.cpu() for x in (cells.clone(), real, share, key, position))
    count = masked.sum(1)
    written = (share * count).long()
    window = Convolution(kernel_size)

    def weights() -> torch.Tensor:
        weight = torch.where(masked, window.weights(real & ~masked), 0.0)
        return torch.where(weight.any(1, keepdim=True), weight, masked.float())  # nothing to begin from

    place = torch.arange(masked.shape[1])
    for step in range(int(written.max()) if len(written) else 0):
        wait = -uniform(fold(key, step)[:, None], position).log() / weights()  # infinite without weight
        first = torch.where(masked, wait, torch.inf).argmin(1, keepdim=True)
        masked &= ~((place == first) & (step < written)[:, None])
    weight = weights()
    weight = count[:, None] * weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    return masked.to(device), weight.to(device)


def complementary_noise(
    batch: TensorBatch,
    slots: torch.Tensor,
    total: int,
    seed: int,
    step: int,
    mask_id: int,
    schedule: NoiseSchedule | None = None,
    blocks: Blocks | None = None,
) -> TensorBatch:
    """A training batch of twice the rows: masks with probability m, then all others, of probability 1 - m.

    With m(t) the schedule's share of masks at the time t, both halves are samples of a forward process, whose
    weights m'(t)/m and m'(t)/(1 - m) give the NELBO; and every token is predicted once (Fast-dLLM v2, arXiv
    2509.26328, section 3.1). Arguments as for `dlm.noising.add_noise`.
    """
    schedule = schedule or LogLinear()
    key = key_of(seed, "complementary", step, device=slots.device)
    ids, maskable = batch["input_ids"], batch["maskable"]
    lead, times, noise = draws(batch, slots, total, key, blocks)
    t = (times if times.dim() == 2 else times[:, None]).expand(ids.shape)
    m = schedule.mask_share(t)
    speed = schedule.weight(t) * m  # m'(t), 1 where the schedule is log-linear
    hidden = maskable & ~lead & (noise < m)
    halves = []
    for masks, probability in ((hidden, m), (maskable & ~lead & ~hidden, 1 - m)):
        noisy = torch.where(masks, mask_id, ids)
        weight = speed / probability.clamp(min=1e-3)
        halves.append(with_targets(batch, probability, weight, noisy, mask_id, lead))
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
