"""Length-free decoding against a fixed window and against autoregressive decoding, on the same backbone.

A model of SmolLM2-135M's shape with random weights answers a prompt of 40 tokens with 64 tokens (speed does
not depend on the weights; the end token is forbidden, so that every answer has that length). Baselines: a
fixed window of L = 512 with S = 64, of which such an answer is a part and which is filled to its end; and
`generate` of transformers with its key/value cache, one token per call. All are measured in turn in one run;
medians and ratios are printed.

    python -m benchmarks.length_free [--rounds 3] [--dtype float32]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decoding import PROMPT, SMOLLM2, VOCAB
from benchmarks.training import now
from decoding.canvas import Canvas
from decoding.loop import Settings, denoise
from decoding.presets import Decoder
from dlm.checkpoint import DTYPES
from dlm.config import MaskedDiffusionConfig
from dlm.model import MaskedDiffusionModel

ANSWER, MASK, EOS = 64, VOCAB - 1, 0


def diffusion(model: MaskedDiffusionModel, prompt: torch.Tensor, seed: int, rate: float | None) -> int:
    """Write an answer, length-free at a rate or in the fixed window; returns the number of model calls."""
    decoder = Decoder.named("conv").without(EOS)
    room = ANSWER if rate else 512 - PROMPT
    ids = torch.cat([prompt, torch.full((1, room), MASK, device=prompt.device)], dim=1)
    settings = Settings(None if rate else 64, EOS, MASK, rate=rate, grow=rate is not None)
    key = torch.tensor([seed], device=prompt.device)
    canvas = Canvas.of(ids, MASK, key, ahead=settings.ahead(decoder))
    with torch.inference_mode():
        for _ in denoise(model, canvas, decoder, settings):
            pass
    return int(canvas.model_calls[0])


def autoregressive(model: torch.nn.Module, prompt: torch.Tensor) -> int:
    """Write an answer token by token with a key/value cache."""
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=EOS
        )
    return ANSWER


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": DTYPES[options.dtype]}
    config = MaskedDiffusionConfig(
        backbone=SMOLLM2, vocab_size=VOCAB, num_tokens=VOCAB, mask_token_id=MASK, eos_token_id=EOS
    )
    model = MaskedDiffusionModel(config).to(**to).eval()
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMOLLM2, vocab_size=VOCAB))
    causal = causal.to(**to).eval()
    prompt = torch.randint(5, VOCAB - 5, (1, PROMPT), device=options.device)
    runs: dict[str, Callable[[int], int]] = {
        "autoregressive, cache": lambda _: autoregressive(causal, prompt)
    }
    for rate in (1.0, 2.0, 4.0):
        runs[f"length-free, rate {rate:g}"] = lambda seed, r=rate: diffusion(model, prompt, seed, r)  # type: ignore[misc]
    runs["fixed window"] = lambda seed: diffusion(model, prompt, seed, None)
    report(runs, options.rounds, options.dtype)


def report(runs: dict[str, Callable[[int], int]], rounds: int, dtype: str) -> None:
    """Time every way in turn and print seconds, calls and the ratio to autoregressive decoding."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, list[int]] = {name: [] for name in runs}
    for seed in range(rounds + 1):
        for name, run in runs.items():
            begun = now()
            calls[name].append(run(seed))
            seconds[name].append(now() - begun)
    threads = torch.get_num_threads()
    print(f"{ANSWER} tokens behind a prompt of {PROMPT}, 135M parameters, {dtype}, {threads} threads")
    first = next(iter(runs))
    for name in runs:
        own, base = seconds[name][1:], seconds[first][1:]  # the first round warms up
        ratio = median(b / a for a, b in zip(own, base, strict=True))
        print(
            f"  {name:<22} {median(own):6.2f} s, {ANSWER / median(own):6.1f} tokens/s, "
            f"{median(calls[name][1:]):5.1f} calls, {ratio:5.2f} x {first}"
        )


if __name__ == "__main__":
    main()
