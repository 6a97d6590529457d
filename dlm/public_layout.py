"""Files of a checkpoint under other names, public to ours and back; weights are copied as bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm.checkpoint_checks import origin_of
from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError
from dlm.families.base import Family
from dlm.model import MaskedDiffusionModel
from dlm.spec import ModelSpec
from dlm.weights import INDEX, read_index, shards, write_renamed

_TOKENIZER_FACTS = ("mask_token", "eos_token", "pad_token", "padding_side")
"""Attributes that a tokenizer is given for diffusion, beside its template."""


def write_ours(
    folder: Path,
    target: Path,
    config: MaskedDiffusionConfig,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
) -> None:
    """Write a public checkpoint in our layout, with all that the way back needs.

    Args:
        folder: where it lies.
        target: folder to write.
        config: its configuration, as `family` makes it.
        tokenizer: its tokenizer, as `family` makes it.
        family: its family.
    """
    published = family.load_tokenizer(str(folder))
    facts = {name: getattr(published, name) for name in _TOKENIZER_FACTS}
    config.public = {**(config.public or {}), "tokenizer": facts}
    config.architectures = [MaskedDiffusionModel.__name__]
    _write_files(folder, target, family.our_name, tokenizer)
    config.save_pretrained(target)


def write_public(
    folder: Path, target: Path, config: MaskedDiffusionConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a checkpoint of ours in the public layout that it came from.

    Args:
        folder: where it lies.
        target: folder to write.
        config: its configuration.
        tokenizer: its tokenizer, which is changed to the published one.

    Raises:
        CheckpointError: when it came from none, or has been trained to attend otherwise since.
    """
    family, public = _origin(folder, config, tokenizer)
    _restore(tokenizer, family, public)
    _write_files(folder, target, family.public_name, tokenizer)
    _write_json(target / "config.json", public["config"])


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
    published = ModelSpec.of_config(family.config(config.public["config"], tokenizer))
    current = ModelSpec.of_config(config)
    for name in ("visibility", "schedule"):
        ours, original = getattr(current, name), getattr(published, name)
        if ours != original:
            raise CheckpointError(
                f"{folder}: trained further with another {name} ({ours}) than the public layout "
                f"has ({original})"
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


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
