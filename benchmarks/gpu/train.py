"""Stage `train`: tokens per second and share of the peak, then the default recipe while there is time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import material
from benchmarks.gpu.context import PEAK, Context, ceilings, free, seconds
from benchmarks.gpu.material import BILLION, MINIATURE, SMOLLM2, built, recipe, shaped
from dlm.adapter import add_adapter
from dlm.export import export
from dlm.model import IGNORE
from dlm.objective import masked_diffusion_loss
from dlm.pretrained.names import located
from finetune.config import TrainConfig

GENERATION = {"decoder": "entropy-bound", "options": {"kernel_size": 9}}
"""How the default model decodes."""


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
        estimate: seconds that it may take.
    """

    name: str
    shape: dict[str, Any]
    rows: int
    rank: int = 0
    folded: bool = False
    compiled: bool = False
    estimate: float = 15.0


SPEEDS = (
    Speed("135M, LoRA r 32, folded", SMOLLM2, 96, 32, folded=True),
    Speed("135M, LoRA r 32, folded, compiled", SMOLLM2, 96, 32, folded=True, compiled=True, estimate=60),
    Speed("135M, all weights, compiled", SMOLLM2, 96, compiled=True, estimate=60),
    Speed("135M, all weights", SMOLLM2, 96),
    Speed("1B, LoRA r 64", BILLION, 32, 64),
    Speed("1B, LoRA r 64, compiled", BILLION, 32, 64, compiled=True, estimate=60),
    Speed("135M, LoRA r 32", SMOLLM2, 96, 32),
)
ROWS = 256
"""Rows of a step of the recipe."""

EAGER, COMPILED = SPEEDS[0].name, SPEEDS[1].name


def run(context: Context) -> None:
    """The speeds of the recipe's own kind, the recipe, then the other speeds in what time is left."""
    spare = 60 * _share(context)
    for speed in SPEEDS[:2]:
        _measured(context, speed, spare)
    train_recipe(context, reserve=15 + (spare if context.cuda else 0))
    for speed in SPEEDS[2:]:
        _measured(context, speed, 0)


def _share(context: Context) -> float:
    """Minutes of the stage that go into speeds after the recipe: a sixth, at most one."""
    return min(1.0, context.left / 60 / 6)


# ---- speeds ------------------------------------------------------------------------------------------


def _measured(context: Context, speed: Speed, keep: float) -> None:
    """Time a step, unless that would leave less than `keep` seconds; a failure is written down."""
    if context.tiny and speed.compiled:
        return
    if context.skip("train", speed.name, keep + (0 if context.tiny else speed.estimate)):
        return
    try:
        measure(context, speed)
    except Exception as error:  # out of memory, or a compiler that is not there
        context.report.add("train", speed.name, error=f"{type(error).__name__}: {error}"[:300])
    free(context.device)


