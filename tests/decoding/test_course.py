"""How far a row is, and its trace: what the rule saw while it wrote, and what is left in the end."""

import pytest
import torch

from decoding import Decoder
from decoding.course import OPEN_COURSE, Trace, course
from decoding.presets import PRESETS
from decoding.step import Batch, run_work
from tests.decoding.rig import LEARNT, MASK, canvas_of, plan_of, rows
from tests.fakes import FakeDenoiser

KEPT = [n for n in PRESETS if not Decoder.named(n).reveal.revises and n not in ("semi-ar", "dilated")]


def written(model, ids, plan, seed=3):
    """The canvas, and the course seen before each step at each position written in it."""
    canvas = canvas_of(ids, plan, [seed])
    batch, seen = Batch(model, canvas, plan), {}
    with torch.no_grad():
        while not bool(canvas.done.all()):
            before, at = canvas.masked[0].clone(), course(canvas, plan, slice(0, 1), ids.shape[1])
            run_work(model, [batch.step()])
            chance = canvas.confidence[0]
            for i in (before & ~canvas.masked[0] & ~chance.isnan()).nonzero()[:, 0].tolist():
                seen[i] = (float(at.elapsed), float(chance[i]), float(at.place[0, i]))
    return canvas, seen


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("bias", [-50.0, 1.0])
def test_a_trace_is_what_could_be_seen_when_each_token_was_written(name, bias):
    decoder = Decoder.named(name, **LEARNT) if name == "dprm" else Decoder.named(name)
    model = FakeDenoiser(eos_bias=bias)
    paces = [{"steps": 9}, {"steps": 9, "grow": True}]
    paces += [] if decoder.timed else [{"rate": 1.6}, {"rate": 1.6, "grow": True}]
    for pace in paces if decoder.reveal.paced else [{}, {"grow": True}]:
        plan = plan_of(decoder, fit=40, **pace)
        canvas, seen = written(model, rows(model, [4], 30), plan)
        trace = Trace.of(canvas, plan)
        assert len(trace.elapsed) == len(trace.confidence) == len(trace.place) == len(seen)
        for got, expected in zip(zip(trace.elapsed, trace.confidence, trace.place, strict=True),
                                 (seen[i] for i in sorted(seen)), strict=True):  # fmt: skip
            assert got == pytest.approx(expected, abs=1e-6)


def test_steps_count_where_their_number_is_fixed_and_tokens_at_a_rate():
    ids = torch.tensor([[1, 2] + [MASK] * 6 + [7] + [MASK] * 4])
    for pace, passed in (({"steps": 8}, 3 / 8), ({"rate": 1.0}, 4 / 10)):
        plan = plan_of("llada", **pace)
        canvas = canvas_of(ids, plan)
        canvas.step += 3
        canvas.ids[0, 2:6], canvas.masked[0, 2:6] = 5, False
        at = course(canvas, plan, slice(None), 13)
        assert float(at.elapsed) == passed
        assert at.place[0].tolist() == pytest.approx([0, 0, *(i / 11 for i in range(11))])


def test_a_row_of_open_length_is_measured_by_a_fixed_one():
    ids = torch.tensor([[1, 2] + [MASK] * 300])
    plan = plan_of("conv", rate=1.0, grow=True)
    canvas = canvas_of(ids, plan)
    at = course(canvas, plan, slice(None), 60)
    assert float(at.place[0, 34]) == 32 / OPEN_COURSE
    canvas.ids[0, 2:18], canvas.masked[0, 2:18] = 5, False
    assert float(course(canvas, plan, slice(None), 60).elapsed) == 16 / OPEN_COURSE
