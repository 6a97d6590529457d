"""Text in, text out: prompts become canvases, the loop writes them, answers are cut at their EOS."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from decoding.loop import Canvas, Settings, denoise
from decoding.presets import Decoder
from dlm.errors import ConfigError
from dlm.noise import key_of
from dlm.tokenizer import Message, as_messages, encode_prompt

Prompt = str | list[Message]
"""A text (one user turn) or chat messages."""

BLANK = "░"
"""Stands for a position that is not yet written, in the text of events."""


@dataclass(frozen=True)
class Output:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """The answer's tokens, without its EOS and what stands behind."""
    finish_reason: str
    """"stop" when the model ended the answer itself, "length" when the window did."""
    model_calls: int
    """Model calls that ran this row."""
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared (0 = first)."""
    steps: int
    """Denoising steps that were allowed."""


@dataclass(frozen=True)
class Event:
    """The canvas after one step, for streaming."""

    step: int
    token_ids: list[int]
    """Every position after the prompt; the mask token where nothing is written."""
    text: str
    """The answer so far, `BLANK` where nothing is written; what follows the last token is left out."""


class Sampler:
    """Generates text with a masked diffusion model.

    Args:
        model: from `dlm.load_model`; anything with `hidden`, `logits` and a config will do.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.mask_id = int(model.config.mask_token_id)
        self.eos_id = int(model.config.eos_token_id)
        self.defaults: dict[str, Any] = dict(getattr(model.config, "generation", None) or {})

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        decoder: Decoder | str | None = None,
        window: int | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        eos_fill: bool = True,
        batch_size: int = 16,
    ) -> list[Output]:
        """Answer prompts; see `iter_generate` for the arguments. A single prompt gives a list of one."""
        return list(
            self.iter_generate(
                _several(prompts),
                decoder=decoder,
                window=window,
                steps=steps,
                seed=seed,
                eos_fill=eos_fill,
                batch_size=batch_size,
            )
        )

    def iter_generate(
        self,
        prompts: Iterable[Prompt],
        *,
        decoder: Decoder | str | None = None,
        window: int | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        eos_fill: bool = True,
        batch_size: int = 16,
    ) -> Iterator[Output]:
        """Answer prompts batch by batch, without reading them all first.

        Args:
            prompts: texts or chat message lists.
            decoder: a `Decoder` or the name of one; the checkpoint's default if not given.
            window: L, tokens of prompt and answer together.
            steps: S, denoising steps.
            seed: one seed for all rows, or one per prompt. A row's noise depends on its seed and its own
                prompt, never on its batch-mates, so equal prompts under one seed give equal texts.
            eos_fill: once an EOS is written, everything to its right becomes EOS.
            batch_size: rows per model call.

        Yields:
            One `Output` per prompt, in order.

        Raises:
            ConfigError: for a prompt that does not fit the window, and for settings out of range.
        """
        decoder, window, settings = self._resolve(decoder, window, steps, eos_fill)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        pairs = enumerate(_with_seeds(prompts, seed))
        while chunk := list(itertools.islice(pairs, batch_size)):
            rows = [self._row(prompt, window, f"prompt {i}: ") for i, (prompt, _) in chunk]
            canvas = self._canvas(rows, [int(s) for _, (_, s) in chunk])
            for _ in self._denoise(canvas, decoder, settings):
                pass
            yield from (self._output(canvas, i, settings.steps) for i in range(len(rows)))

    def stream(
        self,
        prompt: Prompt,
        *,
        decoder: Decoder | str | None = None,
        window: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        eos_fill: bool = True,
    ) -> Iterator[Event]:
        """Answer one prompt and show the canvas after every step; arguments as in `iter_generate`."""
        decoder, window, settings = self._resolve(decoder, window, steps, eos_fill)
        canvas = self._canvas([self._row(prompt, window)], [seed])
        start = int(canvas.start[0])
        for step in self._denoise(canvas, decoder, settings):
            ids = canvas.ids[0, start:].tolist()
            yield Event(step, ids, self.show(ids))

    def _denoise(self, canvas: Canvas, decoder: Decoder, settings: Settings) -> Iterator[int]:
        """The loop without gradients; the caller's own gradient mode is back whenever it has control."""
        steps = denoise(self.model, canvas, decoder, settings)
        while True:
            with torch.inference_mode():
                step = next(steps, None)
            if step is None:
                return
            yield step

    @property
    def window(self) -> int:
        """The window of the checkpoint, used when none is given."""
        return int(self.defaults.get("window", 256))

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, template included; a window must be longer."""
        return len(encode_prompt(self.tokenizer, as_messages(prompt)))

    def show(self, ids: list[int]) -> str:
        """Text of a partly written answer, up to its EOS, `BLANK` for each mask."""
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        while ids and ids[-1] == self.mask_id:
            ids = ids[:-1]
        parts = itertools.groupby(ids, key=lambda token: token == self.mask_id)
        return "".join(
            BLANK * len(list(run)) if blank else self.tokenizer.decode(list(run), skip_special_tokens=True)
            for blank, run in parts
        ).strip()

    # ---- from text to canvas and back ----------------------------------------------------------------

    def _resolve(
        self, decoder: Decoder | str | None, window: int | None, steps: int | None, eos_fill: bool
    ) -> tuple[Decoder, int, Settings]:
        """Fill in what the caller left open from the checkpoint's defaults."""
        chosen = decoder if decoder is not None else self.defaults.get("decoder", "conv")
        if not isinstance(chosen, Decoder):
            chosen = Decoder.named(chosen)
        window = self.window if window is None else window
        limit = getattr(self.model.config, "max_positions", window)
        if not 1 <= window <= limit:
            raise ConfigError(f"window must lie between 1 and the model's {limit} positions, got {window}")
        steps = int(self.defaults.get("steps", max(1, window // 4))) if steps is None else steps
        return chosen, window, Settings(steps, self.eos_id, self.mask_id, eos_fill)

    def _row(self, prompt: Prompt, window: int, where: str = "") -> list[int]:
        """Prompt tokens followed by masks, `window` in all."""
        ids = encode_prompt(self.tokenizer, as_messages(prompt))
        if len(ids) >= window:
            raise ConfigError(
                f"{where}the prompt has {len(ids)} tokens and the window {window}; "
                f"the window must be at least {len(ids) + 1}"
            )
        return ids + [self.mask_id] * (window - len(ids))

    def _canvas(self, rows: list[list[int]], seeds: list[int]) -> Canvas:
        device = getattr(self.model, "device", "cpu")
        keys = [key_of(seed, _digest(row, self.mask_id)) for row, seed in zip(rows, seeds, strict=True)]
        return Canvas.of(torch.tensor(rows, device=device), self.mask_id, torch.stack(keys).to(device))

    def _output(self, canvas: Canvas, i: int, steps: int) -> Output:
        start = int(canvas.start[i])
        ids = canvas.ids[i, start:].tolist()
        stopped = self.eos_id in ids
        end = ids.index(self.eos_id) if stopped else len(ids)
        return Output(
            text=self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip(),
            token_ids=ids[:end],
            finish_reason="stop" if stopped else "length",
            model_calls=int(canvas.model_calls[i]),
            reveal_step=canvas.reveal_step[i, start : start + end].tolist(),
            steps=steps,
        )


def _several(prompts: Prompt | Iterable[Prompt]) -> Iterable[Prompt]:
    """A lone text or a lone conversation as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], dict):
        return [cast("list[Message]", prompts)]
    return cast("Iterable[Prompt]", prompts)


def _with_seeds(prompts: Iterable[Prompt], seed: int | Sequence[int]) -> Iterator[tuple[Prompt, int]]:
    """Each prompt with its seed: one for all, or as many seeds as there are prompts."""
    if not isinstance(seed, Sequence):
        yield from zip(prompts, itertools.repeat(operator.index(seed)), strict=False)
        return
    seeds = iter(seed)
    for prompt in prompts:
        own = next(seeds, None)
        if own is None:
            raise ConfigError(f"seed lists {len(seed)} seeds, but there are more prompts")
        yield prompt, own
    if next(seeds, None) is not None:
        raise ConfigError(f"seed lists {len(seed)} seeds, but there are fewer prompts")


def _digest(row: list[int], mask_id: int) -> bytes:
    """Identifies the given tokens of a row, whatever the length of the window."""
    known = [token for token in row if token != mask_id]
    return hashlib.blake2b(repr(known).encode(), digest_size=8).digest()
