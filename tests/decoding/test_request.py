"""One request for the command line, Python and the server; resolved, it is complete."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from decoding import Decoder, Request, Sampler
from decoding.pace import OwnPace, Rate, Steps
from decoding.request import OPEN_LENGTH, Reuse
from decoding.window import MARGIN
from dlm.errors import ConfigError
from dlm.spec import DecodingDefaults, ModelSpec
from tests.fakes import FakeDenoiser, FakeTokenizer


def resolve(generation=None, positions=4096, **given):
    model = FakeDenoiser()
    model.config.max_positions, model.config.generation = positions, generation
    return Request(**given).resolve(model)


def test_nothing_given_is_a_canvas_that_grows_at_two_tokens_a_call():
    plan = resolve()
    assert plan.decoder == Decoder.named("conv", kernel_size=OPEN_LENGTH // 4 + 1)
    assert (plan.pace, plan.margin, plan.tokens, plan.positions) == (Rate(2.0), MARGIN, 256, 4096)
    assert plan.end_tokens.fill
    assert plan.end_tokens.early_exit
    assert plan.end_tokens.closes


@pytest.mark.parametrize(
    ("given", "pace", "margin", "positions"),
    [
        ({"window": 60}, Steps(15), None, 60),
        ({"window": 60, "steps": 4}, Steps(4), None, 60),
        ({"steps": 4}, Steps(4), None, 256),
        ({"window": 60, "rate": 3}, Rate(3.0), None, 60),
        ({"window": 60, "steps": 4, "canvas": "growing"}, Steps(4), MARGIN, 60),
        ({"max_tokens": 9, "rate": 1.5, "margin": 2}, Rate(1.5), 2, 4096),
        ({"max_tokens": 9, "decoder": "threshold"}, OwnPace(), MARGIN, 4096),
        ({"window": 60, "decoder": "threshold"}, OwnPace(), None, 60),
        ({"window": 60, "decoder": "threshold", "steps": 7}, Steps(7), None, 60),
        ({"decoder": "remdm"}, Steps(64), None, 256),
        ({"decoder": "sliding"}, Steps(64), None, 256),
        ({"max_tokens": 9, "ending": " end"}, Rate(2.0), None, 4096),
    ],
)
def test_pace_and_canvas_follow_from_what_is_given(given, pace, margin, positions):
    plan = resolve(**given)
    assert (plan.pace, plan.margin, plan.positions) == (pace, margin, positions)


def test_a_rule_with_a_pace_of_its_own_carries_no_rate():
    assert resolve(decoder="threshold").pace == OwnPace()
    assert resolve({"decoder": "entropy-bound", "rate": 3.0}).pace == OwnPace()


def test_a_request_and_a_plan_are_frozen_and_plans_compare():
    request = Request(decoder="conv")
    with pytest.raises(FrozenInstanceError):
        request.decoder = "llada"
    one, two = resolve(window=40, stop="a"), resolve(window=40, stop=["b", "c"])
    assert one.batch_key == two.batch_key  # rows that differ in stop texts share the arithmetic
    assert one.batch_key != resolve(window=40, steps=3).batch_key


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"window": True}, "window must be a whole number"),
        ({"rate": "fast"}, "rate must be at least 1 token per model call, got 'fast'"),
        ({"eos_fill": "no"}, "eos_fill must be true or false, got 'no'"),
        ({"eos_fill": 0}, "eos_fill must be true or false, got 0"),
        ({"decoder": []}, r"decoder must be a name or a Decoder, got \[\]"),
        ({"options": 3}, "options must be names with values, got 3"),
        ({"options": {1: "r"}}, "options must be names with values"),
        ({"margin": "1"}, "margin must be a whole number, not negative, got '1'"),
        ({"margin": 2**40}, "margin must be at most"),
        ({"forced": {"9" * 5000: "a"}}, "forced must name places by number"),
        ({"stop": ""}, "a stop text must not be empty"),
        ({"stop": [3]}, "stop must be a text or several"),
        ({"begin": 4}, "begin must be a text, got 4"),
        ({"forced": [3]}, "forced must be places with texts"),
        ({"forced": {3: 5}}, "forced must hold texts"),
        ({"reuse": "dual", "refresh": 0}, "refresh must be a whole number of at least 1, got 0"),
        ({"ending": "x", "canvas": "growing"}, "cannot grow"),
    ],
)
def test_each_field_is_checked_when_it_is_given(given, message):
    with pytest.raises(ConfigError, match=message):
        Request(**given)


def test_options_that_a_pace_would_drop_are_refused():
    usual = {"decoder": "threshold", "options": {"kernel_size": 5}}
    assert resolve(usual, rate=2.0).decoder == Decoder.named("threshold", kernel_size=5).with_given_pace()
    assert resolve(usual, options={"temperature": 1.0}, rate=2.0).decoder.tokens.temperature == 1
    for same in ({"kernel_size": 5}, {"temperature": 0.0}, {"tau": Decoder.named("threshold").reveal.tau}):
        assert resolve(usual, options=same, rate=2.0).decoder == resolve(usual, rate=2.0).decoder
    with pytest.raises(ConfigError, match="option tau of decoder 'threshold' sets a pace of its own"):
        resolve(usual, options={"tau": 0.2}, rate=2.0)
    with pytest.raises(ConfigError, match="option temperature of decoder 'conv' must be a number, got None"):
        resolve(decoder="conv", options={"temperature": None})
    with pytest.raises(ConfigError, match="option of decoders: 'temprature'"):
        Request(options={"temprature": 1}).check_decoder()


def test_a_request_keeps_what_it_was_given():
    options = {"top_k": 3}
    request = Request(decoder="conv", options=options)
    options["top_k"] = 9
    assert request.options == {"top_k": 3}


def test_an_unknown_keyword_names_the_right_one():
    sampler = Sampler(FakeDenoiser(), FakeTokenizer())
    with pytest.raises(ConfigError, match="'step'. Did you mean 'steps'"):
        sampler.generate("abc", step=3)
    with pytest.raises(ConfigError, match=r"'temperature': it is an option of decoders, options="):
        sampler.generate("abc", temperature=1.0)
    with pytest.raises(ConfigError, match="not both: steps"):
        sampler.generate("abc", request=Request(), steps=3)
    with pytest.raises(ConfigError, match="one message alone"):
        sampler.generate({"role": "user", "content": "abc"})


def test_every_field_changes_the_plan_or_the_row():
    """None is accepted and then ignored."""
    changed = {
        "decoder": "llada", "options": {"top_k": 3}, "max_tokens": 7, "rate": 3.0, "window": 50, "steps": 5,
        "stop": "x", "eos_fill": False, "canvas": "growing", "margin": 3, "reuse": "dual", "refresh": 3,
        "begin": "a", "ending": "b", "forced": {3: "c"}, "top_logprobs": 2, "drafts": 2,
    }  # fmt: skip
    beside = {"refresh": {"reuse": "dual"}, "canvas": {"window": 50, "steps": 5}}
    assert set(changed) == {field.name for field in fields(Request)}
    for name, value in changed.items():
        rest = beside.get(name, {})
        assert resolve(**rest, **{name: value}) != resolve(**rest), name


def test_what_a_model_is_comes_from_its_spec_or_else_its_configuration():
    model = FakeDenoiser()
    assert ModelSpec.of(model).end_token_ids == {0}
    model.spec = ModelSpec(22, 0, frozenset({3}), positions=50, defaults=DecodingDefaults("llada"))
    plan = Request(reuse="prefix").resolve(model)
    assert plan.end_tokens.end_ids == (0, 3)
    assert (plan.decoder.name, plan.positions, plan.reuse) == ("llada", 50, Reuse("prefix"))


def test_defaults_of_a_checkpoint_have_names():
    with pytest.raises(
        ConfigError, match="unknown default of decoding: 'max_token'. Did you mean 'max_tokens'"
    ):
        DecodingDefaults.of({"decoder": "conv", "max_token": 9})
    for name, wrong in (
        ("window", "abc"), ("window", 8.5), ("steps", True), ("options", 3), ("stop", 5),
        ("eos_fill", "false"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"default of decoding {name} must be of type"):
            DecodingDefaults.of({name: wrong})
    assert DecodingDefaults.of({"stop": "###", "rate": 2, "steps": None}) == DecodingDefaults(
        stop=("###",), rate=2
    )
    assert DecodingDefaults.of({"stop": ["a", "b"]}).stop == ("a", "b")


def test_steps_and_max_tokens_are_a_canvas_of_so_many_masks():
    request = Request(max_tokens=24, steps=8)
    assert resolve(max_tokens=24, steps=8) == resolve(max_tokens=24, steps=8, canvas="full")
    assert replace(request, steps=None, rate=2.0) == Request(max_tokens=24, rate=2.0)  # one that grows
    with pytest.raises(
        ConfigError, match="a margin is for a canvas that grows: with max_tokens, one at a rate"
    ):
        resolve(max_tokens=24, steps=8, margin=4)
