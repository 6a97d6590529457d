"""KLASS against a slow reference: one row, plain Python, the whole history of distributions kept."""

import math

import pytest
import torch

from decoding import Decoder
from decoding.pace import OwnPace
from decoding.reveal import Decision, RevealRule, Stability
from decoding.reveal.base import ranked
from decoding.reveal.stability import TRACKED, divergence
from decoding.window import Block, Convolution
from dlm.errors import ConfigError
from tests.decoding.rig import decode, decode_in_fresh_engines, plan_of, rows
from tests.fakes import FakeDenoiser


class Smooth(FakeDenoiser):
    """Logits that move little from call to call, so that some positions are stable."""

    def logits(self, hidden):
        moved = super().logits(hidden)
        fixed = torch.sin(torch.arange(self.vocab) * 1.7) * 9
        out = torch.where(hidden % 3 == 0, 0.8 * moved, 0.02 * moved) + fixed
        out[..., self.mask_id] = -math.inf
        return out


def gap(now, before):
    """KL over the tracked tokens of the call before and "any other"."""
    tracked = before.argsort(descending=True)[:TRACKED]
    p, q = now[tracked].tolist(), before[tracked].tolist()
    p, q = [*p, max(1 - sum(p), 1e-12)], [*q, max(1 - sum(q), 1e-12)]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slowly(model, row, tau, epsilon, history):
    """The step at which each position is written, and the tokens."""
    row, step, born, seen = row.clone(), 0, {}, {}
    while (row == model.mask_id).any():
        p = model.logits(model.hidden(row[None])[0]).double().softmax(-1)
        masked = [i for i in range(len(row)) if row[i] == model.mask_id]
        for i in masked:
            seen.setdefault(i, []).append(p[i])
        sure = {i: float(p[i].max()) for i in masked}

        def stable(i):
            past = seen[i]
            if len(past) <= history:
                return False
            return all(gap(past[-k], past[-k - 1]) < epsilon for k in range(1, history + 1))

        chosen = {i for i in masked if sure[i] >= tau and stable(i)} | {max(masked, key=sure.get)}
        for i in chosen:
            row[i], born[i] = p[i].argmax(), step
        step += 1
    return row, born


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("epsilon", [0.002, 0.05])
def test_texts_are_those_of_the_slow_reference(history, epsilon):
    model = Smooth(eos_bias=-50.0)
    several = 0
    for length in (2, 3, 5):
        ids = rows(model, [length], 24)
        options = {"tau": 0.3, "epsilon": epsilon, "history": history}
        got = decode(model, ids, plan_of(Decoder.named("stability", **options), eos_fill=False))
        text, born = slowly(model, ids[0], **options)
        assert torch.equal(got.ids[0], text)
        assert {i: int(got.reveal_step[0, i]) for i in born} == born
        several += max(list(born.values()).count(s) for s in set(born.values())) > 1
    assert several  # the stable ones go together


def test_nothing_is_stable_that_was_not_seen_often_enough():
    model = Smooth(eos_bias=-50.0)
    decoder = Decoder.named("stability", tau=1e-6, epsilon=1e9, history=3)
    canvas = decode(model, rows(model, [3], 20), plan_of(decoder))
    counts = [int((canvas.reveal_step == step).sum()) for step in range(4)]
    assert counts == [1, 1, 1, 14]


def test_the_divergence_bounds_that_of_the_whole_vocabulary_from_below():
    torch.manual_seed(0)
    now, before = torch.randn(200, 30).softmax(1).double(), torch.randn(200, 30).softmax(1).double()
    best = before.topk(TRACKED, dim=1)
    coarse = divergence(now.gather(1, best.indices), best.values)
    whole = (now * (now / before).log()).sum(1)
    assert (coarse <= whole + 1e-9).all()
    assert float((coarse / whole).mean()) > 0.2
    assert divergence(now[:, :3], torch.zeros(200, 3)).isinf().all()


@pytest.mark.parametrize(
    ("bad", "message"), [({"tau": 0}, "tau"), ({"epsilon": 0}, "epsilon"), ({"history": 0}, "history")]
)
def test_out_of_range(bad, message):
    with pytest.raises(ConfigError, match=message):
        Stability(**bad)


def test_a_row_may_move_in_a_step_in_which_nothing_is_open():
    """In blocks with steps, a block may be finished before its share of the steps is over."""
    model = FakeDenoiser(eos_bias=-50.0)
    plan = plan_of(Decoder(Block(4), Stability(tau=0.05, epsilon=50.0)), steps=15, fit=16)
    ids = rows(model, [2], 16)
    stays = decode(model, ids, plan, [0])
    assert torch.equal(decode_in_fresh_engines(model, ids[0], plan, 0).ids, stays.ids)


class Smoothed(RevealRule):
    """Takes the best of a running mean of leads, which it keeps for all positions, looked at or not."""

    paced = False

    def initial_state(self, rows, length):
        return {"mean": torch.zeros(rows, length)}

    def observe(self, logits, state, tokens):
        best = logits.topk(2, dim=1).values
        return {"mean": 0.5 * state["mean"] + best[:, 0] - best[:, 1]}

    def decide(self, view):
        mean = view.observed["mean"]
        return Decision(ranked(mean, view.weight, view.masked) == 0, state={"mean": mean})


@pytest.mark.parametrize("seed", range(3))
def test_what_a_rule_observes_is_blank_where_it_did_not_ask(seed):
    """So that a row has its text wherever it is computed."""
    model = FakeDenoiser(eos_bias=-50.0)
    plan = plan_of(Decoder(Convolution(5), Smoothed()), pace=OwnPace(), fit=16)
    ids = rows(model, [2], 16)
    stays = decode(model, ids, plan, [seed])
    moved = decode_in_fresh_engines(model, ids[0], plan, seed)
    assert torch.equal(moved.ids, stays.ids)
    assert torch.equal(moved.reveal_step, stays.reveal_step)


def test_a_rule_that_returns_what_it_must_not_is_told_so():
    class Wide(Stability):
        def score(self, logits, choice, state, tokens):
            return torch.stack([choice.probability] * 2, 1)

    class Other(Stability):
        def observe(self, logits, state, tokens):
            return {"lead": logits[:, 0]}

    model = FakeDenoiser()
    for rule, message in (
        (Wide(), "Wide.score must return a number"),
        (Other(), "Other.observe returned 'lead'"),
    ):
        with pytest.raises(ConfigError, match=message):
            decode(model, rows(model, [2], 16), plan_of(Decoder(reveal=rule), fit=16), [0])
