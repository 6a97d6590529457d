"""Negatives by rule: what a model writes when it decodes far from its context (arXiv 2509.15188, section 5).

A row is masked behind a cut, or around or inside a span. Beside the true tokens, every masked cell near the
cut gets a wrong one: a unit of a few tokens, repeated. Units come from small rules (`RULES`): the tokens
before the masked cells, the tokens behind them, tokens that are frequent everywhere, mixtures. All of it is
tensor arithmetic over the batch, and every random number is counted, so that a row's negative depends on its
key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dlm.errors import ConfigError
from dlm.model import IGNORE
from dlm.noise import fold, uniform
from dlm.noising import Blocks
from finetune.contrast_config import NegativeConfig


@dataclass(frozen=True)
class Contrast:
    """Rows with a true and a wrong continuation of the same x_t; all [B, L] unless said otherwise."""

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
    """[B] int64, index in `RULES`."""


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

    NAMES = ("cut", "unit", "span", "phase", "rule", "layout", "eos", "eos cell")

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
        blocks: those of a block-causal model, in which only `writable` cells are contrasted.

    Returns:
        The contrast; a cell is in `rejected` only if it is masked and its wrong token is not the true one.

    Raises:
        ConfigError: when there is no high-prior token to draw.
    """
    if not len(frequent):
        raise ConfigError("frequent must name at least one high-prior token")
    rules = rules or NegativeConfig()
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    draws = _Draws(key)
    layout = _negative_layout(prompt_length, length, real, draws, rules)
    contrasted = layout.masked if blocks is None else layout.masked & writable(layout.masked, blocks)
    layout = replace(layout, span=layout.span & contrasted)
    rule = _choose(draws("rule"), layout, rules)
    units, size = _units(ids, layout, rule, draws, rules, frequent, frequent_counts)
    position = torch.arange(ids.shape[1], device=ids.device)
    phase = draws.integer("phase", 0, size - 1)
    place = torch.remainder(position - layout.origin[:, None] + phase[:, None], size[:, None])
    wrong = units.gather(1, place)
    wrong = torch.where(_early_eos(ids, length, layout, draws, rules, eos_id), eos_id, wrong)
    answered = position < length[:, None]
    return Contrast(
        noisy_ids=torch.where(layout.masked, mask_id, ids),
        targets=torch.where(contrasted & answered, ids, IGNORE),
        rejected=torch.where(layout.span & (wrong != ids), wrong, IGNORE),
        span=layout.span,
        rule=rule,
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


def _negative_layout(
    prompt_length: torch.Tensor,
    length: torch.Tensor,
    real: torch.Tensor,
    draws: _Draws,
    rules: NegativeConfig,
) -> AnswerLayout:
    """Behind a cut for rows with a prompt; inside or outside a span for the others."""
    position = torch.arange(real.shape[1], device=real.device)
    span = draws.integer("span", rules.span_min, rules.span_max)
    text = prompt_length == 0
    # behind a cut: the context is everything before it
    cut = draws.integer("cut", prompt_length, (length - 1).clamp(min=0))
    # text: a span [a, b) that leaves at least half of the row
    wide = torch.minimum(span, torch.clamp(length // 2, min=1))
    a = draws.integer("cut", torch.zeros_like(length), length - wide)
    b = a + wide
    inside = text & ((draws("layout") < rules.in_span) | (length < 2))
    outside = text & ~inside
    held = (position >= a[:, None]) & (position < b[:, None])
    answered = position < length[:, None]
    masked = (position >= cut[:, None]) & real
    masked = torch.where(inside[:, None], held & answered, masked)
    masked = torch.where(outside[:, None], ~held & real, masked)
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
    frequent: torch.Tensor,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Units [B, G] of the chosen rules, and how many of their tokens are used [B]."""
    names = list(RULES)
    room = torch.full_like(rule_index, rules.unit_max)
    for name in (*_NEEDS_LEFT, *_NEEDS_RIGHT):
        limit = layout.right_room if name in _NEEDS_RIGHT else layout.left_room
        room = torch.where(rule_index == names.index(name), torch.minimum(room, limit), room)
    size = draws.integer("unit", 1, room.clamp(min=1))
    table = _frequent(draws.table(0, rules.unit_max), frequent.to(ids.device), counts)
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
    ids: torch.Tensor,
    length: torch.Tensor,
    layout: AnswerLayout,
    draws: _Draws,
    rules: NegativeConfig,
    eos_id: int,
) -> torch.Tensor:
    """[B, L] bool, at most one covered cell per row, before the true EOS, that the negative ends at."""
    position = torch.arange(ids.shape[1], device=ids.device)
    eligible = layout.span & (position < length[:, None]) & (ids != eos_id)
    number = draws.integer("eos cell", 1, eligible.sum(1))  # which of them, counted from the left
    hit = eligible & (eligible.cumsum(1) == number[:, None])
    return hit & (draws("eos") < rules.eos_p)[:, None]
