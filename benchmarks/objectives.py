"""Training objectives compared: masks, autoregressive loss, block-causal attention, at equal cost.

Every variant of the default recipe starts from the same base, sees the same rows in the same order, and has
the same number of positions pass through the model (a second pass and clean rows beside noisy ones count).
It is measured by the nats per token of held-out answers in the order in which a decoder writes them, at
several tokens per call, and, where there are questions, by its answers.

    python -m benchmarks.objectives --rows rows.npz --positions 300000 --variants full "block 8"
    python -m benchmarks.objectives --data alpaca_data.json --questions alpaca_eval.json --parallel 4

Results are written as they come (results.jsonl), and what is there is not done again: questions can be asked,
and speed measured (`--speed`, on a machine that does nothing else), of variants that were trained before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.material import built, recipe
from finetune.config import TrainConfig


@dataclass(frozen=True)
class Objective:
    """A variant of the recipe.

    Attributes:
        name: in the table.
        changes: of the recipe, by dotted names.
        passes: forward passes over a row in a step.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    passes: int = 1


def block(size: int, **changes: Any) -> dict[str, Any]:
    """Changes for block-causal attention."""
    return {"model.visibility": "block", "model.block_size": size, **changes}


PAIRS = {"masks.complementary": True}
CAUSAL = {"masks.autoregressive": 0.3}
FREE = {"model.block_lead": False}

OBJECTIVES = (
    Objective("full"),
    Objective("block 8", block(8)),
    Objective("block 8, complementary", block(8, **PAIRS), passes=2),
    Objective("block 16", block(16)),
    Objective("full, complementary", PAIRS, passes=2),
    Objective("block 4", block(4)),
    Objective("block 32", block(32)),
    Objective("block 8, lead not first", block(8, **FREE)),
    Objective("full, path 0.5", {"masks.path": 0.5}),
    Objective("full, autoregressive 0.3", CAUSAL, passes=2),
    Objective("block 16, causal context", block(16, **{"model.causal_context": True})),
    Objective("block 8, no shift", block(8, **{"model.shift": False})),
    Objective("full, path 1", {"masks.path": 1.0}),
    Objective("block 16, path 0.5", block(16, **{"masks.path": 0.5})),
    Objective("block 16, complementary", block(16, **PAIRS), passes=2),
    Objective("block 16, lead not first", block(16, **FREE)),
    Objective("block 8, complementary, lead not first", block(8, **PAIRS, **FREE), passes=2),
)

Paced = tuple[str, dict[str, Any], float | None]
"""A decoder, its options, and its tokens per call, if it is given them."""

DECODERS: tuple[Paced, ...] = (
    ("entropy-bound", {"kernel_size": 9}, None),
    ("conv", {"kernel_size": 9}, 1.0),
    ("conv", {"kernel_size": 9}, 2.0),
    ("conv", {"kernel_size": 9}, 4.0),
    ("conv", {"kernel_size": 9, "gap": 3}, 4.0),
)


def label(name: str, choices: dict[str, Any], rate: float | None) -> str:
    """A decoder at its pace, in a few words."""
    apart = "".join(f" {option} {choices[option]}" for option in ("gap", "conflict") if option in choices)
    return name + apart + ("" if rate is None else f" {rate:g}")


def settings(objective: Objective, options: argparse.Namespace) -> TrainConfig:
    """The recipe of a variant, with as many steps as its cost allows."""
    values: dict[str, Any] = {
        "output_dir": str(options.output / objective.name.replace(" ", "-").replace(",", "")),
        "model.init": options.base,
        "model.lora.fold": True,
        "data.source": str(options.rows or options.data),
        "per_device_train_batch_size": options.batch,
        "warmup_steps": 20,
        "eval_steps": 10**6,
        "eval_rows": options.answers,
        "eval_draws": 2,
        "save_steps": 10**6,
        "logging_steps": 20,
        "max_steps": 1,
        "report_to": "none",
        "seed": options.seed,
        "data.window": options.window,
        "trainer": {"disable_tqdm": True},
        **objective.changes,
    }
    if options.tiny:
        values |= {"data.window": 96, "data.validation_rows": 20, "model.lora.r": 4, "precision": "fp32"}
    config: TrainConfig = built(TrainConfig, recipe("alpaca-smollm2-135m-lora", values))
    steps = max(2, round(options.positions / (objective.passes * positions(config))))
    return built(TrainConfig, recipe("alpaca-smollm2-135m-lora", {**values, "max_steps": steps}))


