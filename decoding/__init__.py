"""Decoding: how masks become text.

A decoder is three independent choices: `decoding.window` (where), `decoding.reveal` (when) and
`decoding.tokens` (what). `decoding.loop` holds the one denoising loop, `decoding.sampler` the text around it.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Decoder": "decoding.presets",
    "list_decoders": "decoding.presets",
    "Sampler": "decoding.sampler",
    "Output": "decoding.sampler",
    "Event": "decoding.sampler",
    "TokenRule": "decoding.tokens",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(
            f"module 'decoding' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_LAZY[name]), name)
