"""The training objective: the continuous-time NELBO of a masked diffusion model (MDLM, arXiv 2406.07524)."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dlm.schedule import LogLinear, NoiseSchedule

_CHUNK = 4096
"""Cells per LM-head call in training; bounds the [cells, V] logits that live at once."""


def masked_diffusion_loss(
    token_logp: torch.Tensor,
    t: torch.Tensor,
    maskable_count: torch.Tensor | int | float,
    schedule: NoiseSchedule | None = None,
) -> torch.Tensor:
    """Monte-Carlo NELBO per maskable token, in nats: sum over masked tokens of -w(t) log p, over the count.

    w(t) = -alpha'(t) / (1 - alpha(t)), which is 1/t for the log-linear schedule whatever its eps: with
    u = (1 - eps) t the probability of a mask, the mean of this loss over t is the integral of S(u) / u from 0
    to 1 - eps, S(u) the expected nats of the masked tokens. The bound goes on to 1. Lacking is eps S(1),
    a thousandth of the nats of a row that is masked whole; another weight would bend the rest of the integral
    to make up for it. So training keeps 1/t (MDLM), and what is reported as NELBO, in validation and
    evaluation, draws fixed numbers of masks, which is the bound whatever the schedule.
    Unmasked tokens contribute nothing (SUBS: they predict themselves with probability 1), so only the
    masked ones are passed.

    Args:
        token_logp: [N] log p_theta(x_i | x_t) of the masked tokens.
        t: [N] time of the row that each token comes from.
        maskable_count: how many tokens could have been masked, in all rows; the divisor.
        schedule: noise schedule, log-linear by default (weight 1/t).

    Returns:
        Scalar, float32.
    """
    return weighted_loss(token_logp, (schedule or LogLinear()).weight(t.float()), maskable_count)


def weighted_loss(
    token_logp: torch.Tensor, weight: torch.Tensor, count: torch.Tensor | int | float
) -> torch.Tensor:
    """Scalar float32, -Σ weight · log p over a count; both [N], of the masked tokens."""
    return -(token_logp.float() * weight).sum() / count


def _token_logp(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float()
    if targets.dim() == 1:
        return -F.cross_entropy(logits, targets, reduction="none")
    logp = logits.gather(1, targets.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
    return torch.where(targets < 0, 0.0, logp)


def token_log_probabilities(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, chunk: int = _CHUNK
) -> torch.Tensor:
    """Log-probability of each target token, by an fp32 log-softmax over the vocabulary.

    Cells beyond `chunk` are treated in pieces whose logits are recomputed in the backward pass, so that
    memory does not grow with batch × vocabulary.

    Args:
        hidden: [N, D] states at the cells of interest.
        head: module from [n, D] to logits [n, V], the mask column -inf.
        targets: [N] int64, or [N, K] for K candidates at every cell, negative where there is none.
        chunk: cells per piece.

    Returns:
        Float32 in the shape of `targets`; 0 for a candidate that is none.
    """
    if len(hidden) <= chunk:
        return _token_logp(hidden, head, targets)
    pieces = [
        checkpoint(_token_logp, h, head, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(pieces)
