"""`dlm infill`: fill the gaps of texts, or write some of their words again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from decoding.config import LoadConfig, request_hint
from decoding.gaps import Gap, pieces_of, place_of
from decoding.request import DecoderRequest, Request
from dlm.cli import Command, json_line
from dlm.data.prompts import read_prompts
from dlm.errors import ConfigError

LENGTH = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?")


@dataclass(frozen=True)
class InfillConfig(LoadConfig, DecoderRequest):
    """Settings of `dlm infill`.

    Args:
        texts: texts with gaps such as "The capital of <mask:3> is Paris." (the words that are no options), or
            <mask:2-6> for two to six tokens, or <mask> for up to 32; "-" or nothing reads lines from stdin.
        edit: words that are written again, in texts without gaps.
        length: tokens that come in their place, such as 4 or 2-6; as many as they have if empty.
        prompt: what the texts are the answer to; empty for texts that stand alone.
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
        batch_size: rows per model call.
        json: write one JSON object per text instead of the text.
    """

    texts: list[str] = field(default_factory=list)
    edit: str = ""
    length: str = ""
    prompt: str = ""
    seed: int = 0
    batch_size: int = 8
    json: bool = False

    def __post_init__(self) -> None:
        """Check that the settings fit together."""
        LoadConfig.__post_init__(self)
        DecoderRequest.__post_init__(self)
        self.check_reuse(self.reuse)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.length and not self.edit:
            raise ConfigError("length says how many tokens come in place of --edit; give both")
        if self.length and not LENGTH.fullmatch(self.length):
            raise ConfigError(f"length must be a number of tokens or two such as 2-6, got {self.length!r}")
        if (length := _length(self.length)) is not None:
            Gap.of(length)
        for i, text in enumerate(self.texts if self.texts != ["-"] else []):
            self._check(f"text {i}", text)

    def _check(self, name: str, text: str) -> None:
        """Refuse a text that has not what is to be written."""
        try:
            place_of(text, self.edit) if self.edit else pieces_of(text)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def check_sizes(self) -> None:
        """Refuse gaps that are longer than the model's positions, before its weights are read."""
        from dlm.checkpoint import stored_positions

        positions = stored_positions(self.model)
        for i, text in enumerate(self.texts if self.texts != ["-"] and not self.edit else []):
            size = sum(piece.least for piece in pieces_of(text) if isinstance(piece, Gap))
            if positions is not None and size > positions:
                raise ConfigError(f"text {i}: gaps of {size} tokens, and the model has {positions} positions")

    def request(self) -> Request:
        """The part of these settings that says how to decode."""
        return Request.read_from(self)


def run(config: InfillConfig) -> int:
    """Fill the texts, in order."""
    config.request().check_decoder()
    config.check_sizes()
    sampler = config.sampler()
    texts: Iterable[str] = read_prompts("-") if config.texts in ([], ["-"]) else config.texts
    settings: dict[str, Any] = {
        "prompt": config.prompt or None,
        "request": config.request(),
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    outputs: Iterable[Any] = sampler.iter_infill(texts, **settings)
    if config.edit:
        length = _length(config.length)
        outputs = sampler.iter_edit(texts, config.edit, length=length, **settings)
    for output in outputs:
        print(json_line(asdict(output)) if config.json else output.text, flush=True)
    return 0


def _length(text: str) -> tuple[int, int] | None:
    """Bounds of a gap: "4" -> (4, 4), "2-6" -> (2, 6), nothing -> None."""
    match = LENGTH.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2] or match[1]))


COMMAND = Command(
    "fill the gaps of texts, or write words again", InfillConfig, run, positional="texts", hint=request_hint
)
