"""The k most probable tokens of many positions: PyTorch, and one pass over the logits on a GPU.

`top_probabilities` is the only door. On CUDA it runs a Triton kernel which reads every logit once and finds
the normaliser of the softmax and the k largest together; elsewhere, and for large k, the PyTorch version,
which is the kernel's reference. Both give the same up to the rounding of the normaliser. The kernel is
tested with Triton's interpreter on a CPU; it has not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

MOST = 64
"""Largest k that the kernel takes: it keeps the k best in registers."""

ROWS = 32
"""Positions that a CPU takes at a time."""

BLOCK = 1024
"""Logits that the kernel reads at a time."""


def top_probabilities(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens, and their probabilities over the whole vocabulary.

    Args:
        logits: [N, V], -inf at tokens that must not come out.
        k: how many, at most V.

    Returns:
        [N, k] float32 probabilities in falling order, and [N, k] int64 ids. Where logits are equal, which of
        the ids comes first is not defined.
    """
    if logits.is_cuda and k <= MOST and importlib.util.find_spec("triton") is not None:
        return by_triton(logits, k)
    return by_torch(logits, k)


def by_torch(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `top_probabilities`; two passes over the logits."""
    logits = logits.float()
    values, ids = logits.max(1, keepdim=True) if k == 1 else logits.topk(k, dim=1)
    return (values - log_normaliser(logits)).exp(), ids


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N, 1], log Σ exp; on a CPU a few rows at a time, which then stay in its cache."""
    if logits.is_cuda:
        return logits.logsumexp(1, keepdim=True)
    return torch.cat([rows.logsumexp(1, keepdim=True) for rows in logits.split(ROWS)])


def by_triton(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `top_probabilities`; one pass, k at most `MOST`."""
    logits = logits.contiguous()
    count, vocab = logits.shape
    probability = torch.empty(count, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(count, k, dtype=torch.int64, device=logits.device)
    room = 1 << max(k - 1, 1).bit_length()
    if count:
        _kernel()[(count,)](logits, probability, ids, vocab, k, ROOM=room, BLOCK=BLOCK)
    return probability, ids


@cache
def _kernel() -> Any:
    """The kernel, compiled when it is first wanted; Triton is imported here alone.

    A value and its token travel together as one 64-bit number whose order is that of the values: the upper
    half is the bits of the float, made monotonic, the lower half tells tokens apart. One program works on one
    position: it keeps the `ROOM` largest numbers seen, and the running normaliser Σ exp(x - max).
    """
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(logits, probability, ids, vocab, k, ROOM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        row = tl.program_id(0).to(tl.int64)
        best = tl.full([1, ROOM], -0x7FFFFFFFFFFFFFFF, tl.int64)
        highest = tl.full((), -float("inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for begin in range(0, vocab, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + row * vocab + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
            above = tl.maximum(highest, tl.max(x, axis=0))
            safe = tl.where(above == -float("inf"), 0.0, above)
            total = total * tl.exp(highest - safe) + tl.sum(tl.exp(x - safe), axis=0)
            highest = above
            bits = x.to(tl.int32, bitcast=True)
            order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            both = (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
            both = tl.where(token < vocab, both, -0x7FFFFFFFFFFFFFFF)
            top = tl.topk(both.reshape(1, BLOCK), ROOM)
            best = tl.topk(tl.join(best, top).reshape(1, 2 * ROOM), ROOM)
        found = best.reshape(ROOM)
        order = (found >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        place = tl.arange(0, ROOM)
        out = row * k + place
        tl.store(probability + out, tl.exp(value - highest) / total, mask=place < k)
        tl.store(ids + out, 0x7FFFFFFF - (found & 0xFFFFFFFF), mask=place < k)

    return kernel
