"""Stage `train`: the default recipe while there is time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu import material
from benchmarks.gpu.context import Context
from benchmarks.gpu.material import built, recipe
from benchmarks.gpu.speed import COMPILED, EAGER, measured
from dlm.export import export
from dlm.pretrained.names import located
from finetune.config import TrainConfig

GENERATION = {"decoder": "entropy-bound", "options": {"kernel_size": 3, "frequency_penalty": 0.6}}
"""How the default model decodes."""


ROWS = 128
"""Rows of a step of the recipe."""


def run(context: Context) -> None:
    """The recipe; compiled where that was measured to be faster, unless `model.compile` is given."""
    for speed in (EAGER, COMPILED) if "model.compile" not in context.changes else ():
        measured(context, speed, keep=60.0)
    train_recipe(context, reserve=15)


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
        give(context, folder, "sft", "smollm2-135m-instruct")  # first: a stage that is done is not done again
        context.report.add("train", "recipe", **summary(folder, config))


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
        "num_train_epochs": 0,
        "max_minutes": round(max(minutes, 0.02), 3),
        "save_minutes": 0.5,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": ROWS // micro,
        "learning_rate": 1.2e-3,
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
        },
    }
    if context.tiny:
        changes |= tiny_changes() | {"max_minutes": 0.03, "gradient_accumulation_steps": 1, "model.lora.r": 4}
    changes |= {name: yaml.safe_load(value) for name, value in context.changes.items()}
    return recipe("alpaca-smollm2-135m-blocks", changes)


def fits(context: Context, compiled: bool) -> bool:
    """True where all rows of a step, as long as the window, fit into the memory, by what was measured.

    In blocks a row passes twice, which the measurement's rows did not.
    """
    speed = COMPILED if compiled else EAGER
    found = context.report.find("train", speed.name) or {}
    if not context.cuda or "memory_gib" not in found:
        return False
    needed = 2 * float(found["memory_gib"]) * ROWS / speed.rows
    return needed < 0.85 * torch.cuda.get_device_properties(context.device).total_memory / 2**30


def tiny_changes() -> dict[str, Any]:
    """Changes that make a recipe small."""
    return {
        "data.window": material.TINY_WINDOW, "data.validation_rows": 20, "per_device_train_batch_size": 8,
        "eval_rows": 10, "eval_steps": 10**6, "warmup_steps": 2, "logging_steps": 5, "precision": "fp32",
        "trainer": {"disable_tqdm": True, "eval_on_start": True},
    }  # fmt: skip


def faster_compiled(context: Context) -> bool:
    """True where compiled layers were measured, and a tenth faster."""
    compiled, eager = (context.report.find("train", speed.name) or {} for speed in (COMPILED, EAGER))
    return bool(compiled.get("tokens_per_second", 0) > 1.1 * eager.get("tokens_per_second", float("inf")))


def stored(folder: Path, kind: Any) -> Any:
    """The settings of a run that has begun, so that it goes on with them; None if there is none."""
    file = folder / "run.json"
    return built(kind, json.loads(file.read_text(encoding="utf-8"))["config"]) if file.is_file() else None


def summary(folder: Path, config: Any) -> dict[str, Any]:
    """Figures of a finished run."""
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
