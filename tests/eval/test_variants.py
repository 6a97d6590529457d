import pytest

from decoding.pace import Steps
from decoding.request import Request, Reuse
from dlm.errors import ConfigError, DataError
from dlm.spec import DecodingDefaults, ModelSpec
from eval.commands.frontier import FrontierConfig
from eval.commands.orders import LearnConfig
from eval.commands.path import PathConfig
from eval.config import EvalConfig
from eval.variants import Variant, parse_decoders, short, variants
from tests.decoding.rig import order_table


def test_decoders_are_read_with_their_options():
    assert parse_decoders("conv, semi-ar(block_size=64),top-k(top_k=10,temperature=0.8)") == [
        ("conv", {}),
        ("semi-ar", {"block_size": 64}),
        ("top-k", {"top_k": 10, "temperature": 0.8}),
    ]
    assert parse_decoders("") == [("", {})]


@pytest.mark.parametrize("text", ["conv(", "conv(5)", "co nv", "conv(top_k=x)"])
def test_what_cannot_be_read_is_an_error(text):
    with pytest.raises(ConfigError):
        parse_decoders(text)


def test_shares_of_the_window_and_all_combinations():
    found = variants("conv,top-k", window=128, steps="L/16,L/4,L", kernel="L/4")
    assert [v.label for v in found] == [
        "conv,K=33,L=128,S=8",
        "conv,K=33,L=128,S=32",
        "conv,K=33,L=128,S=128",
        "top-k,L=128,S=8",
        "top-k,L=128,S=32",
        "top-k,L=128,S=128",
    ]
    assert found[0].request().steps == 8
    assert found[0].request().options == {"kernel_size": 33}


def test_sizes_are_kernels_or_blocks_and_cuts_go_where_there_are_some():
    found = variants("conv,semi-ar,llada,categorical", kernel="15,33", top_k="5")
    assert [v.label for v in found] == [
        "conv,K=15,top_k=5",
        "conv,K=33,top_k=5",
        "semi-ar,B=15,top_k=5",
        "semi-ar,B=33,top_k=5",
        "llada",
        "categorical",
    ]


def test_shares_of_the_window_are_odd_for_kernels_alone():
    found = variants("conv,semi-ar", window=128, steps="8", kernel="L/4,65")
    assert [v.options for v in found] == [
        {"kernel_size": 33}, {"kernel_size": 65}, {"block_size": 32}, {"block_size": 65},
    ]  # fmt: skip


def test_a_window_and_a_rate_go_together():
    (found,) = variants("conv", window=64, rate="2")
    assert found.pace == {"window": 64, "rate": 2.0}


def test_length_free_paces():
    assert [v.pace for v in variants("conv", max_tokens=64, rate="1,2")] == [
        {"max_tokens": 64, "rate": 1.0},
        {"max_tokens": 64, "rate": 2.0},
    ]
    assert variants("") == [Variant("")]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": "8", "rate": "2"}, "not both"),
        ({"steps": "L/4"}, "need --window"),
        ({"steps": "many"}, "'many' is not a number"),
        ({"steps": "nan"}, "must be finite"),
        ({"rate": "inf"}, "must be finite"),
        ({"steps": "L/0", "window": 64}, "not a number"),
        ({"steps": "8.5"}, "whole numbers"),
        ({"steps": "0"}, "whole numbers"),
        ({"rate": "0.5"}, "rate must be at least 1"),
        ({"kernel": "1.7"}, "whole numbers"),
        ({"kernel": "32"}, "odd and positive, got 32; use 31 or 33"),
        ({"decoders": "conv,semi-ar", "kernel": "32"}, "use 31 or 33"),
        ({"decoders": "", "kernel": "33"}, "--kernel: none of the decoders"),
        ({"decoders": "llada", "kernel": "33"}, "--kernel: none of the decoders"),
        ({"decoders": "llada,categorical", "top_k": "5"}, "--top_k: none of the decoders"),
        ({"window": 64, "max_tokens": 20}, "not both"),
        ({"decoders": "conv,,semi-ar"}, "cannot read"),
        ({"decoders": "convv"}, "Did you mean 'conv'"),
        ({"decoders": "conv(kernel=3)"}, "kernel_size"),
        ({"decoders": "conv(scale=much)"}, "'much' is not a number"),
        ({"decoders": "llada(order=margins)"}, "Did you mean 'margin'"),
        ({"decoders": "dprm(normalise=yes)"}, "normalise: 'yes' is not a number"),
        ({"decoders": "dprm(normalise=1)"}, "must be true or false, got 1"),
        ({"decoders": "dprm(table=no/such.json)"}, "no/such.json: no such order table"),
    ],
)
def test_errors_say_what_would_be_right(how, message):
    with pytest.raises((ConfigError, DataError), match=message):
        variants(how.pop("decoders", "conv"), **how)


