"""`make demo`: train a small model on rule-made tasks, reject repetition, and compare every decoder.

Everything is made here, nothing is fetched: instructions and their answers by a seeded generator, the
tokenizer and the model from random weights. The answers to held-out prompts are checked by program.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from decoding.presets import Decoder
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.config import DataConfig
from dlm.data.rules import Example, is_right, make_examples
from dlm.prior import TokenPrior
from dlm.repetition import repetition
from eval.ldw import decoding_window, draw_decoding_windows
from examples.coloured import coloured, legend
from finetune.config import ModelConfig, R2FTConfig, StartConfig, TrainConfig
from finetune.contrast_config import ObjectiveConfig

WINDOW = 72
STEPS = WINDOW // 8
DECODERS: dict[str, dict[str, int]] = {
    "categorical": {},
    "top-k": {"top_k": 20},
    "semi-ar": {"top_k": 20, "block_size": 20},
    "llada": {},
    "conv": {"top_k": 20, "kernel_size": 13},
    "llada-conv": {"kernel_size": 41},
}
"""The presets and their options; sizes are the best of `--sweep`, on prompts of the validation split."""
PROMPT_SEED = 10_007
"""Seed of the prompts that are decoded; their instructions belong to splits that are never trained on."""


def training(folder: Path, seed: int, steps: int) -> TrainConfig:
    """The recipe of the small model."""
    return TrainConfig(
        output_dir=str(folder),
        model=ModelConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, vocab_size=640
        ),
        data=DataConfig(source="rules", window=WINDOW, limit=60_000, validation_rows=256),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=100,
        logging_steps=25,
        eval_steps=400,
        save_steps=400,
        sample_steps=STEPS,
        precision="fp32",
        max_grad_norm=10.0,
        trainer={"adam_beta2": 0.98},
        seed=seed,
    )


def rejecting(folder: Path, start: Path, seed: int, steps: int, beta: float) -> R2FTConfig:
    """The recipe of the R2FT stage; with a beta of 0 the loss is its anchor alone, which is the control."""
    return R2FTConfig(
        output_dir=str(folder),
        model=StartConfig(init=str(start)),
        data=DataConfig(source="rules", window=WINDOW, limit=60_000, validation_rows=256),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=2e-5,
        objective=ObjectiveConfig(beta_w=beta, beta_l=beta),
        warmup_steps=10,
        logging_steps=10,
        eval_steps=50,
        save_steps=50,
        sample_steps=STEPS,
        watch=64,
        precision="fp32",
        max_grad_norm=10.0,
        seed=seed,
    )


@dataclass(frozen=True)
class Score:
    """Results of one model and one decoder over all prompts under one seed."""

    model: str
    """"SFT" or "SFT+R2FT"."""
    decoder: str
    seed: int
    right: float
    """Share of answers that are right, checked by program."""
    right_by_task: dict[str, float]
    repetition: float
    """Share of 4-grams of words in an answer that have occurred before in it."""
    model_calls: float
    """Mean number of model calls per answer."""
    tokens_per_second: float
    """Answer tokens (EOS and padding excluded) per second of wall time."""


def score(model: str, sampler: Sampler, examples: list[Example], decoder: Decoder, seed: int) -> Score:
    """Decode every prompt once and check the answers."""
    begun = time.perf_counter()
    outputs = sampler.generate(
        [example.instruction for example in examples],
        decoder=decoder,
        window=WINDOW,
        steps=STEPS,
        seed=seed,
        batch_size=32,
    )
    seconds = time.perf_counter() - begun
    right = [is_right(example, output.text) for example, output in zip(examples, outputs, strict=True)]
    tasks = sorted({example.task for example in examples})
    return Score(
        model=model,
        decoder=decoder.name,
        seed=seed,
        right=mean(right),
        right_by_task={
            task: mean(r for r, example in zip(right, examples, strict=True) if example.task == task)
            for task in tasks
        },
        repetition=mean(repetition(output.text) for output in outputs),
        model_calls=mean(output.model_calls for output in outputs),
        tokens_per_second=sum(len(output.token_ids) for output in outputs) / seconds,
    )


def compare(
    samplers: dict[str, Sampler], examples: list[Example], seeds: list[int], console: Console, top_k: int = 20
) -> list[Score]:
    """Every preset of every model under every seed, with a progress bar; `top_k` for those that cut."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    scores = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Decoding", total=len(DECODERS) * len(seeds) * len(samplers))
        for name, preset in DECODERS.items():
            decoder = Decoder.named(name, **preset | ({"top_k": top_k} if "top_k" in preset else {}))
            for model, sampler in samplers.items():
                for seed in seeds:
                    progress.update(bar, description=f"Decoding: {model}, {name}, seed {seed}")
                    scores.append(score(model, sampler, examples, decoder, seed))
                    progress.advance(bar)
    return scores


