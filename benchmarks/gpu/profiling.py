"""The time of a call on a GPU: its kernels, the host's calls, and how long the GPU was idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.context import Context, seconds

LISTED = 12
"""Kernels and host operations that are listed."""


def profile(context: Context, name: str, call: Callable[[], Any], calls: int = 2) -> None:
    """Write down the kernels with the most time, the host's dearest operations, and the GPU's idle share.

    A failure of the profiler is a line of the report.
    """
    if context.done("profile", name):
        return
    try:
        measured = _measure(context, call, calls)
    except Exception as error:
        context.report.add("failures", f"profile: {name}", error=f"{type(error).__name__}: {error}"[:300])
        return
    context.report.add("profile", name, **measured)


def _measure(context: Context, call: Callable[[], Any], calls: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    usual = seconds(call, context.device, limit=0.0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    _wait(context)
    with profiler(activities=activities, acc_events=True) as recorded:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(context)
        took = time.perf_counter() - begun
    events = recorded.key_averages()
    kernels = [e for e in events if "cuda" in str(e.device_type).lower()]
    host = [e for e in events if e not in kernels]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    return {
        "ms": 1000 * usual,
        "ms_watched": 1000 * took / calls,
        "gpu_busy": busy / calls / usual,
        "kernels_a_call": sum(e.count for e in kernels) / calls,
        "top_kernels": _listed(kernels, "self_device_time_total", calls),
        "top_host": _listed(host, "self_cpu_time_total", calls),
    }


def _listed(events: list[Any], by: str, calls: int) -> str:
    """Name, milliseconds a call and count of the dearest events."""
    dearest = sorted(events, key=lambda e: -getattr(e, by))[:LISTED]
    return "; ".join(
        f"{e.key[:70]} {getattr(e, by) / 1000 / calls:.3g} ms x{e.count // calls}" for e in dearest
    )


def _wait(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()
