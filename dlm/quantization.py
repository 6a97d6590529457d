"""Linear layers in 8 or 4 bits, by bitsandbytes, on CUDA and on a CPU.

"int8" is LLM.int8() (arXiv 2208.07339) with every column in 8 bits, so that a row's states do not depend on
the rows beside it. "nf4" is the 4-bit type of QLoRA (2305.14314), its scales in 8 bits. Quantised are the
linear layers within the repeated layers of the backbone. Embedding, LM head, norms, and what stands outside
those layers keep the type in which the model computes: they are looked up, or decide between close tokens.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from dlm.device import QUANTIZED, check_quantized

Model = TypeVar("Model", bound=nn.Module)

_OUTSIDE = r"(?!backbone\.(?:layers|h)\.).*|.*adaLN_modulation|.*\.mlp\.gate"
"""Pattern of the modules that stay as they are: all but those of the layers, and in these what conditions
them and what chooses experts."""

BLOCK = 64
"""Weights of NF4 that share a scale."""


def quantization_config(dtype: str, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """Transformers' settings for weights of a type; None for types that are not quantised.

    Args:
        dtype: one of `QUANTIZED`, or another.
        compute: type in which the layers compute.
    """
    if dtype not in QUANTIZED:
        return None
    check_quantized(dtype)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that it rounds
    return BitsAndBytesConfig(
        load_in_8bit=dtype == "int8",
        load_in_4bit=dtype == "nf4",
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=[_OUTSIDE],
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )


@torch.no_grad()
def quantize(model: Model, dtype: str) -> Model:
    """The model with its layers' linear weights in 8 or 4 bits, changed in place on its device.

    Args:
        model: with weights in a floating-point type, in which it goes on computing; one that is quantised
            already stays as it is.
        dtype: one of `QUANTIZED`.
    """
    if is_quantized(model):
        return _settled(model, dtype)
    from transformers.integrations.bitsandbytes import (
        Bnb4bitQuantize,
        Bnb8bitQuantize,
        replace_with_bnb_linear,
    )

    config = quantization_config(dtype, next(model.parameters()).dtype)
    convert = (Bnb8bitQuantize if dtype == "int8" else Bnb4bitQuantize)(None).convert
    parameters = dict(model.named_parameters())
    training = model.training
    replace_with_bnb_linear(model, [_OUTSIDE], config)
    for name, layer in quantized_layers(model):
        key = f"{name}.weight"
        (layer.weight,) = convert({key: parameters[key].data}, full_layer_name=key, model=model).values()
        if layer.bias is not None:
            layer.bias = parameters[f"{name}.bias"]
    return _settled(model, dtype).train(training)


def quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that are in 8 or 4 bits, with their names."""
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "source_cls")]


def is_quantized(model: nn.Module) -> bool:
    """True for a model with layers in 8 or 4 bits."""
    return any(hasattr(layer, "source_cls") for layer in model.modules())


def _settled(model: Model, dtype: str) -> Model:
    """The model with the marks that peft looks for, and without those for writing it as transformers would.

    Widths that the CPU's kernel for 4 bits has no place for are computed by the other one.
    """
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    for bits, name in ((8, "int8"), (4, "nf4")):
        setattr(model, f"is_loaded_in_{bits}bit", dtype == name)
    for _, layer in quantized_layers(model):
        if layer.out_features % 32 or layer.in_features % BLOCK:
            layer.support_avx512bf16_for_cpu = False
    return model


def differentiable(model: Model) -> Model:
    """The model with layers through which gradients pass; the CPU's fastest kernel for 4 bits has none."""
    for _, layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
    return model


def calculated_bytes(model: nn.Module, dtype: str, compute: torch.dtype) -> int:
    """Bytes that `weight_bytes` would count if a model were loaded with a type.

    Args:
        model: perhaps on the meta device, not quantised.
        dtype: one of `QUANTIZED`, or another for none.
        compute: type of the weights that are not quantised.
    """
    rounded = {
        id(layer.weight): quantized_bytes(layer.weight.shape, dtype)
        for name, layer in model.named_modules()
        if dtype in QUANTIZED and type(layer) in (nn.Linear, Conv1D) and not re.fullmatch(_OUTSIDE, name)
    }
    return sum(rounded.get(id(x), x.numel() * compute.itemsize) for x in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, counted; of those in 8 or 4 bits with their scales."""
    tensors = [x.data for x in model.parameters()]
    for _, layer in quantized_layers(model):
        weight = layer.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            tensors.append(weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB)
        else:
            tensors.append(state.absmax)
            tensors += [state.state2.absmax] if state.nested else []
    held = {x.data_ptr(): x.numel() * x.element_size() for x in tensors}
    return sum(held.values())


def quantized_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a matrix in 8 or 4 bits with its scales.

    One in float32 for each row ("int8"), or one in 16 bits for `BLOCK` weights ("nf4"): on a CPU, once it has
    computed. Before that, and on CUDA, the latter take half of it.
    """
    rows, size = shape[0], math.prod(shape)
    return size + 4 * rows if dtype == "int8" else -(-size // BLOCK) * (BLOCK // 2 + 2)
