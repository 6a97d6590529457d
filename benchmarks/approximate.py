"""Costs of each way of decoding, and its effect on the texts: exact and approximate modes side by side.

Every mode answers the same prompts under the same seeds, one at a time. Speed: model calls and tokens per
second, and the ratio to the first mode. Texts: negative log-likelihood in nats per token, once under an
autoregressive model given the prompt (the base that the diffusion model came from; lower is more fluent,
though loops are fluent too), once by the diffusion model's own word when each token was written (the chain
rule's likelihood at rate 1, a bound's integrand else); share of words that repeat the one before, 4-gram
repetition, share of answers that end by themselves, tokens. With `--demo`, a model of `make demo`: share of
right answers on its held-out instructions, which a program checks.

    python -m benchmarks.approximate --model DIR --judge BASE --file PROMPTS [--limit 24] [--demo DIR]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from decoding.answer import Output
from decoding.presets import Decoder
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.prompts import read_prompts
from dlm.data.rules import is_right, make_examples
from dlm.repetition import repetition, stutter
from eval.bench import as_causal
from examples.demo import PROMPT_SEED, STEPS, WINDOW

Modes = dict[str, dict[str, Any]]


def modes(kernel: int, near: int, window: int, steps: int) -> Modes:
    """The modes by name, margins being 8 if not named; the first is what the others are compared with."""
    conv, close = Decoder.named("conv", kernel_size=kernel), Decoder.named("conv", kernel_size=near)
    fixed = {"decoder": conv, "window": window, "steps": steps}
    growing = {**fixed, "canvas": "growing", "margin": 8}
    free = {"decoder": close, "max_tokens": window, "margin": 8}
    out: Modes = {
        "steps, exact": fixed,
        "steps, growing": growing,
        "steps, growing, margin 32": {**growing, "margin": 32},
        "steps, reuse prompt": {**fixed, "reuse": "prompt"},
        "steps, growing, reuse dual": {**growing, "reuse": "dual"},
    }
    for rate in (1.0, 2.0, 4.0):
        out[f"free, rate {rate:g}"] = {**free, "rate": rate}
        for scope in ("prompt", "prefix", "dual") if rate == 2.0 else ("dual",):
            out[f"free, rate {rate:g}, reuse {scope}"] = {**free, "rate": rate, "reuse": scope}
    out["free, rate 2, reuse dual, refresh 32"] = {**free, "rate": 2.0, "reuse": "dual", "refresh": 32}
    for margin in (16, 32):
        out[f"free, rate 2, margin {margin}"] = {**free, "rate": 2.0, "margin": margin}
    for tau in (0.9, 0.6):
        decoder = Decoder.named("threshold", tau=tau, kernel_size=near)
        out[f"free, threshold {tau}"] = {**free, "decoder": decoder}
    bound = Decoder.named("entropy-bound", gamma=0.5, temperature=1.0, top_k=20, kernel_size=near)
    for margin in (8, 16):
        out[f"free, entropy bound 0.5, margin {margin}"] = {**free, "decoder": bound, "margin": margin}
    return out


class Judge:
    """An autoregressive model that says how likely answers are.

    Args:
        path: the causal language model, of the same vocabulary as the diffusion model.
    """

    def __init__(self, path: str, device: str, dtype: str) -> None:
        self.model = as_causal(load_model(path, device, dtype)[0])

    @torch.inference_mode()
    def nats(self, prompt: list[int], answer: list[int]) -> float:
        """Negative log-likelihood of the answer's tokens, given the prompt."""
        ids = torch.tensor([prompt + answer], device=self.model.device)
        logp = self.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return float(-logp.gather(1, ids[0, len(prompt) :, None]).sum())


def write(sampler: Sampler, prompts: Sequence[Any], how: dict[str, Any]) -> tuple[list[Output], float]:
    """Answers one by one, and the seconds they took."""
    begun = time.perf_counter()
    outs = sampler.generate(prompts, batch_size=1, seed=0, **how)
    return outs, time.perf_counter() - begun


def compare(sampler: Sampler, judge: Judge, prompts: Sequence[Any], chosen: Modes) -> None:
    """Print a line for every mode."""
    first = 0.0
    for name, how in chosen.items():
        outs, seconds = write(sampler, prompts, how)
        tokens = sum(len(out.token_ids) for out in outs)
        if not first:
            first = tokens / seconds
        nats = sum(
            judge.nats(sampler.rows.prompt(prompt), out.token_ids)
            for prompt, out in zip(prompts, outs, strict=True)
            if out.token_ids
        )
        cells = {
            "mode": name,
            "tokens/s": f"{tokens / seconds:.1f}",
            "× first": f"{tokens / seconds / first:.2f}",
            "calls": f"{mean(out.model_calls for out in outs):.1f}",
            "tokens": f"{tokens / len(outs):.0f}",
            "ended": f"{100 * mean(out.finish_reason == 'stop' for out in outs):.0f} %",
            "NLL, judge": f"{nats / tokens:.2f}",
            "NLL, own": f"{_own(outs):.2f}",
            "stutter": f"{100 * mean(stutter(out.text) for out in outs):.1f} %",
            "repetition": f"{100 * mean(repetition(out.text) for out in outs):.1f} %",
        }
        if name == next(iter(chosen)):
            print("| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")
        print("| " + " | ".join(cells.values()) + " |", flush=True)


def _own(outs: Sequence[Output]) -> float:
    """Mean of -log p of the written tokens, each by the model's own word when it was written."""
    return -mean(math.log(max(p, 1e-9)) for out in outs for p in out.confidence if p is not None)


def tasks(sampler: Sampler, size: int, chosen: Modes) -> None:
    """Print the share of right answers for every mode, on instructions that were never trained on."""
    examples = make_examples(size, seed=PROMPT_SEED, split="test")
    print("| mode | right | calls | answers/s |\n|---|---|---|---|")
    for name, how in chosen.items():
        begun = time.perf_counter()
        outs = sampler.generate([e.instruction for e in examples], batch_size=32, seed=0, **how)
        seconds = time.perf_counter() - begun
        right = mean(is_right(e, out.text) for e, out in zip(examples, outs, strict=True))
        calls = mean(out.model_calls for out in outs)
        print(f"| {name} | {100 * right:.1f} % | {calls:.1f} | {size / seconds:.1f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--judge", default="")
    parser.add_argument("--file", default="")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--demo", default="", help="a model of make demo")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.model:
        sampler = Sampler(*load_model(options.model, options.device, options.dtype))
        judge = Judge(options.judge, options.device, options.dtype)
        fitting = (p for p in read_prompts(options.file) if sampler.prompt_length(p) < options.window // 2)
        prompts = [p for p, _ in zip(fitting, range(options.limit), strict=False)]
        print(f"{len(prompts)} prompts, window {options.window}, {options.steps} steps, {options.dtype}\n")
        compare(sampler, judge, prompts, modes(options.window // 4 + 1, 33, options.window, options.steps))
    if options.demo:
        sampler = Sampler(*load_model(options.demo, options.device, options.dtype))
        print(f"\n{options.examples} held-out instructions of the demo, window {WINDOW}, {STEPS} steps\n")
        tasks(sampler, options.examples, modes(13, 13, WINDOW, STEPS))


if __name__ == "__main__":
    main()
