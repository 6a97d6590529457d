"""Decoding at a rate, and on a canvas that grows."""

import math

import pytest
import torch

from decoding import Decoder, Sampler
from decoding.presets import PRESETS
from decoding.reveal import first_arrivals
from decoding.step import Batch, denoise
from decoding.window import MARGIN
from dlm.errors import ConfigError
from dlm.noise import fold, key_of, uniform
from tests.decoding.rig import LEARNT, canvas_of, plan_of
from tests.fakes import FakeDenoiser, FakeTokenizer

RATED = [name for name in PRESETS if not Decoder.named(name).timed]
SMALL = {
    "conv": {"kernel_size": 9},
    "llada-conv": {"kernel_size": 9},
    "semi-ar": {"block_size": 8},
    "dprm": {"kernel_size": 9, **LEARNT},
}


def noise(rows, length, seed=0):
    return uniform(fold(key_of(seed), torch.arange(rows))[:, None], torch.arange(length))


# ---- the race ----------------------------------------------------------------------------------------


def slow_arrivals(speed, u, rate):
    """Which clocks ring, one row in plain Python: the first, and those within τ after it, τ by bisection."""
    total = sum(speed)
    v = [x / total for x in speed]
    times = [-math.log(x) / y if y > 0 else math.inf for x, y in zip(u, v, strict=True)]
    first = min(range(len(v)), key=lambda i: times[i])
    if sum(x > 0 for x in v) <= rate:
        return [x > 0 for x in v]
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        more = sum(1 - math.exp(-y * middle) for i, y in enumerate(v) if i != first)
        low, high = (middle, high) if more < rate - 1 else (low, middle)
    return [t <= times[first] + low for t in times]


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0, 4.0, 7.5])
def test_arrivals_agree_with_an_independent_slow_reference(rate):
    torch.manual_seed(0)
    mass, weight = torch.rand(300, 9), torch.rand(300, 9) * (torch.rand(300, 9) < 0.8)
    masked = torch.rand(300, 9) < 0.9
    u = noise(300, 9)
    got = first_arrivals(mass, weight, masked, u, rate)
    for i in range(300):
        speed = [
            float(m) * float(w) * bool(x)
            for m, w, x in zip(mass[i].double(), weight[i].double(), masked[i], strict=True)
        ]
        if sum(speed) > 0:
            assert got[i].tolist() == slow_arrivals(speed, u[i].double().tolist(), rate), i


def test_at_rate_one_the_next_event_of_the_ancestral_process_is_drawn():
    speed = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])
    rows = 20_000
    got = first_arrivals(
        speed.expand(rows, -1), torch.ones(rows, 5), torch.ones(rows, 5).bool(), noise(rows, 5), 1.0
    )  # fmt: skip
    assert (got.sum(1) == 1).all()
    torch.testing.assert_close(got.float().mean(0), speed, atol=0.01, rtol=0)


@pytest.mark.parametrize("rate", [1.5, 3.0, 6.0])
def test_as_many_arrive_as_the_rate_says(rate):
    torch.manual_seed(1)
    speed, rows = torch.rand(20) + 0.05, 20_000
    got = first_arrivals(
        speed.expand(rows, -1), torch.ones(rows, 20), torch.ones(rows, 20).bool(), noise(rows, 20), rate
    )  # fmt: skip
    assert float(got.sum(1).float().mean()) == pytest.approx(rate, rel=0.02)
    assert int(got.sum(1).min()) == 1


def test_where_the_rate_is_not_below_the_open_positions_all_of_them_go():
    masked = torch.tensor([[True, True, True, False]])
    weight = torch.tensor([[1.0, 0.5, 0.0, 1.0]])
    assert first_arrivals(torch.ones(1, 4), weight, masked, noise(1, 4), 2.0).tolist() == [
        [True, True, False, False]
    ]
    shut = first_arrivals(torch.ones(1, 4), torch.zeros(1, 4), masked, noise(1, 4), 9.0)
    assert shut.tolist() == [[True, True, True, False]]  # all shut: as if all were open


# ---- the loop ----------------------------------------------------------------------------------------


