"""JSON files that a command reads again: an object, or one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlm.errors import CheckpointError, DLMError, first_line


def read_object(file: str | Path, kind: type[DLMError] = CheckpointError, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: its path.
        kind: what is raised.
        hint: what is to be done, behind the message.

    Raises:
        DLMError: of `kind`, naming the file that cannot be read, is no JSON, or holds no object.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, error, kind, hint) from error
    if not isinstance(value, dict):
        raise damaged(file, TypeError(f"an object was expected, got {type(value).__name__}"), kind, hint)
    return value


def damaged(
    file: str | Path, error: Exception, kind: type[DLMError] = CheckpointError, hint: str = ""
) -> DLMError:
    """An error about a file whose contents are not what is written there.

    Args:
        file: its path.
        error: what is wrong.
        kind: class of the result.
        hint: what is to be done.
    """
    reason = f"{first_line(error)} is missing" if isinstance(error, KeyError) else first_line(error)
    return kind(f"{file}: damaged ({reason})" + (f"; {hint}" if hint else ""))
