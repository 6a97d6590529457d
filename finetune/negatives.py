"""Negatives by rule: what a model writes when it decodes far from its context (arXiv 2509.15188, section 5).

A row is masked behind a cut, or around or inside a span; that of a block-causal model, behind a cut in each
of its blocks. Beside the true tokens, every masked cell near the
cut gets a wrong one: a unit of a few tokens, repeated. Units come from small rules (`RULES`): the tokens
before the masked cells, the tokens behind them, tokens that are frequent everywhere, mixtures. All of it is
tensor arithmetic over the batch, and every random number is counted, so that a row's negative depends on its
key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from dlm.errors import ConfigError
from dlm.model import IGNORE
from dlm.noise import fold, key_of, uniform
from dlm.noising import Blocks
from finetune.contrast_config import NegativeConfig


@dataclass(frozen=True)
class Contrast:
    """Rows with a true and a wrong continuation of the same x_t; all [B, L] unless said otherwise.

    N is 1, or in blocks their number.
    """

    clean_ids: torch.Tensor
    """int64, the row without masks; not the one given where a repetition has been put into its context."""
    noisy_ids: torch.Tensor
    """int64, x_t: the row with masks where it is to be written."""
    targets: torch.Tensor
    """int64, y_w: the true token of masked cells up to the first EOS, -100 elsewhere."""
    rejected: torch.Tensor
    """int64, y_l: the wrong token of masked cells that the negative covers, -100 elsewhere and where it would
    be the true one."""
    span: torch.Tensor
    """bool, the masked cells that the negative covers, whether its token is the true one or not."""
    rule: torch.Tensor
    """[B, N] int64, index in `RULES`; -1 for a block that is not cut."""
    share: torch.Tensor
    """[B, N] float32, weight of each cut: the chance that a single one of the row would fall there."""


@dataclass(frozen=True)
class AnswerLayout:
    """Masked cells of each row, and the context of the repeated units."""

    masked: torch.Tensor
    """[B, L] bool."""
    span: torch.Tensor
    """[B, L] bool, the masked cells that the negative covers."""
    left: torch.Tensor
    """[B] int64, end of the context on the left (exclusive): a unit is taken from the tokens before it."""
    left_room: torch.Tensor
    """[B] int64, how many tokens there are on the left; 0 for none."""
    right: torch.Tensor
    """[B] int64, start of the context on the right: a unit is taken from the tokens from here on."""
    right_room: torch.Tensor
    """[B] int64, how many tokens there are on the right; 0 for none."""
    origin: torch.Tensor
    """[B] int64, the cell at which the unit's phase is counted from."""


@dataclass(frozen=True)
class Material:
    """Inputs of a rule, of which it makes its units."""

    ids: torch.Tensor
    """[B, L] int64, clean rows."""
    layout: AnswerLayout
    size: torch.Tensor
    """[B] int64, length of the unit."""
    frequent: torch.Tensor
    """[B, G] int64, for each place of the unit a high-prior token, drawn in proportion to its count."""
    coin: torch.Tensor
    """[B, G] bool, fair coins."""


Rule = Callable[[Material], torch.Tensor]
"""Units [B, G] int64, of which the first `size` tokens of a row are used."""


def left(material: Material) -> torch.Tensor:
    """The last tokens before the masked cells."""
    return _gather(material.ids, material.layout.left - material.size, material.frequent.shape[1])


def right(material: Material) -> torch.Tensor:
    """The first tokens behind the masked cells."""
    return _gather(material.ids, material.layout.right, material.frequent.shape[1])


def prior(material: Material) -> torch.Tensor:
    """Tokens that are frequent in all answers."""
    return material.frequent


def mixed(material: Material) -> torch.Tensor:
    """The tokens before the masked cells, about half of them exchanged for frequent ones."""
    return torch.where(material.coin, material.frequent, left(material))


def run(material: Material) -> torch.Tensor:
    """One frequent token, over and over."""
    return material.frequent[:, :1].expand_as(material.frequent)