def sampler(eos_bias=0.0, positions=4096):
    model = FakeDenoiser(eos_bias=eos_bias)
    model.config.max_positions = positions
    return Sampler(model, FakeTokenizer())


def named(name):
    return Decoder.named(name, **SMALL.get(name, {}))


def at(name, rate):
    """The rate, for rules that take one."""
    return {"rate": rate} if named(name).reveal.paced else {}


@pytest.mark.parametrize("name", RATED)
@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_text_and_cost_do_not_depend_on_the_limit(name, rate):
    ended = 0
    for seed in range(12):
        one, two = (
            sampler(eos_bias=3.0).generate(
                ["a prompt"], decoder=named(name), max_tokens=limit, seed=seed, **at(name, rate)
            )[0]
            for limit in (300, 3000)
        )
        ended += two.finish_reason == "stop"
        assert one == two
    assert ended == 12


@pytest.mark.parametrize("name", RATED)
def test_a_growing_row_is_bit_identical_alone_and_in_a_batch(name):
    prompts = ["a", "some longer prompt", "abc abc abc abc abc abc", "xyz"]
    how = {"decoder": named(name), "max_tokens": 60, "seed": 5, **at(name, 2.0)}
    together = sampler(eos_bias=0.5).generate(prompts, **how)
    alone = [sampler(eos_bias=0.5).generate([p], **how)[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize("name", RATED)
@pytest.mark.parametrize("how", [{"window": 60}, {"max_tokens": 50}])
def test_at_a_rate_no_mask_comes_out_and_nothing_is_written_twice(name, how):
    outs = sampler().generate(["abc", "defgh"], decoder=named(name), seed=1, **at(name, 2.5), **how)
    for out, prompt in zip(outs, ("abc", "defgh"), strict=True):
        assert 22 not in out.token_ids
        assert all(step >= 0 for step in out.reveal_step)
        room = 60 - len(prompt) if "window" in how else 50
        if out.finish_reason == "length":
            assert len(out.token_ids) == room
        if "rate" in at(name, 2.5):
            assert out.steps >= 1 + max(out.reveal_step, default=0)


def test_rate_one_writes_one_token_per_call():
    out = sampler(eos_bias=-50).generate(["abc"], decoder=named("conv"), max_tokens=40, rate=1.0)[0]
    assert out.model_calls == len(out.token_ids) == 40
    assert sorted(out.reveal_step) == list(range(40))


@pytest.mark.parametrize("name", ["conv", "top-k", "llada", "llada-conv"])
def test_the_rate_is_kept_on_average(name):
    outs = sampler(eos_bias=-50).generate(
        [f"prompt {i}" for i in range(8)], decoder=Decoder.named(name), max_tokens=200, rate=3.0
    )
    calls = sum(out.model_calls for out in outs) / 8
    assert 200 / calls == pytest.approx(3.0, rel=0.06)


def test_the_canvas_is_never_wider_than_what_can_open_and_a_margin():
    model = FakeDenoiser(eos_bias=-50)
    seen = []
    hidden = model.hidden

    def watched(ids, mask=None):
        masks = (ids[0] == 22).nonzero()[:, 0]
        known = (ids[0] != 22).nonzero()[:, 0]
        seen.append((ids.shape[1], int(known[-1]), len(masks)))
        return hidden(ids, mask)

    model.hidden = watched
    model.config.max_positions = 4096
    Sampler(model, FakeTokenizer()).generate(["abcde"], decoder=named("conv"), max_tokens=100, rate=2.0)
    for width, _, masks in seen[: -MARGIN - 2]:
        assert masks == 4 + MARGIN  # the reach of a kernel of 9, and the margin
        assert width <= 105
    assert seen[0][0] == 5 + 4 + MARGIN


def test_an_end_closes_the_canvas():
    model = FakeDenoiser(eos_bias=-50)
    ids = torch.full((1, 30), 22)
    ids[0, :3] = 5
    plan = plan_of(named("conv"), rate=4.0, grow=True, margin=6)
    canvas = canvas_of(ids, plan)
    batch, row = Batch(model, canvas, plan), torch.tensor([0])
    assert canvas.valid.sum() == 13
    canvas.ids[0, 6], canvas.masked[0, 6] = 0, False
    batch._grow(row, 10)
    assert canvas.valid.sum() == 13
    canvas.ids[0, 6] = 7
    batch._grow(row, 10)
    assert canvas.valid.sum() == 14
    assert canvas.masked.sum() == 10
    batch._grow(row, 100)
    assert canvas.valid.sum() == 30
    assert not canvas.pinned[0, 3:].any()
    for _ in denoise(model, canvas, plan):
        pass
    assert not canvas.masked.any()


def test_streaming_a_growing_answer_ends_in_the_text_of_generate():
    for seed in range(30):
        how = {"decoder": named("conv"), "max_tokens": 60, "rate": 2.0, "seed": seed}
        events = list(sampler(eos_bias=0.5).stream("abc", **how))
        out = sampler(eos_bias=0.5).generate(["abc"], **how)[0]
        assert events[-1].text == out.text
        assert len(events) == out.steps
        assert len(events[0].token_ids) < 60


def test_the_models_positions_limit_a_growing_canvas():
    out = sampler(eos_bias=-50, positions=30).generate(["abc"], decoder=named("conv"), max_tokens=99)[0]
    assert len(out.token_ids) == 27
    with pytest.raises(ConfigError, match="the prompt has 40 tokens and the model 30 positions"):
        sampler(positions=30).generate(["a" * 40], max_tokens=5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_tokens": 9, "window": 30}, "it has no window and no steps"),
        ({"max_tokens": 9, "steps": 3, "canvas": "growing"}, "it has no window and no steps"),
        ({"rate": 2.0, "steps": 3}, "either steps or a rate"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 9, "rate": 0}, "rate must be at least 1 token per model call, got 0"),
        ({"max_tokens": 9, "rate": 2.0, "decoder": "threshold"}, "says itself how many tokens it writes"),
        ({"max_tokens": 9, "rate": 0.5}, "rate must be at least 1 token per model call, got 0.5"),
        ({"rate": math.nan, "window": 30}, "rate must be at least 1"),
        ({"max_tokens": 9, "decoder": "remdm"}, "goes by time: it needs steps"),
    ],
)
def test_bad_paces_say_what_would_be_right(how, message):
    with pytest.raises(ConfigError, match=message):
        sampler().generate(["abc"], **how)
    with pytest.raises(ConfigError, match="Did you mean 'max_tokens'"):
        sampler().generate(["abc"], max_token=3)


