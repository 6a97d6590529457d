"""Decoding: how masks become text.

A decoder is three independent choices: `decoding.window` (where), `decoding.reveal` (when) and
`decoding.tokens` (what). A `Request` becomes a `Plan`; `decoding.step` takes one denoising step of
the rows of a plan; `decoding.engine` holds rows of many plans; `decoding.sampler` puts text around it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoding.answer import Event as Event
    from decoding.answer import Output as Output
    from decoding.engine import Engine as Engine
    from decoding.infill import Infilled as Infilled
    from decoding.presets import Decoder as Decoder
    from decoding.presets import list_decoders as list_decoders
    from decoding.request import Plan as Plan
    from decoding.request import Request as Request
    from decoding.sampler import Sampler as Sampler
    from decoding.tilted.particles import TiltedOutput as TiltedOutput
    from decoding.tilted.tilt import Tilt as Tilt
    from decoding.tokens import TokenRule as TokenRule

_LAZY = {
    "Decoder": "decoding.presets",
    "list_decoders": "decoding.presets",
    "Sampler": "decoding.sampler",
    "Request": "decoding.request",
    "Plan": "decoding.request",
    "Engine": "decoding.engine",
    "Output": "decoding.answer",
    "Event": "decoding.answer",
    "Infilled": "decoding.infill",
    "Tilt": "decoding.tilted.tilt",
    "TiltedOutput": "decoding.tilted.particles",
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


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