RULES: dict[str, Rule] = {"left": left, "right": right, "prior": prior, "mixed": mixed, "run": run}
"""Rules by name; the weight of each is the field of that name in `NegativeConfig`."""

_NEEDS_LEFT, _NEEDS_RIGHT = ("left", "mixed"), ("right",)


def _gather(ids: torch.Tensor, start: torch.Tensor, width: int) -> torch.Tensor:
    """[B, width]: the tokens of each row from `start` [B] on (the row's ends are repeated beyond them)."""
    index = start[:, None] + torch.arange(width, device=ids.device)
    return ids.gather(1, index.clamp(0, ids.shape[1] - 1))


class _Draws:
    """Named uniform numbers of each row; the name is the counter."""

    NAMES = ("cut", "unit", "span", "phase", "rule", "layout", "eos", "eos cell", "recover", "slip")

    def __init__(self, key: torch.Tensor) -> None:
        self.key = key

    def __call__(self, name: str) -> torch.Tensor:
        """[B] numbers of (0, 1)."""
        return uniform(self.key, self.NAMES.index(name))

    def integer(self, name: str, low: torch.Tensor | int, high: torch.Tensor | int) -> torch.Tensor:
        """[B] int64, uniform over low … high, both included."""
        return low + (self(name) * (high - low + 1)).long()

    def table(self, stream: int, width: int) -> torch.Tensor:
        """[B, width] numbers of (0, 1)."""
        return uniform(fold(self.key, -1 - stream)[:, None], torch.arange(width, device=self.key.device))