SWEEP: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv": ("kernel_size", (5, 9, 13, 19, 31)),
    "semi-ar": ("block_size", (8, 12, 20, 32)),
    "llada-conv": ("kernel_size", (9, 19, 41)),
}
"""Sizes that `--sweep` tries."""


def sweep(sampler: Sampler, examples: list[Example], seeds: list[int], console: Console) -> None:
    """Share of right answers by kernel and block size, so that each decoder can be given its best."""
    for name, (option, sizes) in SWEEP.items():
        for size in sizes:
            decoder = Decoder.named(name, **(DECODERS[name] | {option: size}))
            shares = [score("SFT", sampler, examples, decoder, seed).right for seed in seeds]
            console.print(f"{name:<8} {option} {size:>3}: right {_spread(shares)} %")


def _spread(values: list[float]) -> str:
    """Mean and standard deviation of shares, in per cent."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean(values):.1f} ± {100 * deviation:.1f}"


LEGEND = (
    "right: answers that a program finds right, of all and of each task; rep.: repeated 4-grams; "
    "calls: of the model, for an answer; tok/s: tokens of all answers in a second"
)


def table(scores: list[Score]) -> Table:
    """One line per decoder and model, mean and standard deviation over the seeds."""
    tasks = list(scores[0].right_by_task)
    out = Table(
        title=f"Held-out prompts, window {WINDOW}, {STEPS} steps (mean ± deviation over seeds)",
        box=SIMPLE_HEAD,
        padding=0,
        caption=LEGEND,
        caption_justify="left",
    )
    for title in ("decoder", "model", "right, %", *tasks, "rep., %", "calls", "tok/s"):
        left = title in ("decoder", "model")
        out.add_column(title, justify="left" if left else "right", no_wrap=True)
    shown = ""
    for name, model in dict.fromkeys((s.decoder, s.model) for s in scores):
        rows = [s for s in scores if (s.decoder, s.model) == (name, model)]
        out.add_row(
            name if name != shown else "",
            model.removeprefix("SFT") or model,
            _spread([s.right for s in rows]),
            *(f"{100 * mean(s.right_by_task[task] for s in rows):.0f}" for task in tasks),
            f"{100 * mean(s.repetition for s in rows):.2f}",
            f"{mean(s.model_calls for s in rows):.1f}",
            f"{mean(s.tokens_per_second for s in rows):.0f}",
        )
        shown = name
    return out


def collect(folders: list[Path]) -> list[str]:
    """Right answers and repetition by training seed and on the mean, as Markdown, from demo folders."""
    runs = [
        [Score(**s) for s in json.loads((folder / "demo.json").read_text(encoding="utf-8"))["scores"]]
        for folder in folders
    ]
    heads = [*(folder.name for folder in folders), "right, mean", "repeated, mean"]
    lines = [f"| decoder | model | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name, model in dict.fromkeys((s.decoder, s.model) for s in runs[0]):
        own = [[s for s in run if (s.decoder, s.model) == (name, model)] for run in runs]
        right = [100 * mean(s.right for s in rows) for rows in own]
        repeated = 100 * mean(s.repetition for rows in own for s in rows)
        cells = [*(f"{share:.1f}" for share in right), f"{mean(right):.1f}", f"{repeated:.2f}"]
        lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
    return lines


def show(samplers: dict[str, Sampler], console: Console) -> None:
    """One prompt answered by three presets of each model, coloured by step."""
    prompt = next(e.instruction for e in make_examples(8, PROMPT_SEED, "test") if e.task == "meet")
    console.print(f"\n[bold]{prompt}[/bold]", legend(range(STEPS + 1)), sep="\n")
    for name in ("top-k", "semi-ar", "conv"):
        decoder = Decoder.named(name, **DECODERS[name])
        for model, sampler in samplers.items():
            output = sampler.generate([prompt], decoder=decoder, window=WINDOW, steps=STEPS, seed=0)[0]
            heading = f"\n{name}, {model} ({output.model_calls} model calls)"
            console.print(heading, coloured(output, sampler), sep="\n")


def diagnose(samplers: dict[str, Sampler], examples: list[Example], folder: Path) -> None:
    """Draw where each model's probability lies by distance from the prompt, into `ldw.png`."""
    prior = TokenPrior.load(folder / "sft")
    assert prior is not None
    prompts = [example.instruction for example in examples]
    measured = {
        name: decoding_window(sampler.model, sampler.tokenizer, prompts, prior, window=WINDOW, top=20)
        for name, sampler in samplers.items()
    }
    draw_decoding_windows(measured, 20).savefig(folder / "ldw.png", dpi=150)