def measure(context: Context, speed: Speed) -> None:
    """Tokens per second of forward, backward and AdamW under bf16 autocast, and the share of the peak."""
    if context.cuda:
        torch.cuda.reset_peak_memory_stats()
    shape, rows, width = (MINIATURE, 2, 32) if context.tiny else (speed.shape, speed.rows, 256)
    model: Any = shaped(context.device, torch.float32, **shape).train()
    if speed.compiled:
        for layer in model.layers:
            layer.compile(dynamic=True)
    if speed.rank:
        model = add_adapter(model, "random", r=speed.rank, alpha=speed.rank, folded=speed.folded)
        model.to(context.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(5, shape["vocab_size"] - 5, (rows, width), device=context.device)
    masked = torch.rand(ids.shape, device=context.device) < 0.5
    noisy = ids.masked_fill(masked, model.config.mask_token_id)
    targets = torch.where(masked, ids, IGNORE)
    real = torch.ones_like(masked)
    real[0, -8:] = False  # as in training, where rows end in padding
    targets[0, -8:] = IGNORE
    times = torch.full((int((targets != IGNORE).sum()),), 0.5, device=context.device)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=context.cuda):
            out = model(input_ids=noisy, attention_mask=real, targets=targets)
            loss = masked_diffusion_loss(out.token_logp, times, ids.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    begun = time.monotonic()
    step()
    first = time.monotonic() - begun
    took = seconds(step, context.device, limit=0.2 if context.tiny else 3.0)
    rate = ids.numel() / took
    done = rate * operations(shape, width, 0.5, bool(speed.rank))
    memory = torch.cuda.max_memory_allocated() / 2**30 if context.cuda else 0.0
    context.report.add(
        "train", speed.name, tokens_per_second=rate, mfu=done / PEAK,
        of_measured_peak=done / ceilings(context)["matmul"], goal="mfu >= 0.5", seconds=took,
        first_seconds=first, memory_gib=memory,
    )  # fmt: skip


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


# ---- the recipe --------------------------------------------------------------------------------------


def folder_of(context: Context) -> Path:
    """The run of the recipe."""
    return context.output / "sft"


def train_recipe(context: Context, reserve: float) -> None:
    """Train until `reserve` seconds before the end of the stage, and hand the adapter over."""
    from finetune.sft import train

    folder = folder_of(context)
    config = stored(folder, TrainConfig) or built(
        TrainConfig, settings(context, (context.left - reserve) / 60)
    )
    if not context.done("train", "recipe"):
        try:
            train(config)
        except Exception as error:
            if not config.model.compile:
                raise
            context.report.add("failures", "recipe, compiled", error=f"{type(error).__name__}: {error}"[:300])
            shutil.rmtree(folder)
            config = built(TrainConfig, settings(context, (context.left - reserve) / 60, compiled=False))
            train(config)
        context.report.add("train", "recipe", **summary(folder, config))
        give(context, folder, "sft", "smollm2-135m-instruct")


def settings(context: Context, minutes: float, compiled: bool | None = None) -> dict[str, Any]:
    """The default recipe, for a GPU and a time."""
    compiled = faster_compiled(context) if compiled is None else compiled
    micro = ROWS if fits(context, compiled) else ROWS // 2
    changes: dict[str, Any] = {
        "output_dir": str(folder_of(context)),
        "model.init": material.base(context),
        "model.lora.fold": True,
        "model.compile": compiled,
        "data.source": str(material.rows(context)),
        "max_minutes": round(max(minutes, 0.02), 3),
        "save_minutes": 0.5,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": ROWS // micro,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "eval_steps": 400,
        "eval_rows": 500,
        "save_steps": 10**7,
        "keep_checkpoints": 1,
        "logging_steps": 20,
        "report_to": "none",
        "trainer": {
            "disable_tqdm": True,
            "eval_on_start": True,
            "dataloader_num_workers": 4,
            "logging_nan_inf_filter": False,
        },
    }
    if context.tiny:
        changes |= tiny_changes() | {"max_minutes": 0.03, "gradient_accumulation_steps": 1, "model.lora.r": 4}
    return recipe("alpaca-smollm2-135m-lora", changes)


def fits(context: Context, compiled: bool) -> bool:
    """Whether all rows of a step, as long as the window, fit into the memory, by what was measured."""
    measured = context.report.find("train", COMPILED if compiled else EAGER) or {}
    if not context.cuda or "memory_gib" not in measured:
        return False
    needed = float(measured["memory_gib"]) * ROWS / SPEEDS[0].rows
    return needed < 0.85 * torch.cuda.get_device_properties(context.device).total_memory / 2**30


def tiny_changes() -> dict[str, Any]:
    """What makes a recipe small."""
    return {
        "data.window": material.TINY_WINDOW, "data.validation_rows": 20, "per_device_train_batch_size": 8,
        "eval_rows": 10, "eval_steps": 10**6, "warmup_steps": 2, "logging_steps": 5, "precision": "fp32",
        "trainer": {"disable_tqdm": True, "eval_on_start": True},
    }  # fmt: skip


def faster_compiled(context: Context) -> bool:
    """Whether compiled layers were measured, and a tenth faster."""
    compiled, eager = (context.report.find("train", name) or {} for name in (COMPILED, EAGER))
    return bool(compiled.get("tokens_per_second", 0) > 1.1 * eager.get("tokens_per_second", float("inf")))


def stored(folder: Path, kind: Any) -> Any:
    """The settings of a run that has begun, so that it goes on with them; None if there is none."""
    file = folder / "run.json"
    return built(kind, json.loads(file.read_text(encoding="utf-8"))["config"]) if file.is_file() else None


def summary(folder: Path, config: Any) -> dict[str, Any]:
    """What a finished run says of itself."""
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    nelbo = [record["eval_nelbo"] for record in history if "eval_nelbo" in record]
    logged = [record for record in history if "loss" in record]
    speeds = sorted(record["tokens_per_second"] for record in logged)
    return {
        "steps": history[-1]["step"], "epochs": logged[-1]["epoch"] if logged else 0.0,
        "rows_per_step": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else 0.0,
        "loss": logged[-1]["loss"] if logged else None,
        "nelbo_first": nelbo[0] if nelbo else None, "nelbo_last": nelbo[-1] if nelbo else None,
        "nelbo_best": min(nelbo, default=None), "minutes": config.max_minutes,
        "compiled": config.model.compile,
    }  # fmt: skip


def give(context: Context, folder: Path, name: str, base: str) -> None:
    """Export the adapter of a run as the package ships it, and hand it over in pieces."""
    target = context.output / "export" / name
    shutil.rmtree(target, ignore_errors=True)
    export(folder, target, base="" if context.tiny else base, generation=GENERATION)
    if not context.tiny:  # the package's own, whatever this version of transformers made of it
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(Path(located("default-sft")) / file, target / file)
    for file in ("history.json", "run.json", *pictures(folder)):
        shutil.copyfile(folder / file, target / file)
    context.hand_over(f"{name}.tar.gz", target, "*")


def pictures(folder: Path) -> Iterator[str]:
    """The plots of a run."""
    yield from (path.name for path in folder.glob("*.png"))
