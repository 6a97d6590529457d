"""Stage `r2ft`: reject repetition, by the default recipe on the result of stage `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import material, train
from benchmarks.gpu.context import Context, MaterialError
from benchmarks.gpu.material import built, recipe
from finetune.config import R2FTConfig

RESERVE = 15.0
"""Seconds at the end of the stage for handing the adapter over."""


def folder_of(context: Context) -> Path:
    """The run of the recipe."""
    return context.output / "r2ft"


def run(context: Context) -> None:
    """Train with the guard on the NELBO, and hand the adapter over."""
    from finetune.r2ft import r2ft

    if context.done("r2ft", "recipe"):
        return
    if not (train.folder_of(context) / "adapter_config.json").is_file():
        raise MaterialError(f"{train.folder_of(context)} holds no finished run: stage train comes first")
    folder = folder_of(context)
    config = train.stored(folder, R2FTConfig) or built(R2FTConfig, settings(context))
    r2ft(config)
    train.give(context, folder, "r2ft", "default-sft")
    context.report.add("r2ft", "recipe", **train.summary(folder, config), **kept(folder, config))


def settings(context: Context) -> dict[str, Any]:
    """The default recipe on the adapter of stage `train`, within the time of the stage.

    Its learning rate follows the clock where that is faster than the steps.
    """
    changes: dict[str, Any] = {
        "output_dir": str(folder_of(context)),
        "model.init": str(train.folder_of(context)),
        "model.lora.fold": True,
        "data.source": str(material.rows(context)),
        "max_minutes": round(max((context.left - RESERVE) / 60, 0.02), 3),
        "save_minutes": 0.5,
        "report_to": "none",
        "keep_checkpoints": 4,
        "trainer": {"disable_tqdm": True},
    }
    if context.tiny:
        small = train.tiny_changes() | {"trainer": {"disable_tqdm": True}, "eval_steps": 2, "save_steps": 2}
        changes |= small | {"max_steps": 4, "learning_rate": 1e-6, "model.lora.r": 2}
    return recipe("r2ft-smollm2-135m-blocks", changes)


def kept(folder: Path, config: R2FTConfig) -> dict[str, Any]:
    """The step whose weights were kept."""
    import json

    from finetune.watch import kept_step

    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return {"kept_step": kept_step(history, config.nelbo_tolerance)}
