"""R2FT, DDRO and DPO compared: equal steps from one model, the same rows, the same negatives by rule.

Every variant trains an adapter on the model it starts from and answers held-out questions. Reported are the
NELBO of held-out answers and the gain of good over bad ones in validation, and of the answers to the
questions their repeated 4-grams, their relevance to the references, and their length.

    python -m benchmarks.preferences --rows alpaca_data.json --questions alpaca_eval.json --minutes 60

Each variant is a process of its own. What is cut off by the time goes on where it was, when the command is
called again; results are written as they come (results.jsonl), and one that is there is not made again.

    python -m benchmarks.preferences --rules demo/sft --steps 100 --batch 32 --limit 240 --minutes 12

compares them on wrong answers of the model's own, to tasks whose answers a program checks; see
`benchmarks.rule_preferences`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.material import built, recipe
from benchmarks.objectives import complete, stored
from finetune.config import R2FTConfig


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name: in the table.
        objective: settings of `ObjectiveConfig`; none for the model before the training.
    """

    name: str
    objective: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("start"),
    Variant("r2ft", {"name": "r2ft"}),
    Variant("ddro", {"name": "ddro"}),
    Variant("dpo", {"name": "dpo"}),
    Variant("ddro, relative", {"name": "ddro", "alpha": 0.5}),
    Variant("ddro, 4 draws", {"name": "ddro", "draws": 4}),
    Variant("dpo, 4 draws", {"name": "dpo", "draws": 4}),
    Variant("ddro, kl 0.1", {"name": "ddro", "kl": 0.1}),
)


