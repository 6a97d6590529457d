"""Autoregressive models of transformers, read as they are: folders, hub ids and `.gguf` files; real paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dlm.config import FAMILIES, bidirectional
from dlm.errors import CheckpointError, first_line


def read_causal_lm(
    path: str, dtype: torch.dtype = torch.float32, *, all_to_all: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """An autoregressive model and its tokenizer; arguments and errors as of `dlm.backbone.load_causal_lm`."""
    where = _location(path)
    try:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        if all_to_all and config.model_type not in FAMILIES:
            raise CheckpointError(
                f"{path}: family {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        config.return_dict = True
        tokenizer = _tokenizer(where, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            **where,
            config=bidirectional(config) if all_to_all else config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_weights(path, info)
        return model, tokenizer
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a causal language model ({first_line(error)})"
        ) from error


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an autoregressive model.

    Raises:
        CheckpointError: when it cannot be read.
    """
    where = _location(path)
    try:
        return _tokenizer(where, AutoConfig.from_pretrained(**where, trust_remote_code=False))
    except Exception as error:
        raise CheckpointError(f"{path}: no tokenizer to be had ({first_line(error)})") from error


def _tokenizer(where: dict[str, Any], config: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    if "gguf_file" in where:
        _settle_marks(tokenizer, config)
    return tokenizer


def _settle_marks(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Give a tokenizer the control tokens that the file names, which older transformers take for others."""
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(config, f"{name}_id", None)
        if isinstance(number, int) and getattr(tokenizer, f"{name}_id") != number:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False  # which would change what was written


def _check_weights(path: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those of its configuration, which would begin at random."""
    for name, verb in (("missing", "lacks"), ("mismatched", "has another shape of"), ("unexpected", "has")):
        keys = sorted(map(str, info.get(f"{name}_keys") or []))
        if keys:
            unknown = " that its configuration does not know" if name == "unexpected" else ""
            raise CheckpointError(f"{path}: {verb} {len(keys)} weights{unknown}, the first is {keys[0]}")


def _location(path: str) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` for a hub id, a folder or a .gguf file."""
    if not path.endswith(".gguf"):
        return {"pretrained_model_name_or_path": path}
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{path}: no such file")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
