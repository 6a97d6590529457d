"""Public layout to ours and back: weight files are read one by one, and their bytes are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from dlm.adapter_files import is_adapter
from dlm.checkpoint import check_checkpoint
from dlm.checkpoint_checks import no_weights, origin_of
from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError, ConfigError, first_line
from dlm.families.base import Family
from dlm.lock import check_writable
from dlm.model import MaskedDiffusionModel
from dlm.notice import carry_notice
from dlm.pretrained.names import located
from dlm.weights import INDEX, read_index, shards


def convert(source: str | Path, target: str | Path) -> Path:
    """Write a public checkpoint in our layout, or one of ours that was public in the public layout.

    Types and values of the weights are kept; one file is in memory at a time. On the way back config.json is
    the public one; the tokenizer is written in transformers' layout, python files of the repository are not.

    Args:
        source: folder, hub id or name.
        target: folder to write; made if it is not there, and empty if it is.

    Returns:
        The folder `target`.

    Raises:
        CheckpointError: when the source is of no public family and did not come from one, or is not whole.
        ConfigError: when the target is not empty or cannot be written to.
    """
    folder, target = _source_folder(located(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    check_writable(target)
    if not is_adapter(folder) and shards(folder):
        config, tokenizer, family = check_checkpoint(str(folder))
    else:
        raise no_weights(folder)
    if family is not None:
        target.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, target, family.our_name)
        config.architectures = [MaskedDiffusionModel.__name__]
        config.save_pretrained(target)
    else:
        family, public = _origin(folder, config)
        tokenizer.chat_template = (config.public or {}).get("template", tokenizer.chat_template)
        target.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, target, family.public_name)
        (target / "config.json").write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(target)
    carry_notice(folder, target)
    return target


def _source_folder(path: str) -> Path:
    """The folder of a path, or of the files of a hub repository that are needed."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, and the hub does not give it ({first_line(error)})"
        ) from error


def _origin(folder: Path, config: MaskedDiffusionConfig) -> tuple[Family, dict[str, Any]]:
    """Family and public configuration that a checkpoint of ours came from."""
    family = origin_of(config)
    if family is None or config.public is None:
        raise CheckpointError(f"{folder}: did not come from a public checkpoint; it has only this layout")
    return family, dict(config.public["config"])


def _write_weights(folder: Path, target: Path, renamed: Any) -> None:
    for file in shards(folder):
        weights = load_file(file)
        save_file({renamed(name): x for name, x in weights.items()}, target / file.name, {"format": "pt"})
    if (folder / INDEX).is_file():
        index = read_index(folder / INDEX)
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in ("generation_config.json",):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
