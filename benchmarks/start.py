"""The time that a short answer of the default model takes from the start of the program.

    python -m benchmarks.start [ROUNDS]

Prints wall and processor seconds of `dlm generate` for an answer of a few tokens on one thread: with an empty
cache of merged weights, then with it; and of its parts. On a machine with other work, the processor's seconds
are those to look at. Nothing is asserted. The base must be fetched already.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dlm.model_names import BASE_NAME
from dlm.pretrained import base
from dlm.pretrained.store import cache

QUESTION = ["What is the capital of France?", "--max-tokens", "16", "--device", "cpu"]

PARTS = {
    "dlm generate --help": ["-m", "dlm.cli", "generate", "--help"],
    "import torch": ["-c", "import torch"],
    "import transformers' models": ["-c", "import torch, transformers.modeling_utils"],
    "import decoding.sampler, dlm.checkpoint": ["-c", "import decoding.sampler, dlm.checkpoint"],
}


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    base.base_folder()
    print(" wall   cpu")
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, BASE_NAME).symlink_to(cache() / BASE_NAME)
        ask = ["-m", "dlm.cli", "generate", *QUESTION]
        first = _measured(ask, empty, 1, "dlm generate, the first time")
        assert _measured(ask, empty, rounds, "dlm generate, later") == first
        for name, part in PARTS.items():
            _measured(part, empty, rounds, name)


def _measured(words: list[str], folder: str, rounds: int, name: str) -> str:
    """Print the median seconds of a Python process on one thread; returns what it writes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DLM_CACHE": folder, "HF_HUB_OFFLINE": "1"}
    walls, works, written = [], [], ""
    for _ in range(rounds):
        begun, spent = time.perf_counter(), _processor()
        done = subprocess.run(
            [sys.executable, *words], env=env, stdout=subprocess.PIPE, check=True, text=True
        )
        walls.append(time.perf_counter() - begun)
        works.append(_processor() - spent)
        written = done.stdout
    print(f"{statistics.median(walls):5.1f} {statistics.median(works):5.1f} s  {name}", flush=True)
    return written


def _processor() -> float:
    """Processor seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
