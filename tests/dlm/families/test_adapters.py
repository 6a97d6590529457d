"""Adapters on published models as they lie: this toolkit's, and those that peft saves by itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dlm import load_model
from dlm.adapter import add_adapter
from dlm.checkpoint import is_causal_lm, stored_spec
from dlm.convert import convert
from dlm.export import export
from tests.dlm.families.layouts import LAYOUTS


@pytest.fixture(params=LAYOUTS)
def public(request, tmp_path, base):
    return LAYOUTS[request.param]().write(tmp_path / "public", base)


def moved(adapted):
    """An adapter whose every trained number is another."""
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight += 0.2 * torch.randn(weight.shape, generator=made)
    return adapted.eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def check(folder, public, expected, ids):
    """What is loaded from an adapter's folder computes what was saved, and is still of its family."""
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    before, tokens = load_model(public, device="cpu", dtype="float32")
    assert not torch.allclose(logits(before, ids), expected, atol=1e-2)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert model.spec == before.spec == stored_spec(folder)
    assert model.config.public == before.config.public
    assert tokenizer.get_vocab() == tokens.get_vocab()
    assert not is_causal_lm(str(folder))


def test_our_own(public, tmp_path):
    model, tokenizer = load_model(public, device="cpu", dtype="float32")
    ids = torch.arange(8, 31)[None]
    adapted = moved(add_adapter(model, str(public), r=2, alpha=4))
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    check(tmp_path / "adapter", public, expected, ids)
    export(tmp_path / "adapter", tmp_path / "whole", merge=True, dtype="float32")
    convert(tmp_path / "whole", tmp_path / "again")
    again, _ = load_model(tmp_path / "again", device="cpu", dtype="float32")
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)


def test_one_that_peft_saved(public, tmp_path):
    model, _ = load_model(public, device="cpu", dtype="float32")
    ids = torch.arange(8, 31)[None]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    expected = logits(moved(adapted), ids)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "config.json").exists()
    check(tmp_path / "adapter", public, expected, ids)
