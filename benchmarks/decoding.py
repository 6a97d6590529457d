"""Decoding: the time that a step spends outside the model, and model calls per answer.

A model of SmolLM2-135M's shape with random weights (speed does not depend on their values) decodes one row
of L = 512, V = 49,153 with S = 64. The model's share is its forward pass and LM head; the rest is window
weights, normaliser, top-k, sampling and bookkeeping.

    python -m benchmarks.decoding [--window 512] [--steps 64] [--dtype float32]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.canvas import Canvas
from decoding.loop import Settings, denoise
from decoding.presets import Decoder
from dlm.config import MaskedDiffusionConfig
from dlm.model import MaskedDiffusionModel

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
VOCAB = 49_153
PROMPT = 40


def _now() -> float:
    """The clock, after the GPU (if there is one) has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Timed:
    """A model whose two calls are timed."""

    model: Any
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "head": 0.0})
    calls: int = 0

    def _time(self, name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        begun = _now()
        out = call()
        self.seconds[name] += _now() - begun
        return out

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        self.calls += 1
        return self._time("forward", lambda: self.model.hidden(input_ids, attention_mask))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V]."""
        return self._time("head", lambda: self.model.logits(hidden))


def measure(
    model: MaskedDiffusionModel, decoder: Decoder, window: int, steps: int, limit: int
) -> dict[str, float]:
    """Seconds per model call in the forward pass, the head and elsewhere, over the first `limit` steps."""
    timed = Timed(model)
    ids = torch.full((1, window), VOCAB - 1, device=model.device)
    ids[0, :PROMPT] = torch.arange(100, 100 + PROMPT)
    canvas = Canvas.of(ids, VOCAB - 1, torch.tensor([1], device=model.device))
    settings = Settings(steps, eos_id=2, mask_id=VOCAB - 1, eos_fill=False, early_exit=False)
    taken = 0
    begun = _now()
    with torch.inference_mode():
        for taken, _ in enumerate(denoise(timed, canvas, decoder, settings), start=1):
            if taken == limit:
                break
    total = _now() - begun
    model_seconds = sum(timed.seconds.values())
    return {
        "step": total / taken,
        "forward": timed.seconds["forward"] / taken,
        "head": timed.seconds["head"] / taken,
        "rest": (total - model_seconds) / taken,
        "share": (total - model_seconds) / total,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--limit", type=int, default=12, help="steps to measure")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    config = MaskedDiffusionConfig(
        backbone=SMOLLM2,
        vocab_size=VOCAB,
        num_tokens=VOCAB,
        mask_token_id=VOCAB - 1,
        eos_token_id=2,
        shift=True,
    )
    model = MaskedDiffusionModel(config).to(options.device, getattr(torch, options.dtype)).eval()
    print(
        f"decoding, 135M parameters, L={options.window}, S={options.steps}, V={VOCAB}, {options.dtype}, "
        f"{torch.get_num_threads()} threads; milliseconds per step"
    )
    print(f"  {'decoder':<12}{'step':>8}{'forward':>9}{'LM head':>9}{'rest':>7}   outside the model")
    for name in ("categorical", "top-k", "semi-ar", "llada", "conv", "llada-conv"):
        measure(model, Decoder.named(name), options.window, options.steps, 2)
        r = measure(model, Decoder.named(name), options.window, options.steps, options.limit)
        times = "".join(
            f"{1000 * r[k]:>{w}.0f}" for k, w in (("step", 8), ("forward", 9), ("head", 9), ("rest", 7))
        )
        print(f"  {name:<12}{times}   {100 * r['share']:.1f} %")


if __name__ == "__main__":
    main()