def make_negative(
    ids: torch.Tensor,
    prompt_length: torch.Tensor,
    length: torch.Tensor,
    key: torch.Tensor,
    *,
    mask_id: int,
    eos_id: int,
    frequent: torch.Tensor,
    frequent_counts: torch.Tensor | None = None,
    rules: NegativeConfig | None = None,
    real: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> Contrast:
    """Mask rows and set a wrong continuation against the true one (arXiv 2509.15188, section 5).

    A row with a prompt is cut at c ~ U{L_Q, …, L_Q+L_A-1} and masked from there to its end. The negative
    covers z ~ U{span_min, …, span_max} cells from c, as far as the row goes, with a unit of
    g ~ U{1, …, unit_max} tokens (never more than the context has) at a random phase. A row without a prompt
    is masked inside a span, or outside it. With probability `eos_p` one covered cell before the true EOS
    becomes EOS.

    With `blocks`, every block that holds a part of the answer is cut, uniformly within that part, and masked
    from there to the end of the block. Each cut has a negative of its own, made of the true row before it,
    which ends with the block. For a model that sees the clean blocks before a block, this is the contrast of
    as many rows in one pass. With the cuts weighed by `share`, a loss has the same mean as under one cut.

    With probability `recover` the first tokens of a negative, r ~ U{1, …, span_max} as far as there is room,
    come before the masked cells, and everything behind moves on: the context ends in a repetition that has
    begun. The cut lies behind it. What is true there is the way back, and the negative goes on repeating.

    Args:
        ids: [B, L] int64, clean rows, EOS behind the answer.
        prompt_length: [B] int64, L_Q; 0 for text without a prompt.
        length: [B] int64, L_Q + L_A: tokens up to the first EOS, which is included.
        key: [B] int64, noise keys (`dlm.noise`); the only randomness.
        mask_id: id of the mask token.
        eos_id: id of the end token.
        frequent: [F] int64, high-prior tokens, F ≥ 1.
        frequent_counts: [F] how often each occurs, to draw them in proportion; alike by default.
        rules: weights and sizes.
        real: [B, L] bool, False at padding; all real by default.
        blocks: those of a block-causal model.

    Returns:
        The contrast; a cell is in `rejected` only if it is masked and its wrong token is not the true one.

    Raises:
        ConfigError: when there is no high-prior token to draw.
    """
    if not len(frequent):
        raise ConfigError("frequent must name at least one high-prior token")
    rules = rules or NegativeConfig()
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    tokens = _Tokens(mask_id, eos_id, frequent.to(ids.device), frequent_counts)
    none = torch.full_like(length, -1)
    rows = _Rows(ids, prompt_length, length, real, none, length, ids, none)
    if rules.recover:
        rows = _with_repetition(rows, _Draws(fold(key, key_of("recover", device=key.device))), rules, tokens)
    if blocks is None:
        draws, slipped = _Draws(key), rows.back >= 0
        first = torch.where(slipped, rows.back, rows.prompt_length)
        last = torch.where(slipped, rows.back, (rows.length - 1).clamp(min=0))
        return _contrast(rows, _layout(rows, draws, rules, first, last), draws, rules, tokens)
    return _contrast_in_blocks(rows, key, rules, tokens, blocks)


@dataclass(frozen=True)
class _Rows:
    """Clean rows; fields as the arguments of `make_negative`, and the repetition in their context."""

    ids: torch.Tensor
    prompt_length: torch.Tensor
    length: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor
    """[B] int64, where the true answer goes on behind a repetition; -1 in rows without one."""
    slip: torch.Tensor
    """[B] int64, where that repetition begins; `length` in rows without one."""
    repetition: torch.Tensor
    """[B, L] int64, the repetition from there on, without an end."""
    rule: torch.Tensor
    """[B] int64, that it is made by."""

    @property
    def position(self) -> torch.Tensor:
        """[L] int64."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def answered(self) -> torch.Tensor:
        """[B, L] bool, positions of the true answer up to the first EOS; of the prompt too."""
        repeated = (self.position >= self.slip[:, None]) & (self.position < self.back[:, None])
        return (self.position < self.length[:, None]) & ~repeated

    def take(self, rows: torch.Tensor) -> _Rows:
        """The rows [b], in this order."""
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class _Tokens:
    """Tokens that rules need; fields as the arguments of `make_negative`."""

    mask_id: int
    eos_id: int
    frequent: torch.Tensor
    counts: torch.Tensor | None


def _with_repetition(rows: _Rows, draws: _Draws, rules: NegativeConfig, tokens: _Tokens) -> _Rows:
    """Some of the rows with the beginning of a negative in their answer, as far as they have room for it."""
    layout = _layout(rows, draws, rules, rows.prompt_length, (rows.length - 1).clamp(min=0))
    room = (rows.real.sum(1) - rows.length).clamp(max=rules.span_max)
    slips = (draws("recover") < rules.recover) & (rows.prompt_length > 0) & (room > 0)
    size = torch.where(slips, draws.integer("slip", 1, room.clamp(min=1)), 0)
    cut, position = layout.origin, rows.position
    wrong, rule = _wrong_tokens(rows, layout, draws, rules, tokens)
    moved = rows.ids.gather(1, (position - size[:, None]).clamp(min=0))
    ids = torch.where(position < cut[:, None], rows.ids, moved)
    repeated = (position >= cut[:, None]) & (position < (cut + size)[:, None])
    return replace(
        rows,
        ids=torch.where(repeated, wrong, ids),
        length=rows.length + size,
        back=torch.where(slips, cut + size, -1),
        slip=torch.where(slips, cut, rows.length + size),
        repetition=wrong,
        rule=rule,
    )


def _wrong_tokens(
    rows: _Rows, layout: AnswerLayout, draws: _Draws, rules: NegativeConfig, tokens: _Tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] a unit of each row over and over, by a rule [B]."""
    rule = _choose(draws("rule"), layout, rules)
    units, size = _units(rows.ids, layout, rule, draws, rules, tokens)
    phase = draws.integer("phase", 0, size - 1)
    place = torch.remainder(rows.position - layout.origin[:, None] + phase[:, None], size[:, None])
    return units.gather(1, place), rule


def _contrast(
    rows: _Rows, layout: AnswerLayout, draws: _Draws, rules: NegativeConfig, tokens: _Tokens
) -> Contrast:
    """Masked rows and their wrong tokens."""
    wrong, rule = _wrong_tokens(rows, layout, draws, rules, tokens)
    goes_on = layout.origin == rows.back
    wrong = torch.where(goes_on[:, None], rows.repetition, wrong)
    rule = torch.where(goes_on, rows.rule, rule)
    wrong = torch.where(_early_eos(rows, layout, draws, rules, tokens.eos_id), tokens.eos_id, wrong)
    return Contrast(
        clean_ids=rows.ids,
        noisy_ids=torch.where(layout.masked, tokens.mask_id, rows.ids),
        targets=torch.where(layout.masked & rows.answered, rows.ids, IGNORE),
        rejected=torch.where(layout.span & (wrong != rows.ids), wrong, IGNORE),
        span=layout.span,
        rule=rule[:, None],
        share=torch.ones(len(rule), 1, device=rule.device),
    )


def _contrast_in_blocks(
    rows: _Rows, key: torch.Tensor, rules: NegativeConfig, tokens: _Tokens, blocks: Blocks
) -> Contrast:
    """A cut in each block of the answer: rows are repeated for their blocks, and each keeps one."""
    batch, width = rows.ids.shape
    count = -(-width // blocks.size)
    row = torch.arange(batch, device=key.device).repeat_interleave(count)
    block = torch.arange(count, device=key.device).repeat(batch)
    end = (block + 1) * blocks.size
    repeated = rows.take(row)
    repeated = replace(repeated, real=repeated.real & (rows.position < end[:, None]))
    of_block = rows.position // blocks.size == block[:, None]
    allowed = of_block & repeated.answered & (rows.position >= repeated.prompt_length[:, None])
    recovers = (repeated.back >= 0) & (repeated.back // blocks.size == block)
    first = torch.where(recovers, repeated.back, allowed.int().argmax(1))
    last = torch.where(recovers, repeated.back, first + (allowed.sum(1) - 1).clamp(min=0))
    cells = (allowed & (rows.position >= first[:, None])).sum(1)  # of the answer in the block
    draws = _Draws(fold(key[row], block))
    layout = _layout(repeated, draws, rules, first, last, cut_text=True)
    reachable = writable(layout.masked, blocks)
    contrast = _contrast(repeated, replace(layout, span=layout.span & reachable), draws, rules, tokens)
    of_block = of_block & (cells > 0)[:, None]

    def of_blocks(values: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """[B·N, L] -> [B, L]: of each block what its own cut made of it."""
        gathered = torch.where(of_block, values, 0).view(batch, count, width).sum(1).to(values.dtype)
        return torch.where(of_block.view(batch, count, width).any(1), gathered, otherwise)

    nothing = torch.full_like(rows.ids, IGNORE)
    share = cells.view(batch, count).float()
    return Contrast(
        clean_ids=rows.ids,
        noisy_ids=of_blocks(contrast.noisy_ids, rows.ids),
        targets=of_blocks(torch.where(reachable, contrast.targets, IGNORE), nothing),
        rejected=of_blocks(contrast.rejected, nothing),
        span=of_blocks(contrast.span, torch.zeros_like(rows.real)),
        rule=torch.where(cells > 0, contrast.rule[:, 0], -1).view(batch, count),
        share=share / share.sum(1, keepdim=True).clamp(min=1),
    )


def writable(masked: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """[B, L] bool, positions that a block-causal model may be writing when `masked` [B, L] are masks.

    They are those of the block that holds the first mask; behind it, it never sees masks before its own
    block. Where a block begins with a position that is written first, that position alone.
    """
    place = torch.arange(masked.shape[1], device=masked.device)
    first = torch.where(masked, place, masked.shape[1]).amin(1, keepdim=True)
    inside = place // blocks.size == first // blocks.size
    alone = (first % blocks.size == 0) & (first > 0) & blocks.lead
    return inside & (~alone | (place == first))


def _layout(
    rows: _Rows,
    draws: _Draws,
    rules: NegativeConfig,
    first: torch.Tensor,
    last: torch.Tensor,
    cut_text: bool = False,
) -> AnswerLayout:
    """Behind a cut in `first` [B] … `last` [B] for rows with a prompt; in or outside a span for the others.

    With `cut_text` those are cut too.
    """
    length, position, answered = rows.length, rows.position, rows.answered
    span = draws.integer("span", rules.span_min, rules.span_max)
    text = (rows.prompt_length == 0) & (not cut_text)
    # behind a cut: the context is everything before it
    cut = draws.integer("cut", first, last)
    # text: a span [a, b) that leaves at least half of the row
    wide = torch.minimum(span, torch.clamp(length // 2, min=1))
    a = draws.integer("cut", torch.zeros_like(length), length - wide)
    b = a + wide
    inside = text & ((draws("layout") < rules.in_span) | (length < 2))
    outside = text & ~inside
    held = (position >= a[:, None]) & (position < b[:, None])
    masked = (position >= cut[:, None]) & rows.real
    masked = torch.where(inside[:, None], held & answered, masked)
    masked = torch.where(outside[:, None], ~held & rows.real, masked)
    near = masked & (position < (cut + span)[:, None])
    nothing = torch.zeros_like(cut)
    return AnswerLayout(
        masked=masked,
        span=torch.where(text[:, None], masked, near),
        left=torch.where(inside, a, torch.where(outside, b, cut)),
        left_room=torch.where(inside, a, torch.where(outside, wide, cut)),
        right=torch.where(inside, b, a),
        right_room=torch.where(inside, length - b, torch.where(outside, wide, nothing)),
        origin=torch.where(text, a, cut),
    )


def _choose(u: torch.Tensor, layout: AnswerLayout, rules: NegativeConfig) -> torch.Tensor:
    """[B] a rule for each row, by weight among those for which the row has material; else `run`."""
    weight = (
        torch.tensor([getattr(rules, name) for name in RULES], device=u.device).expand(len(u), -1).clone()
    )
    for i, name in enumerate(RULES):
        if name in _NEEDS_LEFT:
            weight[:, i] *= layout.left_room > 0
        if name in _NEEDS_RIGHT:
            weight[:, i] *= layout.right_room > 0
    share = weight.cumsum(1)
    rule = (u[:, None] * share[:, -1:] >= share).sum(1).clamp(max=len(RULES) - 1)
    return torch.where(share[:, -1] > 0, rule, list(RULES).index("run"))


def _units(
    ids: torch.Tensor,
    layout: AnswerLayout,
    rule_index: torch.Tensor,
    draws: _Draws,
    rules: NegativeConfig,
    tokens: _Tokens,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Units [B, G] of the chosen rules, and how many of their tokens are used [B]."""
    names = list(RULES)
    room = torch.full_like(rule_index, rules.unit_max)
    for name in (*_NEEDS_LEFT, *_NEEDS_RIGHT):
        limit = layout.right_room if name in _NEEDS_RIGHT else layout.left_room
        room = torch.where(rule_index == names.index(name), torch.minimum(room, limit), room)
    size = draws.integer("unit", 1, room.clamp(min=1))
    table = _frequent(draws.table(0, rules.unit_max), tokens.frequent, tokens.counts)
    material = Material(ids, layout, size, table, draws.table(1, rules.unit_max) < 0.5)
    units = torch.stack([rule(material) for rule in RULES.values()])  # [R, B, G]
    return units[rule_index, torch.arange(len(ids), device=ids.device)], size


def _frequent(u: torch.Tensor, frequent: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Uniform numbers [B, G] -> high-prior tokens [B, G], in proportion to their counts."""
    weight = torch.ones(len(frequent), device=u.device) if counts is None else counts.to(u.device)
    share = weight.double().cumsum(0)
    index = torch.searchsorted(share, u.double() * share[-1], right=True)
    return frequent[index.clamp(max=len(frequent) - 1)]


def _early_eos(
    rows: _Rows, layout: AnswerLayout, draws: _Draws, rules: NegativeConfig, eos_id: int
) -> torch.Tensor:
    """[B, L] bool, at most one covered cell per row, before the true EOS, that the negative ends at."""
    eligible = layout.span & rows.answered & (rows.ids != eos_id)
    number = draws.integer("eos cell", 1, eligible.sum(1))  # which of them, counted from the left
    hit = eligible & (eligible.cumsum(1) == number[:, None])
    return hit & (draws("eos") < rules.eos_p)[:, None]
