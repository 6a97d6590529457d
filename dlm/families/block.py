"""Block-causal families on Qwen: SDAR (arXiv 2510.06303) and Fast-dLLM v2 (2509.26328)."""

from __future__ import annotations

from typing import Any

from dlm.families.base import Family, Public, require, stock_settings

SDAR_BLOCK = 4
"""Positions per block of the published SDAR chat models, whose config.json does not say it."""


class SDAR(Family):
    """SDAR 1.7B, 4B and 8B: Qwen3 in blocks of 4, without a shift."""

    name = "sdar"
    ids = ("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-4B-Chat", "JetLM/SDAR-8B-Chat")
    model_types = ("sdar",)
    mask = "<|MASK|>"
    ends = ("<|im_end|>", "<|endoftext|>")
    tokenizer_class = "Qwen2Tokenizer"
    generation = {  # noqa: RUF012
        "decoder": "threshold",
        "options": {"tau": 0.9, "temperature": 1.0},
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Qwen3."""
        require(public, {"use_sliding_window": (False, None)})
        return {"tie_word_embeddings": False, **stock_settings(public), "model_type": "qwen3"}

    def extra(self, public: Public) -> dict[str, Any]:
        """Blocks; see `Family`."""
        return {"block_size": int(public.get("block_size") or public.get("block_length") or SDAR_BLOCK)}


class FastDLLM(Family):
    """Fast-dLLM v2 1.5B and 7B: Qwen2.5 in blocks of 32, with a shift."""

    name = "fast-dllm-v2"
    ids = ("Efficient-Large-Model/Fast_dLLM_v2_1.5B", "Efficient-Large-Model/Fast_dLLM_v2_7B")
    model_types = ("Fast_dLLM_Qwen",)
    shift = True
    mask = "|<MASK>|"
    ends = ("<|im_end|>", "<|endoftext|>")
    tokenizer_class = "Qwen2Tokenizer"
    generation = {  # noqa: RUF012
        "decoder": "block-threshold",
        "options": {"block_size": 8, "tau": 0.9},
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Qwen2."""
        require(public, {"use_sliding_window": (False, None)})
        given = stock_settings(public)
        given.pop("bd_size", None)
        return {"tie_word_embeddings": False, **given, "model_type": "qwen2"}

    def extra(self, public: Public) -> dict[str, Any]:
        """Blocks; see `Family`."""
        return {"block_size": int(public.get("bd_size", 32))}
