"""Stage `kernels`: the kernel of a decoding step against PyTorch, and against reading the logits once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.context import Context, ceilings, free, once, seconds

K = 20
VOCABULARIES = (49_153, 151_936, 32_000, 126_464)
CELLS = (64, 1, 4096, 1024, 16, 256)
CACHE = 256 * 2**20
"""Bytes of inputs that calls take turns with, so that none finds its own in the cache."""

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def composition(logits: torch.Tensor, noise: torch.Tensor, k: int) -> Found:
    """Token, its probability and the mass of the k best of each row [N, V], by PyTorch."""
    values, ids = logits.topk(k, dim=-1)
    best = (values.float() - logits.float().logsumexp(-1, keepdim=True)).exp()
    cumulative = best.cumsum(-1)
    mass = cumulative[:, -1]
    place = (cumulative <= noise[:, None] * mass[:, None]).sum(-1, keepdim=True).clamp(max=k - 1)
    return ids.gather(-1, place)[:, 0], best.gather(-1, place)[:, 0], mass


def run(context: Context) -> None:
    """Every size, the most telling first."""
    try:
        import triton  # noqa: F401
    except ImportError:
        context.report.add("kernels", "triton", state="not installed: nothing to measure")
        return
    compiled = None if context.tiny else torch.compile(composition, dynamic=True)
    for vocab in (300,) if context.tiny else VOCABULARIES:
        for cells in (4,) if context.tiny else CELLS:
            name = f"V={vocab}, N={cells}"
            if not context.skip("kernels", name, 3.0):
                measure(context, name, cells, vocab, compiled)
                free(context.device)


def measure(context: Context, name: str, cells: int, vocab: int, compiled: Any) -> None:
    """Times of the kernel, of PyTorch, of PyTorch compiled; what the kernel has of the bandwidth."""
    from benchmarks.gpu.step_kernel import choose

    dtype = torch.bfloat16 if context.cuda else torch.float32
    size = cells * vocab * dtype.itemsize
    copies = 2 if context.tiny else min(64, max(1, CACHE // size))
    logits = [torch.randn(cells, vocab, device=context.device).to(dtype) * 4 for _ in range(copies)]
    noise = torch.rand(cells, device=context.device) * 0.998 + 0.001
    off = compare(choose(logits[0], noise, K), composition(logits[0].float(), noise, K))
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "kernel": lambda x: choose(x, noise, K),
        "torch": lambda x: composition(x, noise, K),
    }
    if compiled is not None:
        ways["compiled"] = lambda x: compiled(x, noise, K)
    took: dict[str, float] = {}
    for way, call in ways.items():
        try:
            took[way] = in_turn(call, logits, context)
        except Exception as error:
            context.report.add("failures", f"kernels, {name}, {way}", error=str(error)[:300])
    bound = size / ceilings(context)["copy"]
    ours = took.get("kernel", float("nan"))
    best = min((value for way, value in took.items() if way != "kernel"), default=float("nan"))
    context.report.add(
        "kernels", name, **{f"{way}_us": 1e6 * value for way, value in took.items()}, bound_us=1e6 * bound,
        of_bandwidth=bound / ours, times_faster=best / ours, **off,
    )  # fmt: skip


def in_turn(call: Callable[[torch.Tensor], Any], logits: list[torch.Tensor], context: Context) -> float:
    """Seconds of a call, over inputs that take turns; by a CUDA graph, so that launches cost nothing."""
    if not context.cuda:
        return once(lambda: call(logits[0]), context.device)
    for x in logits[:2]:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(logits[0])
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for x in logits:
            call(x)
    return seconds(graph.replay, context.device, 0.2, 50) / len(logits)


def compare(found: Found, expected: Found) -> dict[str, float]:
    """Distance of the kernel's masses and tokens from PyTorch's, in float32 on the same logits."""
    off = (found[2] - expected[2]).abs().div(expected[2]).max()
    return {"mass_off": float(off), "same_tokens": float((found[0] == expected[0]).float().mean())}
