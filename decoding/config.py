"""The settings of decoding that commands share; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dlm.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class LoadConfig:
    """Which model, where, and how its calls are made.

    Args:
        model: folder or hub id of a checkpoint; "default" or "default-sft" (before R2FT) come along.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "fastest": bfloat16 where the machine computes in it.
        accelerate: "compile" compiles the model with torch.compile (minutes, once), "graphs" records its
            calls as CUDA graphs; empty for neither.
    """

    model: str = "default"
    device: str = "auto"
    dtype: str = "fastest"
    accelerate: str = ""

    def __post_init__(self) -> None:
        """Check that there is a model."""
        if not self.model:
            raise ConfigError(
                "--model must name the folder or hub id of a checkpoint (dlm train makes one), or default"
            )
        if self.accelerate not in ("", "compile", "graphs"):
            raise unknown_name("accelerate", self.accelerate, ("compile", "graphs"))

    def check(self, reuse: str) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: for `reuse` with an accelerated model.
        """
        if self.accelerate and reuse:
            raise ConfigError(
                "--accelerate makes few shapes fast, and --reuse has another in every call: give one of them"
            )

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from dlm.checkpoint import load_model
        from dlm.graphs import BucketedModel

        model, tokenizer = load_model(self.model, self.device, self.dtype)
        if not self.accelerate:
            return model, tokenizer
        if self.accelerate == "compile":
            model.backbone.compile(dynamic=False)
        return BucketedModel(model, graphs=self.accelerate == "graphs"), tokenizer


def decoder_option(name: str) -> str:
    """Where an unknown option belongs if a decoder has it: `options.temperature` for `temperature`."""
    from decoding.presets import PRESETS

    return f"options.{name}" if any(name in preset.options for preset in PRESETS.values()) else ""


@dataclass(frozen=True)
class DecodingConfig:
    """How text is decoded.

    Args:
        decoder: name of the decoder (see `dlm generate --list-decoders`); the checkpoint's own if empty, in
            the same order at the given pace when it has a pace of its own and steps or a rate are given.
        options: options of the decoder, such as --options.kernel_size 129, or for other answers with other
            seeds --options.temperature 1; those of the checkpoint hold for its own decoder.
        max_tokens: longest answer, on a canvas that grows as it is written; 0 for the default (256), or for a
            window, if that or steps are given.
        rate: tokens written per model call on average (at least 1), instead of steps; 0 for the decoder's own
            pace, or where it has none, for 2 on a canvas that grows and for steps in a window.
        window: tokens of prompt and answer together, on a fixed canvas; 0 for the checkpoint's default.
        steps: denoising steps on a fixed canvas; 0 for the checkpoint's own, or a quarter of the window.
        stop: a text that ends an answer, which is cut before it; several as '["one", "two"]'.
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
        eos_fill: once the end is written, everything to its right becomes the end token.
        canvas: "growing" with a window and steps shows the model no more than can open soon (approximate).
        margin: masks that a growing canvas holds beyond those that can open; -1 for 16.
        reuse: "prompt", "prefix" or "dual" reuses keys and values (approximate); nothing for exact decoding.
        refresh: with reuse, every so many calls everything is computed; 0 for 8.
    """

    decoder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    window: int = 0
    steps: int = 0
    max_tokens: int = 0
    rate: float = 0.0
    stop: str | list[str] = ""
    seed: int = 0
    eos_fill: bool = True
    canvas: str = ""
    margin: int = -1
    reuse: str = ""
    refresh: int = 0

    meant = staticmethod(decoder_option)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("window", "steps", "max_tokens", "rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `Sampler.generate` and `Sampler.stream`."""
        from decoding.presets import Decoder

        if self.decoder:
            Decoder.named(self.decoder, **self.options)  # refused before a model is loaded
        return {
            "decoder": self.decoder or None,
            "options": self.options or None,
            "window": self.window or None,
            "steps": self.steps or None,
            "max_tokens": self.max_tokens or None,
            "rate": self.rate or None,
            "stop": self.stop or None,
            "seed": self.seed,
            "eos_fill": self.eos_fill,
            "canvas": self.canvas or None,
            "margin": self.margin if self.margin >= 0 else None,
            "reuse": self.reuse or None,
            "refresh": self.refresh or None,
        }
