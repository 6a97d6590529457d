"""The names that stand for a model wherever a folder or a hub id may be given."""

from __future__ import annotations

import os
from pathlib import Path

from dlm.adapter_files import base_of
from dlm.errors import CheckpointError
from dlm.model_names import ADAPTERS, BASE_NAME
from dlm.pretrained import base, lightning


def located(path: str | Path) -> str:
    """Path of a model: for a name of `dlm.model_names` its folder, fetched if need be; else `path` itself.

    For a checkpoint of Lightning it is the folder into which that has been unpacked.

    Raises:
        CheckpointError: for an empty path, which would be the current folder; when the base of the default
            model has to be fetched and cannot be; and for a `.ckpt` file that cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"the name of a model must be a text or a path, got {path!r}")
    name = str(path)
    if not name.strip():
        raise CheckpointError("the name of a model must not be empty")
    if name in ADAPTERS:
        return str(Path(__file__).parent / ADAPTERS[name])
    if name.endswith(lightning.CHECKPOINT_SUFFIX) and not Path(name).is_dir():
        return str(lightning.unpacked(Path(name)))
    return str(base.base_folder()) if name == BASE_NAME else name


def base_path(adapter: str | Path) -> str:
    """Path of the base that an adapter's folder names; errors as of `located` and `base_of`."""
    return located(base_of(adapter))
