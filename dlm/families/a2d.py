"""A2D of dllm (arXiv 2602.22661): Qwen and Llama models that were taught to fill masks, without a shift."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm.families.base import Family
from dlm.families.fields import Public, is_named, require, stock_decoder, whole

_BASES = {"a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"}


class A2D(Family):
    """Qwen3-0.6B-diffusion-mdlm and its kin."""

    name = "a2d"
    ids = (
        "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
    )
    model_types = tuple(_BASES)
    mask = "<|mask|>"
    ends = ("<|im_end|>", "<|eot_id|>")
    tokenizer_class = "Qwen2Tokenizer"
    generation = {  # noqa: RUF012
        "decoder": "llada",
        "options": {"block_size": 32},
        "canvas": "full",
        "max_tokens": 128,
        "steps": 128,
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """The model of transformers that it was, whose configuration it keeps."""
        require(public, {"use_sliding_window": (False, None)})
        return stock_decoder(public, _BASES[public["model_type"]])

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The tokenizer's, answering without thinking where it asks."""
        text = super().template(tokenizer)
        return "{%- set enable_thinking = false -%}" + text if "enable_thinking" in text else text


A2D_BLOCK = 32
"""Positions per block of the published models, whose config.json does not say it."""


class A2DBlocks(A2D):
    """Qwen3-0.6B-diffusion-bd3lm and its kin: A2D in blocks; known by the name, which their files do not say.

    Blocks are counted from the first position of the row, as in their training. The published sampler pads
    the prompt on the left, so that a block begins with the answer; the two agree where the prompt is whole
    blocks long.
    """

    name = "a2d-bd3lm"
    ids = (
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
    )
    generation = {  # noqa: RUF012
        "decoder": "llada",
        "canvas": "full",
        "max_tokens": 128,
        "steps": 128,
        "eos_fill": False,
    }

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`."""
        return super().detect(public, path, names) and is_named(public, path, "bd3lm")

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """Blocks; see `Family`."""
        del path
        return {"block_size": whole(public, "block_size", default=A2D_BLOCK)}
