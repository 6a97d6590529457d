import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decoding.config import LoadConfig
from dlm import load_model
from dlm.backbone import from_causal_lm
from dlm.checkpoint import place
from dlm.errors import CheckpointError, ConfigError
from dlm.model import IGNORE, aligned_linear
from eval.config import EvalConfig

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
CAUSAL = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


@pytest.fixture
def causal(tmp_path, tokenizer):
    def make(family="llama", tied=True, vocab=None):
        config_class, model_class = CAUSAL[family]
        vocab = vocab or len(tokenizer)
        torch.manual_seed(1)
        causal = model_class(
            config_class(vocab_size=vocab, tie_word_embeddings=tied, eos_token_id=0, **SHAPE)
        )
        causal.save_pretrained(tmp_path / family)
        plain = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        assert plain.mask_token is None
        plain.save_pretrained(tmp_path / family)
        return tmp_path / family, causal.eval()

    return make


def test_attention_is_all_to_all_and_padding_is_invisible(model):
    torch.manual_seed(0)
    x = torch.randint(0, 100, (2, 12))
    with torch.no_grad():
        base = model.hidden(x)
        changed = x.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 100
        assert ((model.hidden(changed) - base).abs().amax(-1) > 1e-6).all()
        padded = torch.cat([x, torch.randint(0, 100, (2, 5))], 1)
        mask = torch.arange(17).expand(2, -1) < 12
        assert torch.allclose(model.hidden(padded, mask)[:, :12], base, atol=1e-5)


def test_subs_mask_never_predicted_and_only_masked_positions_pass_the_head(model, tokenizer):
    x = torch.randint(0, 100, (2, 10))
    with torch.no_grad():
        logits = model(input_ids=x).logits
        assert torch.isinf(logits[..., tokenizer.mask_token_id]).all()
        assert torch.isfinite(logits.softmax(-1)).all()
        targets = torch.full_like(x, IGNORE)
        targets[0, 3], targets[1, 7] = 11, 12
        seen = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        out = model(input_ids=x, targets=targets)
        handle.remove()
    assert seen == [(2, 32)]
    expected = logits.log_softmax(-1)[torch.tensor([0, 1]), torch.tensor([3, 7]), torch.tensor([11, 12])]
    assert torch.allclose(out.token_logp, expected, atol=1e-5)


def test_shift_moves_states_by_one(model):
    x = torch.randint(0, 100, (1, 8))
    with torch.no_grad():
        plain = model.hidden(x)
        model.config.shift = True
        shifted = model.hidden(x)
    model.config.shift = False
    assert torch.equal(shifted[:, 1:], plain[:, :-1])


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("tied", [True, False])
def test_causal_lm_becomes_bidirectional_with_a_mean_initialised_mask(causal, family, tied):
    path, source = causal(family, tied)
    model, tokenizer = from_causal_lm(str(path))
    mask = tokenizer.mask_token_id
    table = source.get_input_embeddings().weight
    others = torch.arange(len(table)) != mask
    got = model.get_input_embeddings().weight
    assert torch.allclose(got[mask], table[others].mean(0), atol=1e-6)
    assert torch.equal(got[: len(table)][others], table[others])
    head = source.get_output_embeddings().weight
    assert torch.allclose(model.lm_head.weight[mask], head[others].mean(0), atol=1e-6)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    # with a causal mask the backbone is still the autoregressive model
    x = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        reference = source(x).logits
        length = x.shape[1]
        causal_mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        states = model.backbone(input_ids=x, attention_mask=causal_mask, use_cache=False, is_causal=False)
        again = model.logits(states.last_hidden_state)[..., : reference.shape[-1]]
    keep = [i for i in range(reference.shape[-1]) if i != mask]
    assert torch.allclose(again[..., keep], reference[..., keep], atol=1e-4)
    assert model.config.shift


def test_a_mask_token_that_was_already_there_keeps_its_embedding(causal, tokenizer):
    path, source = causal("llama")
    tokenizer.save_pretrained(path)  # this one has a mask token
    model, _ = from_causal_lm(str(path))
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_padded_vocabularies_never_produce_unknown_ids(causal, tokenizer):
    path, _ = causal("qwen2", vocab=len(tokenizer) + 37)
    model, tokenizer = from_causal_lm(str(path))
    with torch.no_grad():
        logits = model(input_ids=torch.randint(0, 90, (1, 6))).logits
    assert logits.shape[-1] == model.config.vocab_size
    assert torch.isinf(logits[..., len(tokenizer) :]).all()


