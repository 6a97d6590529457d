"""Loading: a path or hub id in, a model and its tokenizer out, or one clear error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from dlm.adapter import base_of, is_adapter, load_adapter, saved_by_peft
from dlm.backbone import from_causal_lm
from dlm.config import FAMILIES, MaskedDiffusionConfig
from dlm.errors import CheckpointError, did_you_mean, unknown_name
from dlm.model import MaskedDiffusionModel
from dlm.pretrained.names import NAMES, located

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    attn_implementation: str | None = None,
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """Load a masked diffusion model for inference or further training.

    Args:
        path: "default" or "default-sft", the model that comes with the package, after and before R2FT; folder
            or hub id of a checkpoint of this toolkit, or folder of an adapter; also a causal LM (folder, hub
            id or `.gguf` file), which is made bidirectional and has then still to be trained.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16"; or "auto": bfloat16 on a GPU, and on a CPU that computes in
            it, else float32. Commands have the same default.
        attn_implementation: transformers' name of the attention kernel; by default flash-attn where it
            is installed and applies, else SDPA.

    Returns:
        The model in evaluation mode on `device`, and its tokenizer.

    Raises:
        CheckpointError: when there is no such checkpoint, a file is missing or truncated, weights are
            missing, or the model family is not supported.
        ConfigError: for an unknown `dtype`.
    """
    path = located(path)
    device, torch_dtype = place(device, dtype)
    model, tokenizer = format_of(path).read(path, torch_dtype)
    model.set_attn_implementation(attn_implementation or _attention_for(device, torch_dtype))
    return model.to(device).eval(), tokenizer


def place(device: str = "auto", dtype: str = "auto") -> tuple[str, torch.dtype]:
    """Device and dtype of a model, from the arguments of `load_model`.

    Raises:
        ConfigError: for an unknown `dtype`.
    """
    if dtype not in ("auto", "fastest", *DTYPES):
        raise unknown_name("dtype", dtype, ["auto", *DTYPES])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:  # "fastest" is an older name of "auto"
        dtype = "bfloat16" if device != "cpu" or computes_bfloat16() else "float32"
    return device, DTYPES[dtype]


def computes_bfloat16() -> bool:
    """True when this CPU multiplies bfloat16 matrices itself, so that they are faster than float32 ones."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in checks)


def is_causal_lm(path: str) -> bool:
    """True when a path is an autoregressive model, which has still to be trained to fill masks."""
    return CausalFormat().detect(path)


def _attention_for(device: str, dtype: torch.dtype) -> str:
    """flash-attn on CUDA in half precision when it is installed, else PyTorch's SDPA."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        "flash_attention_2" if device.startswith("cuda") and half and is_flash_attn_2_available() else "sdpa"
    )


def model_type(path: str) -> str:
    """The `model_type` of a folder's or hub repository's config.json."""
    folder = Path(path)
    if saved_by_peft(path):
        base = base_of(path)
        try:
            return model_type(located(base))
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
    if folder.exists():
        file = folder / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{path}: not a checkpoint (no config.json in it)")
        try:
            return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: config.json is damaged ({error})") from error
    try:
        return str(AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, not a model that the hub could give, and none of {', '.join(NAMES)}."
            + did_you_mean(path, NAMES)
        ) from error


Loaded = tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]


class CheckpointFormat(Protocol):
    """A layout in which a model may lie on disk or on the hub; paths are real ones, names are resolved."""

    def detect(self, path: str) -> bool:
        """True for a path of this format."""
        ...

    def read(self, path: str, dtype: torch.dtype) -> Loaded:
        """Read the model, on the CPU, and its tokenizer.

        Raises:
            CheckpointError: when something is missing, damaged or does not belong together.
        """
        ...


class AdapterFormat:
    """A low-rank adapter of `peft`; its base is read first, and the adapter merged into it."""

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return is_adapter(path) and not is_causal_lm(path)

    def read(self, path: str, dtype: torch.dtype) -> Loaded:
        """See `CheckpointFormat`; configuration and tokenizer are the adapter's own."""
        base = base_of(path)
        described = located(base) if saved_by_peft(path) else path  # where configuration and tokenizer lie
        config = _diffusion_config(described)
        try:
            where = located(base)
            if CausalFormat().detect(where):
                model, _ = from_causal_lm(where, shift=config.shift, dtype=torch.float32)
            else:
                model, _ = load_model(where, device="cpu", dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(described, trust_remote_code=False)
        except Exception as error:
            if base in NAMES and isinstance(error, CheckpointError):
                raise  # what comes with the package or is fetched says by itself what it lacks
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
        model = load_adapter(model, path).to(dtype)
        model.config.training, model.config.generation = config.training, config.generation
        model.config.schedule = config.schedule
        _check(path, model, tokenizer, {})
        return model, tokenizer


class CausalFormat:
    """An autoregressive model of transformers, folder, hub id or `.gguf`: it is made bidirectional."""

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return path.endswith(".gguf") or model_type(path) in FAMILIES

    def read(self, path: str, dtype: torch.dtype) -> Loaded:
        """See `CheckpointFormat`."""
        logger.warning(
            "%s is an autoregressive model: made bidirectional, not yet trained to fill masks", path
        )
        return from_causal_lm(path, dtype=dtype)


class DiffusionFormat:
    """This toolkit's own layout, that of transformers: config.json, safetensors, tokenizer files."""

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`; whatever is of no other format is read as this one, or refused by it."""
        del path
        return True

    def read(self, path: str, dtype: torch.dtype) -> Loaded:
        """See `CheckpointFormat`."""
        _diffusion_config(path)
        try:
            model, info = MaskedDiffusionModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(
                f"{path}: weights or tokenizer missing, truncated or damaged ({error})"
            ) from error
        _check(path, model, tokenizer, info)
        return model, tokenizer

    def write(self, model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write a model and its tokenizer."""
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


FORMATS: list[CheckpointFormat] = [AdapterFormat(), CausalFormat(), DiffusionFormat()]
"""Formats in the order in which they are tried."""


def format_of(path: str) -> CheckpointFormat:
    """The first format that knows a path; further ones are added to `FORMATS`."""
    return next(each for each in FORMATS if each.detect(path))


def _diffusion_config(path: str) -> MaskedDiffusionConfig:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{path}: config.json cannot be used ({error})") from error
    if not isinstance(config, MaskedDiffusionConfig):
        raise CheckpointError(
            f"{path}: model type {config.model_type!r} is neither a masked diffusion checkpoint "
            f"of this toolkit nor one of {', '.join(FAMILIES)}"
        )
    return config


def _check(
    path: str, model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, info: dict[str, Any]
) -> None:
    """Refuse a checkpoint that would load and then produce noise."""
    wrong = sorted(info.get("missing_keys") or []) + sorted(str(k) for k in info.get("mismatched_keys") or [])
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} weights are missing or of another shape, the first is {wrong[0]}"
        )
    if tokenizer.mask_token_id != model.config.mask_token_id or len(tokenizer) != model.config.num_tokens:
        raise CheckpointError(
            f"{path}: tokenizer and model do not belong together (mask token "
            f"{tokenizer.mask_token_id} against {model.config.mask_token_id}, {len(tokenizer)} tokens "
            f"against {model.config.num_tokens})"
        )
