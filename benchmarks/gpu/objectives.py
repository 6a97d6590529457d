"""Stage `objectives`: variants of the recipe at equal cost, by `benchmarks.objectives`."""

from __future__ import annotations

from benchmarks import objectives
from benchmarks.gpu import material
from benchmarks.gpu.context import Context

TOGETHER = 3
"""Processes at a time: a small model leaves most of a GPU idle, but each needs up to 20 GB."""


def run(context: Context) -> None:
    """Every variant while there is time, and the table."""
    output = context.output / "objectives"
    words = ["--output", str(output), "--base", material.base(context), "--rows", str(material.rows(context))]
    words += ["--device", context.device.type]
    if context.tiny:
        words += ["--questions", str(material.questions(context)), "--tiny", "--limit", "3"]
        words += ["--positions", "8000", "--batch", "8", "--answers", "4", "--longest", "12"]
        words += ["--variants", "full, path 0.5", "block 8, complementary"]
    else:
        words += ["--positions", "1e6", "--answers", "64", "--parallel", str(TOGETHER)]
        words += ["--seconds", str(max(0.0, context.left - 65)), "--grace", "60"]
    objectives.main(words)
    for name, result in objectives.stored(output).items():
        stage = "failures" if "error" in result else "objectives"
        context.report.add(stage, name, **{k: v for k, v in result.items() if k != "name"})
    context.hand_over("objectives.tar.gz", output, "results.jsonl", "answers.jsonl", "part-*.jsonl")