def test_save_and_load_are_the_same_model(model, tokenizer, tmp_path, monkeypatch):
    model.config.generation = {"decoder": "conv", "window": 64, "steps": 8}
    model.config.training = {"init": "random weights"}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokens = load_model(tmp_path, device="cpu", dtype="float32")
    x = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)
    assert again.config.generation == model.config.generation
    assert tokens.chat_template == tokenizer.chat_template
    assert tokens.mask_token_id == again.config.mask_token_id
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "masked_diffusion"
    assert load_model(tmp_path, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    for can, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("dlm.checkpoint.computes_bfloat16", lambda can=can: can)
        for dtype in ({}, {"dtype": "auto"}, {"dtype": "fastest"}):
            assert load_model(tmp_path, device="cpu", **dtype)[0].dtype == expected
        assert LoadConfig(model=str(tmp_path), device="cpu").load()[0].dtype == expected
        assert place("cpu", EvalConfig("rules", model="x").dtype) == ("cpu", expected)


@pytest.mark.parametrize(
    "damage", ["truncate", "no_weights", "no_config", "json", "missing", "family", "tokenizer"]
)
def test_damaged_checkpoints_give_one_clear_error(model, tokenizer, tmp_path, damage):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    weights = tmp_path / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no_weights":
        weights.unlink()
    elif damage == "no_config":
        config.unlink()
    elif damage == "json":
        config.write_text(config.read_text()[:-20])
    elif damage == "missing":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        del state["backbone.norm.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "family":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "bert"}))
    elif damage == "tokenizer":
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "mask_token_id": 5}))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_model(tmp_path, device="cpu")


def test_unknown_places_and_dtypes_are_named():
    with pytest.raises(CheckpointError, match="/nowhere/at/all"):
        load_model("/nowhere/at/all")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model("/nowhere/model.gguf")
    with pytest.raises(ConfigError, match="'float31'.*Did you mean 'float32'"):
        load_model("x", dtype="float31")


def test_push_to_hub_uploads_what_loads_again(model, tokenizer, tmp_path, monkeypatch):
    import shutil

    from huggingface_hub import HfApi

    def commit(*_, operations, **__):
        for item in operations:
            shutil.copyfile(item.path_or_fileobj, tmp_path / item.path_in_repo)

    repo = type("Url", (), {"repo_id": "me/model"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    model.push_to_hub("me/model")
    tokenizer.push_to_hub("me/model")
    again, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_import_is_light():
    code = (
        "import sys, dlm, decoding; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {}, r"lacks \d+ weights, the first is"),
        (lambda weights: dict(list(weights.items())[1:]), "lacks 1 weights"),
        (lambda weights: {**weights, "model.more.weight": torch.zeros(3)}, "has 1 weights that its config"),
        (lambda weights: {**weights, "model.norm.weight": torch.zeros(3)}, "cannot be read|another shape"),
    ],
)
def test_a_causal_lm_whose_weights_are_others_is_refused(tokenizer, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from_causal_lm(str(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        from_causal_lm(str(tmp_path))


@torch.no_grad()
def test_under_causal_attention_it_is_the_autoregressive_base(causal):
    folder, base = causal("llama")
    model, _ = from_causal_lm(str(folder), template="chatml", shift=True)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 6:] = False
    targets = torch.where(valid & (torch.arange(9) > 2), ids, IGNORE)
    got = model(input_ids=ids, attention_mask=valid, targets=targets, causal=True).token_logp
    logits = base(ids).logits
    logits[..., model.config.mask_token_id : model.config.mask_token_id + 1] = -torch.inf
    logp = logits.log_softmax(-1)
    expected = [logp[b, i - 1, ids[b, i]] for b, i in (targets != IGNORE).nonzero().tolist()]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [64, 97, 130])
def test_the_aligned_head_is_the_head_and_has_its_gradients(vocabulary):
    parts = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (vocabulary, 8), (vocabulary,))]
    expected, found = torch.nn.functional.linear(*parts), aligned_linear(*parts)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weight).sum(), parts) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
