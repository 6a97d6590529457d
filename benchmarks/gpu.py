"""`make gpu`: every CUDA test and benchmark in one go, with a report that names the hardware.

python -m benchmarks.gpu [--report runs/gpu.md]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

JOBS = {
    "CUDA tests": ["-m", "pytest", "-m", "cuda", "-rs"],
    "Training": ["-m", "benchmarks.training", "--device", "cuda", "--steps", "60"],
    "R2FT": ["-m", "benchmarks.r2ft", "--rounds", "20"],
    "Decoding": ["-m", "benchmarks.decoding", "--device", "cuda", "--dtype", "bfloat16"],
    "Decoding, 32 rows": [
        "-m", "benchmarks.decoding", "--device", "cuda", "--dtype", "bfloat16", "--rows", "32",
    ],
    "Decoding, L=1024, S=128": [
        "-m", "benchmarks.decoding", "--device", "cuda", "--dtype", "bfloat16",
        "--window", "1024", "--steps", "128",
    ],
    "Cost of a step": ["-m", "benchmarks.cost", "--device", "cuda", "--dtype", "bfloat16"],
}  # fmt: skip


def hardware() -> str:
    """The GPU, the driver's CUDA version and PyTorch."""
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"


def main() -> int:
    """Run all jobs, echo their output, write the report; returns 1 when one of them failed."""
    parser = argparse.ArgumentParser(description="CUDA tests and benchmarks")
    parser.add_argument("--report", type=Path, default=Path("runs/gpu.md"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: error: PyTorch sees no CUDA device on this machine", file=sys.stderr)
        return 1
    parts, failed = [f"# CUDA report\n\n{hardware()}\n"], 0
    for title, words in JOBS.items():
        print(f"== {title}", flush=True)
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr[-2000:], flush=True)
        failed += done.returncode != 0
        state = "" if done.returncode == 0 else f" (failed with status {done.returncode})"
        parts.append(f"## {title}{state}\n\n```\n{done.stdout.strip()}\n```\n")
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text("\n".join(parts), encoding="utf-8")
    print(f"report: {options.report}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
