"""Public layout to ours and back: the bytes of the weights are copied, and only their names change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from dlm.adapter_files import is_adapter
from dlm.checkpoint import check_checkpoint
from dlm.checkpoint_checks import no_weights, origin_of
from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError, ConfigError, first_line
from dlm.families.base import Family
from dlm.lock import check_writable
from dlm.memory import disk
from dlm.model import MaskedDiffusionModel
from dlm.notice import NOTICE_FILE, carry_notice
from dlm.pretrained.names import located
from dlm.spec import ModelSpec
from dlm.weights import INDEX, read_index, shards, stored_bytes, write_renamed

NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", NOTICE_FILE)
"""Files of a hub repository that are fetched."""

_TOKENIZER_FACTS = ("mask_token", "eos_token", "pad_token", "padding_side")
"""What a tokenizer is given for diffusion, beside its template."""


def convert(source: str | Path, target: str | Path) -> Path:
    """Write a public checkpoint in our layout, or one of ours that was public in the public layout.

    Types and values of the weights are kept. On the way back config.json is the public one, and the tokenizer
    has its template and special tokens as published, unless the model was trained with another template. It
    is written in transformers' layout, and a mask that was added to its tokens stays among them. Python files
    of the repository are not written.

    Args:
        source: folder, hub id or name.
        target: folder to write; made if it is not there, and empty if it is.

    Returns:
        The folder `target`.

    Raises:
        CheckpointError: when the source is of no public family and did not come from one, is not whole, or
            has been trained to attend otherwise than its public layout says.
        ConfigError: when the target is not empty, cannot be written to, or has no room.
    """
    folder, target = _source_folder(located(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    check_writable(target)
    if is_adapter(folder) or not shards(folder):
        raise no_weights(folder)
    config, tokenizer, family = check_checkpoint(str(folder))
    needed = disk(stored_bytes(folder) or 0, target)
    if needed.needed > needed.free:
        raise ConfigError(f"{target}: no room ({needed})")
    if family is not None:
        published = family.load_tokenizer(str(folder))
        facts = {name: getattr(published, name) for name in _TOKENIZER_FACTS}
        config.public = {**(config.public or {}), "tokenizer": facts}
        config.architectures = [MaskedDiffusionModel.__name__]
        _write_files(folder, target, family.our_name, tokenizer)
        config.save_pretrained(target)
    else:
        family, public = _origin(folder, config, tokenizer)
        _restore(tokenizer, family, public)
        _write_files(folder, target, family.public_name, tokenizer)
        _write_json(target / "config.json", public["config"])
    return target


def _source_folder(path: str) -> Path:
    """The folder of a path, or of the files of a hub repository that are needed.

    Raises:
        CheckpointError: when the hub does not give it, or it has no safetensors files there.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(snapshot_download(path, allow_patterns=list(NEEDED)))
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, and the hub does not give it ({first_line(error)})"
        ) from error
    if not is_adapter(folder) and not shards(folder):
        raise CheckpointError(
            f"{path}: no safetensors files on the hub, and .bin files are not converted; load_model reads "
            "them, and save_pretrained writes safetensors"
        )
    return folder


def _origin(
    folder: Path, config: MaskedDiffusionConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Family, dict[str, Any]]:
    """The family that a checkpoint of ours came from, and what is kept of the public one.

    Raises:
        CheckpointError: when it came from none, or was trained to attend otherwise since.
    """
    family = origin_of(config)
    if family is None or config.public is None:
        raise CheckpointError(f"{folder}: did not come from a public checkpoint; it has only this layout")
    then = ModelSpec.of_config(family.config(config.public["config"], tokenizer)).visibility
    now = ModelSpec.of_config(config).visibility
    if now != then:
        raise CheckpointError(
            f"{folder}: trained further with another visibility ({now}) than the public layout has ({then})"
        )
    return family, config.public


def _restore(tokenizer: PreTrainedTokenizerBase, family: Family, public: Mapping[str, Any]) -> None:
    """Give a tokenizer the special tokens and the template of the published one.

    A template that is not what the family makes of the published one stays: the model was trained with it.
    """
    present = tokenizer.chat_template
    tokenizer.chat_template = public.get("template", present)
    if family.template(tokenizer) != present:
        tokenizer.chat_template = present
    for name, value in public.get("tokenizer", {}).items():
        if getattr(tokenizer, name) != value:
            setattr(tokenizer, name, value)
    for name in ("chat_template", *_TOKENIZER_FACTS):
        if getattr(tokenizer, name) is None:
            tokenizer.init_kwargs.pop(name, None)  # it would be written as null


def _write_files(
    folder: Path, target: Path, renamed: Callable[[str], str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write all but config.json, which comes last: a folder without it is no checkpoint."""
    target.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for file in shards(folder):
        places |= dict.fromkeys(write_renamed(file, target / file.name, renamed), file.name)
    if (folder / INDEX).is_file():
        _write_json(target / INDEX, {**read_index(folder / INDEX), "weight_map": places})
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")
    tokenizer.save_pretrained(target)
    carry_notice(folder, target)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
