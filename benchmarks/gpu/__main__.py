"""Run stages, each for so many minutes; what is done already is not done again.

python -m benchmarks.gpu                                  # all, with what is there
python -m benchmarks.gpu --stage train=4 r2ft=1 eval=2 --rows rows.npz --questions alpaca_eval.json
python -m benchmarks.gpu --tiny --device cpu              # everything in miniature
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu.context import Context, MaterialError, ceilings, free
from benchmarks.gpu.report import Report, hardware, missing

STAGES = {
    "tests": "benchmarks.gpu.proofs",
    "kernels": "benchmarks.gpu.kernels",
    "decode": "benchmarks.gpu.decode",
    "objectives": "benchmarks.gpu.objectives",
    "speed": "benchmarks.gpu.speed",
    "train": "benchmarks.gpu.train",
    "r2ft": "benchmarks.gpu.r2ft",
    "eval": "benchmarks.gpu.evaluation",
    "paths": "benchmarks.gpu.paths",
    "serve": "benchmarks.gpu.serving",
}
"""Stages in order, and the modules whose `run(context)` they are."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    out.add_argument(
        "--stage", nargs="+", default=list(STAGES), metavar="NAME[=MINUTES]", help=", ".join(STAGES)
    )
    out.add_argument(
        "--minutes", type=float, default=5.0, help="for each stage that names no number of its own"
    )
    out.add_argument("--tiny", action="store_true", help="everything in miniature")
    out.add_argument("--device", default="auto", help="auto, cuda or cpu")
    out.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="folder of the run; it continues there"
    )
    out.add_argument("--rows", type=Path, help="encoded rows to train on (dlm encode)")
    out.add_argument("--questions", type=Path, help="questions to answer, .json in Alpaca's fields")
    out.add_argument("--apart", action="store_true", help="each stage in a process of its own, as on a GPU")
    out.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes of the recipe of stage train"
    )
    out.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    out.add_argument("--deliver", type=Path, help="folder that results are copied to as well, few files")
    return out


def timed(words: list[str], minutes: float) -> dict[str, float]:
    """Stages and their minutes, from words like `train` and `train=4`.

    Raises:
        ValueError: for a stage that does not exist.
    """
    chosen: dict[str, float] = {}
    for word in words:
        name, _, own = word.partition("=")
        if name not in STAGES:
            raise ValueError(f"no stage {name!r}; stages: {', '.join(STAGES)}")
        chosen[name] = float(own or minutes)
        if not 0 < chosen[name] < math.inf:
            raise ValueError(f"a stage has some minutes, got {word!r}")
    return chosen


def run(context: Context, stages: dict[str, float]) -> list[str]:
    """Run stages one after the other; one that fails does not keep the others from it. Returns the failed."""
    failed = []
    for name, minutes in stages.items():
        print(f"== {name}, {minutes:g} minutes", flush=True)
        begun = time.monotonic()
        context.until = begun + 60 * minutes
        try:
            importlib.import_module(STAGES[name]).run(context)
        except MaterialError as error:
            context.report.add("left out", name, why=str(error))
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            context.report.add("failures", name, error=f"{type(error).__name__}: {error}"[:500])
        context.report.add("stages", name, seconds=round(time.monotonic() - begun, 1))
        context.copy_report()
        free(context.device)
    return failed


GRACE = 45.0
"""Seconds that a process may take beyond its stage's minutes, for what loads and saves."""


def run_apart(words: list[str], stages: dict[str, float]) -> list[str]:
    """Run each stage in a process of its own, which cannot hurt or hold up the next. Returns the failed."""
    failed = []
    for name, minutes in stages.items():
        stage = ["--stage", f"{name}={minutes:g}", "--part"]
        command = [sys.executable, "-m", "benchmarks.gpu", *words, *stage]
        try:
            done = subprocess.run(command, timeout=60 * minutes + GRACE, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            print(f"[{name}] did not end in time and was stopped", flush=True)
            done = False
        failed += [] if done else [name]
    return failed


def main(words: list[str] | None = None) -> int:
    """Parse, run, and return 1 when a stage failed, 2 when there is no such stage or device."""
    words = sys.argv[1:] if words is None else words
    options = parser().parse_args(words)
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; before anything loads triton
    try:
        stages = timed(options.stage, options.minutes)
        if unset := [pair for pair in options.set if "=" not in pair]:
            raise ValueError(f"--set takes NAME=VALUE, got {unset[0]!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {options.device!r}")
        if options.device.startswith("cuda") and not cuda:
            raise ValueError("PyTorch sees no CUDA device on this machine")
        if not (cuda or options.tiny or options.device == "cpu"):
            raise ValueError("PyTorch sees no CUDA device; --tiny --device cpu tries everything in miniature")
    except ValueError as error:
        print(f"python -m benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2
    if not options.part and (lacking := missing()):
        print(f"not installed, and done without: {', '.join(lacking)}", flush=True)
    if len(stages) > 1 and (options.apart or not options.tiny):
        return 1 if run_apart(words, stages) else 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "torch", "transformers", "accelerate", "matplotlib", "serve"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    device = torch.device(("cuda" if cuda else "cpu") if options.device == "auto" else options.device)
    context = Context(
        device, options.tiny, options.output, Report(options.output), options.rows, options.questions,
        options.deliver, dict(pair.split("=", 1) for pair in options.set),
    )  # fmt: skip
    context.report.add("machine", "hardware", **hardware(device))
    ceilings(context)
    failed = run(context, stages)
    print(f"report: {context.report.page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
