"""`dlm inspect`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.cli import Command
from dlm.errors import CheckpointError, ConfigError


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
            print(json.dumps(facts, ensure_ascii=False))
        else:
            print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=100))
    return 0


def describe(path: str) -> dict[str, Any]:
    """Facts about a checkpoint, from its configuration, tokenizer and weight headers.

    Raises:
        CheckpointError: when it is not a checkpoint of this toolkit, or its weights are truncated.
    """
    from transformers import AutoConfig, AutoTokenizer

    from dlm.adapter import base_of, saved_by_peft
    from dlm.checkpoint import model_type
    from dlm.config import MaskedDiffusionConfig
    from dlm.pretrained.names import located

    path = located(path)
    kind = model_type(path)
    if kind != MaskedDiffusionConfig.model_type:
        raise CheckpointError(
            f"{path}: a {kind!r} model, not a masked diffusion checkpoint; dlm train can start from it"
        )
    described = located(base_of(path)) if saved_by_peft(path) else path
    config = AutoConfig.from_pretrained(described, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(described, trust_remote_code=False)
    shape = config.backbone or {}
    layers = shape.get("num_hidden_layers")
    return {
        "path": path,
        "family": f"{shape.get('model_type')}, {layers} layers, width {config.hidden_size}",
        **_adapter(path),
        **_weights(path),
        "vocabulary": f"{config.num_tokens} tokens, mask {tokenizer.mask_token!r} = {config.mask_token_id}, "
        f"end {tokenizer.eos_token!r} = {config.eos_token_id}",
        "shift": config.shift,
        "positions": config.max_positions,
        "training": config.training,
        "generation": config.generation,
        **_complete(path),
        "template": tokenizer.chat_template,
    }


def _adapter(path: str) -> dict[str, str]:
    """Base and size of an adapter."""
    from dlm.adapter import base_of, is_adapter

    return {"adapter of": base_of(path)} if is_adapter(path) else {}


def _weights(path: str) -> dict[str, Any]:
    """Number and type of the parameters of a local checkpoint, from the headers of its safetensors files."""
    from safetensors import SafetensorError, safe_open

    from dlm.adapter import is_adapter

    pattern = "adapter_model.safetensors" if is_adapter(path) else "model*.safetensors"
    files = sorted(Path(path).glob(pattern))
    if Path(path).is_dir() and not files:
        raise CheckpointError(f"{path}: config.json is there, but no {pattern}")
    total, types = 0, set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dictionary)
                    piece = handle.get_slice(name)
                    size = 1
                    for side in piece.get_shape():
                        size *= side
                    total += size
                    types.add(piece.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error})") from error
    return {"parameters": f"{total:,} ({', '.join(sorted(types))})"} if files else {}


def _complete(path: str) -> dict[str, str]:
    """For a checkpoint within a run, whether it was written to its end."""
    from dlm.checkpointing import is_complete

    if not Path(path).name.startswith("checkpoint-"):
        return {}
    return {"complete": "yes" if is_complete(path) else "no: it was interrupted while being written"}


COMMAND = Command("say what a checkpoint is", InspectConfig, run, positional="checkpoints")
