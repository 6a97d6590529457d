"""Joint threshold with editing against a slow reference."""

import pytest
import torch

from decoding import Decoder
from decoding.engine import Engine
from decoding.reveal import Editing
from decoding.window import Block
from dlm.errors import ConfigError
from tests.decoding.rig import canvas_of, decode, decode_in_fresh_engines, plan_of, rows
from tests.fakes import FakeDenoiser, FakeTokenizer


def slowly(model, row, tau, tau_edit, edits):
    """Tokens, the step of each, and how many were replaced."""
    first, row, step, born, replaced = row.clone(), row.clone(), 0, {}, {}
    free = [i for i in range(len(row)) if first[i] == model.mask_id]
    while True:
        p = model.logits(model.hidden(row[None])[0]).softmax(-1)
        sure, best = p.max(-1).values, p.argmax(-1)
        masked = [i for i in free if row[i] == model.mask_id]
        reveal = {i for i in masked if sure[i] >= tau}
        reveal |= {max(masked, key=lambda i: float(sure[i]))} if masked else set()
        replace = {
            i for i in free
            if i not in masked and best[i] != row[i] and sure[i] >= tau_edit and replaced.get(i, 0) < edits
        }  # fmt: skip
        for i in reveal | replace:
            row[i], born[i] = best[i], step
        for i in replace:
            replaced[i] = replaced.get(i, 0) + 1
        step += 1
        if not reveal and not replace:
            return row, born, sum(replaced.values())


@pytest.mark.parametrize("edits", [0, 1, 3])
@pytest.mark.parametrize("tau_edit", [0.2, 0.5])
def test_texts_are_those_of_the_slow_reference(edits, tau_edit):
    model, total = FakeDenoiser(eos_bias=-50.0), 0
    for length in (2, 4, 7):
        ids = rows(model, [length], 22)
        options = {"tau": 0.4, "tau_edit": tau_edit, "edits": edits}
        got = decode(model, ids, plan_of(Decoder.named("editing", **options), eos_fill=False))
        text, born, replaced = slowly(model, ids[0], **options)
        assert torch.equal(got.ids[0], text)
        assert {i: int(got.reveal_step[0, i]) for i in born} == born
        assert torch.equal(got.ids[0, :length], ids[0, :length])  # given tokens are never replaced
        total += replaced
    assert (total > 0) == (edits > 0 and tau_edit == 0.2)  # at 0.5 this model is never so sure of another


def test_without_edits_it_is_the_threshold():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [2, 5], 30)
    one = decode(model, ids, plan_of(Decoder.named("editing", tau=0.3, edits=0), eos_fill=False))
    two = decode(model, ids, plan_of(Decoder.named("threshold", tau=0.3), eos_fill=False))
    assert torch.equal(one.ids, two.ids)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"tau": 0}, "tau must"), ({"tau_edit": 2}, "tau_edit must"), ({"edits": -1}, "edits must")],
)
def test_out_of_range(bad, message):
    with pytest.raises(ConfigError, match=message):
        Editing(**bad)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_in_blocks_a_text_depends_on_no_other_row_and_on_no_move(length):
    """A row in which nothing is masked is looked at once more in its own last block."""
    model = FakeDenoiser(eos_bias=-50.0)
    decoder = Decoder(Block(4), Editing(tau=0.3, tau_edit=0.2, edits=3))
    plan, changed = plan_of(decoder, fit=length), 0
    for seed in range(12):
        ids = rows(model, [3], length)
        ids[0, 0] = seed
        alone = decode(model, ids, plan, [seed])
        moved = decode_in_fresh_engines(model, ids[0], plan, seed)
        assert torch.equal(moved.ids, alone.ids)
        engine = Engine(model, FakeTokenizer())
        tickets = [engine.add(canvas_of(each, plan, [seed]), plan) for each in (ids, rows(model, [3], 30))]
        done = {}
        while len(engine):
            done |= {update.ticket: update.canvas for update in engine.step() if update.finished}
        beside = done[tickets[0]]
        assert torch.equal(beside.ids[0, :length], alone.ids[0])
        assert torch.equal(beside.reveal_step[0, :length], alone.reveal_step[0])
        changed += int((alone.reveal_step.max() > 0).item())
    assert changed
