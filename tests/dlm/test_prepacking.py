"""Packed weights: the same products, for computing alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

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
def test_a_packed_model_gives_the_states_of_the_model():
    model = tiny(shift=True, dtype=torch.float32)
    packed = prepack(copy.deepcopy(model))
    linear = [x for x in model.backbone.modules() if type(x) is nn.Linear]
    assert len(linear) == sum(isinstance(x, PrepackedLinear) for x in packed.modules()) == 3 * 7
    ids = torch.randint(0, 59, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(packed.hidden(ids), model.hidden(ids), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            packed.logits(packed.hidden(ids)), model.logits(model.hidden(ids)), rtol=1e-4, atol=1e-4
        )


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
