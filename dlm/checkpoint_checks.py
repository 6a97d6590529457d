"""Configuration, weights and tokenizer of a checkpoint, which must go together; one line says why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from dlm.adapter_files import is_adapter
from dlm.config import MaskedDiffusionConfig
from dlm.errors import CheckpointError, first_line
from dlm.families import family_named
from dlm.families.base import Family
from dlm.families.fields import check_numbers, whole
from dlm.model import MaskedDiffusionModel
from dlm.weights import SINGLE, TORCH_DTYPES, Stored


def check_config(stored: Mapping[str, Any]) -> None:
    """Refuse a config.json of this toolkit whose fields no model can have.

    Raises:
        DLMError: naming the field and its value.
    """
    rows = whole(stored, "vocab_size")
    whole(stored, "num_tokens")
    if whole(stored, "mask_token_id", least=0) >= rows:
        raise CheckpointError(
            f"config.json says mask_token_id = {stored['mask_token_id']}; it is less than vocab_size = {rows}"
        )
    for name in ("schedule", "generation"):
        if not isinstance(stored.get(name) or {}, Mapping):
            raise CheckpointError(f"config.json says {name} = {stored[name]!r}; it is a dictionary")
    if stored.get("block_size") is not None:
        whole(stored, "block_size")
    backbone = _dictionary(stored, "backbone")
    check_numbers(backbone)
    whole(backbone, "hidden_size")
    if stored.get("public") is not None:
        public = _dictionary(stored, "public")
        family_named(str(public.get("family")))
        _dictionary(public, "config")


def _dictionary(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = stored.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json says {name} = {value!r}; it is a dictionary")
    return value


def origin_of(config: MaskedDiffusionConfig) -> Family | None:
    """The family of the public checkpoint that a model came from; None for one that did not."""
    return family_named(config.public["family"]) if config.public else None


def our_weights(
    config: MaskedDiffusionConfig, family: Family | None, stored: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Stored tensors under our names, without those that follow from the configuration.

    Args:
        config: the configuration.
        family: that of the layout they are stored in; None for ours.
        stored: the tensors by their names in the files.
    """
    origin = family or origin_of(config)
    return {
        family.our_name(name) if family else name: entry
        for name, entry in stored.items()
        if not (origin and origin.is_derived(name))
    }


def check_shapes(path: str, config: MaskedDiffusionConfig, weights: Mapping[str, Stored]) -> None:
    """Refuse weights that are not those of the model that a configuration describes.

    Args:
        path: where they lie.
        config: the configuration.
        weights: the stored tensors, by our names.

    Raises:
        CheckpointError: naming the first that is missing, of another shape, superfluous, or no floating-point
            number where the model has one.
    """
    with torch.device("meta"), no_init_weights():
        try:
            model = MaskedDiffusionModel(config)
        except Exception as error:
            raise CheckpointError(f"{path}: config.json describes no model ({first_line(error)})") from error
    expected = model.state_dict()
    tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
    wrong = sorted(
        name
        for name, x in expected.items()
        if (name in weights or name not in tied) and _shape(weights, name) != tuple(x.shape)
    )
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} weights are missing or of another shape, the first is {wrong[0]}: "
            f"{_shape(weights, wrong[0])} in place of {tuple(expected[wrong[0]].shape)}"
        )
    superfluous = sorted(weights.keys() - expected.keys())
    if superfluous:
        raise CheckpointError(
            f"{path}: has no place for {len(superfluous)} weights, the first is {superfluous[0]}"
        )
    for name, entry in weights.items():
        if expected[name].is_floating_point() and not TORCH_DTYPES[entry.dtype].is_floating_point:
            raise CheckpointError(
                f"{path}: {name} is stored as {entry.dtype}, whole numbers; quantised weights are not read"
            )


def _shape(weights: Mapping[str, Stored], name: str) -> tuple[int, ...] | None:
    return weights[name].shape if name in weights else None


def check_tokenizer(path: str, config: MaskedDiffusionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is not the model's, with which it would load and then produce noise.

    Raises:
        CheckpointError: when the mask token or the number of tokens differs.
    """
    count = min(len(tokenizer), config.vocab_size)
    if tokenizer.mask_token_id != config.mask_token_id or count != config.num_tokens:
        raise CheckpointError(
            f"{path}: tokenizer and model do not belong together (mask token "
            f"{tokenizer.mask_token_id} against {config.mask_token_id}, {len(tokenizer)} tokens "
            f"against {config.num_tokens})"
        )


def no_weights(path: str | Path) -> CheckpointError:
    """An error for a folder without safetensors files that says what it has, and what to do."""
    if is_adapter(path):
        return CheckpointError(
            f"{path}: an adapter, not a model: dlm export --merge true makes one of it and its base"
        )
    if has_bin(path):
        return CheckpointError(
            f"{path}: holds .bin files; load_model reads them, and save_pretrained writes safetensors"
        )
    return CheckpointError(f"{path}: holds no weights (no {SINGLE} in it)")


def has_bin(path: str | Path) -> bool:
    """True for a folder with weights in files that `torch.save` wrote."""
    return any(Path(path).glob("pytorch_model*.bin*"))
