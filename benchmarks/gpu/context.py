"""The surroundings of a stage: device, material, time, and where results go."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.pieces import SUMS, cut, packed
from benchmarks.gpu.report import Report


class MaterialError(Exception):
    """Raised where something that a stage needs is not there."""


@dataclass
class Context:
    """A run of some stages.

    Attributes:
        device: where models are.
        tiny: everything in miniature, on models made here.
        output: folder of the run: report, training runs, answers.
        report: the results so far.
        rows: encoded rows to train on (`dlm.data.encoded`), where there are any.
        questions: questions to answer, where there are any.
        deliver: folder that results and pieces are copied to as well; for machines that give few files back.
        changes: of the recipe of stage `train`, by dotted names, values as YAML.
        until: when the present stage has to end, on `time.monotonic`.
    """

    device: torch.device
    tiny: bool
    output: Path
    report: Report
    rows: Path | None = None
    questions: Path | None = None
    deliver: Path | None = None
    changes: dict[str, str] = field(default_factory=dict)
    until: float = float("inf")

    @property
    def cuda(self) -> bool:
        """True where there is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that the present stage has left."""
        return self.until - time.monotonic()

    def done(self, stage: str, name: str) -> bool:
        """True where a result of that name is there already."""
        return self.report.find(stage, name) is not None

    def skip(self, stage: str, name: str, seconds: float) -> bool:
        """True for a measurement that is done, or would not end in time."""
        if self.done(stage, name):
            return True
        if self.left < seconds:
            print(f"[{stage}] {name}: left out, {self.left:.0f} s are left", flush=True)
            return True
        return False

    def hand_over(self, name: str, folder: Path, *patterns: str) -> None:
        """Cut the files of a folder that fit the patterns into pieces, and copy the report."""
        files = [path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()]
        pieces = cut(packed(files, folder), self.output / "pieces", name)
        self.report.add("pieces", name, count=len(pieces), bytes=sum(p.stat().st_size for p in pieces))
        self._copy(*pieces, pieces[0].parent / SUMS)
        self.copy_report()

    def copy_report(self) -> None:
        """Copy the report to where results are fetched."""
        self._copy(self.report.lines, self.report.page)

    def _copy(self, *files: Path) -> None:
        if self.deliver:
            self.deliver.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, self.deliver / file.name)


def seconds(call: Any, device: torch.device, limit: float = 0.3, most: int = 200) -> float:
    """Median seconds of a call, by events of the GPU or the clock, over as many calls as fit into `limit`."""
    call()
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < 3 or (len(took) < most and time.perf_counter() - begun < limit):
        took.append(once(call, device))
    return sorted(took)[len(took) // 2]


def once(call: Any, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` when what is done here takes longer (in the main thread, of which it is)."""

    def over(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)  # again, should somebody catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free(device: torch.device) -> None:
    """Give memory that nobody holds back to the GPU."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PEAK = 989e12
"""Multiplications and additions a second, dense bf16, of an H100 or H200 by the datasheet."""


def ceilings(context: Context) -> dict[str, float]:
    """Measured once a run: bf16 matrix products (operations a second) and copies (bytes a second)."""
    known = context.report.find("machine", "ceilings")
    if known is None:
        size, count = (8192, 2**28) if context.cuda else (256, 2**18)
        dtype = torch.bfloat16 if context.cuda else torch.float32
        a, b = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
        source = torch.randn(count, device=context.device)
        target = torch.empty_like(source)
        product = 2 * size**3 / seconds(lambda: a @ b, context.device)
        copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), context.device)
        context.report.add("machine", "ceilings", matmul=product, copy=copy)
        del a, b, source, target
        free(context.device)
        known = context.report.find("machine", "ceilings")
    assert known is not None
    return {"matmul": float(known["matmul"]), "copy": float(known["copy"])}
