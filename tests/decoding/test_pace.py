"""Clocks and quotas against their definitions."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import decoding.pace
from decoding import Decoder, Sampler
from decoding.canvas import Row
from decoding.pace import OwnPace, Rate, Steps
from decoding.window import Block, Full
from dlm.cli import main
from dlm.errors import ConfigError
from dlm.schedule import Cosine, LogLinear
from tests.decoding.rig import MASK, plan_of


def clock(pace, step, length=20, window=None):
    start, end = torch.tensor([2]), torch.tensor([length])
    masked, window = torch.arange(length)[None] >= 2, window or Full()
    return pace.clock(torch.tensor([step]), window.stages(start, end), masked, masked, start, window)


@given(total=st.integers(0, 90), steps=st.integers(1, 30))
def test_quotas_of_all_steps_are_the_whole_and_as_even_as_can_be(total, steps):
    pace = Steps(steps)
    quotas = [int(clock(pace, i, total + 2).quota) for i in range(steps)]
    assert sum(quotas) == total
    assert max(quotas) - min(quotas) <= 1
    assert quotas == sorted(quotas, reverse=True)  # as LLaDA: the larger steps first


@given(total=st.integers(0, 90), steps=st.integers(1, 30))
def test_quotas_of_a_cosine_follow_its_curve(total, steps):
    pace, written = Steps(steps, Cosine()), 0
    for i in range(steps):
        written += int(clock(pace, i, total + 2).quota)
        share = math.sin(math.pi / 2 * (1 - (i + 1) / steps))
        assert abs(written - (total - total * share)) <= 0.5 + 1e-9
    assert written == total


@given(rate=st.floats(1, 9), steps=st.integers(1, 60))
def test_a_rate_is_kept_by_whole_tokens(rate, steps):
    pace = Rate(rate)
    quotas = [int(clock(pace, i).quota) for i in range(steps)]
    assert abs(sum(quotas) - rate * steps) < 1


def test_a_late_step_has_the_times_of_the_last_one():
    late, last = clock(Steps(4), 9), clock(Steps(4), 3)
    assert (late.stage, late.t, late.s, late.quota) == (last.stage, last.t, last.s, last.quota)


def test_only_steps_are_limited_and_counted_when_nothing_happens():
    for pace in (Rate(2.0), OwnPace()):
        pace.check_stages(5)
        assert pace.total(3) == 3
    assert Steps(4).total(3) == 4
    with pytest.raises(ConfigError, match="4 steps are too few for 5 blocks"):
        Steps(4).check_stages(5)


@pytest.mark.parametrize(
    ("pace", "late", "elapsed"),
    [
        (Steps(4), [False, False, True, True], [0, 0.75, 1, 1]),
        (Rate(2.0), [False] * 4, [0.5, 0.5, 0.9, 1]),
        (OwnPace(), [False] * 4, [0.5, 0.5, 0.9, 1]),
    ],
)
def test_steps_end_and_measure_a_row_and_without_them_its_tokens_do(pace, late, elapsed):
    step, written = torch.tensor([0, 3, 4, 9]), torch.tensor([5, 5, 9, 20])
    assert pace.late(step).tolist() == late
    assert pace.elapsed(step, written, torch.tensor(10)).tolist() == elapsed
    assert pace.bounded == any(late)


def test_a_row_needs_as_many_steps_as_it_has_blocks():
    decoder = Decoder(window=Block(4))
    row = Row([5] + [MASK] * 12, 1)  # three blocks
    assert int(row.stages(plan_of(decoder, 3))) == int(row.stages(plan_of(decoder, rate=9.0))) == 3
    with pytest.raises(ConfigError, match="2 steps are too few for 3 blocks"):
        row.stages(plan_of(decoder, 2))


def test_without_times_a_stage_lasts_until_it_is_written():
    start, masked = torch.tensor([2]), torch.arange(20)[None] >= 9
    at = Rate(2.0).clock(torch.tensor([5]), torch.tensor([5]), masked, masked, start, Block(4))
    assert int(at.stage) == (9 - 2) // 4


def test_decoding_begins_with_everything_masked_whatever_the_schedule():
    for schedule in (LogLinear(), LogLinear(0.2), Cosine()):
        times = torch.linspace(1, 0, 11, dtype=torch.float64)
        clocks = [clock(Steps(10, schedule), step) for step in range(10)]
        share = torch.cat([c.t for c in clocks] + [clocks[-1].s])
        assert float(share[0]) == 1
        assert float(share[-1]) == 0
        expected = (1 - schedule(times).value) / (1 - schedule(torch.ones(1, dtype=torch.float64)).value)
        torch.testing.assert_close(share, expected)
        assert all(torch.equal(a.s, b.t) for a, b in itertools.pairwise(clocks))


def test_out_of_range():
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        Steps(0)
    for rate in (0.5, math.inf, math.nan):
        with pytest.raises(ConfigError, match="rate must be at least 1"):
            Rate(rate)


@pytest.fixture
def notes(caplog):
    decoding.pace._note_unused.cache_clear()  # so that every test hears its note
    return lambda: [r.getMessage() for r in caplog.records if "can use" in r.getMessage()]


def test_sixteen_steps_a_position_leave_a_pair_in_thirty_two():
    """Positions of n that fall into a step with another one, on average: (n - 1)/32 pairs."""
    n = 40
    pace = Steps(10**6).within(n)
    times = [clock(pace, i) for i in range(pace.steps)]
    pairs = n * (n - 1) / 2 * sum(float(c.t - c.s) ** 2 for c in times)
    assert pairs == pytest.approx((n - 1) / 32)


@pytest.mark.parametrize("name", ["categorical", "conv", "remdm", "llada", "dilated", "semi-ar"])
def test_steps_that_a_row_cannot_use_are_left_out_with_one_note(model, tokenizer, notes, name):
    sampler = Sampler(model, tokenizer)
    prompts, given = ["Count 2.", "Hi"], {"decoder": name, "window": 28, "eos_fill": False}
    started = time.perf_counter()
    capped = sampler.generate(prompts, steps=10**6, **given)
    events = list(sampler.stream(prompts[0], steps=10**6, **given))
    taken = time.perf_counter() - started
    (note,) = notes()
    assert note.startswith("steps 1000000 are more than 28 positions can use: 448 are taken")
    started = time.perf_counter()
    assert capped == sampler.generate(prompts, steps=448, **given)
    assert events[-1].text == list(sampler.stream(prompts[0], steps=448, **given))[-1].text
    assert taken < 3 * (time.perf_counter() - started) + 1
    assert len(notes()) == 1


def test_steps_of_a_text_with_gaps_are_those_of_its_gaps(model, tokenizer, notes):
    sampler = Sampler(model, tokenizer)
    text = "Count <mask:3> to 5."
    capped = sampler.infill([text], decoder="conv", steps=10**6)
    assert notes() == [note for note in notes() if "than 3 positions can use: 48 are taken" in note] != []
    assert capped == sampler.infill([text], decoder="conv", steps=48)
    assert len(notes()) == 1


def test_the_command_line_and_the_evaluation_say_it_too(model, tokenizer, notes, tmp_path, capsys):
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    words = ["--model", str(tmp_path / "m"), "--window", "40", "--steps", "1000000", "--decoder", "conv"]
    assert main(["generate", *words, "Hi", "Count from 2 to 5."]) == 0
    assert len(notes()) == 1
    decoding.pace._note_unused.cache_clear()
    words = [word.replace("--decoder", "--decoders") for word in words]
    assert (
        main(["eval", "rules", *words, "--limit", "3", "--reader", "", "--output", str(tmp_path / "e")]) == 0
    )
    assert len(notes()) == 2


def test_steps_that_can_be_used_are_all_taken(notes):
    for positions in (1, 7, 256):
        assert Steps(16 * positions).within(positions).steps == 16 * positions
    assert notes() == []
