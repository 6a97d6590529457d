"""The registry: each layout detects its own, writes it, and reads what it wrote."""

import pytest
import torch

from dlm import load_model
from dlm.adapter import add_adapter
from dlm.backbone import from_scratch
from dlm.checkpoint import check_checkpoint, is_causal_lm, load_tokenizer, stored_positions, stored_spec
from dlm.errors import CheckpointError, ConfigError
from dlm.formats import FORMATS, AdapterFormat, CausalFormat, DiffusionFormat, PublicFormat, format_of
from tests.conftest import TINY
from tests.dlm.families.layouts import LAYOUTS
from tests.dlm.test_backbone import MODELS, SHAPE

IDS = torch.arange(8, 29)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture
def ours(tmp_path, tokenizer):
    model = from_scratch(TINY, tokenizer)
    DiffusionFormat().write(model, tokenizer, tmp_path / "ours")
    return tmp_path / "ours", model, tokenizer


@pytest.fixture
def causal(tmp_path, tokenizer):
    config, kind, _ = MODELS["llama"]
    kind(config(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def test_this_toolkits_own(ours):
    place, model, tokenizer = ours
    assert type(format_of(str(place))) is DiffusionFormat
    again, tokens = DiffusionFormat().read(str(place), torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert tokens.get_vocab() == tokenizer.get_vocab()


def test_adapters(ours, tmp_path):
    place, _, tokenizer = ours
    model, _ = load_model(place, device="cpu", dtype="float32")
    adapted = add_adapter(model, str(place), r=2, alpha=4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    AdapterFormat().write(adapted, tokenizer, tmp_path / "adapter")
    assert type(format_of(str(tmp_path / "adapter"))) is AdapterFormat
    again, _ = AdapterFormat().read(str(tmp_path / "adapter"), torch.float32)
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="without an adapter"):
        AdapterFormat().write(load_model(place, device="cpu")[0], tokenizer, tmp_path / "none")


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_layouts_are_written_as_their_authors_have_them(name, base, tmp_path):
    layout = LAYOUTS[name]()
    place = layout.write(tmp_path / "public", base)
    assert type(format_of(str(place))) is PublicFormat
    model, tokenizer = PublicFormat().read(str(place), torch.float32)
    template = tokenizer.chat_template
    PublicFormat().write(model, tokenizer, tmp_path / "again")
    assert tokenizer.chat_template == template, "the tokenizer that was given is not changed"
    assert not list((tmp_path / "again").glob(".draft-*"))
    assert (tmp_path / "again" / "config.json").read_text("utf-8")
    assert type(format_of(str(tmp_path / "again"))) is PublicFormat
    again, tokens = PublicFormat().read(str(tmp_path / "again"), torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert again.config.public["config"] == model.config.public["config"]
    assert tokens.get_vocab() == tokenizer.get_vocab()


def test_what_came_from_no_public_model_is_not_written_as_one(ours, tmp_path):
    _, model, tokenizer = ours
    with pytest.raises(CheckpointError, match="did not come from a public checkpoint"):
        PublicFormat().write(model, tokenizer, tmp_path / "public")


def test_autoregressive_models_are_read_and_not_written(causal, tmp_path):
    assert type(format_of(str(causal))) is CausalFormat
    model, tokenizer = CausalFormat().read(str(causal), torch.float32)
    with pytest.raises(CheckpointError, match="cannot be written as an autoregressive one"):
        CausalFormat().write(model, tokenizer, tmp_path / "again")


def test_a_format_may_be_added(ours, tmp_path, monkeypatch):
    class Twice(DiffusionFormat):
        """A folder in a folder."""

        def detect(self, path):
            return path.endswith(".twice")

        def config(self, path):
            return super().config(f"{path}/inner")

        def tokenizer(self, path):
            return super().tokenizer(f"{path}/inner")

        def check(self, path):
            return super().check(f"{path}/inner")

        def read(self, path, dtype, device_map=None, quantized=""):
            return super().read(f"{path}/inner", dtype, device_map, quantized)

        def write(self, model, tokenizer, folder):
            super().write(model, tokenizer, folder / "inner")

    _, model, tokenizer = ours
    monkeypatch.setattr("dlm.formats.FORMATS", [Twice(), *FORMATS])
    Twice().write(model, tokenizer, tmp_path / "a.twice")
    path = tmp_path / "a.twice"
    again, _ = load_model(path, device="cpu", dtype="float32")
    assert torch.equal(logits(again), logits(model))
    same(load_tokenizer(path), tokenizer)
    assert stored_spec(path) == model.spec
    assert stored_positions(path) == model.spec.positions
    assert not is_causal_lm(path)
    assert check_checkpoint(path)[0].forward_fields() == again.config.forward_fields()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_tokenizer_alone_is_that_of_the_model(name, base, tmp_path):
    place = LAYOUTS[name]().write(tmp_path / "public", base)
    _, expected = load_model(place, device="cpu", dtype="float32")
    same(load_tokenizer(place), expected)


def same(tokenizer, expected):
    assert tokenizer.get_vocab() == expected.get_vocab()
    for name in ("chat_template", "mask_token_id", "eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(tokenizer, name) == getattr(expected, name), name


def test_so_is_that_of_an_autoregressive_one(causal):
    same(load_tokenizer(causal), load_model(causal, device="cpu")[1])
    assert load_tokenizer(causal, "plain").chat_template != load_tokenizer(causal).chat_template


def test_a_template_is_for_autoregressive_models(ours):
    with pytest.raises(ConfigError, match="has a template of its own"):
        load_tokenizer(ours[0], "plain")
