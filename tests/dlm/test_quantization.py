"""Layers in 8 and 4 bits against an independent rounding, their bytes and gradients, and what is refused."""

import importlib.util
from copy import deepcopy
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoding import Sampler
from decoding.config import LoadConfig
from dlm import load_model
from dlm.adapter import add_adapter
from dlm.backbone import ScratchConfig, from_scratch
from dlm.checkpoint import place
from dlm.commands.inspect import describe
from dlm.device import QUANTIZED
from dlm.errors import ConfigError
from dlm.memory import room
from dlm.quantization import (
    calculated_bytes,
    differentiable,
    is_quantized,
    quantize,
    quantized_bytes,
    quantized_layers,
    weight_bytes,
)
from finetune.config import LoraConfig
from tests.dlm.families.layouts import LAYOUTS

pytest.importorskip("bitsandbytes")


def nf4_values():
    """The 16 values of NF4 by QLoRA's section 3: quantiles of the normal distribution, scaled to 1."""
    inverse, offset = NormalDist().inv_cdf, 0.9677083
    positive = [inverse(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-inverse(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*positive, *negative, 0.0]))
    return values / values.abs().max()


def nf4_rounded(weight):
    """The weight in NF4 with exact scales, and how far rounding the scales to 8 bits may move it.

    A scale loses the mean of all, and the rest becomes one of 256 values between the extremes of 256 scales,
    the widest of which are 0.9 / 64 apart.
    """
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    place = (blocks[..., None] / scale[..., None] - nf4_values()).abs().argmin(-1)
    values = nf4_values()[place]
    loss = values.abs() * (scale - scale.mean()).abs().max() * 0.9 / 64 / 2
    return [x.flatten()[: weight.numel()].view_as(weight) for x in (values * scale, loss)]


def int8_rounded(x):
    """The rows of a matrix in 8 bits, by their largest value, from half precision."""
    half = x.half().float()
    scale = half.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (half / scale).round() * scale