def main() -> None:
    """Train unless the finished model is there, decode, print, and save the figures."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that it would like to fetch
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="where the model and the figures go"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run")
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--r2ft-steps", type=int, default=100)
    parser.add_argument(
        "--beta",
        type=float,
        default=0.3,  # the margin is wide here: with 1 the loss is flat
        help="factor of both sides in R2FT; 0 rejects nothing, as a control",
    )
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=3, help="decoding seeds")
    parser.add_argument("--top-k", type=int, default=20, help="k of the decoders that cut")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="whose prompts")
    parser.add_argument(
        "--collect", type=Path, nargs="+", metavar="FOLDER", help="only put together what several demos gave"
    )
    parser.add_argument("--sweep", action="store_true", help="compare kernel and block sizes instead")
    options = parser.parse_args()
    console = Console()
    if options.collect:
        return print("\n".join(collect(options.collect)))
    prepare(options, console)
    samplers = {
        name: Sampler(*load_model(options.folder / part, "cpu", "float32")) for name, part in MODELS.items()
    }
    examples = make_examples(options.prompts, PROMPT_SEED, "validation" if options.sweep else options.split)
    console.print(f"[bold]3. Decoding[/bold] {len(examples)} held-out prompts with each preset")
    if options.sweep:
        return sweep(samplers["SFT"], examples, list(range(options.seeds)), console)
    scores = compare(samplers, examples, list(range(options.seeds)), console, options.top_k)
    console.print(table(scores))
    show(samplers, console)
    diagnose(samplers, examples, options.folder)
    report: dict[str, Any] = {"window": WINDOW, "steps": STEPS, "scores": [asdict(s) for s in scores]}
    (options.folder / "demo.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(
        f"\nIn {options.folder}: demo.json (the figures), sft/curve.png, r2ft/r2ft.png, ldw.png "
        f"(probability by distance). This model knows its tasks alone; try:\n"
        f'  .venv/bin/dlm generate --model {options.folder}/r2ft "Count from 3 to 7."',
        highlight=False,
    )
    return None


MODELS = {"SFT": "sft", "SFT+R2FT": "r2ft"}
"""Models by name in the table, and their folders."""


def prepare(options: argparse.Namespace, console: Console) -> None:
    """Train both models, unless they are there."""
    sft, rejected = (options.folder / part for part in MODELS.values())
    if not (sft / "model.safetensors").exists():
        from finetune.sft import train

        console.print(f"[bold]1. Training[/bold] a small model from random weights ({sft})")
        train(training(sft, options.seed, options.train_steps))
    if not (rejected / "model.safetensors").exists():
        from finetune.r2ft import r2ft

        console.print(f"[bold]2. R2FT[/bold]: rejecting repetition and frequent tokens ({rejected})")
        r2ft(rejecting(rejected, sft, options.seed, options.r2ft_steps, options.beta))


if __name__ == "__main__":
    main()
