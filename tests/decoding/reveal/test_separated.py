"""Separated reveals against a slow reference, and the pace that they hold."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from decoding import Decoder, Request, Sampler, list_decoders
from decoding.canvas import Row, make_canvas
from decoding.pace import OwnPace, Rate, Steps
from decoding.reveal import EntropyBound, Quota, Separated, StepView
from decoding.reveal.separated import choose_apart
from decoding.step import denoise
from dlm.errors import ConfigError
from dlm.noise import uniform
from tests.decoding.rig import MASK, plan_of, rows
from tests.fakes import FakeDenoiser


def reference(order, eligible, number, gap):
    """Positions one after the other, in Python."""
    taken = []
    for position in sorted(range(len(order)), key=lambda i: (order[i], i)):
        near = any(abs(position - other) < gap for other in taken)
        if eligible[position] and not near and len(taken) < number:
            taken.append(position)
    return sorted(taken)


@pytest.mark.parametrize("gap", [1, 2, 3, 7])
def test_positions_are_taken_in_order_and_apart(gap):
    torch.manual_seed(gap)
    order = torch.randint(0, 9, (200, 24)).double()  # with ties
    eligible = torch.rand(200, 24) < 0.6
    number = torch.randint(0, 12, (200,))
    place = torch.arange(24)
    taken = choose_apart(order, eligible, number, lambda first: (place - first).abs() < gap)
    for row in range(200):
        expected = reference(order[row].tolist(), eligible[row].tolist(), int(number[row]), gap)
        assert taken[row].nonzero()[:, 0].tolist() == expected


def view_of(masked, quota, *, owed=0, rate=None, s=0.5, weight=None):
    rows = len(masked)
    place = torch.arange(masked.shape[1])
    return StepView(
        masked=masked,
        weight=torch.ones(masked.shape) if weight is None else weight,
        t=torch.ones(rows),
        s=torch.full((rows,), s),
        quota=torch.full((rows,), quota),
        written=~masked,
        noise=lambda stream: uniform(torch.tensor(stream), place).expand(masked.shape),
        score=torch.linspace(0.9, 0.1, len(place)).expand(masked.shape),
        pace=Steps(8) if rate is None else Rate(rate),
        state={"owed": torch.full((rows,), owed)},
    )


def test_what_falls_short_is_owed_to_the_next_call():
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, 4:8] = True
    decision = Separated(Quota(), 3).decide(view_of(masked, 4))
    assert int(decision.reveal.sum()) == 2
    assert decision.state["owed"].tolist() == [2]
    wide = torch.ones(1, 12, dtype=torch.bool)
    later = Separated(Quota(), 3).decide(view_of(wide, 1, owed=2))
    assert int(later.reveal.sum()) == 3
    assert later.state["owed"].tolist() == [0]


def test_the_last_step_takes_all_that_is_left():
    masked = torch.ones(1, 6, dtype=torch.bool)
    assert int(Separated(Quota(), 4).decide(view_of(masked, 2, owed=4, s=0.0)).reveal.sum()) == 6


def test_a_rule_with_its_own_pace_writes_less_and_nothing_else():
    masked = torch.ones(8, 16, dtype=torch.bool)
    view = view_of(masked, 1)
    plain = EntropyBound(4.0).decide(view).reveal
    thin = Separated(EntropyBound(4.0), 2).decide(view).reveal
    assert (thin <= plain).all()
    assert (thin.any(1) == plain.any(1)).all()
    assert not (thin[:, 1:] & thin[:, :-1]).any()


def test_a_gap_of_one_is_the_rule_itself(model, tokenizer):
    """By the wrapped rule, not by leaving the wrapper out."""
    sampler = Sampler(model, tokenizer)
    cases = [
        (name, pace)
        for name in ("llada", "conv", "llada-conv", "top-k")
        for pace in ({"rate": 3.0, "max_tokens": 24}, {"steps": 9, "window": 48})
    ]
    cases += [(name, {"max_tokens": 24}) for name in ("entropy-bound", "threshold", "dilated", "stability")]
    for name, pace in cases:
        decoder = Decoder.named(name)
        wrapped = replace(decoder, reveal=Separated(decoder.reveal, 1))
        first, second = (
            [
                (o.token_ids, o.reveal_step)
                for o in sampler.generate(["a", "copy: 1 2 3"], decoder=each, **pace)
            ]
            for each in (decoder, wrapped)
        )
        assert first == second, (name, pace)


@pytest.mark.parametrize("name", sorted(list_decoders()))
def test_every_decoder_takes_a_gap(model, tokenizer, name):
    sampler = Sampler(model, tokenizer)
    request = Request(decoder=name, options={"gap": 4}, window=48, steps=16)
    plan = sampler.plan(request)
    rule = plan.decoder.reveal.inner if name == "wino" else plan.decoder.reveal
    assert isinstance(rule, Separated)
    (output,) = sampler.generate(["copy: 1 2 3"], request=request)
    assert tokenizer.mask_token_id not in output.token_ids
    if plan.decoder.reveal.revises or plan.decoder.window.stages(torch.tensor([0]), torch.tensor([48])) > 1:
        return  # steps are those of the last change, or each block has a last step
    for step in range(15 if isinstance(plan.pace, Steps) else max(output.reveal_step) + 1):
        written = [i for i, at in enumerate(output.reveal_step) if at == step]
        assert all(b - a >= 4 for a, b in itertools.pairwise(written)), (step, written)


@pytest.mark.parametrize("name", ["conv", "llada-conv"])
def test_a_narrow_window_holds_so_many_a_side_and_the_pace_holds(model, tokenizer, name):
    reach, gap, prompts = 4, 3, [f"copy: {i}" for i in range(40)]
    sampler = Sampler(model, tokenizer)
    plain = Request(
        decoder=name, options={"kernel_size": 2 * reach + 1}, rate=2.0, max_tokens=60, eos_fill=False
    )
    separated = replace(plain, options={"kernel_size": 2 * reach + 1, "gap": gap})
    for output in sampler.generate(prompts, request=separated):
        steps = {}
        for position, step in enumerate(output.reveal_step):
            steps.setdefault(step, []).append(position)
        assert all(b - a >= gap for written in steps.values() for a, b in itertools.pairwise(written))
        assert len(steps.get(0, [])) <= math.ceil(reach / gap)  # the text stands on the left alone
    pace = []
    for request in (plain, separated):
        outputs = sampler.generate(prompts, request=request)
        pace.append(sum(len(o.reveal_step) for o in outputs) / sum(o.steps for o in outputs))
    assert pace[1] == pytest.approx(pace[0], rel=0.06)


def test_a_gap_that_is_none_is_refused():
    for gap in (0, -1, 2.5):
        with pytest.raises(ConfigError, match="gap"):
            Decoder.named("conv", gap=gap)


@pytest.mark.parametrize("seed", range(4))
def test_replaced_tokens_are_kept_apart_too(seed):
    """New tokens of a call, whether they take the place of a mask or of a token; each is replaced once."""
    model = FakeDenoiser(eos_bias=-50.0)
    plan = plan_of(Decoder.named("editing", gap=3, tau=0.05, tau_edit=0.05), pace=OwnPace())
    canvas, before = make_canvas([Row([1, 2] + [MASK] * 30, 2)], [seed], plan), None
    changes = torch.zeros(32, dtype=torch.int64)
    for _ in denoise(model, canvas, plan):
        if before is not None:
            changed = (canvas.ids[0] != before).nonzero()[:, 0]
            assert all(b - a >= 3 for a, b in itertools.pairwise(changed.tolist()))
            changes[changed] += before[changed] != MASK
        before = canvas.ids[0].clone()
    assert int(changes.max()) == 1
    assert MASK not in canvas.ids


def test_the_last_step_of_a_row_is_its_own_under_a_window_with_times_of_its_own():
    """A shorter row beside a longer one takes all that is left in its last step, as it does alone."""
    fake = FakeDenoiser()
    plan = plan_of(Decoder.named("sliding", gap=3), steps=4, fit=14)
    ids = rows(fake, [2, 9], 14)
    short, long = Row(ids[0, :14].tolist(), 2), Row([*ids[1].tolist(), *[MASK] * 7], 9)
    alone = make_canvas([short], [5], plan)
    beside = make_canvas([short, long], [5, 6], plan)
    for canvas in (alone, beside):
        for _ in denoise(fake, canvas, plan):
            pass
    assert torch.equal(beside.ids[0, :14], alone.ids[0])
    assert torch.equal(beside.reveal_step[0, :14], alone.reveal_step[0])