def test_options_that_are_words_and_switches(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path))
    table = order_table()
    file = table.save(tmp_path / "a.safetensors")
    table.save("mine")
    one, two, three = variants(
        f"llada(order=margin),dprm(table=mine,normalise=true),dprm(table={file},draws=2)"
    )
    assert one.options == {"order": "margin"}
    assert (two.options, two.label) == (
        {"table": "mine", "normalise": True},
        "dprm,table=mine,normalise=true",
    )
    assert three.label == "dprm,table=a,draws=2"
    assert one.recorded == one.options
    assert two.recorded == {"table": table.digest, "normalise": True}
    spec = ModelSpec(mask_token_id=5, eos_token_id=0, positions=300)
    for each in (two, three):
        assert each.request().decoder_for(spec).reveal.table == table


@pytest.mark.parametrize("size", ["window", "max_tokens"])
def test_a_size_that_is_not_given_is_left_out_and_zero_is_none(size):
    assert variants("conv") == variants("conv", **{size: None})
    with pytest.raises(
        ConfigError, match=f"^{size} must be at least 1, got 0; leave it out for the default$"
    ):
        EvalConfig(task="alpaca_eval", model="default", **{size: 0})
    with pytest.raises(ConfigError, match=f"^{size} must be at least 1"):
        PathConfig(models=["default"], **{size: 0})
    with pytest.raises(ConfigError, match=f"^{size} must be at least 1"):
        FrontierConfig(models=["default"], **{size: 0})
    with pytest.raises(ConfigError, match=f"^{size} must be a whole number of at least 1"):
        LearnConfig(output="a", model="default", task="rules", reward="length=3", **{size: 0})


def test_what_is_asked_for_beside_the_pace_reaches_every_variant_and_its_label():
    asked = {"reuse": "dual", "refresh": 4, "stop": ["x", "y"]}
    config = EvalConfig(task="rules", model="m", decoders="conv,llada", max_tokens=20, **asked)
    for variant in config.variants():
        request = variant.request(eos_fill=config.eos_fill)
        assert (request.reuse_settings(), request.stop_texts) == (Reuse("dual", 4), ("x", "y"))
        assert "reuse=dual,refresh=4" in variant.label
    sizes = {"window": 64, "steps": "8", "canvas": "growing", "margin": 3}
    (grown,) = EvalConfig(task="rules", model="m", **sizes).variants()
    assert (grown.request().canvas, grown.request().margin) == ("growing", 3)
    with pytest.raises(ConfigError, match="reuse is for --model"):
        EvalConfig(task="rules", endpoint="http://x", reuse="dual")


def test_a_decoder_that_is_named_is_what_generate_makes_of_the_name():
    published = {
        "decoder": "llada", "options": {"block_size": 8}, "canvas": "full", "max_tokens": 64, "steps": 32,
        "eos_fill": False,
    }  # fmt: skip
    spec = ModelSpec(mask_token_id=5, eos_token_id=0, positions=300, defaults=DecodingDefaults.of(published))
    (own,), (named,), (other,) = (variants(text) for text in ("", "llada", "llada(block_size=16)"))
    assert named.request().resolve(spec) == own.request().resolve(spec)
    assert named.request().resolve(spec) == Request(decoder="llada").resolve(spec)
    assert other.request().resolve(spec).decoder.window.size == 16
    assert other.request().resolve(spec).pace == Steps(32)
    with pytest.raises(ConfigError, match="kernel_sise"):
        variants("conv(kernel_sise=9)")[0].request()


@pytest.mark.parametrize(
    ("value", "label"),
    [(".", "."), ("a/b", "a/b"), ("x/b", "x/b"), ("tables/mine.json", "mine"), (0.5, "0.5"), (True, "true")],
)
def test_only_files_are_shortened_in_labels(value, label):
    assert short(value) == label
