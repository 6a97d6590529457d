"""Masked diffusion language models: the model, the diffusion process, the data and the trainer.

`import dlm` is light: nothing here imports torch until a name that needs it is used, unless transformers is
there already.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from dlm.version import __version__

if TYPE_CHECKING:
    from dlm.checkpoint import load_model as load_model
    from dlm.config import MaskedDiffusionConfig as MaskedDiffusionConfig
    from dlm.diffusion import corrupt as corrupt
    from dlm.model import MaskedDiffusionModel as MaskedDiffusionModel
    from dlm.objective import masked_diffusion_loss as masked_diffusion_loss
    from dlm.schedule import LogLinear as LogLinear
    from dlm.spec import ModelSpec as ModelSpec

_LAZY = {
    "load_model": "dlm.checkpoint",
    "MaskedDiffusionConfig": "dlm.config",
    "MaskedDiffusionModel": "dlm.model",
    "LogLinear": "dlm.schedule",
    "ModelSpec": "dlm.spec",
    "corrupt": "dlm.diffusion",
    "masked_diffusion_loss": "dlm.objective",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    # In a program that uses it anyway, its AutoModel reads our folders from here on.
    importlib.import_module("dlm.model")
