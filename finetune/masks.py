"""Masks of training beyond the uniform ones: along the path of a decoder, and in complementary pairs."""

from __future__ import annotations

import torch

from decoding.window import Convolution
from dlm.data.windows import TensorBatch
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.noising import Blocks, draws, with_targets
from dlm.schedule import LogLinear, NoiseSchedule

Weighted = tuple[torch.Tensor, torch.Tensor]
"""[B, L] bool masks, and [B, L] float32 weights of their -log p."""


def path_masks(batch: TensorBatch, share: torch.Tensor, key: torch.Tensor, kernel_size: int) -> Weighted:
    """Masks as a convolutional decoder meets them on its way to the true answer.

    Positions are written one by one, drawn in proportion to the window weight w (first hitting with equal
    confidence). With n positions to write and k of them written,

        -log p(x) ≤ n · E_k E_path[Σ_i w_i / Σ_j w_j · -log p(x_i | x_t)]

    with k uniform on 0 … n-1: the bound of that order. Only masks with a weight are predicted. One position
    after another is written, so that no noise schedule has a part in it.

    Args:
        batch: from `WindowCollator`.
        share: [B] float of [0, 1), which of the n numbers a row has.
        key: [B] int64, noise keys of the rows.
        kernel_size: of the convolution, odd.

    Returns:
        Masks, and weights n · w / Σ w. One written token after the other is drawn, on the host.
    """
    device = batch["maskable"].device
    masked, real, share, key = (
        x.cpu() for x in (batch["maskable"].clone(), batch["attention_mask"].bool(), share, key)
    )
    count = masked.sum(1)
    written = (share * count).long()
    window, position = Convolution(kernel_size), torch.arange(masked.shape[1])

    def weights() -> torch.Tensor:
        weight = torch.where(masked, window.weights(real & ~masked), 0.0)
        return torch.where(weight.any(1, keepdim=True), weight, masked.float())  # nothing to begin from

    for step in range(int(written.max()) if len(written) else 0):
        wait = -uniform(fold(key, step)[:, None], position).log() / weights()  # infinite without weight
        first = torch.where(masked, wait, torch.inf).argmin(1, keepdim=True)
        masked &= ~((position == first) & (step < written)[:, None])
    weight = weights()
    weight = count[:, None] * weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    return masked.to(device), weight.to(device)


def path_noise(
    batch: TensorBatch, slots: torch.Tensor, total: int, seed: int, step: int, mask_id: int, kernel_size: int
) -> TensorBatch:
    """A training batch whose masks are those of `path_masks`; arguments as for `dlm.noising.add_noise`."""
    key = key_of(seed, "path", step, device=slots.device)
    share = torch.remainder(uniform(key, -1).double() + slots.double() / total, 1.0)
    masked, weight = path_masks(batch, share, fold(key, slots), kernel_size)
    noisy = torch.where(masked, mask_id, batch["input_ids"])
    out = with_targets(batch, 1 - share.float(), weight, noisy, mask_id)
    return {**out, "targets": torch.where(weight > 0, out["targets"], IGNORE)}


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
