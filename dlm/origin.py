"""Fingerprint, origin and NOTICE of a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

from dlm.adapter_files import base_of, is_adapter
from dlm.checkpoint import is_causal_lm
from dlm.model_names import ADAPTERS
from dlm.pretrained.names import located

NOTICE_FILE = "NOTICE"
"""The file with a model's licence and origin; it goes wherever the weights go."""

_HASHED = (
    "*.safetensors", "pytorch_model*.bin", "config.json", "generation_config.json",
    "adapter_config.json", "base.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
"""Files that a model's texts depend on; base.json tells an adapter's base by its weights."""


def fingerprint(path: str) -> str:
    """Fingerprint of a checkpoint: a hash of its files, or of its name if it is not on disk.

    One that comes with the package is on disk: a later version of it is another model.
    """
    digest = hashlib.sha256()
    folder = Path(located(path))
    if not folder.exists():
        return "name:" + hashlib.sha256(path.encode()).hexdigest()[:16]
    files = (
        [folder] if folder.is_file() else sorted(itertools.chain(*(folder.glob(kind) for kind in _HASHED)))
    )
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def autoregressive_origin(model: str) -> str:
    """The autoregressive checkpoint that training began with, by what runs and adapters record.

    Empty where there are no records, or what they name is not an autoregressive model that is still there.
    """
    for _ in range(10):  # stages of training
        if not model:
            return ""  # random weights, or nothing on record
        model = located(model)
        file = Path(model) / "run.json"
        if file.is_file():
            try:
                model = str(json.loads(file.read_text(encoding="utf-8"))["config"]["model"]["init"] or "")
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                return ""
        elif is_adapter(model):
            model = base_of(model)
        else:
            break
    else:
        return ""
    if model.endswith(".gguf"):
        return model if Path(model).is_file() else ""
    return model if (Path(model) / "config.json").is_file() and is_causal_lm(model) else ""


def notice_of(model: str | Path) -> Path | None:
    """The NOTICE of a model on disk; of an adapter without one, that of its base."""
    folder = Path(located(model) if str(model) in ADAPTERS else model)
    if (folder / NOTICE_FILE).is_file():
        return folder / NOTICE_FILE
    return notice_of(base_of(folder)) if is_adapter(folder) else None


def carry_notice(source: str | Path, target: Path) -> None:
    """Put the notice of `source`, if it has one, beside the weights that were made of it."""
    notice = notice_of(source)
    if notice is not None:
        shutil.copyfile(notice, target / NOTICE_FILE)
