"""A2D of dllm (arXiv 2602.22661): Qwen and Llama models that were taught to fill masks, without a shift."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm.families.base import Family, Public, require, stock_settings

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
        return {
            "tie_word_embeddings": False,
            **stock_settings(public),
            "model_type": _BASES[public["model_type"]],
        }

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The tokenizer's, answering without thinking where it asks."""
        text = super().template(tokenizer)
        return "{%- set enable_thinking = false -%}" + text if "enable_thinking" in text else text
