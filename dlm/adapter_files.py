"""The files of an adapter, read without `peft`: which folders are adapters, and what they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from dlm.errors import CheckpointError, first_line
from dlm.model_names import NAMES

CONFIG = "adapter_config.json"

WEIGHTS = "adapter_model.safetensors"

BASE = "base.json"
"""In an adapter's folder: what its base was, see `dlm.adapter.sketch`."""


def is_adapter(path: str | Path) -> bool:
    """True when a folder holds an adapter."""
    return (Path(path) / CONFIG).is_file()


def saved_by_peft(path: str | Path) -> bool:
    """True when an adapter's folder is as `peft` alone writes it: without the model's config.json."""
    return is_adapter(path) and not (Path(path) / "config.json").is_file()


def base_of(path: str | Path) -> str:
    """The base that an adapter was trained on: a name, a hub id, or a folder where it was then.

    A folder that is no longer there is looked for beside the adapter, in case both have moved.

    Raises:
        CheckpointError: when the adapter does not say.
    """
    try:
        base = dict(json.loads((Path(path) / CONFIG).read_text("utf-8"))).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {CONFIG} is damaged ({first_line(error)})") from error
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{path}: {CONFIG} does not name the model that the adapter belongs to")
    beside = Path(path).resolve().parent / Path(base).name
    moved = base not in NAMES and not Path(base).exists()
    return str(beside if moved and (beside.is_file() or (beside / "config.json").is_file()) else base)
