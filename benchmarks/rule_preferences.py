"""R2FT, DDRO and DPO on wrong answers that the model wrote itself; a program tells which they are.

The material is that of `make demo`: its fine-tuned model answers training instructions, and a program labels
the answers. That makes three files: true answers (R2FT, whose negatives are made by rule; and the other two
with such negatives), pairs of a true and a wrong answer (DPO, DDRO), and single answers with labels (DDRO).
All objectives take equally many steps of equally many rows from the same weights.

Reported are the share of right answers to instructions that neither the model nor the objectives were trained
on, paired by instruction with the start; the NELBO of true answers; and the gains s = log p/p_ref of true
answers and of wrong ones of the start, by differences of NELBOs under equal masks. It is run by
`python -m benchmarks.preferences --rules demo/sft`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.objectives import stored
from decoding.presets import Decoder
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.config import DataConfig
from dlm.data.rules import Example, is_right, make_examples
from dlm.tokenizer import encode_prompt, encode_text
from eval.nelbo import nelbo
from eval.statistics import estimate, paired_test
from examples.demo import DECODERS, STEPS, WINDOW
from finetune.config import R2FTConfig, StartConfig
from finetune.contrast_config import ObjectiveConfig

WRITER = "conv"
"""Decoder of the answers that are labelled; the first of those that are compared."""

COMPARED = (WRITER, "llada-conv")

DRAWS = 8
"""Masks of an answer whose NELBO is measured."""


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name: in the table.
        file: "answers", "pairs" or "single"; empty for the model before the training.
        objective: settings of `ObjectiveConfig`.
        rate: learning rate.
    """

    name: str
    file: str = ""
    objective: tuple[tuple[str, Any], ...] = ()
    rate: float = 0.0


def variants(rates: Sequence[float], theta: float) -> list[Variant]:
    """The start, and every objective at every learning rate.

    Args:
        rates: learning rates.
        theta: share of right answers among those of the start.
    """
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "R2FT": ("answers", {"name": "r2ft"}),
        "DDRO, pairs": ("pairs", {"name": "ddro", "theta": theta}),
        "DPO, pairs": ("pairs", {"name": "dpo"}),
        "DDRO, single answers": ("single", {"name": "ddro", "theta": theta}),
        "true answers alone": ("answers", {"name": "r2ft", "beta_w": 0.0, "beta_l": 0.0}),
        "DDRO, negatives by rule": ("answers", {"name": "ddro", "theta": theta}),
        "DPO, negatives by rule": ("answers", {"name": "dpo"}),
    }
    trained = [
        Variant(f"{name}, {rate:g}", file, tuple(objective.items()), rate)
        for rate in rates
        for name, (file, objective) in kinds.items()
    ]
    return [Variant("start"), *trained]


# ---- material ----------------------------------------------------------------------------------------


def held_out(limit: int) -> list[Example]:
    """Different instructions of the splits that nothing is trained on, the tasks in turn."""
    made = (make_examples(4 * limit, seed=53, split=split) for split in ("test", "validation"))
    return list({each.instruction: each for rows in made for each in rows}.values())[:limit]


def answers(sampler: Sampler, examples: Sequence[Example], decoder: str, seed: int) -> list[str]:
    """Texts by a decoder of the demo, at its pace."""
    outs = sampler.generate(
        [each.instruction for each in examples],
        decoder=Decoder.named(decoder, **DECODERS[decoder]), window=WINDOW, steps=STEPS, seed=seed,
        batch_size=32,
    )  # fmt: skip
    return [out.text for out in outs]


