"""`dlm eval` and `dlm eval sweep`: answers to a task, and all measures that need no judge."""

from __future__ import annotations

import sys

from decoding.config import request_hint
from dlm.cli import Command
from eval.config import EvalConfig, SweepConfig


def run(config: EvalConfig) -> int:
    """Answer, measure, and print the table; 1 if something is missing in the end."""
    from rich.console import Console

    from eval.evaluate import evaluated
    from eval.report.tables import quality

    results, lacks = evaluated(config)
    if results:
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
        console.print(quality(results).rich())
        console.print(f"runs: {results[0].folder.parent}; a page: dlm eval report {results[0].folder.parent}")
    for lack in lacks:
        print(f"dlm eval: missing: {lack}", file=sys.stderr)
    return 1 if lacks else 0


COMMAND = Command(
    "answer a task with one or several decoders, and measure",
    EvalConfig,
    run,
    positional="task",
    hint=request_hint,
)
SWEEP = Command(
    "the same over steps, kernels and cuts", SweepConfig, run, positional="task", hint=request_hint
)