def settings(variant: Variant, options: argparse.Namespace) -> R2FTConfig:
    """The run of a variant: the recipe of the R2FT of `full`, without its guard.

    The held-out rows are the last 1000, as in the fine-tuning of `full-sft`: it has never seen them.
    """
    values: dict[str, Any] = {
        "output_dir": str(options.output / variant.name.replace(" ", "-").replace(",", "")),
        "model.init": options.base,
        "objective": variant.objective,
        "data.source": str(options.rows),
        "data.window": options.window,
        "data.eos_tail": options.window // 4,
        "per_device_train_batch_size": options.batch,
        "eval_rows": options.held_out,
        "eval_draws": 1,
        "max_steps": options.steps,
        "eval_steps": options.every,
        "save_steps": options.every,
        "nelbo_tolerance": 1e6,  # every variant has equally many steps, whatever becomes of its language
        "keep_checkpoints": 1,
        "learning_rate": options.learning_rate,
        "warmup_steps": max(1, options.steps // 10),
        "watch": 0,
        "samples": ["Give three tips for staying healthy."],
        "sample_steps": 16,
        "seed": options.seed,
        "report_to": "none",
        "trainer": {"disable_tqdm": True},
    }
    if options.tiny:
        values |= {"model.lora.r": 4, "precision": "fp32", "data.validation_rows": options.held_out}
    config: R2FTConfig = built(R2FTConfig, recipe("r2ft-smollm2-135m-lora", values))
    return config


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant, if it is to be trained, and measure it."""
    result: dict[str, Any] = {"name": variant.name}
    model = options.base
    if variant.objective:
        from finetune.r2ft import r2ft

        config = settings(variant, options)
        model = str(r2ft(config))
        history = json.loads((Path(model) / "history.json").read_text(encoding="utf-8"))
        result |= {"steps": config.max_steps, **trained(history, variant.objective["name"])}
    return result | answered(model, variant, options)


def trained(history: list[dict[str, Any]], objective: str) -> dict[str, Any]:
    """Figures of a run: validation before it, and at the step whose weights were kept."""
    from finetune.watch import kept_step

    kept = kept_step(history, 1e6, objective)
    validated = {r["step"]: r for r in history if "eval_nelbo" in r}
    figures = {f"{name} at the start": round(validated[0][f"eval_{name}"], 4) for name in ("nelbo", "margin")}
    if kept is not None:
        names = ("nelbo", "margin", "accuracy", "gain_good", "gain_bad")
        at_end = {name: validated[int(kept)].get(f"eval_{name}") for name in names}
        figures |= {name: round(value, 4) for name, value in at_end.items() if value is not None}
    return {**figures, "kept step": kept}


MEASURES = ("nelbo", "repetition_4", "relevance", "ended", "empty", "words", "tokens")
"""Of the answers; `nelbo` is that of the references of the questions."""


def answered(model: str, variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Means over the answers to the questions, by decoder, each with half its 95 % interval."""
    from eval.config import EvalConfig
    from eval.evaluate import evaluate

    results = evaluate(
        EvalConfig(
            task="alpaca_eval",
            model=model,
            name=variant.name.replace(" ", "-").replace(",", ""),
            data=str(options.questions),
            output=str(options.output / "eval"),
            decoders=options.decoders,
            rate=str(options.rate),
            batch_size=8,
            reader="",
            encoder=options.encoder,
            nelbo_draws=1,
            limit=options.limit,
            max_tokens=options.longest,
        )
    )
    out: dict[str, Any] = {}
    for decoder, result in zip(options.decoders.split(","), results, strict=True):
        for name in MEASURES:
            if name in result.means:
                mean = result.means[name]
                key = "references" if name == "nelbo" else f"{decoder} {name}"
                out[key] = [round(mean.mean, 4), round((mean.high - mean.low) / 2, 4)]
    return out


# ---- running -----------------------------------------------------------------------------------------


def run(variant: Variant, options: argparse.Namespace) -> None:
    """Measure one variant and write down the result."""
    result = measure(variant, options)
    with (options.output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def run_all(variants: list[Variant], options: argparse.Namespace, words: list[str]) -> None:
    """Measure variants that are not there yet, each in a process, until the time is up."""
    until = time.monotonic() + 60 * options.minutes
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for variant in variants:
        left = until - time.monotonic()
        if variant.name in complete(options.output) or left <= 0:
            continue
        command = [sys.executable, "-m", "benchmarks.preferences", *words, "--here"]
        command += ["--variants", variant.name]  # of two, the last counts
        try:
            subprocess.run(command, env=environment, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"{variant.name}: cut off; the same command goes on with it", flush=True)


COLUMNS = ("steps", "kept step", "nelbo", "margin", "accuracy", "references")


def table(results: dict[str, dict[str, Any]], decoders: list[str]) -> str:
    """Markdown: one variant a line."""
    columns = [*COLUMNS, *(f"{d} {name}" for d in decoders for name in MEASURES[1:])]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(show(r.get(c)) for c in columns)} |" for name, r in results.items()]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A figure, with its interval if it has one."""
    if isinstance(value, list):
        return " ± ".join(f"{x:.3g}" for x in value)
    return "" if value is None else f"{value:g}"


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    out.add_argument("--output", type=Path, default=Path("runs/preferences"))
    out.add_argument("--base", default="full-sft", help="the fine-tuned model to start from")
    out.add_argument("--rows", help="rows to train on, whose last ones are held out")
    out.add_argument("--questions", type=Path, help="with reference answers, in Alpaca's fields")
    out.add_argument("--limit", type=int, default=24, help="of the questions")
    out.add_argument("--variants", nargs="+", default=[v.name for v in VARIANTS], metavar="NAME")
    out.add_argument("--steps", type=int, default=32, help="of every variant")
    out.add_argument("--every", type=int, default=16, help="steps between validations, and checkpoints")
    out.add_argument("--batch", type=int, default=4, help="rows of a step")
    out.add_argument("--window", type=int, default=96, help="tokens of a row")
    out.add_argument("--learning-rate", type=float, default=1e-4)
    out.add_argument("--held-out", type=int, default=24, help="rows of a validation")
    out.add_argument("--decoders", default="conv")
    out.add_argument("--rate", type=float, default=2.0, help="tokens per call")
    out.add_argument("--longest", type=int, default=48, help="tokens of an answer")
    out.add_argument("--encoder", default="package", help="of the relevance; empty for none")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--minutes", type=float, default=1e6, help="for everything")
    out.add_argument("--rules", default="", help="the fine-tuned model of make demo: its tasks, nothing else")
    out.add_argument("--sampled", type=int, default=2400, help="answers that --rules labels")
    out.add_argument("--rates", type=float, nargs="+", default=[2e-5, 2e-4], help="learning rates of --rules")
    out.add_argument("--seeds", type=int, default=2, help="answers of --rules to an instruction")
    out.add_argument("--here", action="store_true", help="in this process, however long it takes")
    out.add_argument("--tiny", action="store_true", help="for a tiny model")
    return out


def main(words: list[str] | None = None) -> None:
    """Measure and print the table."""
    words = sys.argv[1:] if words is None else words
    options = parser().parse_args(words)
    if options.rules:
        from benchmarks.rule_preferences import run_rules

        options.output.mkdir(parents=True, exist_ok=True)
        run_rules(options)
        return
    if not options.rows or not options.questions:
        parser().error("give --rows and --questions, or --rules")
    by_name = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in options.variants if name not in by_name]:
        sys.exit(f"no variant {unknown[0]!r}; variants: {', '.join(by_name)}")
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [by_name[name] for name in options.variants]
    if options.here:
        for variant in chosen:
            run(variant, options)
        return
    run_all(chosen, options, words)
    print(table(stored(options.output), options.decoders.split(",")))


if __name__ == "__main__":
    main()
