"""The packages of this project, found where `dlm` lies, even when folders of the same names come first."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from dlm.errors import DLMError

SIBLINGS = ("decoding", "finetune", "eval", "serve")
"""Packages beside `dlm`, with names that other projects may have too."""


HOME = Path(__file__).resolve().parent.parent
"""The folder of `dlm` and of the others beside it."""


def claim() -> list[str]:
    """Make the names of `SIBLINGS` mean this project's packages; a line for each that something else hides.

    A folder `decoding/` in the working folder comes first on Python's path under `python -m dlm.cli` and with
    PYTHONPATH. What is hidden is imported at once, so that later imports find it.

    Raises:
        DLMError: when another module of such a name is loaded already.
    """
    lines = []
    for name in SIBLINGS:
        file = HOME / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin == file or not file.is_file():
            continue
        if name in sys.modules:
            raise DLMError(f"{origin} is loaded as {name!r}, which {file.parent} should be")
        _load(name, file)
        where = origin.parent if origin.name == "__init__.py" else origin
        lines.append(f"{where} hides the package {name!r} of this program; {file.parent} is used")
    return lines


def _load(name: str, file: Path) -> None:
    """Import a package from its `__init__.py`."""
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