def positions(config: TrainConfig) -> float:
    """Mean number of positions in a forward pass of a step, padding included, over some of its batches."""
    from dlm.data.encode import encode_rows
    from dlm.data.windows import EpochSampler
    from finetune.run import collator, split_rows
    from finetune.start import first_model

    rows, _ = split_rows(config.data, config.seed)
    _, tokenizer = first_model(config, rows)
    encoded, _ = encode_rows(rows, tokenizer, config.data.window)
    collate = collator(config.data, tokenizer, config.seed)
    size, total, batches = config.per_device_train_batch_size, 0, 0
    order = list(islice(EpochSampler(list(encoded["length"]), size, config.seed), 40 * size))
    for first in range(0, len(order) - size + 1, size):
        batch = collate([{**encoded[i], "row": i} for i in order[first : first + size]])
        length = batch["input_ids"].shape[1]
        total += size * (length + clean(batch["maskable"], length, config.model.block_size))
        batches += 1
    return total / batches


def clean(maskable: torch.Tensor, length: int, block_size: int) -> int:
    """Positions of the clean half of a row beyond the noisy half that is left out before the answers."""
    if not block_size:
        return 0
    before = int(maskable.any(0).int().argmax()) // block_size * block_size
    return (length - 1) // block_size * block_size - before


# ---- measuring ---------------------------------------------------------------------------------------