def test_the_command_line_takes_a_limit_and_a_rate(model, tokenizer, tmp_path, capsys):
    from dlm.cli import main

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["generate", "--model", str(tmp_path), "--json", "Count from 2 to 5."]
    assert main([*words, "--max-tokens", "20", "--rate", "3"]) == 0
    assert '"reveal_step"' in capsys.readouterr().out
    assert main([*words, "--max-tokens", "20", "--steps", "3"]) == 0
    fixed = capsys.readouterr().out
    assert main([*words, "--max-tokens", "20", "--steps", "3", "--canvas", "full"]) == 0
    assert capsys.readouterr().out == fixed
    assert main([*words, "--max-tokens", "20", "--steps", "3", "--canvas", "growing"]) == 2
    assert "no window and no steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["conv", "top-k", "semi-ar"])
@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_a_limit_that_the_canvas_does_not_meet_changes_nothing(name, rate):
    """The farthest that the canvas ever reaches is a limit that is as good as none."""
    for seed in range(10):
        own = sampler(eos_bias=2.0)
        reach = []
        free = own.generate(["abc"], decoder=named(name), max_tokens=500, rate=rate, seed=seed)[0]
        for event in own.stream("abc", decoder=named(name), max_tokens=500, rate=rate, seed=seed):
            reach.append(len(event.token_ids))
        if free.finish_reason == "stop" and max(reach) < 490:
            limit = max(reach) + 1
            tight = own.generate(["abc"], decoder=named(name), max_tokens=limit, rate=rate, seed=seed)[0]
            assert tight == free
