"""The way of a reader: files and functions that one prompt passes through, followed at run time.

    python -m benchmarks.travel

One prompt is answered by `Sampler.generate` with a fake model (so that the model's own files do not count).
Every call of a function of ours is an event; a change of file between two neighbouring events is a switch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from decoding import Decoder, Sampler
from tests.fakes import FakeDenoiser, FakeTokenizer

ROOT = Path(__file__).resolve().parents[1]
OURS = ("decoding", "dlm", "eval", "finetune")
GOALS = {
    "file switches before the first model call": 20,
    "file switches within a step": 15,
    "functions for one answer": 70,
    "files for one answer": 10,
}


@dataclass
class Journey:
    """Calls of our functions, in order."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    """File and function."""
    model_calls: list[int] = field(default_factory=list)
    """Number of calls before each call of the model."""

    def trace(self, frame: FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        del argument
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        caller = frame.f_back
        while caller is not None and caller.f_code.co_filename != __file__:
            if caller.f_code.co_filename.endswith("fakes.py"):
                return  # what the fake model does is not ours
            caller = caller.f_back
        if path.name == "fakes.py" and frame.f_code.co_name == "hidden":
            self.model_calls.append(len(self.calls))
        elif path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            name = frame.f_code.co_qualname
            if not name.endswith(("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")):
                self.calls.append((str(path.relative_to(ROOT)), name))

    def switches(self, begin: int, end: int) -> int:
        """Changes of file among the calls from `begin` to `end`."""
        files = [file for file, _ in self.calls[begin:end]]
        return sum(a != b for a, b in itertools.pairwise(files))


def follow(name: str, **request: Any) -> Journey:
    """The journey of one prompt; what is imported and cached at first is not counted."""
    sampler, decoder = Sampler(FakeDenoiser(eos_bias=-50.0), FakeTokenizer()), Decoder.named(name)
    sampler.generate(["warm up"], decoder=decoder, **request)
    journey = Journey()
    sys.setprofile(journey.trace)
    try:
        sampler.generate(["a prompt"], decoder=decoder, **request)
    finally:
        sys.setprofile(None)
    return journey


def figures(journey: Journey) -> dict[str, float]:
    """Figures that are compared with the goals."""
    first, second = journey.model_calls[1:3]
    return {
        "file switches before the first model call": journey.switches(0, journey.model_calls[0]),
        "file switches within a step": journey.switches(first, second),
        "functions for one answer": len(set(journey.calls)),
        "files for one answer": len({file for file, _ in journey.calls}),
    }


def main() -> None:
    """Print a table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    options.add_argument("--verbose", action="store_true", help="list the calls before the second model call")
    chosen = options.parse_args()
    journeys = {
        "conv, 6 steps": follow("conv", window=40, steps=6),
        "conv, rate 2": follow("conv", max_tokens=20, rate=2.0),
        "llada-conv, 6 steps": follow("llada-conv", window=40, steps=6),
    }
    print("| | " + " | ".join(journeys) + " | goal |\n" + "|---" * (len(journeys) + 2) + "|")
    each = {name: figures(journey) for name, journey in journeys.items()}
    for line, goal in GOALS.items():
        print(f"| {line} | " + " | ".join(f"{f[line]:.0f}" for f in each.values()) + f" | ≤ {goal} |")
    if chosen.verbose:
        journey = journeys["conv, 6 steps"]
        for i, (file, name) in enumerate(journey.calls[: journey.model_calls[2]]):
            print(f"{'>> model ' if i in journey.model_calls else '':10}{file}: {name}")


if __name__ == "__main__":
    main()
