"""The layouts in which a model may lie, each with what detects, reads and writes it; paths are real ones.

A name becomes a path in `dlm.checkpoint`, before anything here is asked.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dlm import merged
from dlm.adapter_files import base_of, is_adapter, saved_by_peft
from dlm.backbone import causal_tokenizer, from_causal_lm
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
from dlm.device import cast_weights
from dlm.errors import CheckpointError, ConfigError, DLMError, did_you_mean, first_line
from dlm.families import PUBLIC, family_of
from dlm.families.base import Family
from dlm.json_files import read_object
from dlm.memory import heap_without_holes
from dlm.model import MaskedDiffusionModel
from dlm.model_names import NAMES
from dlm.pretrained.names import base_path
from dlm.public_layout import write_public
from dlm.quantization import quantization_config
from dlm.weights import check_files, read_lazily, tensors

logger = logging.getLogger(__name__)


Loaded = tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]

DeviceMap = str | dict[str, int | str] | None
"""Parts of a model to devices, or "auto"; as accelerate's."""


class CheckpointFormat(Protocol):
    """A layout in which a model may lie on disk or on the hub."""

    as_stored: bool
    """True where weights are read as they are stored; False where they are changed after reading."""

    autoregressive: bool
    """True for models that have still to be trained to fill masks."""

    def detect(self, path: str) -> bool:
        """True for a path of this format."""
        ...

    def config(self, path: str) -> MaskedDiffusionConfig | None:
        """The configuration of the model, without its weights; None for an autoregressive one.

        Raises:
            CheckpointError: when it lacks or misstates something.
        """
        ...

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """The tokenizer, fit for diffusion.

        Raises:
            CheckpointError: when it is missing or damaged.
        """
        ...

    def check(self, path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
        """Configuration and tokenizer, and the weights' names and shapes held to them; no weights are read.

        Raises:
            CheckpointError: see `read`.
        """
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

    def write(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write a model and its tokenizer into a folder, which is made.

        Raises:
            CheckpointError: for a model that this layout cannot hold.
        """
        ...


class AdapterFormat:
    """A low-rank adapter of `peft`; its base is read first, and the adapter merged into it."""

    as_stored = autoregressive = False

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`; what `peft` saved on an autoregressive model is one more of those."""
        return is_adapter(path) and not (saved_by_peft(path) and _base_format(path).autoregressive)

    def config(self, path: str) -> MaskedDiffusionConfig | None:
        """See `CheckpointFormat`; that of the base where `peft` alone saved the adapter."""
        return _base_format(path).config(base_path(path)) if saved_by_peft(path) else diffusion_config(path)

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """See `config`."""
        return (
            _base_format(path).tokenizer(base_path(path)) if saved_by_peft(path) else stored_tokenizer(path)
        )

    def check(self, path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
        """See `CheckpointFormat`; the weights are checked when they are merged."""
        return _checked_parts(self, path)

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
            config, tokenizer = _checked_parts(self, path)
            where = base_path(path)
            if format_of(where).autoregressive:
                model, _ = from_causal_lm(where, shift=config.shift, dtype=torch.float32)
            elif merged.is_cached(where):
                model, _ = self._merge(where, torch.float32)
            else:
                model, _ = format_of(where).read(where, torch.float32)
        except Exception as error:
            if base in NAMES and isinstance(error, CheckpointError):
                raise  # what comes with the package or is fetched says by itself what it lacks
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
        model = cast_weights(load_adapter(model, path), dtype)
        model.config.dtype = dtype
        for name in ("training", "generation", "schedule", "block_size", "block_lead", "causal_context"):
            setattr(model.config, name, getattr(config, name))
        check_tokenizer(path, model.config, tokenizer)
        return model, tokenizer

    def write(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """See `CheckpointFormat`; the model is an `AdaptedModel`, and its base is not written."""
        if not hasattr(model, "peft_config"):
            raise CheckpointError("a model without an adapter is not written as one")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class PublicFormat:
    """A published diffusion model in the layout of its authors; see `dlm.families`."""

    as_stored, autoregressive = True, False

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return not path.endswith(".gguf") and not is_adapter(path) and family_at(path) is not None

    def config(self, path: str) -> MaskedDiffusionConfig | None:
        """See `CheckpointFormat`."""
        return public_config(path)[0]

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """See `CheckpointFormat`."""
        return public_config(path)[1]

    def check(self, path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
        """See `CheckpointFormat`; of a hub id no weights are fetched."""
        config, tokenizer, family = public_config(path)
        _check_stored(path, config, tokenizer, family)
        return config, tokenizer

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`; tensors go one by one from the files into the model."""
        config, tokenizer, family = public_config(path)
        check_files(path)
        model = _read_weights(path, config, dtype, device_map, family, quantized)
        check_tokenizer(path, model.config, tokenizer)
        return model, tokenizer

    def write(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """See `CheckpointFormat`; for a model that was read from a public layout, which it is written in."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".draft-") as draft:
            DiffusionFormat().write(model, tokenizer, Path(draft))
            write_public(Path(draft), folder, model.config, stored_tokenizer(draft))


class CausalFormat:
    """An autoregressive model of transformers, folder, hub id or `.gguf`: it is made bidirectional."""

    as_stored, autoregressive = False, True

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return path.endswith(".gguf") or stored_config(path).get("model_type") in FAMILIES

    def config(self, path: str) -> MaskedDiffusionConfig | None:
        """None; see `CheckpointFormat`."""
        del path
        return None

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """See `CheckpointFormat`."""
        return causal_tokenizer(path)

    def check(self, path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
        """Refused: it is no diffusion model yet; see `CheckpointFormat`."""
        raise unknown_architecture(path, {} if path.endswith(".gguf") else stored_config(path))

    def read(
        self, path: str, dtype: torch.dtype, device_map: DeviceMap = None, quantized: str = ""
    ) -> Loaded:
        """See `CheckpointFormat`."""
        del device_map, quantized
        logger.warning(
            "%s is an autoregressive model: made bidirectional, not yet trained to fill masks", path
        )
        return from_causal_lm(path, dtype=dtype)

    def write(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """See `CheckpointFormat`; no model that was made bidirectional is autoregressive any more."""
        raise CheckpointError("a diffusion model cannot be written as an autoregressive one")


class DiffusionFormat:
    """This toolkit's own layout, that of transformers: config.json, safetensors, tokenizer files."""

    as_stored, autoregressive = True, False

    def detect(self, path: str) -> bool:
        """See `CheckpointFormat`."""
        return stored_config(path).get("model_type") == MaskedDiffusionConfig.model_type

    def config(self, path: str) -> MaskedDiffusionConfig | None:
        """See `CheckpointFormat`."""
        return diffusion_config(path)

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """See `CheckpointFormat`."""
        return stored_tokenizer(path)

    def check(self, path: str) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
        """See `CheckpointFormat`."""
        config, tokenizer = diffusion_config(path), stored_tokenizer(path)
        _check_stored(path, config, tokenizer, None)
        return config, tokenizer

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

    def write(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """See `CheckpointFormat`; an adapter is merged first (`dlm.adapter.merged`)."""
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


FORMATS: list[CheckpointFormat] = [AdapterFormat(), PublicFormat(), CausalFormat(), DiffusionFormat()]
"""Formats in the order in which they are tried."""


def format_of(path: str) -> CheckpointFormat:
    """The first format that knows a path; further ones are added to `FORMATS`.

    Raises:
        CheckpointError: when there is nothing, or nothing that any of them knows.
    """
    detected = next((candidate for candidate in FORMATS if candidate.detect(path)), None)
    if detected is None:
        raise unknown_architecture(path, stored_config(path))
    return detected


def _base_format(adapter: str) -> CheckpointFormat:
    """The format of an adapter's base."""
    try:
        return format_of(base_path(adapter))
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter}: an adapter of {base_of(adapter)}, which cannot be loaded ({error})"
        ) from error


def _checked_parts(
    layout: CheckpointFormat, path: str
) -> tuple[MaskedDiffusionConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a diffusion model."""
    config = layout.config(path)
    assert config is not None
    return config, layout.tokenizer(path)


def _check_stored(
    path: str, config: MaskedDiffusionConfig, tokenizer: PreTrainedTokenizerBase, family: Family | None
) -> None:
    """Hold the files of a checkpoint to its configuration, see `CheckpointFormat.check`."""
    check_files(path)
    weights = our_weights(config, family, tensors(path))
    if weights:
        check_shapes(path, config, weights)
    elif Path(path).is_dir() and not has_bin(path):
        raise no_weights(path)
    check_tokenizer(path, config, tokenizer)


def family_at(path: str) -> Family | None:
    """The family of the public checkpoint at a path; None where there is none of a known family."""
    return family_of(stored_config(path), path, lambda: tensors(path) if Path(path).is_dir() else ())


def stored_config(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub repository; of an adapter that `peft` saved, that of its base.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    if saved_by_peft(path):
        base = base_of(path)
        try:
            return stored_config(base_path(path))
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: an adapter of {base}, which cannot be loaded ({error})"
            ) from error
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no config.json in it)")
    near, ours = did_you_mean(path, NAMES), ", ".join(NAMES)
    slip = difflib.get_close_matches(path, NAMES, n=1, cutoff=0.85)
    if slip and not Path(path).exists():  # the hub need not be asked
        raise CheckpointError(f"{path}: no such folder, and none of {ours}.{near}")
    try:
        file = cached_file(path, "config.json")
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, not a model that the hub could give, and none of {ours}.{near}"
        ) from error
    return read_object(str(file))


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
