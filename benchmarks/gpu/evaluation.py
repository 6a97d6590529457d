"""Stage `eval`: the questions, answered by the models of stages `train` and `r2ft` under several decoders.

What is measured of the texts alone is measured at once. What takes another model, a reader or a sentence
encoder, is measured later where there is time, from the folders that come back:

    python -m benchmarks.gpu.evaluation runs/eval/alpaca_eval --questions alpaca_eval.json --encoder package
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import material, r2ft, train
from benchmarks.gpu.context import Context, MaterialError, time_limit


@dataclass(frozen=True)
class Variant:
    """A call of `dlm eval`: decoders and their pace."""

    decoders: str
    pace: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In the report."""
        return " ".join([self.decoders, *(f"{key} {value}" for key, value in self.pace.items())])


SEPARATED = "llada-conv(kernel_size=9,gap=3),conv(kernel_size=9,gap=3)"

VARIANTS = (
    Variant("entropy-bound(kernel_size=3,frequency_penalty=0.6)"),
    Variant("entropy-bound(kernel_size=9),entropy-bound(kernel_size=3)"),
    Variant("entropy-bound(kernel_size=3,gamma=0.5),entropy-bound(kernel_size=9,gamma=0.5)"),
    Variant(SEPARATED, {"rate": "4"}),
    Variant(SEPARATED, {"rate": "2"}),
    Variant("entropy-bound(kernel_size=3,gamma=1),entropy-bound(kernel_size=9,gamma=1)"),
    Variant("llada-conv(kernel_size=9),conv,top-k", {"rate": "2"}),
    Variant("conv,top-k", {"window": 256, "steps": "L/4"}),
    Variant("llada-conv(kernel_size=9),conv,top-k", {"rate": "4"}),
    Variant("llada-conv(kernel_size=9),conv", {"rate": "1"}),
    Variant("semi-ar,llada-conv", {"window": 256, "steps": "L/4"}),
    Variant("conv,top-k,semi-ar,llada-conv", {"window": 256, "steps": "L/16"}),
)


def run(context: Context) -> None:
    """Every variant by every model that is there, the most important first, and the folders in pieces."""
    models = {"sft": train.folder_of(context), "r2ft": r2ft.folder_of(context)}
    there = {name: path for name, path in models.items() if (path / "adapter_config.json").is_file()}
    if not there:
        raise MaterialError("no model to ask: stages train and r2ft come first")
    material.questions(context)  # without any there is nothing to hand over
    slowest = 0.0
    for variant in VARIANTS[:2] if context.tiny else VARIANTS:
        for name, path in there.items():
            if not context.skip("eval", f"{name}, {variant.name}", slowest + 10):
                begun = time.monotonic()
                try:
                    with time_limit(context.left):
                        _answer(context, name, path, variant)
                finally:  # answers of a variant that was stopped halfway, too
                    hand_over(context)
                slowest = max(slowest, time.monotonic() - begun)


def hand_over(context: Context) -> None:
    """All answers so far, in pieces."""
    files = ("run.json", "answers.jsonl", "part-*.jsonl", "metrics.json")
    context.hand_over("eval.tar.gz", context.output / "eval", *files)


def _answer(context: Context, name: str, path: Path, variant: Variant) -> None:
    from eval.config import EvalConfig
    from eval.evaluate import evaluate

    small: dict[str, Any] = {"max_tokens": 12} if context.tiny and "window" not in variant.pace else {}
    config = EvalConfig(
        task="alpaca_eval", model=str(path), name=name, data=str(material.questions(context)),
        output=str(context.output / "eval"), decoders=variant.decoders, batch_size=256,
        reader="", device=context.device.type, **variant.pace, **small,
    )  # fmt: skip
    begun = time.monotonic()
    results = evaluate(config)
    context.report.add("eval", f"{name}, {variant.name}", seconds=time.monotonic() - begun)
    for result in results:
        means = {key: result.means[key].mean for key in SHOWN if key in result.means}
        context.report.add("eval answers", result.card.name, answers=len(result.answers), **means)


SHOWN = ("repetition_4", "stutter", "empty", "ended", "tokens", "model_calls", "tokens_per_call")
"""Means of a run that go into the report."""


def main() -> None:
    """Measure the answers of folders that came back."""
    from eval.answers import AnswerFile
    from eval.fluency import Band, Reader
    from eval.metrics import Instruments
    from eval.relevance import Encoder
    from eval.run import Results, finish, merge
    from eval.tasks import load_questions

    parser = argparse.ArgumentParser(description="measure answers that came back from a GPU")
    parser.add_argument("folders", type=Path, nargs="+", help="runs, or folders of runs")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--encoder", default="package", help="as for dlm eval; empty for none")
    parser.add_argument("--reader", default="smollm2-135m-instruct", help="as for dlm eval; empty for none")
    options = parser.parse_args()
    questions = load_questions("alpaca_eval", options.questions, 0)
    tools = Instruments()
    if options.reader:
        tools.reader = Reader(options.reader)
        known = [q for q in questions if q.reference]
        talks = [[{"role": "user", "content": q.turns[0]}] for q in known]
        tools.band = Band.of(tools.reader.read(talks, [q.reference[0] for q in known], "references"))
    if options.encoder:
        tools.encoder = Encoder(options.encoder)
    for file in sorted(file for folder in options.folders for file in folder.rglob("run.json")):
        if AnswerFile(file.parent / "answers.jsonl").read():
            merge(file.parent, questions)
            asked = Results.load(file.parent)
            finish(file.parent, asked.card, questions, asked.answers, tools)
            means = {name: round(mean.mean, 3) for name, mean in Results.load(file.parent).means.items()}
            print(asked.card.name, means, flush=True)


if __name__ == "__main__":
    main()