def write_files(folder: Path, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Any]:
    """Write the three files of labelled answers to training instructions; returns the counts.

    Args:
        folder: of the files.
        examples: of the training split, with a true answer each.
        texts: an answer of the start to each; empty ones are left out.
    """
    rows = [(e, text, is_right(e, text)) for e, text in zip(examples, texts, strict=True) if text.strip()]
    wrong = [(e, text) for e, text, right in rows if not right]
    files: dict[str, list[dict[str, Any]]] = {
        "answers": [{"instruction": e.instruction, "output": e.answer} for e, _ in wrong],
        "pairs": [{"prompt": e.instruction, "chosen": e.answer, "rejected": text} for e, text in wrong],
        "single": [{"prompt": e.instruction, "completion": text, "label": right} for e, text, right in rows],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {"answers": len(rows), "wrong": len(wrong), "theta": round(1 - len(wrong) / len(rows), 3)}


def material(options: argparse.Namespace) -> dict[str, Any]:
    """Counts of the labelled answers, which are made if they are not there."""
    file = options.output / "counts.json"
    if not file.is_file():
        examples = make_examples(options.sampled, seed=51)
        texts = answers(Sampler(*load_model(options.rules, "cpu")), examples, WRITER, 0)
        file.write_text(json.dumps(write_files(options.output, examples, texts)), encoding="utf-8")
    counts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return counts


# ---- training and measuring --------------------------------------------------------------------------


def config_of(variant: Variant, options: argparse.Namespace) -> R2FTConfig:
    """The run of a variant; the weights of its last step are kept, whatever becomes of the language."""
    return R2FTConfig(
        output_dir=str(options.output / variant.name.replace(" ", "-").replace(",", "")),
        model=StartConfig(init=options.rules),
        data=DataConfig(
            source=str(options.output / f"{variant.file}.jsonl"),
            window=WINDOW, validation_rows=options.held_out,
        ),
        objective=ObjectiveConfig(**dict(variant.objective)),
        rejected="rules" if variant.file == "answers" else "data",
        max_steps=options.steps, eval_steps=options.steps, save_steps=options.steps, eval_draws=1,
        per_device_train_batch_size=options.batch, learning_rate=variant.rate,
        warmup_steps=max(1, options.steps // 10), nelbo_tolerance=1e6, keep_checkpoints=1, watch=0,
        samples=["Spell bread and cloud."], sample_steps=STEPS, precision="fp32", max_grad_norm=10.0,
        seed=options.seed, report_to="none", trainer={"disable_tqdm": True},
    )  # fmt: skip


def measure(variant: Variant, options: argparse.Namespace, first: dict[str, Any] | None) -> dict[str, Any]:
    """Train a variant, and measure it.

    Args:
        variant: what is trained.
        options: of the command.
        first: the result of the start, whose wrong answers are measured; None for itself.
    """
    begun, model = time.monotonic(), options.rules
    if variant.file:
        from finetune.r2ft import r2ft

        model = str(r2ft(config_of(variant, options)))
    trained = time.monotonic() - begun
    sampler, examples = Sampler(*load_model(model, "cpu")), held_out(options.limit)
    texts = {
        f"{decoder} {seed}": answers(sampler, examples, decoder, seed)
        for decoder in COMPARED for seed in range(options.seeds)
    }  # fmt: skip
    right = {name: [is_right(*pair) for pair in zip(examples, t, strict=True)] for name, t in texts.items()}
    bad = texts[f"{WRITER} 0"] if first is None else first["texts"]
    result = {"name": variant.name, "seconds": round(trained), "right": right, "texts": bad}
    return result | bounds_of(sampler, examples, bad)


def bounds_of(sampler: Sampler, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Any]:
    """NELBOs of the true answers, and of those texts that are wrong, in nats, and the tokens of the true."""
    tokenizer = sampler.tokenizer
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": e.instruction}]) for e in examples]
    true = [[*encode_text(tokenizer, e.answer), tokenizer.eos_token_id] for e in examples]
    wrong = [
        (prompt, [*encode_text(tokenizer, text), tokenizer.eos_token_id])
        for prompt, e, text in zip(prompts, examples, texts, strict=True)
        if text.strip() and not is_right(e, text)
    ]
    good = nelbo(sampler.model, list(zip(prompts, true, strict=True)), DRAWS, 64)
    bad = nelbo(sampler.model, wrong, DRAWS, 64)
    return {"good": good, "bad": bad, "tokens": list(map(len, true))}


# ---- the table ---------------------------------------------------------------------------------------


def shares(result: dict[str, Any], decoder: str) -> list[float]:
    """Of each instruction, the share of its answers under all seeds that are right."""
    runs = [right for name, right in result["right"].items() if name.rsplit(" ", 1)[0] == decoder]
    return [sum(each) / len(each) for each in zip(*runs, strict=True)]


def with_interval(values: Sequence[float], signed: bool = False, digits: int = 3) -> str:
    """The mean of values with half of its 95 % interval."""
    mean = estimate(values)
    return f"{mean.mean:{'+' if signed else ''}.{digits}f} ± {mean.high - mean.mean:.{digits}f}"


def difference(first: dict[str, Any], other: dict[str, Any], decoder: str) -> list[str]:
    """Share of right answers of the other less that of the first, paired by instruction, and its p-value."""
    before, after = shares(first, decoder), shares(other, decoder)
    p = paired_test(before, after)[1]
    shown = with_interval([b - a for a, b in zip(before, after, strict=True)], True)
    return [shown, "< 0.001" if p < 0.001 else f"{p:.3f}"]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one variant a line; differences and gains are those from the start."""
    first = results["start"]
    heads = ["", *(head for d in COMPARED for head in (f"right, {d}", "difference", "p"))]
    heads += ["NELBO per token", "gain of true answers, nats", "gain of wrong answers, nats"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, result in results.items():
        cells = [name]
        for d in COMPARED:
            cells.append(with_interval(shares(result, d)))
            cells += ["", ""] if result is first else difference(first, result, d)
        cells.append(f"{sum(result['good']) / sum(result['tokens']):.4f}")
        for kind in ("good", "bad"):
            gains = [a - b for a, b in zip(first[kind], result[kind], strict=True)]
            cells.append("0" if result is first else with_interval(gains, True, 2))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_r2ft(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: differences in right answers from R2FT at the same learning rate, one variant a line."""
    heads = ["", *(head for d in COMPARED for head in (f"difference from R2FT, {d}", "p"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, result in results.items():
        first = results.get(f"R2FT, {name.rsplit(', ', 1)[-1]}", result)
        if first is not result:
            cells = [cell for d in COMPARED for cell in difference(first, result, d)]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def run_rules(options: argparse.Namespace) -> None:
    """Train and measure every variant that is not there yet, until the time is up; print the table."""
    begun, counts = time.monotonic(), material(options)
    if not 0 < counts["theta"] < 1:
        sys.exit(f"{counts['wrong']} of {counts['answers']} answers are wrong: there must be both kinds")
    for variant in variants(options.rates, counts["theta"]):
        results = stored(options.output)
        if variant.name in results or time.monotonic() - begun > 60 * options.minutes:
            continue
        result = measure(variant, options, results.get("start"))
        with (options.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{variant.name}: {result['seconds']} s of training", flush=True)
    results = stored(options.output)
    print(f"{counts}; {options.steps} steps of {options.batch} rows\n\n{table(results)}\n")
    print(f"{against_r2ft(results)}\n\nNo p is corrected for the number of comparisons.")
