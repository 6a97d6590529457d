"""Masked diffusion language models: the model, the diffusion process, the data and the trainer.

`import dlm` is light: nothing here imports torch until a name that needs it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from dlm.version import __version__

_LAZY = {
    "load_model": "dlm.checkpoint",
    "MaskedDiffusionConfig": "dlm.config",
    "MaskedDiffusionModel": "dlm.model",
    "LogLinear": "dlm.schedule",
    "corrupt": "dlm.diffusion",
    "masked_diffusion_loss": "dlm.objective",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)