def dequantised(layer):
    """The weight of a layer as bitsandbytes reads it, from the layer's answer to the unit vectors."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(layer.weight, "quant_state"):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scale = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scale)


def tiny(tokenizer):
    shape = ScratchConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return from_scratch(shape, tokenizer, seed=3).eval()


@pytest.fixture
def model(base):
    return tiny(deepcopy(base))


@torch.no_grad()
def test_nf4_is_the_nearest_of_sixteen_normal_quantiles_by_blocks_of_64(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    quantize(model, "nf4")
    assert len(quantized_layers(model)) == 2 * 7
    for name, layer in quantized_layers(model):
        nearest, loss = nf4_rounded(before[f"{name}.weight"])
        weight = before[f"{name}.weight"]
        away, least = ((each - weight).abs() for each in (dequantised(layer), nearest))
        assert (away <= least + loss + 1e-5).all()  # between two values both are nearest
        x = torch.randn(5, layer.in_features)
        exact = F.linear(x, dequantised(layer))
        layer.support_avx512bf16_for_cpu = False  # the kernel that computes in the type that comes in
        assert torch.allclose(layer(x), exact, atol=1e-5)


@torch.no_grad()
def test_the_kernel_for_4_bits_on_a_cpu_is_exact_up_to_bfloat16(model):
    quantize(model.bfloat16(), "nf4")
    for _, layer in quantized_layers(model):
        weight, x = dequantised(layer), torch.randn(5, layer.in_features).bfloat16()
        exact, parts = F.linear(x.float(), weight), F.linear(x.float().abs(), weight.abs())
        assert ((layer(x).float() - exact).abs() <= 4 * 2**-9 * parts + 1e-6).all()  # scale, weight, x·w, sum


@torch.no_grad()
def test_int8_rounds_weights_and_what_comes_in_by_rows(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    quantize(model, "int8")
    for name, layer in quantized_layers(model):
        weight, x = before[f"{name}.weight"], torch.randn(5, layer.in_features)
        step = weight.abs().amax(1, keepdim=True) / 127
        half = 2 * 127 * 2**-11  # steps: weight and scale go through half precision
        assert ((dequantised(layer) - weight).abs() <= (0.5 + half) * step).all()
        exact = F.linear(int8_rounded(x), dequantised(layer))
        assert torch.allclose(layer(x), exact, atol=2e-3 * float(exact.abs().max()))


class Rounded(nn.Module):
    """A linear layer whose weight is rounded beforehand, and whose input is in 8 bits if need be."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = dequantised(layer), layer.bias
        self.inputs = (lambda x: x) if hasattr(layer.weight, "quant_state") else int8_rounded

    def forward(self, x):
        return F.linear(self.inputs(x), self.weight, self.bias)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_the_rounded_weights_in_every_layout_of_rows(name, dtype, tmp_path, base):
    folder = LAYOUTS[name]().write(tmp_path / "public", base, shards=2)
    model = differentiable(quantize(load_model(folder, device="cpu", dtype="float32")[0], dtype))
    plain = load_model(folder, device="cpu", dtype="float32")[0]
    layers = quantized_layers(model)
    assert {layer.weight.dtype for _, layer in layers} == {torch.int8 if dtype == "int8" else torch.uint8}
    for place_, layer in layers:
        plain.set_submodule(place_, Rounded(layer))
    lengths = (11, 7, 41)
    rows = torch.randint(0, model.config.num_tokens, (3, 41), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(41) < torch.tensor(lengths)[:, None]
    known = torch.isfinite(plain(rows[:1]).logits[0, 0])
    exact = plain.logits(plain.hidden(rows, valid))[valid][:, known]
    bound = 1e-3 if dtype == "nf4" else 0.03  # a state between two steps of 1/127 is rounded to either
    number, memory = torch.arange(3), model.new_memory()
    for hidden in (
        model.hidden(rows, valid)[valid],
        model.packed_hidden(rows[valid], lengths),
        model.partial_hidden(rows, valid, valid, memory, number),
    ):
        assert (model.logits(hidden)[:, known] - exact).norm() < bound * exact.norm()


@torch.no_grad()
def test_a_row_in_8_bits_does_not_depend_on_its_neighbours(model):
    _, layer = quantized_layers(quantize(model, "int8"))[0]
    row, beside = torch.randn(2, 1, 9, 64).clamp(-3, 3)
    beside[0, 4, 7] = 50.0  # which LLM.int8() would compute, with its column, in 16 bits
    assert torch.allclose(layer(torch.cat([row, beside]))[:1], layer(row), atol=1e-5)


@pytest.mark.parametrize("dtype", QUANTIZED)
@torch.no_grad()
def test_bytes_counted_are_those_calculated(model, dtype):
    before = weight_bytes(model)
    shapes = [layer.weight.shape for layer in model.layers.modules() if isinstance(layer, nn.Linear)]
    rest = before - 4 * sum(shape.numel() for shape in shapes)
    calculated = calculated_bytes(model, dtype, torch.float32)
    assert calculated_bytes(model, "float32", torch.float32) == before
    assert calculated == rest + sum(quantized_bytes(shape, dtype) for shape in shapes)
    per_weight = {"int8": 1 + 4 / 64, "nf4": 0.5 + 2 / 64}[dtype]
    assert quantized_bytes((10, 64), dtype) == 640 * per_weight
    quantize(model, dtype)
    counted = weight_bytes(model)
    if dtype == "int8":
        assert counted == calculated
        return
    blocks = sum(shape.numel() // 64 for shape in shapes)
    groups = sum(-(-shape.numel() // 64 // 256) for shape in shapes)
    assert counted == calculated - blocks + 4 * groups  # scales of 8 bits until the CPU computes


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_model_is_rounded_while_it_is_read_and_writes_texts(dtype, tmp_path, base):
    folder = LAYOUTS["llada"]().write(tmp_path / "public", base, shards=2)
    model, tokenizer = load_model(folder, device="cpu", dtype=dtype)
    assert is_quantized(model)
    assert model.lm_head.weight.dtype == model.dtype == place("cpu")[1]
    again = quantize(load_model(folder, device="cpu")[0], dtype)
    row = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(row).logits, again(row).logits)
    sampler = LoadConfig(model=str(folder), device="cpu", dtype=dtype).sampler()
    first, second = (
        each.generate("Say it.", max_tokens=32, seed=3).token_ids
        for each in (sampler, Sampler(model, tokenizer))
    )
    assert first == second
    assert len(first) <= 32
    assert model.config.mask_token_id not in first
    for _, layer in quantized_layers(model):
        assert not layer.weight.requires_grad
    with pytest.raises(ConfigError, match=r"8 or 4 bits are not written: load the model in"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"quantised already: load it in bfloat16"):
        add_adapter(model, "x", r=2, alpha=2)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_an_adapter_has_the_gradient_of_the_rounded_weights(model, base, dtype):
    plain = tiny(deepcopy(base))
    rounded = add_adapter(model, "x", r=4, alpha=8, quantized=dtype)
    rows = torch.randint(0, 200, (2, 17))
    noisy = torch.where(torch.rand(rows.shape) < 0.5, model.config.mask_token_id, rows)
    with torch.no_grad():
        rounded(rows)  # a validation does not leave the layers without gradients
        for name, layer in quantized_layers(rounded.base_model.model):
            plain.get_submodule(name.replace(".base_layer", "")).weight.copy_(dequantised(layer))
    exact = add_adapter(plain, "x", r=4, alpha=8)
    gradients = []
    for each in (rounded, exact):
        with torch.no_grad():
            for name, x in each.named_parameters():
                if "lora_B" in name:
                    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        each.train()(noisy, targets=rows).token_logp.sum().backward()
        gradients.append({name: x.grad for name, x in each.named_parameters() if x.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 28
    for name, gradient in gradients[1].items():
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < (1e-4 if dtype == "nf4" else 0.1), name  # inputs in 8 bits


def test_what_cannot_be_is_refused_in_one_line(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"dtype nf4 is for cpu and cuda, got device 'mps'"):
        place("mps", "nf4")
    with pytest.raises(ConfigError, match=r"unknown dtype 'int4'.*nf4"):
        place("cpu", "int4")
    for option in ("fold", "merge"):
        with pytest.raises(ConfigError, match=rf"lora.{option} needs the base's own weights"):
            LoraConfig(r=2, base_dtype="nf4", **{option: True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refused in (
        lambda: load_model("default", dtype="int8"),
        lambda: LoadConfig(dtype="int8"),
        lambda: LoraConfig(r=2, base_dtype="int8"),
    ):
        with pytest.raises(ConfigError, match=r'int8 needs .* bitsandbytes: pip install "\.\[quantized\]"'):
            refused()


def test_inspect_says_whether_a_model_fits_in_8_and_4_bits(tmp_path, base):
    layout = LAYOUTS["llada"]()
    facts = describe(str(layout.write(tmp_path / "public", base)))
    model = load_model(tmp_path / "public", device="cpu", dtype="float32")[0]
    for dtype in QUANTIZED:
        assert facts[f"fits in {dtype}"][:11] == str(room(calculated_bytes(model, dtype, place()[1])))[:11]
    assert room(2 * 10**9, "cpu").needed == int(2 * 10**9 * 1.15)
