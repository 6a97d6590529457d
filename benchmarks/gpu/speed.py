"""Stage `speed`: tokens per second of a training step and its share of the peak, in variants; and a profile.

A step is forward, backward, clipping and AdamW under bf16 autocast, on rows of 256 tokens of which half are
masked; the LM head sees the masked ones alone. The variants show what a step gains by attention without a
mask (rows end to end, as flash kernels take them), frozen weights in bf16, compiled layers, more rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.context import PEAK, Context, ceilings, free, seconds, time_limit
from benchmarks.gpu.material import BILLION, MINIATURE, SMOLLM2, shaped
from benchmarks.gpu.profiling import profile
from dlm.adapter import add_adapter
from dlm.model import IGNORE
from dlm.objective import masked_diffusion_loss, token_log_probabilities


@dataclass(frozen=True)
class Speed:
    """A training step to be timed.

    Attributes:
        name: in the report.
        shape: of the model.
        rows: of 256 tokens.
        rank: of a LoRA adapter; 0 trains all weights.
        folded: whether the adapter is added to the weights (`FoldedLinear`).
        compiled: whether the layers are compiled.
        packed: rows end to end, without padding and without a mask.
        half: whether frozen weights are in bf16.
        profiled: whether the kernels of a step are listed as well.
        estimate: seconds that it may take.
    """

    name: str
    shape: dict[str, Any]
    rows: int
    rank: int = 0
    folded: bool = False
    compiled: bool = False
    packed: bool = False
    half: bool = False
    profiled: bool = False
    estimate: float = 12.0


LORA: dict[str, Any] = {"rank": 32, "folded": True}
BIG: dict[str, Any] = {"rank": 64}
FAST: dict[str, Any] = {"packed": True, "half": True}
BIG_FAST = {**BIG, **FAST, "folded": True}
SPEEDS = (
    Speed("135M, LoRA r 32, folded", SMOLLM2, 96, **LORA, profiled=True),
    Speed("135M, LoRA r 32, folded, packed", SMOLLM2, 96, **LORA, packed=True),
    Speed("135M, LoRA r 32, folded, packed, bf16 base", SMOLLM2, 96, **LORA, **FAST, profiled=True),
    Speed("1B, LoRA r 64", BILLION, 32, **BIG, profiled=True),
    Speed("1B, LoRA r 64, folded, packed, bf16 base", BILLION, 32, **BIG_FAST),
    Speed("135M, all weights, packed", SMOLLM2, 96, packed=True, profiled=True),
    Speed("135M, LoRA r 32, folded, packed, bf16 base, 192 rows", SMOLLM2, 192, **LORA, **FAST),
    Speed("1B, LoRA r 64, folded, packed, bf16 base, 64 rows", BILLION, 64, **BIG_FAST),
    Speed("135M, LoRA r 32, folded, packed, bf16 base, compiled", SMOLLM2, 96, **LORA, **FAST, compiled=True,
          profiled=True, estimate=30),
    Speed("1B, LoRA r 64, folded, packed, bf16 base, compiled", BILLION, 32, **BIG_FAST,
          compiled=True, estimate=30),
    Speed("135M, all weights, packed, compiled", SMOLLM2, 96, packed=True, compiled=True, estimate=30),
    Speed("135M, all weights", SMOLLM2, 96),
    Speed("135M, LoRA r 32", SMOLLM2, 96, 32),
    Speed("135M, LoRA r 32, folded, compiled", SMOLLM2, 96, **LORA, compiled=True, estimate=30),
)  # fmt: skip
"""The most telling first."""

EAGER, COMPILED = SPEEDS[0], SPEEDS[-1]
"""Those that the recipe is run as."""


def run(context: Context) -> None:
    """All that fit into the time."""
    for speed in SPEEDS:
        measured(context, speed)


def measured(context: Context, speed: Speed, keep: float = 0.0) -> None:
    """Time a step, unless that would leave less than `keep` seconds; a failure is written down."""
    if context.tiny and speed.compiled:
        return
    if context.skip("train", speed.name, keep + (0 if context.tiny else speed.estimate)):
        return
    try:
        with time_limit(min(2 * speed.estimate, max(context.left - keep, speed.estimate))):
            measure(context, speed)
    except Exception as error:  # out of memory, or a compiler that is not there
        context.report.add("failures", speed.name, error=f"{type(error).__name__}: {error}"[:500])
    free(context.device)


def measure(context: Context, speed: Speed) -> None:
    """Tokens per second of forward, backward and AdamW under bf16 autocast, and the share of the peak."""
    if context.cuda:
        torch.cuda.reset_peak_memory_stats()
    shape, rows, width = (MINIATURE, 2, 32) if context.tiny else (speed.shape, speed.rows, 256)
    step = step_of(context, speed, shape, rows, width)
    begun = time.monotonic()
    step()
    first = time.monotonic() - begun
    took = seconds(step, context.device, limit=0.2 if context.tiny else 1.5)
    rate = rows * width / took
    done = rate * operations(shape, width, 0.5, bool(speed.rank))
    memory = torch.cuda.max_memory_allocated() / 2**30 if context.cuda else 0.0
    context.report.add(
        "train", speed.name, tokens_per_second=rate, mfu=done / PEAK,
        of_measured_peak=done / ceilings(context)["matmul"], goal="mfu >= 0.5", seconds=took,
        first_seconds=first, memory_gib=memory,
    )  # fmt: skip
    if speed.profiled and (context.cuda or speed is EAGER):
        profile(context, f"step of {speed.name}", step)


def step_of(
    context: Context, speed: Speed, shape: dict[str, Any], rows: int, width: int
) -> Callable[[], None]:
    """A training step of a new model on rows that lie ready."""
    model, trained = learner(context, speed, shape)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(5, shape["vocab_size"] - 5, (rows, width), device=context.device)
    masked = torch.rand(ids.shape, device=context.device) < 0.5
    noisy = ids.masked_fill(masked, model.config.mask_token_id)
    targets = torch.where(masked, ids, IGNORE)
    real = torch.ones_like(masked)
    if not speed.packed:
        real[0, -8:] = False  # as in training, where rows end in padding
        targets[0, -8:] = IGNORE
    cells = targets.flatten() != IGNORE
    clean = targets.flatten()[cells]
    times = torch.full((len(clean),), 0.5, device=context.device)

    def logp() -> torch.Tensor:
        if not speed.packed:
            return model(input_ids=noisy, attention_mask=real, targets=targets).token_logp  # type: ignore[no-any-return]
        hidden = model.packed_hidden(noisy.flatten(), [width] * rows)
        return token_log_probabilities(hidden[cells], model.lm_head, clean)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=context.cuda):
            loss = masked_diffusion_loss(logp(), times, ids.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def learner(context: Context, speed: Speed, shape: dict[str, Any]) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model as the variant has it, and what is trained of it."""
    half = speed.half and context.cuda
    model: Any = shaped(context.device, torch.bfloat16 if half else torch.float32, **shape).train()
    if speed.compiled:
        for layer in model.layers:
            layer.compile(dynamic=False if speed.packed else None)
    if speed.rank:
        model = add_adapter(model, "random", r=speed.rank, alpha=speed.rank, folded=speed.folded)
        model.to(context.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    return model, trained


def operations(shape: dict[str, Any], width: int, masked: float, adapted: bool) -> float:
    """Multiplications and additions that a trained token needs: 2 forward and 4 backward for each weight.

    For frozen weights 2 less; attention is counted, the LM head for the masked share only, an adapter's own
    weights are not.
    """
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    groups = shape["num_key_value_heads"] / heads
    weights = layers * hidden * (hidden * (2 + 2 * groups) + 3 * shape["intermediate_size"])
    weights += masked * hidden * shape["vocab_size"]
    return float((4 if adapted else 6) * weights + 12 * layers * hidden * width)
