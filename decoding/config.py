"""Settings that commands share: which model, where; importable without torch."""

from __future__ import annotations

import atexit
import difflib
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dlm.device import PlaceConfig
from dlm.errors import ConfigError, check_whole, unknown_name

if TYPE_CHECKING:
    from decoding.request import Plan, Request
    from decoding.sampler import Sampler

logger = logging.getLogger(__name__)


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection inside, and none of what was made inside after it.

    Importing makes a million objects that all stay; to look through them once takes a quarter of a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # an interpreter that ends the usual way frees everything
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class LoadConfig(PlaceConfig):
    """The model, its device, and the way its calls are made.

    Args:
        model: folder or hub id of a checkpoint; "default", "full" and, before R2FT, "default-sft", "full-sft"
            come along.
        accelerate: "compile" compiles the model with torch.compile (minutes, once), "graphs" records its
            calls as CUDA graphs; empty for neither.
        block_size: positions per block of a model in blocks, at most its own: 4 makes the default model
            faster on a CPU.
    """

    model: str = "default"
    accelerate: str = ""
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Check that there is a model."""
        if not self.model:
            raise ConfigError(
                "--model must name the folder or hub id of a checkpoint (dlm train makes one), or default"
            )
        if self.accelerate not in ("", "compile", "graphs"):
            raise unknown_name("accelerate", self.accelerate, ("compile", "graphs"))
        self.check_place()
        if self.block_size is not None:
            check_whole("block_size", self.block_size)

    def check_reuse(self, reuse: str | None) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: for `reuse` with an accelerated model.
        """
        if self.accelerate and reuse:
            raise ConfigError(
                "--accelerate makes few shapes fast, and --reuse has another in every call: give one of them"
            )

    def sampler(self, request: Request | None = None) -> Sampler:
        """A sampler of the model; nothing is searched for garbage while it is imported and loaded.

        Args:
            request: what is going to be asked for.

        Raises:
            ConfigError: for a request that the model cannot answer, before its weights are read.
        """
        with collection_paused():
            if request is not None:
                request.check_decoder()
                self.check(request)
            from decoding.sampler import Sampler

            return Sampler(*self.load())

    def check(self, request: Request) -> Plan | None:
        """Refuse a request that the model cannot answer, from its configuration alone.

        Returns:
            Its plan; None where the configuration is not here yet.

        Raises:
            ConfigError: see `Request.resolve`.
        """
        from dlm.checkpoint import stored_spec

        spec = stored_spec(self.model)
        return None if spec is None else request.resolve(spec.in_blocks_of(self.block_size))

    def load(self, prepacked: bool = True) -> tuple[Any, Any]:
        """The model and its tokenizer; with `prepacked` weights for computing alone (see `load_model`)."""
        from dlm.checkpoint import load_model
        from dlm.graphs import BucketedModel

        model, tokenizer = load_model(
            self.model,
            self.device,
            self.dtype,
            prepacked=prepacked and not self.accelerate,
            block_size=self.block_size,
        )
        if not self.accelerate:
            return model, tokenizer
        if self.accelerate == "compile":
            model.backbone.compile(dynamic=False)
        elif model.device.type != "cuda":
            logger.warning("accelerate graphs records CUDA graphs: nothing is recorded on %s", model.device)
        elif model.spec.visibility.block_size is not None:
            logger.warning("accelerate graphs records whole rows: nothing is recorded of a model in blocks")
        return BucketedModel(model, graphs=self.accelerate == "graphs"), tokenizer


ALIASES = {"n": "samples", "num_return_sequences": "samples"}
"""Options as other programs call them."""


def request_hint(config: type, name: str) -> str:
    """Say which option was meant by one that a command which decodes does not have.

    Those of a decoder are at home below `options`, or behind the name of one of several `decoders`.

    Args:
        config: dataclass of the command's settings.
        name: of the option.
    """
    known = {item.name for item in fields(config)}
    if ALIASES.get(name) in known:
        return f"Did you mean {ALIASES[name]}?"
    from decoding.presets import option_names, presets

    near = difflib.get_close_matches(name.removeprefix("options."), sorted(option_names()), n=1, cutoff=0.75)
    if not near:
        return ""
    if "options" in known:
        return f"Did you mean options.{near[0]}?"
    having = [key for key, preset in presets().items() if near[0] in preset.options]
    decoder = "conv" if "conv" in having else having[0]
    return f'Options of a decoder stand behind its name: --decoders "{decoder}({near[0]}=…)".'
