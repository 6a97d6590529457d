"""Loading: a name, path or hub id in, a model and its tokenizer out, or one clear error.

Names of models become paths here, and nowhere above: what is above takes names, what is below takes paths.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from dlm import device as places
from dlm.backbone import causal_tokenizer
from dlm.config import MaskedDiffusionConfig
from dlm.errors import ConfigError
from dlm.formats import DeviceMap, format_of, stored_config
from dlm.model import MaskedDiffusionModel
from dlm.prepacking import prepack
from dlm.pretrained.names import located
from dlm.quantization import quantize
from dlm.spec import ModelSpec

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in places.DTYPE_NAMES}


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    attn_implementation: str | None = None,
    device_map: DeviceMap = None,
    prepacked: bool = False,
    block_size: int | None = None,
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """Load a masked diffusion model for inference or further training.

    Args:
        path: "default" or "full", models that come with the package, or "default-sft" or "full-sft", the same
            before R2FT; folder or hub id of a checkpoint of this toolkit or of a published family
            (`dlm.families`), or folder of an adapter; also a causal LM (folder, hub id or `.gguf` file),
            which is made bidirectional and has then still to be trained.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16"; or "auto": bfloat16 on a GPU, and on a CPU that computes in
            it, else float32. Commands have the same default. Or "int8" or "nf4": linear layers in 8 or 4 bits
            (`dlm.quantization`), the rest as for "auto"; not to be trained whole, nor written.
        attn_implementation: transformers' name of the attention kernel; by default flash-attn where it
            is installed and applies, else SDPA.
        device_map: which device each part of the model goes to, or "auto" to spread it over what there is
            (accelerate's); in place of `device`.
        prepacked: for computing alone: on a CPU the weights are packed (`dlm.prepacking`), which makes small
            batches faster (by 1.3 to 1.5 times with a row). A head that shares the embedding's weights has a
            copy of them. Such a model can be neither trained nor saved nor moved.
        block_size: positions per block of a block-causal model, at most its own: smaller blocks are faster
            for a row or a few on a CPU, and see less of what stands behind a position.

    Returns:
        The model in evaluation mode on `device`, and its tokenizer.

    Raises:
        CheckpointError: when there is no such checkpoint, a file is missing or truncated, weights are
            missing, or the model family is not supported.
        ConfigError: for an unknown `dtype`, for a quantised one without bitsandbytes, and for a `device_map`
            with devices that are not there or too small; for a `block_size` that is not for the model.
    """
    path = located(path)
    device, torch_dtype = place(device, dtype)
    quantized, layout = dtype if dtype in places.QUANTIZED else "", format_of(path)
    for each in places.devices_of(device_map):
        place(each)
    if device_map is not None and not layout.as_stored:
        raise ConfigError(f"{path}: a device_map is for checkpoints whose weights are read as they are")
    if quantized and layout.as_stored:  # each weight is rounded where it goes, as soon as it is read
        model, tokenizer = layout.read(path, torch_dtype, device_map or {"": device}, quantized)
    else:
        model, tokenizer = layout.read(path, torch_dtype, device_map)
    if block_size is not None:
        model.config.block_size = model.spec.in_blocks_of(block_size).visibility.block_size
    model.set_attn_implementation(attn_implementation or _attention_for(device, torch_dtype))
    model = model if device_map else model.to(device)
    model = (quantize(model, quantized) if quantized else model).eval()
    return (prepack(model) if prepacked else model), tokenizer


def place(device: str = "auto", dtype: str = "auto") -> tuple[str, torch.dtype]:
    """Device and dtype of a model, from the arguments of `load_model`.

    Raises:
        ConfigError: for an unknown `device` or `dtype`, and for a GPU where there is none.
    """
    places.check_place(device, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {device}: there is no GPU that torch {torch.__version__} can use; give cpu"
        )
    if dtype not in DTYPES:  # "fastest" is an older name of "auto"
        dtype = "bfloat16" if device != "cpu" or computes_bfloat16() else "float32"
    return device, DTYPES[dtype]


def computes_bfloat16() -> bool:
    """True when this CPU multiplies bfloat16 matrices itself, so that they are faster than float32 ones."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in checks)


def load_tokenizer(path: str | Path, template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives, without the weights.

    Args:
        path: as of `load_model`.
        template: chat template of a model that is still autoregressive (`dlm.backbone.from_causal_lm`).

    Raises:
        CheckpointError: see `load_model`.
        ConfigError: for a template where the model has one of its own.
    """
    name, path = path, located(path)
    layout = format_of(path)
    if not template:
        return layout.tokenizer(path)
    if not layout.autoregressive:
        raise ConfigError(f"{name}: a checkpoint has a template of its own; give none")
    return causal_tokenizer(path, template)


def is_causal_lm(path: str | Path) -> bool:
    """True for an autoregressive model, which has still to be trained to fill masks.

    Raises:
        CheckpointError: when there is no model.
    """
    return format_of(located(path)).autoregressive


def _attention_for(device: str, dtype: torch.dtype) -> str:
    """flash-attn on CUDA in half precision when it is installed, else PyTorch's SDPA."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        "flash_attention_2" if device.startswith("cuda") and half and is_flash_attn_2_available() else "sdpa"
    )


def stored_spec(path: str | Path) -> ModelSpec | None:
    """The properties of the model at a path, from its configuration; no weights are read.

    None for an autoregressive model, which `load_model` has to make bidirectional first.

    Raises:
        CheckpointError: see `load_model`.
    """
    path = located(path)
    config = format_of(path).config(path)
    return None if config is None else ModelSpec.of_config(config)


def stored_positions(path: str | Path) -> int | None:
    """Longest row, in tokens, of the model at a path, by its configuration; None where that does not say."""
    spec = stored_spec(path)
    if spec is not None:
        return spec.positions
    path = located(path)
    stored = {} if path.endswith(".gguf") else stored_config(path)
    limit = stored.get("max_position_embeddings", stored.get("n_positions"))
    return limit if isinstance(limit, int) else None


def check_checkpoint(path: str | Path) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a checkpoint, which is held to what `load_model` demands.

    No weights are read, and of a hub id none are fetched. Models that are still autoregressive are refused.

    Raises:
        CheckpointError: see `load_model`.
    """
    path = located(path)
    return format_of(path).check(path)
