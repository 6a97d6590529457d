"""Checkpoints of Lightning (`.ckpt`), as the trainer of MDLM's authors writes them.

Such a file is a pickle with everything that training needs: weights, their moving average, the optimiser,
the settings as objects of other packages. Read here are weights and settings, without those packages and
without running anything: a class that is not on a short list of harmless ones is replaced by an empty one.

What is read goes into a folder of the cache, in the layout that the authors publish (`dlm.families.mdlm`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dlm.errors import CheckpointError, first_line
from dlm.pretrained.store import (
    alone,
    cache,
    is_stored,
    manifest,
    put_in_place,
    scratch_folder,
    write_manifest,
)

logger = logging.getLogger(__name__)

CHECKPOINT_SUFFIX = ".ckpt"

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
"""Files beside a checkpoint that are taken along; without them the tokenizer is GPT-2's."""

_HARMLESS = {
    "builtins": {"dict", "frozenset", "list", "set", "tuple"},
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor_v2"},
}
"""Classes that a file may construct, by module."""

_LIGHTNING_SIZES = {
    "hidden_size": "hidden_dim",
    "cond_dim": "cond_dim",
    "length": "model_length",
    "n_heads": "n_heads",
}
"""Settings of the trainer's `model` and their names in the published config.json."""


class Opaque:
    """Stands for an object of a class that is not loaded; holds its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Drop whatever the class would have been given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        """Results of functions that are not loaded are opaque too."""
        return Opaque()

    def __setstate__(self, state: Any) -> None:
        """Keep what belongs to the object."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of classes that are dictionaries are dropped."""

    def append(self, value: Any) -> None:
        """Items of classes that are lists are dropped."""

    def extend(self, values: Any) -> None:
        """Items of classes that are lists are dropped."""


class _Unpickler(pickle.Unpickler):
    """Loads classes of `_HARMLESS`, and torch's types; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, or an `Opaque` one."""
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            import torch

            if isinstance(value := getattr(torch, name, None), torch.dtype):
                return value
        return type(name.rpartition(".")[2], (Opaque,), {})


def unpacked(file: Path) -> Path:
    """The folder in the cache that holds the model of a file; made if it is missing or the file has changed.

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another model than MDLM's transformer.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    folder = cache() / f"lightning-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder, f"reading {file}"):
        sources = [file, *(beside for name in _TOKENIZER if (beside := file.parent / name).is_file())]
        made_of = {source.name: [source.stat().st_size, source.stat().st_mtime_ns] for source in sources}
        if manifest(folder).get("made_of") != made_of or not is_stored(folder):
            public, tensors = read(file)
            with scratch_folder(folder) as scratch:
                draft = scratch / folder.name
                draft.mkdir()
                _write_folder(draft, public, tensors, sources[1:])
                write_manifest(draft, {"from": str(file), "made_of": made_of})
                put_in_place(draft, folder)
            logger.info("%s: the model in it is kept in %s", file, folder)
    return folder


def _write_folder(
    folder: Path, public: Mapping[str, Any], tensors: Mapping[str, Any], tokenizer: list[Path]
) -> None:
    """Write a model in the published layout, with the files of a tokenizer, if there are any."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(dict(public), indent=1), encoding="utf-8")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for item in tokenizer:
        shutil.copy(item, folder / item.name)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The published config.json of the model in a file, and its tensors by their published names.

    Weights are the moving average, where the run kept one.

    Raises:
        CheckpointError: see `unpacked`.
    """
    stored = _load_pickle(file)
    state, config = stored.get("state_dict"), _item(stored.get("hyper_parameters"), "config")
    if not isinstance(state, Mapping) or "backbone.vocab_embed.embedding" not in state:
        raise CheckpointError(
            f"{file}: not a checkpoint of MDLM's transformer (no backbone.vocab_embed in it)"
        )
    for name, supported in (("backbone", ("dit",)), ("parameterization", ("subs",))):
        setting = _parsed(_item(config, name))
        if setting is not None and setting not in supported:
            raise CheckpointError(f"{file}: {name} {setting!r} is not supported, only {supported[0]!r}")
    names = [
        name for name in state if name.startswith("backbone.") and not name.endswith("rotary_emb.inv_freq")
    ]
    tensors = {name: state[name] for name in names}
    average = _item(stored.get("ema"), "shadow_params")
    if average is not None:
        tensors = _averaged(file, tensors, average)
    return _public(config, tensors), tensors


def _load_pickle(file: Path) -> Mapping[str, Any]:
    """The contents of a file, without what is opaque."""
    import torch

    reader: Any = ModuleType("pickle")
    reader.Unpickler, reader.load = _Unpickler, lambda stream, **kwargs: _Unpickler(stream).load()
    try:
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=reader)
    except Exception as error:
        raise CheckpointError(f"{file}: damaged, or not a checkpoint ({first_line(error)})") from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{file}: not a checkpoint of Lightning (no dictionary in it)")
    return stored


def _averaged(file: Path, tensors: dict[str, Any], average: Any) -> dict[str, Any]:
    """The moving average, which has no names: it follows the order of the parameters.

    Raises:
        CheckpointError: when it has other shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in average]
    if shapes != [tuple(tensor.shape) for tensor in tensors.values()]:
        raise CheckpointError(f"{file}: its moving average (ema) does not belong to its weights")
    return dict(zip(tensors, average, strict=True))


def _public(config: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json; what the settings do not say follows from the shapes, or is MDLM's."""
    vocabulary, width = tensors["backbone.vocab_embed.embedding"].shape
    condition = tensors.get("backbone.sigma_map.mlp.2.bias")
    public: dict[str, Any] = {
        "model_type": "mdlm",
        "vocab_size": vocabulary,
        "hidden_dim": width,
        "n_blocks": len({name.split(".")[2] for name in tensors if name.startswith("backbone.blocks.")}),
        "n_heads": max(1, width // 64),
        "cond_dim": 128 if condition is None else len(condition),
        "model_length": 1024,
        "time_conditioning": bool(_parsed(_item(config, "time_conditioning"))),
    }
    sizes = {ours: _parsed(_item(_item(config, "model"), name)) for name, ours in _LIGHTNING_SIZES.items()}
    return public | {name: value for name, value in sizes.items() if isinstance(value, int)}


def _item(node: Any, name: str) -> Any:
    """An entry of a dictionary, or of a configuration of OmegaConf that was not loaded; None without one."""
    if isinstance(node, Opaque):
        state = getattr(node, "state", None)
        node = state.get("_content") if isinstance(state, Mapping) else None
    return node.get(name) if isinstance(node, Mapping) else None


def _parsed(node: Any) -> Any:
    """The value of a leaf of a configuration."""
    state = getattr(node, "state", None) if isinstance(node, Opaque) else None
    return state.get("_val") if isinstance(state, Mapping) else None if isinstance(node, Opaque) else node
