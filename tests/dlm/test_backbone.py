"""Every family that can be made bidirectional, and adapters that peft saved by itself."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dlm import load_model
from dlm.adapter import add_adapter, merged
from dlm.attention import KeyValues
from dlm.backbone import from_scratch, load_causal_lm
from dlm.checkpoint import is_causal_lm
from dlm.commands.inspect import describe
from dlm.config import FAMILIES
from dlm.errors import CheckpointError
from dlm.export import export
from finetune.config import ModelConfig
from finetune.sft import train
from tests.conftest import TINY
from tests.finetune.test_train import losses, settings

WINDOW = 4
"""Of sliding attention in the causal models, far below the lengths that are tried."""

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "eos_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"scale_attn_by_inverse_layer_idx": True}),
}


@pytest.fixture
def folder(tmp_path, tokenizer):
    def make(family):
        settings, kind, more = MODELS[family]
        torch.manual_seed(2)
        kind(settings(vocab_size=len(tokenizer), **SHAPE, **more)).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


def rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator) for n in lengths]


def test_every_family_is_tried():
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_depends_on_every_other(folder, family):
    """Token j moves the input embedding of position j alone; its effect must reach each state i."""
    model, _ = load_model(folder(family), device="cpu")
    ids = rows(12)[0][None]
    model.config.shift = False
    seen = torch.zeros(12, 12, dtype=torch.bool)
    with torch.no_grad():
        base = model.hidden(ids)[0]
        for j in range(12):
            changed = ids.clone()
            changed[0, j] = 95
            seen[:, j] = (model.hidden(changed)[0] - base).abs().amax(-1) > 1e-5
    assert seen.all(), seen.int()
    with torch.no_grad():  # and an implementation of its own agrees with that of the kernels
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model.hidden(ids)[0], base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_partial_rows_have_the_states_of_the_row_alone(folder, family):
    model, _ = load_model(folder(family), device="cpu")
    lengths = [9, 3, 14]
    several = rows(*lengths)
    valid = torch.arange(14) < torch.tensor(lengths)[:, None]
    padded = torch.full((3, 14), 7)
    padded[valid] = torch.cat(several)
    with torch.no_grad():
        alone = torch.cat([model.hidden(row[None])[0] for row in several])
        packed = model.packed_hidden(torch.cat(several), lengths)
        partial = model.partial_hidden(padded, valid, valid, KeyValues(), torch.arange(3))
        for states in (packed, model.hidden(padded, valid)[valid], partial):
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


def test_gpt2_is_its_formula(folder):
    """Radford et al. 2019, written out: learned positions, layer norms before, no causal mask."""
    model, _ = load_model(folder("gpt2"), device="cpu")
    model.config.shift = False
    w = {name: value.detach() for name, value in model.backbone.state_dict().items()}
    ids, heads, width = rows(11)[0], 4, 32

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(2):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(width, -1)
        q, k, v = (y.view(-1, heads, width // heads).transpose(0, 1) for y in (q, k, v))
        scores = q @ k.mT / math.sqrt(width // heads) / (i + 1)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, width), f"h.{i}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids[None])[0], norm(x, "ln_f"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_exported_and_loaded_again_it_is_the_same_model(folder, family, tmp_path):
    model, tokenizer = load_model(folder(family), device="cpu")
    model.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    export(tmp_path / "one", tmp_path / "two", dtype="float32")
    ids = rows(10)[0][None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for path in (tmp_path / "one", tmp_path / "two"):
            again, _ = load_model(path, device="cpu")
            assert torch.equal(again(input_ids=ids).logits, expected)
            assert again.spec == model.spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_adapters_train_norms_and_updates_and_merge_exactly(folder, family, targets, tmp_path):
    path = folder(family)
    outputs = []
    for folded in (False, True):
        model = add_adapter(
            load_model(path, device="cpu")[0], str(path), r=4, alpha=8, targets=targets, folded=folded
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.2 * torch.randn(weight.shape, generator=generator)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        norms = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gpt2": 10}[family]
        assert sum("norm" in name or ".ln_" in name for name in trained) == norms
        linear = {("gpt2", "all"): 4, ("gpt2", "attention"): 1}.get(
            (family, targets), {"all": 7}.get(targets, 3)
        )
        assert sum("lora_A" in name for name in trained) == 2 * linear
        ids = rows(10)[0][None]
        ids[0, 4:6] = model.config.mask_token_id
        outputs.append(model.eval()(ids).logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    load_model(path, device="cpu")[1].save_pretrained(tmp_path / "adapter")
    for whole in (load_model(tmp_path / "adapter", device="cpu")[0], merged(model)):
        torch.testing.assert_close(whole(ids).logits, outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_a_run_starts_from_it(folder, family, tmp_path):
    train(settings(tmp_path / "run", model=ModelConfig(init=str(folder(family))), max_steps=12))
    curve = losses(tmp_path / "run")
    assert min(curve[11], curve[12]) < max(curve[1], curve[2]) - 0.2
    model, _ = load_model(tmp_path / "run", device="cpu")
    assert model.config.backbone["model_type"] == family
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules()), "noise is counted"


def test_a_model_that_gives_tuples_is_asked_for_names(folder):
    place, ids = folder("llama"), rows(9)[0][None]
    expected = load_model(place, device="cpu")[0](ids).logits
    file = place / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "return_dict": False}))
    assert torch.equal(load_model(place, device="cpu")[0](ids).logits, expected)
    assert load_causal_lm(place)[0](ids).logits.shape == expected.shape


def with_peft(model, folder, **settings):
    """What a user of peft writes: an adapter around a model, its numbers moved, saved by peft itself."""
    settings["fan_in_fan_out"] = settings["target_modules"] == ["c_attn"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@pytest.mark.parametrize(("family", "layers"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_an_adapter_that_peft_saved_on_a_causal_lm_is_one_more_causal_lm(folder, family, layers, tmp_path):
    base, saved = folder(family), tmp_path / "adapter"
    adapted = with_peft(
        AutoModelForCausalLM.from_pretrained(base), saved, target_modules=layers, task_type="CAUSAL_LM"
    )
    assert not (saved / "config.json").exists()
    assert is_causal_lm(str(saved))
    ids = rows(9)[0][None]
    with torch.no_grad():
        expected = adapted(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        assert not torch.allclose(expected, plain, atol=1e-2)
        torch.testing.assert_close(load_causal_lm(str(saved))[0](ids).logits, expected, rtol=1e-4, atol=1e-4)
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    load_model(base, device="cpu")[1].save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(saved, device="cpu")[0](ids).logits,
            load_model(tmp_path / "whole", device="cpu")[0](ids).logits,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    train(settings(tmp_path / "run", model=ModelConfig(init=str(saved)), max_steps=2))
    load_model(tmp_path / "run", device="cpu")


def test_an_adapter_that_peft_saved_on_a_diffusion_model_is_that_model(tokenizer, tmp_path):
    from_scratch(TINY, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_peft(
        load_model(tmp_path / "base", device="cpu")[0],
        tmp_path / "adapter",
        target_modules=["q_proj", "up_proj"],
    )
    ids = rows(9)[0][None]
    ids[0, 3:5] = tokenizer.mask_token_id
    loaded, tokens = load_model(tmp_path / "adapter", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(tokens) == len(tokenizer)
    assert describe(str(tmp_path / "adapter"))["adapter of"] == str(tmp_path / "base")
    export(tmp_path / "adapter", tmp_path / "given", dtype="float32")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "given", device="cpu")[0](ids).logits, loaded(ids).logits)


CHANGES = {
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "an embedding of its own": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings"
)
@pytest.mark.parametrize("changed", CHANGES)
def test_an_adapter_may_part_a_tied_head_from_its_embedding(tokenizer, tmp_path, changed):
    model = from_scratch(TINY, tokenizer)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_peft(
        load_model(tmp_path / "base", device="cpu")[0], tmp_path / "adapter", **CHANGES[changed]
    )
    ids = rows(9)[0][None]
    ids[0, 3:5] = tokenizer.mask_token_id
    loaded, _ = load_model(tmp_path / "adapter", device="cpu")
    export(tmp_path / "adapter", tmp_path / "given", dtype="float32")
    given, _ = load_model(tmp_path / "given", device="cpu")
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(given(ids).logits, loaded(ids).logits)


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings"
)
@pytest.mark.parametrize("changed", CHANGES)
def test_so_may_that_of_an_autoregressive_model(tokenizer, tmp_path, changed):
    torch.manual_seed(2)
    shape = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = with_peft(causal, tmp_path / "adapter", task_type="CAUSAL_LM", **CHANGES[changed])
    ids = rows(9)[0][None]
    with torch.no_grad():
        expected = adapted(ids).logits
        plain, _ = load_causal_lm(str(tmp_path / "adapter"))
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    train(settings(tmp_path / "run", model=ModelConfig(init=str(tmp_path / "adapter")), max_steps=2))
    load_model(tmp_path / "run", device="cpu")


def test_an_adapter_that_peft_saved_says_what_it_lacks(folder, tmp_path):
    base, saved = folder("llama"), tmp_path / "adapter"
    with_peft(AutoModelForCausalLM.from_pretrained(base), saved, target_modules=["q_proj"])
    file = saved / "adapter_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, "target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(
        CheckpointError, match=r"adapter: the adapter lacks 4 of its weights, the first is .*v_proj"
    ):
        load_model(saved, device="cpu")
    file.write_text(json.dumps({**given, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(
        CheckpointError, match=r"adapter: an adapter of /nowhere/base, which cannot be loaded"
    ):
        load_model(saved, device="cpu")


def test_a_family_that_cannot_be_made_bidirectional_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(
        CheckpointError,
        match="unknown architecture 'bloom'; known: .* to train from llama, mistral, qwen2, qwen3, gpt2",
    ):
        load_model(tmp_path, device="cpu")
