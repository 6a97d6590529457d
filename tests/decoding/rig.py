"""Rows of ids, decoded without any text: plans and canvases as tests want them."""

import torch

from decoding import Decoder
from decoding.canvas import Row, make_canvas
from decoding.engine import Engine
from decoding.pace import EndTokens, OwnPace, Rate, Steps
from decoding.request import OPEN_LENGTH, Plan, Reuse
from decoding.reveal.order_table import OrderTable
from decoding.step import denoise
from decoding.window import MARGIN
from tests.fakes import FakeTokenizer

MASK, EOS = 22, 0


def order_table(shape=(8, 16, 4), seed=0, tokens=4000):
    """A table of rewards that differ much from cell to cell; some cells are empty."""
    generator = torch.Generator().manual_seed(seed)
    table = OrderTable.empty(shape)
    cells = torch.randint(table.counts.numel(), (tokens,), generator=generator)
    worth = torch.randn(table.counts.numel(), generator=generator) * 4
    return table.credited(cells[cells % 7 > 0], worth[cells[cells % 7 > 0]])


LEARNT = {"table": order_table(), "warm_up": 0.0, "switch": 0.3, "ready": 4}
"""Options of the decoder dprm under which its table counts from the start."""


def plan_of(
    decoder,
    steps=None,
    *,
    rate=None,
    grow=False,
    fit=None,
    eos=EOS,
    mask=MASK,
    end_ids=(),
    eos_fill=True,
    early_exit=True,
    margin=MARGIN,
    reuse=None,
    drafts=0,
    pace=None,
):
    """A plan from its parts; `fit` is the length for which open sizes are chosen."""
    decoder = Decoder.named(decoder) if isinstance(decoder, str) else decoder
    if pace is None:
        pace = Rate(rate) if rate is not None else OwnPace() if steps is None else Steps(steps)
    chosen = Decoder(
        decoder.window.fitted(fit or OPEN_LENGTH),
        decoder.reveal,
        decoder.tokens,
        decoder.name,
        decoder.guidance,
    )
    ending = EndTokens(
        eos,
        tuple(sorted({eos, *end_ids})),
        fill=eos_fill,
        early_exit=early_exit and not decoder.reveal.revises,
        closes=eos_fill or steps is None,
    )
    return Plan(chosen, pace, ending, mask, margin=margin if grow else None, reuse=reuse, drafts=drafts)


def canvas_of(ids, plan, seeds=None, answer=None):
    """A canvas of rows [B, L] in which the mask token marks what is to be written."""
    rows = []
    for i, row in enumerate(ids.tolist()):
        first = row.index(plan.mask_id) if answer is None else answer[i]
        rows.append(Row(row, first))
    return make_canvas(rows, range(len(rows)) if seeds is None else seeds, plan)


def decode_in_fresh_engines(model, row, plan, seed, **given):
    """The finished canvas of one row [L], moved to another engine after every step."""
    canvas = canvas_of(row[None], plan, [seed], **given)
    while not bool(canvas.done.all()):
        engine = Engine(model, FakeTokenizer())
        ticket = engine.add(canvas, plan)
        (update,) = engine.step()
        canvas = update.canvas if update.finished else engine.remove(ticket)
    return canvas


def decode(model, ids, plan, seeds=None, **given):
    """The finished canvas of rows [B, L]."""
    canvas = canvas_of(ids, plan, seeds, **given)
    with torch.no_grad():
        for _ in denoise(model, canvas, plan):
            pass
    return canvas


def rows(model, lengths, window):
    """Rows with given tokens on the left."""
    ids = torch.full((len(lengths), window), model.mask_id)
    for i, n in enumerate(lengths):
        ids[i, :n] = 1 + (torch.arange(n) * (i + 3)) % 20
    return ids


__all__ = ["EOS", "LEARNT", "MASK", "Reuse", "canvas_of", "decode", "plan_of", "rows"]