def missing(known: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Work that is left for a variant of which `known` is there: "train", "questions", "speed"."""
    wanted = {"train": True, "questions": bool(options.questions), "speed": bool(options.speed)}
    sign = {"train": "steps", "questions": "tokens", "speed": "tokens per second"}
    return [part for part, wish in wanted.items() if wish and sign[part] not in known]


def measure(objective: Objective, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train a variant and measure it, as far as that has not been done; yields what is new as it comes."""
    parts = missing(stored(options.output).get(objective.name, {}), options)
    if not parts:
        return
    config = settings(objective, options)
    folder = Path(config.output_dir)
    if "train" in parts:
        yield trained(config) | path(folder, config, options)
    if "questions" in parts:
        yield asked(folder, options)
    if "speed" in parts:
        yield speed(folder, config, options)


def trained(config: TrainConfig) -> dict[str, Any]:
    """Train a variant; returns its steps and its validation bound."""
    from finetune.sft import train

    begun = time.monotonic()
    history = json.loads((train(config) / "history.json").read_text(encoding="utf-8"))
    bound = next((r["eval_nelbo"] for r in reversed(history) if "eval_nelbo" in r), None)
    return {"steps": config.max_steps, "train_seconds": round(time.monotonic() - begun), "nelbo": bound}


Pairs = list[tuple[list[int], list[int]]]
"""Prompts and answers as ids."""


def path(folder: Path, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Nats per token of held-out answers, and tokens per call, for each of `DECODERS`."""
    from dlm.checkpoint import load_model

    model, tokenizer = load_model(folder, options.device)
    pairs = held_out(config, tokenizer, options.answers, options.longest)
    found: dict[str, Any] = {"answers": len(pairs)}
    for decoder in DECODERS:
        nats, tokens = cost(model, tokenizer, pairs, decoder, options.longest, options.seed)
        found[f"{label(*decoder)} nats"] = round(nats, 4)
        found[f"{label(*decoder)} tokens per call"] = round(tokens, 2)
    return found


def held_out(config: TrainConfig, tokenizer: Any, count: int, longest: int) -> Pairs:
    """The first answers among the validation rows that end and are no longer than `longest`."""
    from dlm.data.encode import encode_rows
    from finetune.run import split_rows

    rows = encode_rows(split_rows(config.data, config.seed)[1], tokenizer, config.data.window)[0]
    pairs: Pairs = []
    for row in (rows[i] for i in range(len(rows))):
        ids, start = [int(token) for token in row["input_ids"]], int(row["prompt_length"])
        if ids[-1] == tokenizer.eos_token_id and len(ids) - start <= longest:
            pairs.append((ids[:start], ids[start:]))
    return pairs[:count]


def cost(
    model: Any, tokenizer: Any, pairs: Pairs, decoder: Paced, longest: int, seed: int
) -> tuple[float, float]:
    """Nats per token of answers along the path of a decoder, and tokens per call."""
    from decoding.request import Request
    from decoding.sampler import Sampler
    from eval.path import path_costs

    name, choices, rate = decoder
    plan = Sampler(model, tokenizer).plan(
        Request(decoder=name, options=dict(choices), rate=rate, max_tokens=longest)
    )
    costs = list(path_costs(model, pairs, plan, seed=seed, batch_size=len(pairs)))
    tokens = sum(len(cost.nats) for cost in costs)
    return sum(cost.total for cost in costs) / tokens, tokens / sum(cost.calls for cost in costs)


def speed(folder: Path, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of a lone row: a token a call, `longest` of them behind each held-out prompt."""
    from decoding.engine import Engine
    from decoding.presets import Decoder
    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model

    model, tokenizer = load_model(folder, options.device)
    sampler = Sampler(model, tokenizer)
    prompts = [ids for ids, _ in held_out(config, tokenizer, options.speed, options.longest)]
    endless = Decoder.named("conv", kernel_size=9).without(*sampler.spec.end_token_ids)
    plan = sampler.plan(decoder=endless, rate=1, max_tokens=options.longest)
    seconds = []
    for ids in [prompts[0], *prompts]:  # the first one warms up
        engine, begun = Engine(model, tokenizer), time.monotonic()
        engine.submit(ids, plan)
        while len(engine):
            engine.step()
        seconds.append(time.monotonic() - begun)
    return {"tokens per second": round(len(prompts) * options.longest / sum(seconds[1:]), 1)}


def asked(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Repetition, relevance, length and calls of answers to questions; the answers stay in the folder."""
    from eval.config import EvalConfig
    from eval.evaluate import evaluate

    begun = time.monotonic()
    (result,) = evaluate(
        EvalConfig(
            task="alpaca_eval",
            model=str(folder),
            name=folder.name,
            data=str(options.questions),
            output=str(options.output / "eval"),
            decoders="entropy-bound(kernel_size=9)",
            batch_size=options.answer_batch,
            reader="",
            encoder=options.encoder,
            device=options.device,
            limit=options.limit,
            max_tokens=options.longest,
        )
    )
    names = ("repetition_4", "relevance", "empty", "ended", "tokens", "model_calls")
    means = {name: round(result.means[name].mean, 4) for name in names if name in result.means}
    return {**means, "answer_seconds": round(time.monotonic() - begun, 1)}


def stored(output: Path) -> dict[str, dict[str, Any]]:
    """Results that are there, by name; a failure holds until something comes after it."""
    file = output / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    results: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            result = json.loads(line)
        except ValueError:  # the end of a line that a kill cut off
            continue
        before = results.setdefault(result["name"], {})
        before.pop("error", None)
        before.update(result)
    return results


def complete(output: Path) -> set[str]:
    """Names of the variants that need not run again."""
    return {name for name, result in stored(output).items() if "error" not in result}


def run(objectives: list[Objective], options: argparse.Namespace) -> None:
    """Measure variants, one after the other, as far as results are not there; a failure is kept as one."""
    for objective in objectives:
        try:
            for result in measure(objective, options):
                keep(objective, result, options.output)
        except Exception as error:
            keep(objective, {"error": f"{type(error).__name__}: {error}"[:400]}, options.output)


def keep(objective: Objective, result: dict[str, Any], output: Path) -> None:
    """Add a line to the results."""
    line, file = json.dumps({"name": objective.name, **result}), output / "results.jsonl"
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n" * torn + line + "\n")
    print(line, flush=True)


def run_beside(objectives: list[Objective], options: argparse.Namespace, words: list[str]) -> None:
    """Measure variants, so many at a time, each in a process of its own: one alone leaves a GPU idle."""
    known = stored(options.output)
    waiting = [o for o in objectives if missing(known.get(o.name, {}), options)]
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < options.parallel and time.monotonic() < options.until:
            command = [sys.executable, "-m", "benchmarks.objectives", *words, "--parallel", "1"]
            command += ["--variants", waiting.pop(0).name]  # of two, the last counts
            running.append(subprocess.Popen(command, env=environment))
        if time.monotonic() > options.until:
            waiting = []
            if time.monotonic() > options.until + options.grace:
                for process in running:
                    process.kill()
        time.sleep(0.2)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: nats per token by decoder, and what the answers are like."""
    columns = ["steps", "nelbo", *(f"{label(*d)} nats" for d in DECODERS)]
    columns += ["entropy-bound tokens per call", "tokens", "model_calls", "repetition_4", "relevance"]
    columns.append("tokens per second")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'][:60]} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {name} | " + " | ".join(str(result.get(c, "")) for c in columns) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    out.add_argument("--output", type=Path, default=Path("runs/objectives"))
    out.add_argument("--base", default="smollm2-135m-instruct", help="the autoregressive model to start from")
    out.add_argument("--rows", type=Path, help="encoded rows (dlm encode)")
    out.add_argument("--data", default="tatsu-lab/alpaca", help="rows, where none are encoded")
    out.add_argument("--questions", type=Path, help="questions to answer, in Alpaca's fields")
    out.add_argument("--limit", type=int, default=128, help="of the questions")
    out.add_argument("--answer_batch", type=int, default=256, help="questions answered at a time")
    out.add_argument("--encoder", default="", help='sentence encoder for relevance, such as "package"')
    out.add_argument("--speed", type=int, default=0, help="prompts answered alone for tokens per second")
    out.add_argument("--variants", nargs="+", default=[o.name for o in OBJECTIVES], metavar="NAME")
    out.add_argument("--positions", type=float, default=5e5, help="through the model, for each variant")
    out.add_argument("--batch", type=int, default=32, help="rows in a step")
    out.add_argument("--window", type=int, default=256, help="longest row; longer ones are left out")
    out.add_argument("--answers", type=int, default=128, help="held-out answers for nats per token")
    out.add_argument("--longest", type=int, default=128, help="tokens of an answer")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="auto")
    out.add_argument("--parallel", type=int, default=1, help="processes at a time")
    out.add_argument("--seconds", type=float, default=1e9, help="no variant begins after so long")
    out.add_argument("--grace", type=float, default=60.0, help="seconds that the last may take beyond that")
    out.add_argument("--tiny", action="store_true", help="in miniature")
    return out


def main(words: list[str] | None = None) -> None:
    """Measure and print the table."""
    words = sys.argv[1:] if words is None else words
    options = parser().parse_args(words)
    options.until = time.monotonic() + options.seconds
    by_name = {objective.name: objective for objective in OBJECTIVES}
    if unknown := [name for name in options.variants if name not in by_name]:
        sys.exit(f"no variant {unknown[0]!r}; variants: {', '.join(by_name)}")
    chosen = [by_name[name] for name in options.variants]
    options.output.mkdir(parents=True, exist_ok=True)
    if options.parallel > 1:
        run_beside(chosen, options, words)
    else:
        run(chosen, options)
    if options.parallel > 1 or len(chosen) > 1:
        print(table(stored(options.output)))


if __name__ == "__main__":
    main()
