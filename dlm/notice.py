"""A model's NOTICE: what it is licensed under and where it comes from. It goes wherever the weights go."""

from __future__ import annotations

import shutil
from pathlib import Path

from dlm.adapter_files import base_of, is_adapter
from dlm.model_names import ADAPTERS
from dlm.pretrained.names import located

NOTICE_FILE = "NOTICE"


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
