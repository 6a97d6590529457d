"""Modes of files: readable by whoever the user's umask allows."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path


def share(folder: str | Path) -> None:
    """Give the weights in a folder that their owner alone can read (0600) the mode that new files have.

    safetensors writes them so, whatever the umask says.
    """
    folder = Path(folder)
    private = [path for path in folder.glob("*.safetensors") if _mode(path) == 0o600]
    if private:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            new = Path(place) / "new"
            new.touch()
            mode = _mode(new)
        for path in private:
            path.chmod(mode)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
