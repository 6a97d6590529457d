"""Public layout to ours and back: the bytes of the weights are copied, and only their names change."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from dlm.adapter_files import is_adapter
from dlm.atomic import filling
from dlm.checkpoint import check_checkpoint
from dlm.checkpoint_checks import no_weights
from dlm.errors import CheckpointError, ConfigError, first_line
from dlm.formats import family_at
from dlm.lock import check_writable
from dlm.memory import disk
from dlm.origin import NOTICE_FILE, carry_notice
from dlm.pretrained.names import located
from dlm.public_layout import write_ours, write_public
from dlm.weights import shards, stored_bytes

NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", NOTICE_FILE)
"""Files of a hub repository that are fetched."""


def convert(source: str | Path, target: str | Path) -> Path:
    """Write a public checkpoint in our layout, or one of ours that was public in the public layout.

    Types and values of the weights are kept. On the way back config.json is the public one, and the tokenizer
    has its template and special tokens as published, unless the model was trained with another template. It
    is written in transformers' layout, and a mask that was added to its tokens stays among them. Python files
    of the repository are not written.

    Args:
        source: folder, hub id or name.
        target: folder to write; made if it is not there, and empty if it is.

    Returns:
        The folder `target`.

    Raises:
        CheckpointError: when the source is of no public family and did not come from one, is not whole, or
            has been trained to attend otherwise than its public layout says.
        ConfigError: when the target is not empty, cannot be written to, or has no room.
    """
    folder, target = _source_folder(located(source)), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    check_writable(target)
    if is_adapter(folder) or not shards(folder):
        raise no_weights(folder)
    config, tokenizer = check_checkpoint(folder)
    family = family_at(str(folder))
    needed = disk(stored_bytes(folder) or 0, target)
    if needed.needed > needed.free:
        raise ConfigError(f"{target}: no room ({needed})")
    with filling(target):
        if family is not None:
            write_ours(folder, target, config, tokenizer, family)
        else:
            write_public(folder, target, config, tokenizer)
        carry_notice(folder, target)
    return target


def _source_folder(path: str) -> Path:
    """The folder of a path, or of the files of a hub repository that are needed.

    Raises:
        CheckpointError: when the hub does not give it, or it has no safetensors files there.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(snapshot_download(path, allow_patterns=list(NEEDED)))
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such folder, and the hub does not give it ({first_line(error)})"
        ) from error
    if not is_adapter(folder) and not shards(folder):
        raise CheckpointError(
            f"{path}: no safetensors files on the hub, and .bin files are not converted; load_model reads "
            "them, and save_pretrained writes safetensors"
        )
    return folder
