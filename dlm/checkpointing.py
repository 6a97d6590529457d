"""Checkpoints of a run: which ones are whole, which one to resume from, which ones to delete.

A checkpoint counts once `complete.json` stands in it. That file is written last, after everything else is
on disk, and lists every file with its size; a kill at any moment leaves either a whole checkpoint or one
that is ignored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dlm.atomic import replacing
from dlm.errors import CheckpointError, DLMError, first_line
from dlm.json_files import damaged, read_object

MARKER = "complete.json"
LOG_STATE = "log_state.json"
"""In a checkpoint: the loss summed since the last log line, so that a resumed curve is the same curve."""

DROP_CHECKPOINT = "remove this checkpoint's folder, and the run goes on from the one before"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def mark_complete(folder: str | Path, step: int) -> None:
    """Flush a checkpoint to disk and mark it as whole."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(file)
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    with replacing(folder / MARKER) as part:
        part.write_text(json.dumps({"step": step, "files": sizes}, indent=1), encoding="utf-8")
        _flush(part)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: str | Path) -> bool:
    """True when a checkpoint is marked as complete and every file has its recorded size."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def complete_checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    paths = [path for path in Path(run).glob("checkpoint-*") if _NAME.match(path.name) and is_complete(path)]
    return sorted(paths, key=_step)


def last_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    paths = complete_checkpoints(run)
    return paths[-1] if paths else None


def keep_last(run: str | Path, count: int, best: str | None = None) -> None:
    """Delete all but the newest `count` whole checkpoints; `best` and anything newer always stay."""
    for old in complete_checkpoints(run)[: -max(1, count)]:
        if not old.is_symlink() and (best is None or old.name != Path(best).name):
            (old / MARKER).unlink()
            shutil.rmtree(old)


def discard_incomplete(run: str | Path) -> list[str]:
    """Delete the half-written checkpoints that a kill left behind; returns their names."""
    named = [path for path in Path(run).glob("checkpoint-*") if _NAME.match(path.name)]
    broken = [path for path in named if path.is_symlink() or path.is_dir()]
    broken = [path for path in broken if not is_complete(path)]
    for path in broken:
        if path.is_symlink():
            path.unlink()  # what it points to is not ours
        else:
            shutil.rmtree(path)
    return sorted(path.name for path in broken)


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """A block that reads files of a checkpoint; whatever is wrong with them is one error.

    Raises:
        CheckpointError: naming the checkpoint, and what to do.
    """
    try:
        yield
    except (DLMError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None:
            raise
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{checkpoint}: damaged ({problem}); {DROP_CHECKPOINT}") from error


def log_state(checkpoint: str | Path) -> dict[str, Any]:
    """Of a checkpoint: the sums that were being collected when it was written; empty where it has none.

    Raises:
        CheckpointError: naming the file that is damaged.
    """
    file = Path(checkpoint) / LOG_STATE
    if not file.is_file():
        return {}
    log = read_object(file, hint=DROP_CHECKPOINT)
    try:
        return {
            "loss_sum": float(log["loss_sum"]),
            "loss_total": None if log.get("loss_total") is None else float(log["loss_total"]),
            "since_step": int(log["since_step"]),
            "watched": {str(name): float(value) for name, value in log.get("watched", {}).items()},
            "watched_since": int(log.get("watched_since", log["since_step"])),
            "parts": None if log.get("parts") is None else int(log["parts"]),
            "rows": None if log.get("rows") is None else int(log["rows"]),
            "given": None if log.get("given") is None else int(log["given"]),
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise damaged(file, error, hint=DROP_CHECKPOINT) from error


def _step(path: Path) -> int:
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else -1
