"""Text in, text out: prompts become canvases, the loop writes them, answers are cut at their EOS."""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack, cast

import torch
from transformers import PreTrainedTokenizerBase

from decoding.loop import GROWING_WINDOW, Canvas, Settings, denoise
from decoding.presets import Decoder
from dlm.errors import ConfigError
from dlm.noise import key_of
from dlm.tokenizer import Message, as_messages, encode_prompt, encode_text

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
    """Denoising steps: those that were allowed, or at a rate those that the row took."""


@dataclass(frozen=True)
class Infilled:
    """A text whose gaps have been filled."""

    text: str
    """All of it."""
    gaps: list[str]
    """What was written into each gap; neighbouring gaps count as one."""
    token_ids: list[int]
    model_calls: int
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared; -1 for given ones."""


GAP = re.compile(r"<mask:(\d{1,7})>")
"""A gap in a text that is to be filled, and its number of tokens."""


@dataclass(frozen=True)
class Event:
    """The canvas after one step, for streaming."""

    step: int
    token_ids: list[int]
    """Every position after the prompt that there is now; the mask token where nothing is written."""
    text: str
    """The answer so far, `BLANK` where nothing is written; what follows the last token is left out."""


RATE = 2.0
"""Tokens per model call on a canvas that grows, when no rate is given."""


class How(TypedDict, total=False):
    """How an answer is decoded.

    Either a fixed canvas, `window` tokens of prompt and answer together, filled in `steps` steps (the setting
    of the papers) or at a `rate`; or a canvas that grows, with `max_tokens` as a limit. Text and cost do not
    depend on the limit, as long as the canvas does not meet it: it holds some masks more than the answer has
    tokens (`Window.ahead`: 40 for `conv` with its own kernel).
    """

    decoder: Decoder | str | None
    """A `Decoder` or the name of one; the checkpoint's default if not given."""
    window: int | None
    """L; the checkpoint's default if neither it nor `max_tokens` is given."""
    steps: int | None
    """S, denoising steps."""
    max_tokens: int | None
    """Longest answer, in tokens."""
    rate: float | None
    """Tokens that are written per model call on average, at least 1; `RATE` on a canvas that grows. A step
    writes no more than is open, and never crosses the end of a block. Not for rules that have a pace of their
    own (threshold, entropy bound, a fixed number per step)."""
    eos_fill: bool
    """Once an EOS is written, everything to its right becomes EOS; True by default."""


