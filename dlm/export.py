"""A trained model made ready to be given away: small, and without traces of the machine it was trained on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from dlm.adapter_files import BASE, WEIGHTS, base_of, is_adapter, saved_by_peft
from dlm.atomic import filling
from dlm.checkpoint import DTYPES, load_model
from dlm.data.encoded import ENCODED_SUFFIX
from dlm.data.records import RECORD_SUFFIXES
from dlm.errors import CheckpointError, ConfigError, first_line
from dlm.formats import DiffusionFormat
from dlm.lock import check_writable
from dlm.model_names import NAMES
from dlm.modes import share
from dlm.origin import carry_notice
from dlm.pretrained.names import located
from dlm.prior import COUNTS_FILE
from dlm.spec import ModelSpec

logger = logging.getLogger(__name__)


def export(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "bfloat16",
    base: str = "",
    merge: bool = False,
    block_size: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model or an adapter anew, in a smaller type, with all that belongs to it.

    Args:
        source: folder of a checkpoint, or a name such as "default".
        target: folder to write; made if it is not there, and empty if it is.
        dtype: type of the weights: "float32", "bfloat16" or "float16".
        base: name that the adapter gives its base from now on: a hub id, say, in place of a folder.
        merge: write an adapter merged into its base, as a model that stands alone.
        block_size: positions per block of a block-causal model from now on; see `load_model`.
        generation: new defaults of decoding, such as {"decoder": "conv"}; the others stay.

    Returns:
        The folder `target`.

    Raises:
        CheckpointError: when the source cannot be loaded.
        ConfigError: when the target is not empty or cannot be written to, or `base` is given for what keeps
            none, or a `block_size` is not for the model.
    """
    source, target = Path(located(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    check_writable(target)
    alone = merge or not is_adapter(source) or saved_by_peft(source)
    if base and alone:
        raise ConfigError(f"base is for adapters, and {source} is to be written as a model that stands alone")
    with filling(target):
        if alone:
            model, tokenizer = load_model(source, "cpu", dtype, block_size=block_size)
            _cleaned(model.config, generation)
            DiffusionFormat().write(model, tokenizer, target)
        else:
            _export_adapter(source, target, DTYPES[dtype], base, block_size, generation)
        if (source / COUNTS_FILE).is_file():
            shutil.copyfile(source / COUNTS_FILE, target / COUNTS_FILE)
        carry_notice(source, target)
    return target


def _export_adapter(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    base: str,
    block_size: int | None,
    generation: Mapping[str, Any] | None,
) -> None:
    try:
        weights = load_file(source / WEIGHTS)
        settings, config = (
            PeftConfig.from_pretrained(str(source)),
            AutoConfig.from_pretrained(source, trust_remote_code=False),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not isinstance(settings, LoraConfig):
            raise TypeError("its settings are not those of a LoRA adapter")
    except Exception as error:  # whatever peft and transformers raise when a file is not what it should be
        raise CheckpointError(f"{source}: not a whole adapter ({first_line(error)})") from error
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: w.to(dtype) for name, w in weights.items()}, target / WEIGHTS, {"format": "pt"})
    share(target)
    if not base and Path(base_of(source)).exists() and base_of(source) not in NAMES:
        logger.warning(
            "the adapter names its base by a folder of this machine, %s: give base, or merge", base_of(source)
        )
    settings.base_model_name_or_path = base or settings.base_model_name_or_path
    if isinstance(settings.target_modules, set):
        settings.target_modules = sorted(settings.target_modules)  # so that equal exports are equal files
    settings.save_pretrained(str(target))
    _cleaned(config, generation)
    if block_size is not None:
        config.block_size = ModelSpec.of_config(config).in_blocks_of(block_size).visibility.block_size
    if base and config.training:
        config.training["init"] = base
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if (source / BASE).is_file():
        shutil.copyfile(source / BASE, target / BASE)


DATA_FILES = (*RECORD_SUFFIXES, ENCODED_SUFFIX)
"""Endings of files of rows, which are no hub ids."""


def merged_defaults(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of decoding with new ones; options stay with their own decoder."""
    another = "decoder" in new and new["decoder"] != stored.get("decoder")
    kept = {name: value for name, value in stored.items() if not (another and name == "options")}
    return {**kept, **new}


def _cleaned(config: Any, generation: Mapping[str, Any] | None) -> None:
    """Of folders in the records of the training, leave the last part; set defaults of decoding."""
    config.generation = merged_defaults(config.generation or {}, generation or {})
    if config.training:
        config.training = _without_folders(config.training)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    path = Path(value)
    try:
        local = path.is_absolute() or path.exists()
    except OSError:  # too long for a path
        return value
    elsewhere = value.startswith(("./", "../", "~")) or value.endswith(DATA_FILES)
    return path.name or value if local or elsewhere else value
