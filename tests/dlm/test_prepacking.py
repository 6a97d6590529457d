"""Packed weights: the same products, for computing alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.config import LoadConfig
from dlm import load_model, prepacking
from dlm.errors import ConfigError
from dlm.prepacking import PrepackedLinear, can_prepack, prepack, prepacked_layers
from tests.dlm.test_attention import tiny

needs_kernels = pytest.mark.skipif(not can_prepack(torch.float32), reason="PyTorch has no oneDNN here")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 16), (0,), (3, 0, 5), (600,)])
def test_a_packed_layer_is_the_layer(shape, bias, dtype):
    if not can_prepack(dtype):
        pytest.skip(f"oneDNN has no {dtype} here")
    torch.manual_seed(0)
    layer = nn.Linear(72, 40, bias=bias).to(dtype)
    x = torch.randn(*shape, 72, dtype=dtype)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    parts = x.double().abs() @ layer.weight.double().abs().T + 1
    with torch.inference_mode():
        y = PrepackedLinear(layer)(x)
    assert y.shape == (*shape, 40)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * parts).all()
    turned = x.transpose(0, -2).contiguous().transpose(0, -2)  # other strides
    assert torch.equal(PrepackedLinear(layer)(turned), PrepackedLinear(layer)(x))


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_become_one_with_their_outputs_side_by_side(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(24, size, bias=bias) for size in (16, 8, 40)]
    x = torch.randn(2, 5, 24)
    joined = PrepackedLinear(*layers)
    with torch.inference_mode():
        torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert joined.out_features == 64
    assert joined.numel == (24 + bias) * 64
    assert joined.nbytes == 4 * joined.numel


@needs_kernels
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_gives_the_states_of_the_model(dtype, groups):
    if not can_prepack(dtype):
        pytest.skip(f"oneDNN has no {dtype} here")
    exact = tiny(shift=True, groups=groups, dtype=torch.float64)
    model = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(model).double()
    packed = prepack(copy.deepcopy(model))
    kinds = [type(module).__name__ for module in packed.modules()]
    assert kinds.count("PrepackedLinear") == 3 * 4 + 1
    assert kinds.count("PrepackedAttention") == kinds.count("PrepackedMLP") == 3
    assert "Linear" not in kinds
    ids = torch.randint(0, 59, (3, 20), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(20) < torch.tensor([[20], [13], [7]])
    with torch.inference_mode():
        wanted = exact.logits(exact.hidden(ids, valid))[valid]
        got = packed.logits(packed.hidden(ids, valid))[valid]
        plain = model.logits(model.hidden(ids, valid))[valid]
    assert (got.isneginf() == wanted.isneginf()).all()
    assert wanted.isneginf().any()
    error, usual = ((x.double() - wanted)[~wanted.isneginf()].square().mean().sqrt() for x in (got, plain))
    assert 0 < error <= 2 * usual, "rounding, as the model itself has it"


@needs_kernels
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_causal_model_generates_as_before(attention):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    biases = {"attention_bias": True, "mlp_bias": True, "attn_implementation": attention}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **biases)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ids, count = torch.randint(0, 50, (2, 6)), model.num_parameters()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **settings)
    packed = prepack(model)
    assert len(prepacked_layers(packed)) == 2 * 4 + 1
    assert numbers(packed) == count
    assert torch.equal(packed.generate(ids, **settings), wanted)
    assert len(set(wanted.flatten().tolist())) > 6


def numbers(packed):
    """Numbers in the weights of a packed model."""
    return sum(layer.numel for layer in prepacked_layers(packed)) + packed.num_parameters()


@needs_kernels
def test_the_copy_of_a_shared_head_is_not_counted_twice(model):
    count = model.num_parameters()
    assert numbers(prepack(copy.deepcopy(model))) == count


def test_other_types_and_machines_without_the_kernels_keep_their_layers(monkeypatch):
    assert not prepacked_layers(prepack(tiny(dtype=torch.float64)))
    monkeypatch.setattr(prepacking, "can_prepack", lambda dtype: False)
    model = tiny(dtype=torch.float32)
    assert prepack(model) is model
    assert not prepacked_layers(model)


@needs_kernels
def test_commands_pack_and_python_does_when_it_is_asked(model, tokenizer, tmp_path):
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path)
    assert not prepacked_layers(load_model(tmp_path, "cpu")[0])
    assert prepacked_layers(LoadConfig(model=str(tmp_path), device="cpu").load()[0])
    model, _ = load_model(tmp_path, "cpu", prepacked=True)
    assert prepacked_layers(model)
    for misuse in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: model.to(torch.bfloat16),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
    ):
        with pytest.raises(ConfigError, match="prepacked weights only compute"):
            misuse()