@dataclass(frozen=True)
class Plan:
    """A request with everything filled in."""

    decoder: Decoder
    settings: Settings
    positions: int
    """Longest row, prompt included."""
    tokens: int
    """Longest answer."""


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
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> list[Output]:
        """Answer prompts; see `iter_generate` for the arguments. A single prompt gives a list of one."""
        return list(self.iter_generate(_several(prompts), seed=seed, batch_size=batch_size, **how))

    def iter_generate(
        self,
        prompts: Iterable[Prompt],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> Iterator[Output]:
        """Answer prompts batch by batch, without reading them all first.

        Args:
            prompts: texts or chat message lists.
            seed: one seed for all rows, or one per prompt. A row's noise depends on its seed and its own
                prompt, never on its batch-mates, so equal prompts under one seed give equal texts.
            batch_size: rows per model call.
            **how: see `How`.

        Yields:
            One `Output` per prompt, in order.

        Raises:
            ConfigError: for a prompt that does not fit, and for settings out of range.
        """
        plan = self._plan(**how)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        pairs = enumerate(_with_seeds(prompts, seed))
        while chunk := list(itertools.islice(pairs, batch_size)):
            rows = [self._row(prompt, plan, f"prompt {i}: ") for i, (prompt, _) in chunk]
            canvas = self._canvas(rows, [int(s) for _, (_, s) in chunk], plan)
            for _ in self._denoise(canvas, plan):
                pass
            yield from (self._output(canvas, i, plan) for i in range(len(rows)))

    def stream(self, prompt: Prompt, *, seed: int = 0, **how: Unpack[How]) -> Iterator[Event]:
        """Answer one prompt and show the canvas after every step; arguments as in `iter_generate`."""
        plan = self._plan(**how)
        canvas = self._canvas([self._row(prompt, plan)], [seed], plan)
        start = int(canvas.start[0])
        for step in self._denoise(canvas, plan):
            ids = canvas.ids[0, start : int(canvas.valid[0].sum())].tolist()
            yield Event(step, ids, self.show(ids))

    def infill(
        self,
        texts: str | Iterable[str],
        *,
        prompt: Prompt | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> list[Infilled]:
        """Fill the gaps of texts; see `iter_infill` for the arguments. A single text gives a list of one."""
        several = [texts] if isinstance(texts, str) else texts
        return list(self.iter_infill(several, prompt=prompt, seed=seed, batch_size=batch_size, **how))

    def iter_infill(
        self,
        texts: Iterable[str],
        *,
        prompt: Prompt | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **how: Unpack[How],
    ) -> Iterator[Infilled]:
        """Fill the gaps of texts: `<mask:3>` stands for three tokens, as often as needed.

        What is written around the gaps is never changed, and everything before and behind them is seen; a
        convolutional window opens each gap from both of its sides. Control tokens cannot come out. A space
        before a gap belongs to the gap, since tokens carry the space before them.

        Args:
            texts: texts with gaps.
            prompt: what the texts are the answer to; by default they stand alone, without a template.
            seed: one seed for all texts, or one per text.
            batch_size: texts per model call.
            **how: see `How`; a text has the length it has, so `window`, `max_tokens` and `eos_fill` are not
                for it, and without `steps` it is decoded at a `rate`, 1 by default.

        Raises:
            ConfigError: for a text without a gap, an empty gap, or a text that is too long for the model.
        """
        plan = self._infill_plan(**how)
        before = encode_prompt(self.tokenizer, as_messages(prompt)) if prompt is not None else []
        pairs = enumerate(_with_seeds(texts, seed))
        while chunk := list(itertools.islice(pairs, batch_size)):
            rows = [self._gapped(str(text), plan, before, i) for i, (text, _) in chunk]
            canvas = self._canvas([ids for ids, _ in rows], [int(s) for _, (_, s) in chunk], plan)
            for _ in self._denoise(canvas, plan):
                pass
            yield from (self._infilled(canvas, i, taken) for i, (_, taken) in enumerate(rows))

    def _infill_plan(self, **how: Unpack[How]) -> Plan:
        """A plan without a window: the row is as long as its text."""
        for name in ("window", "max_tokens", "eos_fill"):
            if how.get(name) is not None:
                raise ConfigError(f"{name} means nothing here: a text with gaps has the length it has")
        limit = int(getattr(self.model.config, "max_positions", 2**31))
        fixed: How = {**how, "eos_fill": False, "window": limit}
        plan = self._plan(**fixed)
        steps, rate = how.get("steps"), how.get("rate")
        rate = 1.0 if steps is None and rate is None else rate
        settings = replace(plan.settings, steps=steps, rate=rate, early_exit=False, fit=GROWING_WINDOW)
        special = getattr(self.tokenizer, "all_special_ids", ())
        return replace(plan, decoder=plan.decoder.without(self.eos_id, *special), settings=settings)

    def _gapped(self, text: str, plan: Plan, before: list[int], number: int) -> tuple[list[int], int]:
        """Token ids of a row, mask ids in the text's gaps; and how many of them come before the text."""
        ids: list[int] = []
        parts = GAP.split(text)
        if len(parts) == 1:
            raise ConfigError(f"text {number} has no gap; write one as <mask:3> (three tokens)")
        for i, part in enumerate(parts):
            size = int(part) if i % 2 else 0
            if i % 2 and size < 1:
                raise ConfigError(f"text {number}: a gap needs at least one token, got <mask:{part}>")
            if i % 2 == 0:
                ids += encode_text(self.tokenizer, part if i == len(parts) - 1 else part.removesuffix(" "))
            if len(before) + len(ids) + size > plan.positions:
                raise ConfigError(f"text {number} is longer than the model's {plan.positions} positions")
            ids += [self.mask_id] * size
        if not before and ids[0] == self.mask_id and getattr(self.model.config, "shift", False):
            before = [self.eos_id]  # the state before the first token has to come from somewhere
        return before + ids, len(before)

    def _infilled(self, canvas: Canvas, i: int, taken: int) -> Infilled:
        end = int(canvas.end[i])
        ids, born = canvas.ids[i, taken:end].tolist(), canvas.reveal_step[i, taken:end].tolist()
        runs = itertools.groupby(zip(ids, born, strict=True), key=lambda pair: pair[1] >= 0)
        gaps = [[token for token, _ in run] for written, run in runs if written]
        return Infilled(
            text=self.tokenizer.decode(ids),
            gaps=[self.tokenizer.decode(gap) for gap in gaps],
            token_ids=ids,
            model_calls=int(canvas.model_calls[i]),
            reveal_step=born,
        )

    def _denoise(self, canvas: Canvas, plan: Plan) -> Iterator[int]:
        """The loop without gradients; the caller's own gradient mode is back whenever it has control."""
        steps = denoise(self.model, canvas, plan.decoder, plan.settings)
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

    def _plan(
        self,
        decoder: Decoder | str | None = None,
        window: int | None = None,
        steps: int | None = None,
        max_tokens: int | None = None,
        rate: float | None = None,
        eos_fill: bool = True,
    ) -> Plan:
        """Fill in what the caller left open from the checkpoint's defaults."""
        chosen = decoder if decoder is not None else self.defaults.get("decoder", "conv")
        if not isinstance(chosen, Decoder):
            chosen = Decoder.named(chosen)
        limit = int(getattr(self.model.config, "max_positions", 2**31))
        if max_tokens is not None and (window is not None or steps is not None):
            raise ConfigError("max_tokens is a limit for a canvas that grows; it has no window and no steps")
        if rate is not None and steps is not None:
            raise ConfigError("give either steps or a rate, not both")
        if rate is not None and not chosen.reveal.paced:
            raise ConfigError(f"decoder {chosen.name!r} says itself how many tokens it writes; give no rate")
        if max_tokens is not None:
            if max_tokens < 1:
                raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
            own = RATE if rate is None else rate
            pace = Settings(None, self.eos_id, self.mask_id, eos_fill, rate=own, grow=True)
            return Plan(chosen, pace, limit, max_tokens)
        window = self.window if window is None else window
        if not 1 <= window <= limit:
            raise ConfigError(f"window must lie between 1 and the model's {limit} positions, got {window}")
        if rate is None and steps is None:
            steps = int(self.defaults.get("steps", max(1, window // 4)))
        return Plan(chosen, Settings(steps, self.eos_id, self.mask_id, eos_fill, rate=rate), window, window)

    def _row(self, prompt: Prompt, plan: Plan, where: str = "") -> list[int]:
        """Prompt tokens followed by the masks that the answer may need."""
        ids = encode_prompt(self.tokenizer, as_messages(prompt))
        if len(ids) >= plan.positions:
            raise ConfigError(
                f"{where}the prompt has {len(ids)} tokens and the window {plan.positions}; "
                f"the window must be at least {len(ids) + 1}"
            )
        return ids + [self.mask_id] * min(plan.tokens, plan.positions - len(ids))

    def _canvas(self, rows: list[list[int]], seeds: list[int], plan: Plan) -> Canvas:
        device = getattr(self.model, "device", "cpu")
        keys = [key_of(seed, _digest(row, self.mask_id)) for row, seed in zip(rows, seeds, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.mask_id] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        valid = torch.arange(width, device=device) < lengths[:, None]
        ahead = plan.decoder.window.fitted(GROWING_WINDOW).ahead if plan.settings.grow else None
        return Canvas.of(ids, self.mask_id, torch.stack(keys).to(device), valid, ahead)

    def _output(self, canvas: Canvas, i: int, plan: Plan) -> Output:
        start = int(canvas.start[i])
        ids = canvas.ids[i, start : int(canvas.end[i])].tolist()
        stopped = self.eos_id in ids
        end = ids.index(self.eos_id) if stopped else len(ids)
        born = canvas.reveal_step[i, start : start + end].tolist()
        return Output(
            text=self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip(),
            token_ids=ids[:end],
            finish_reason="stop" if stopped else "length",
            model_calls=int(canvas.model_calls[i]),
            reveal_step=born,
            steps=plan.settings.steps or 1 + int(canvas.reveal_step[i].max()),
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
