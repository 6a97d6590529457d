"""Decoders that other packages offer, by the entry points `dlm.decoders`."""

import sys

import pytest

from decoding import Decoder, Sampler, list_decoders
from decoding.presets import PRESETS, decoders_in_words, presets
from dlm.cli import main
from dlm.errors import ConfigError
from dlm.spec import ModelSpec, Visibility
from tests.fakes import FakeDenoiser, FakeTokenizer

MODULE = """
from decoding.presets import Preset
from decoding.reveal import Quota
from decoding.tokens import TokenRule
from decoding.window import Full

def build(per_step=3):
    return Full(), Quota(per_step)

THREE = Preset("three at a time", "an example", build, TokenRule(temperature=0.0))
WRONG = 5
"""


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Installs a distribution that offers decoders."""
    (tmp_path / "elsewhere_decoders.py").write_text(MODULE)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "elsewhere_decoders", raising=False)

    def offer(line):
        (info / "entry_points.txt").write_text(f"[dlm.decoders]\n{line}\n")

    return offer


def test_the_list_for_a_terminal_leaves_no_option_out():
    *own, _, shared = decoders_in_words().replace("\n    ", " ").split("\n")
    assert len(own) == len(presets())
    _, usual = shared.split(":")
    for line, preset in zip(own, presets().values(), strict=True):
        for name, value in preset.options.items():
            assert f" {name}={value}" in (line if f" {name}=" in line else usual), (line, name)


def test_a_decoder_of_another_package_is_one_of_all(offer, model, tokenizer, capsys):
    offer("three = elsewhere_decoders:THREE")
    assert set(presets()) == {*PRESETS, "three"}
    assert list_decoders()["three"].startswith(
        "three at a time (an example; approximate). Options: per_step=3"
    )
    assert "three at a time (an example; approximate)\n    per_step=3\n" in decoders_in_words()
    assert Decoder.named("three", per_step=2).reveal == Decoder.named("llada", per_step=2).reveal
    sampler = Sampler(model, tokenizer)
    settings = {"window": 40, "steps": 12}
    out = sampler.generate("Hello.", decoder="three", **settings)
    assert out == sampler.generate("Hello.", decoder="llada", options={"per_step": 3}, **settings)
    assert main(["generate", "--decoder", "thre", "--options.per_step", "2", "hi"]) == 2
    assert "Did you mean 'three'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown option of decoder 'three': 'tau'"):
        Decoder.named("three", tau=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("three = elsewhere_decoders:FOUR", "decoder 'three' of elsewhere cannot be imported .*FOUR"),
        ("three = nowhere:THREE", "decoder 'three' of elsewhere cannot be imported .*nowhere"),
        (
            "three = elsewhere_decoders:WRONG",
            "decoder 'three' of elsewhere: elsewhere_decoders:WRONG is no Preset",
        ),
        ("conv = elsewhere_decoders:THREE", "decoder 'conv' of elsewhere has the name of another decoder"),
    ],
)
def test_a_broken_offer_is_named(offer, line, message):
    offer(line)
    with pytest.raises(ConfigError, match=message):
        Decoder.named("three")


WHOLE = [
    (name, option)
    for name, preset in PRESETS.items()
    for option, default in preset.options.items()
    if option != "logit_bias" and not isinstance(default, bool | str | float) and option != "table"
]


@pytest.mark.parametrize(("name", "option"), WHOLE)
def test_no_number_of_a_decoder_is_larger_than_what_a_step_can_compute_with(name, option):
    """A server's step is shared: what fails or never ends in it would be the others' loss."""
    for value in (10**30, 10**30 + 1):
        with pytest.raises(ConfigError):
            Decoder.named(name, **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1e39}, {"presence_penalty": 1e300}, {"frequency_penalty": -1e39},
        {"repetition_penalty": 1e-45}, {"logit_bias": {3: 1e39}},
    ],
)  # fmt: skip
def test_no_weight_is_beyond_what_logits_hold(options):
    with pytest.raises(ConfigError):
        Decoder.named("conv", **options)


@pytest.mark.parametrize(
    ("name", "option", "axis"),
    [("conv", "scale", "window"), ("entropy-bound", "gamma", "reveal"), ("stability", "epsilon", "reveal")],
)
def test_whole_numbers_that_a_tensor_cannot_hold_are_numbers_all_the_same(name, option, axis):
    decoder = Decoder.named(name, **{option: 10**20})
    assert decoder == Decoder.named(name, **{option: 1e20})
    assert type(getattr(getattr(decoder, axis), option)) is float
    sampler = Sampler(FakeDenoiser(), FakeTokenizer())
    assert sampler.generate("abc", decoder=decoder, max_tokens=5).token_ids


def test_a_decoder_says_with_which_models_it_goes():
    blocks = ModelSpec(0, 1, positions=64, visibility=Visibility(block_size=8, causal_context=True))
    whole = ModelSpec(0, 1, positions=64)
    goes = {name: [Decoder.named(name).goes_with(spec) for spec in (whole, blocks)] for name in presets()}
    assert all(whole for whole, _ in goes.values())
    assert {name for name, (_, in_blocks) in goes.items() if not in_blocks} == {"sliding", "wino"}
