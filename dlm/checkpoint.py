"""Loading: a path or hub id in, a model and its tokenizer out, or one clear error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file, is_flash_attn_2_available

from dlm import device as places
from dlm import merged
from dlm.adapter_files import base_of, is_adapter, saved_by_peft
from dlm.backbone import from_causal_lm
from dlm.checkpoint_checks import (
    check_config,
    check_shapes,
    check_tokenizer,
    has_bin,
    no_weights,
    origin_of,
    our_weights,
)
from dlm.config import FAMILIES, MaskedDiffusionConfig
from dlm.errors import CheckpointError, ConfigError, DLMError, did_you_mean, first_line
from dlm.families import PUBLIC, family_of
from dlm.families.base import Family
from dlm.json_files import read_object
from dlm.memory import heap_without_holes
from dlm.model import MaskedDiffusionModel
from dlm.model_names import NAMES
from dlm.pretrained.names import located
from dlm.quantization import quantization_config, quantize
from dlm.spec import ModelSpec
from dlm.weights import check_files, read_lazily, tensors

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in places.DTYPES}


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    attn_implementation: str | None = None,
    device_map: DeviceMap = None,
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """Load a masked diffusion model for inference or further training.

    Args:
        path: "default" or "default-sft", the model that comes with the package, after and before R2FT; folder
            or hub id of a checkpoint of this toolkit or of a published family (`dlm.families`), or folder of
            an adapter; also a causal LM (folder, hub id or `.gguf` file), which is made bidirectional and has
            then still to be trained.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16"; or "auto": bfloat16 on a GPU, and on a CPU that computes in
            it, else float32. Commands have the same default. Or "int8" or "nf4": linear layers in 8 or 4 bits
            (`dlm.quantization`), the rest as for "auto"; not to be trained whole, nor written.
        attn_implementation: transformers' name of the attention kernel; by default flash-attn where it
            is installed and applies, else SDPA.
        device_map: which device each part of the model goes to, or "auto" to spread it over what there is
            (accelerate's); in place of `device`.

    Returns:
        The model in evaluation mode on `device`, and its tokenizer.

    Raises:
        CheckpointError: when there is no such checkpoint, a file is missing or truncated, weights are
            missing, or the model family is not supported.
        ConfigError: for an unknown `dtype`, for a quantised one without bitsandbytes, and for a `device_map`
            with devices that are not there or too small.
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
    model.set_attn_implementation(attn_implementation or _attention_for(device, torch_dtype))
    model = model if device_map else model.to(device)
    return (quantize(model, quantized) if quantized else model).eval(), tokenizer


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


def is_causal_lm(path: str) -> bool:
    """True when a path is an autoregressive model, which has still to be trained to fill masks."""
    return CausalFormat().detect(path) and not PublicFormat().detect(_described(path))


def family_at(path: str) -> Family | None:
    """The family of the public checkpoint at a path; None where there is none of a known family."""
    return family_of(stored_config(path), path, lambda: tensors(path) if Path(path).is_dir() else ())


def _attention_for(device: str, dtype: torch.dtype) -> str:
    """flash-attn on CUDA in half precision when it is installed, else PyTorch's SDPA."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        "flash_attention_2" if device.startswith("cuda") and half and is_flash_attn_2_available() else "sdpa"
    )


def model_type(path: str) -> str:
    """The `model_type` of a folder's or hub repository's config.json."""
    return str(stored_config(path).get("model_type"))


def stored_config(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub repository; of an adapter that `peft` saved, that of its base.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    if saved_by_peft(path):
        base = base_of(path)
        try:
            return stored_config(located(base))
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no config.json in it)")
    try:
        file = cached_file(path, "config.json")
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, not a model that the hub could give, and none of {', '.join(NAMES)}."
            + did_you_mean(path, NAMES)
        ) from error
    return read_object(str(file))


Loaded = tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]

DeviceMap = str | dict[str, int | str] | None
"""Parts of a model to devices, or "auto"; as accelerate's."""


class CheckpointFormat(Protocol):
    """A layout in which a model may lie on disk or on the hub; paths are real ones, names are resolved."""

    as_stored: bool
    """True where weights are read as they are stored; False where they are changed after reading."""

    def detect(self, path: str) -> bool:
        """True for a path of this format."""
        ...

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """Read the model and its tokenizer.

        Args:
            path: where it lies.
            dtype: type of the weights.
            device_map: which device each part goes to (that of accelerate); by default the CPU. For formats
                whose weights are read as they are stored, like the next.
            quantized: "int8" or "nf4" to round linear layers while they are read (`dlm.quantization`).

        Raises:
            CheckpointError: when something is missing, damaged or does not belong together.
        """
        ...


class AdapterFormat:
    """A low-rank adapter of `peft`; its base is read first, and the adapter merged into it."""

    as_stored = False

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return is_adapter(path) and not is_causal_lm(path)

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`; configuration and tokenizer are the adapter's own.

        Of an adapter that comes with the package the merged weights are kept, see `dlm.merged`.
        """
        del device_map, quantized
        if not merged.is_cached(path):
            return self._merge(path, dtype)
        name = str(dtype).removeprefix("torch.")
        copy = merged.find(path, name)
        if copy is not None:
            try:
                model = DiffusionFormat().read_model(str(copy), dtype)
                model.config.name_or_path = model.name_or_path = ""
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                check_tokenizer(path, model.config, tokenizer)
                return model, tokenizer
            except CheckpointError as error:  # another process may be replacing it
                logger.debug("%s", error)
        model, tokenizer = self._merge(path, dtype)
        merged.keep(path, name, lambda folder: DiffusionFormat().write(model, tokenizer, folder))
        return model, tokenizer

    def _merge(self, path: str, dtype: torch.dtype) -> Loaded:
        from dlm.adapter import load_adapter

        base = base_of(path)
        try:
            home = _described(path)
            if PublicFormat().detect(home):
                config, tokenizer, _ = public_config(home)
            else:
                config, tokenizer = diffusion_config(home), stored_tokenizer(home)
            where = located(base)
            if isinstance(format_of(where), CausalFormat):
                model, _ = from_causal_lm(where, shift=config.shift, dtype=torch.float32)
            elif merged.is_cached(where):
                model, _ = self._merge(where, torch.float32)
            else:
                model, _ = load_model(where, device="cpu", dtype="float32")
        except Exception as error:
            if base in NAMES and isinstance(error, CheckpointError):
                raise  # what comes with the package or is fetched says by itself what it lacks
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
        model = places.cast_weights(load_adapter(model, path), dtype)
        model.config.dtype = dtype
        for name in ("training", "generation", "schedule", "block_size", "block_lead", "causal_context"):
            setattr(model.config, name, getattr(config, name))
        check_tokenizer(path, model.config, tokenizer)
        return model, tokenizer


class PublicFormat:
    """A published diffusion model in the layout of its authors; see `dlm.families`."""

    as_stored = True

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return not path.endswith(".gguf") and family_at(path) is not None

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`; tensors go one by one from the files into the model."""
        config, tokenizer, family = public_config(path)
        check_files(path)
        model = _read_weights(path, config, dtype, device_map, family, quantized)
        check_tokenizer(path, model.config, tokenizer)
        return model, tokenizer


class CausalFormat:
    """An autoregressive model of transformers, folder, hub id or `.gguf`: it is made bidirectional."""

    as_stored = False

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return path.endswith(".gguf") or model_type(path) in FAMILIES

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`."""
        del device_map, quantized
        logger.warning(
            "%s is an autoregressive model: made bidirectional, not yet trained to fill masks", path
        )
        return from_causal_lm(path, dtype=dtype)


class DiffusionFormat:
    """This toolkit's own layout, that of transformers: config.json, safetensors, tokenizer files."""

    as_stored = True

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`; whatever is of no other format is read as this one, or refused by it."""
        del path
        return True

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`."""
        model = self.read_model(path, dtype, device_map, quantized)
        tokenizer = stored_tokenizer(path)
        check_tokenizer(path, model.config, tokenizer)
        return model, tokenizer

    def read_model(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> MaskedDiffusionModel:
        """Read the model alone; arguments and errors as of `read`."""
        config = diffusion_config(path)
        check_files(path)
        return _read_weights(path, config, dtype, device_map, None, quantized)

    def write(self, model: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write a model and its tokenizer."""
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


FORMATS: list[CheckpointFormat] = [AdapterFormat(), PublicFormat(), CausalFormat(), DiffusionFormat()]
"""Formats in the order in which they are tried."""


def format_of(path: str) -> CheckpointFormat:
    """The first format that knows a path; further ones are added to `FORMATS`."""
    return next(each for each in FORMATS if each.detect(path))


def stored_spec(path: str | Path) -> ModelSpec | None:
    """The properties of the model at a path, from its configuration; no weights are read.

    None for an autoregressive model, which `load_model` has to make bidirectional first.

    Raises:
        CheckpointError: see `load_model`.
    """
    path = located(path)
    format_ = format_of(path)
    if isinstance(format_, CausalFormat):
        return None
    home = _described(path)
    public = PublicFormat().detect(home)
    return ModelSpec.of_config(public_config(home)[0] if public else diffusion_config(home))


def stored_positions(path: str | Path) -> int | None:
    """Longest row, in tokens, of the model at a path, by its configuration; None where that does not say."""
    spec = stored_spec(path)
    if spec is not None:
        return spec.positions
    path = located(path)
    stored = {} if path.endswith(".gguf") else stored_config(path)
    limit = stored.get("max_position_embeddings", stored.get("n_positions"))
    return limit if isinstance(limit, int) else None


def _described(path: str) -> str:
    """Where a model's config.json and tokenizer lie; those of an adapter that `peft` saved are its base's."""
    return _described(located(base_of(path))) if saved_by_peft(path) else path


def public_config(path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase, Family]:
    """Configuration, tokenizer and family of a published model.

    Raises:
        CheckpointError: for a configuration that lacks or misstates something, naming the file.
    """
    public, family = stored_config(path), family_at(path)
    assert family is not None
    tokenizer = family.tokenizer(path, public)
    try:
        return family.config(public, tokenizer), tokenizer, family
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config.json lacks or misstates {first_line(error)}") from error


def stored_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint in this toolkit's layout.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer is missing or damaged ({first_line(error)})") from error


def check_checkpoint(path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase, Family | None]:
    """Configuration, tokenizer and family of a checkpoint, which is held to what `load_model` demands.

    No weights are read, and of a hub id none are fetched. The family is None in this toolkit's own layout.
    Adapters, and models that are still autoregressive, are refused.

    Raises:
        CheckpointError: see `load_model`.
    """
    family = family_at(path)
    if family is None:
        config, tokenizer = diffusion_config(path), stored_tokenizer(path)
    else:
        config, tokenizer, _ = public_config(path)
    check_files(path)
    weights = our_weights(config, family, tensors(path))
    if weights:
        check_shapes(path, config, weights)
    elif Path(path).is_dir() and not has_bin(path):
        raise no_weights(path)
    check_tokenizer(path, config, tokenizer)
    return config, tokenizer, family


def _read_weights(
    path: str,
    config: MaskedDiffusionConfig,
    dtype: torch.dtype,
    device_map: DeviceMap,
    family: Family | None,
    quantized: str,
) -> MaskedDiffusionModel:
    """The model of a folder or hub repository, its weights checked; of a family, under their public names."""
    weights = our_weights(config, family, read_lazily(path))
    if weights:
        check_shapes(path, config, weights)
    elif Path(path).is_dir() and not has_bin(path):
        raise no_weights(path)
    try:  # where there are no safetensors, transformers looks for files of other kinds
        with heap_without_holes() if quantized else nullcontext():
            model, info = MaskedDiffusionModel.from_pretrained(
                None if weights else path,
                state_dict=weights or None,
                key_mapping=None if weights or family is None else family.key_mapping(),
                config=config,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config(quantized, dtype),
                output_loading_info=True,
            )
    except Exception as error:
        if device_map is not None and "offload_folder" in str(error):
            raise ConfigError(
                f"{path}: does not fit on the devices of device_map {device_map!r}, and weights are not "
                "left on disk; give more devices, or load with int8 or nf4"
            ) from error
        raise CheckpointError(
            f"{path}: weights missing, truncated or damaged ({first_line(error)})"
        ) from error
    model.name_or_path = model.config.name_or_path = path
    model._weight_conversions = None  # it is saved under its present names
    wrong = sorted(map(str, [*(info.get("missing_keys") or []), *(info.get("mismatched_keys") or [])]))
    if wrong:
        raise CheckpointError(f"{path}: lacks {len(wrong)} weights, the first is {wrong[0]}")
    origin = family or origin_of(config)
    unexpected = map(str, info.get("unexpected_keys") or ()) if not weights else ()
    surplus = sorted(name for name in unexpected if not (origin and origin.is_derived(name)))
    if surplus:
        raise CheckpointError(f"{path}: holds {len(surplus)} weights too many, the first is {surplus[0]}")
    return model  # type: ignore[no-any-return]


def diffusion_config(path: str) -> MaskedDiffusionConfig:
    """The configuration of a checkpoint in this toolkit's layout.

    Raises:
        CheckpointError: when it is of another layout, or has fields that no model can have.
    """
    stored = stored_config(path)
    if stored.get("model_type") != MaskedDiffusionConfig.model_type:
        raise unknown_architecture(path, stored)
    try:
        check_config(stored)
    except DLMError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        return MaskedDiffusionConfig.from_pretrained(path)  # type: ignore[no-any-return]
    except Exception as error:
        raise CheckpointError(f"{path}: config.json cannot be used ({first_line(error)})") from error


def unknown_architecture(path: str, stored: Mapping[str, Any]) -> CheckpointError:
    """An error for the config.json of what is no diffusion model that is known."""
    kind, families = stored.get("model_type"), ", ".join(family.name for family in PUBLIC)
    if kind in FAMILIES:
        return CheckpointError(
            f"{path}: a {kind!r} model, not a masked diffusion checkpoint; dlm train can start from it"
        )
    code = " (it asks for code of its repository, which is never run)" if stored.get("auto_map") else ""
    return CheckpointError(
        f"{path}: unknown architecture {kind!r}{code}; known: this toolkit's own, {families}, and as a base "
        f"to train from {', '.join(FAMILIES)}"
    )
