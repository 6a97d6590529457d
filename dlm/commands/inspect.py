"""`dlm inspect`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli import Command, json_line
from dlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from dlm.families.base import Family


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `dlm inspect`.

    Args:
        checkpoints: folders or hub ids (the words that are no options).
        json: write JSON instead of YAML.
    """

    checkpoints: list[str] = field(default_factory=list)
    json: bool = False

    def __post_init__(self) -> None:
        """Check that there is something to inspect."""
        if not self.checkpoints:
            raise ConfigError("name the folder or hub id of a checkpoint: dlm inspect default")


def run(config: InspectConfig) -> int:
    """Describe each checkpoint."""
    import yaml

    for path in config.checkpoints:
        facts = describe(path)
        if config.json:
            print(json_line(facts))
        else:
            print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=100))
    return 0


def describe(path: str) -> dict[str, Any]:
    """Facts about a checkpoint, from its configuration, tokenizer and weight headers.

    Raises:
        CheckpointError: when it is no checkpoint of this toolkit or of a public family, or its weights are
            truncated.
    """
    from dlm.checkpoint import check_checkpoint
    from dlm.formats import PublicFormat, family_at
    from dlm.pretrained.names import located

    path = located(path)
    config, tokenizer = check_checkpoint(path)
    family = family_at(path) if PublicFormat().detect(path) else None
    return _ours(path, config, tokenizer) if family is None else _published(path, config, tokenizer, family)


def _ours(path: str, config: Any, tokenizer: Any) -> dict[str, Any]:
    """A checkpoint of this toolkit, or an adapter."""
    return {
        "path": path,
        **_facts(config, tokenizer, _adapter(path) | _weights(path)),
        "training": config.training,
        "generation": config.generation,
        **_complete(path),
        "template": tokenizer.chat_template,
    }


def _published(path: str, config: Any, tokenizer: Any, family: Family) -> dict[str, Any]:
    """A public checkpoint: of a hub id configuration, tokenizer and index are fetched, and no weights."""
    from dlm.weights import stored_bytes

    size = stored_bytes(path)
    return {
        "path": path,
        "published as": family.name,
        **_facts(config, tokenizer, _weights(path)),
        "generation": config.generation,
        "size": "unknown" if size is None else f"{size / 1e9:.2f} GB",
        **_download(path, size),
        **_fits(config),
        "template": tokenizer.chat_template,
    }


def _fits(config: Any) -> dict[str, str]:
    """The memory that the model needs in the type that `load_model` would choose, and in 8 and 4 bits."""
    import torch
    from transformers.initialization import no_init_weights

    from dlm.checkpoint import place
    from dlm.device import QUANTIZED
    from dlm.memory import room
    from dlm.model import MaskedDiffusionModel
    from dlm.quantization import calculated_bytes

    with torch.device("meta"), no_init_weights():
        model = MaskedDiffusionModel(config)
        model.tie_weights()
    default_dtype = place()[1]
    name = str(default_dtype).removeprefix("torch.")
    needs = {dtype: room(calculated_bytes(model, dtype, default_dtype)) for dtype in (name, *QUANTIZED)}
    return {
        "fits": f"{needs.pop(name)}, in {name}",
        **{f"fits in {x}": str(need) for x, need in needs.items()},
    }


def _download(path: str, size: int | None) -> dict[str, str]:
    """The room on the disk for weights of the hub that have still to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from dlm.memory import disk
    from dlm.weights import is_fetched

    if Path(path).is_dir() or size is None or is_fetched(path):
        return {}
    return {"download": str(disk(size, HF_HUB_CACHE))}


def _facts(config: Any, tokenizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Facts that both kinds of checkpoints state."""
    from dlm.spec import ModelSpec

    shape, spec = config.backbone or {}, ModelSpec.of_config(config)
    ends = {number: tokenizer.convert_ids_to_tokens(number) for number in sorted(spec.end_token_ids)}
    return {
        "family": f"{shape.get('model_type')}, {shape.get('num_hidden_layers')} layers, "
        f"width {config.hidden_size}",
        **weights,
        "vocabulary": f"{config.num_tokens} tokens, mask {tokenizer.mask_token!r} = {config.mask_token_id}, "
        f"end {tokenizer.eos_token!r} = {config.eos_token_id}",
        "ends": ", ".join(f"{token} = {number}" for number, token in ends.items()),
        "shift": config.shift,
        "visibility": str(spec.visibility),
        "positions": config.max_positions,
    }


def _adapter(path: str) -> dict[str, str]:
    """Base and size of an adapter."""
    from dlm.adapter_files import base_of, is_adapter

    return {"adapter of": base_of(path)} if is_adapter(path) else {}


def _weights(path: str) -> dict[str, Any]:
    """Number and types of the parameters of a local checkpoint, from the headers of its safetensors files."""
    from dlm.adapter_files import WEIGHTS, is_adapter
    from dlm.weights import header, tensors

    if not Path(path).is_dir():
        return {}
    adapter = Path(path) / WEIGHTS
    if is_adapter(path) and not adapter.is_file():
        raise CheckpointError(f"{path}: {adapter.name} is missing")
    held = header(adapter) if is_adapter(path) else tensors(path)
    if not held:
        return {"parameters": "in .bin files, whose headers are not read"}
    types = sorted({entry.dtype for entry in held.values()})
    return {"parameters": f"{sum(math.prod(x.shape) for x in held.values()):,} ({', '.join(types)})"}


def _complete(path: str) -> dict[str, str]:
    """For a checkpoint within a run, whether it was written to its end."""
    from dlm.checkpointing import is_complete

    if not Path(path).name.startswith("checkpoint-"):
        return {}
    return {"complete": "yes" if is_complete(path) else "no: it was interrupted while being written"}


COMMAND = Command("say what a checkpoint is", InspectConfig, run, positional="checkpoints")
