"""Block-causal families on Qwen: SDAR (arXiv 2510.06303) and Fast-dLLM v2 (2509.26328)."""

from __future__ import annotations

import logging
from typing import Any

from dlm.families.base import Family
from dlm.families.fields import Public, number_named, require, stock_decoder, whole

logger = logging.getLogger(__name__)

SDAR_BLOCK = 4
"""Positions per block of SDAR where neither config.json nor the name says it, as for the chat models."""


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
        return stock_decoder(public, "qwen3")

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """Blocks, of the size that config.json says, or the name ("-b16"); see `Family`."""
        for name in ("block_size", "block_length"):
            if public.get(name) is not None:
                return {"block_size": whole(public, name)}
        size = number_named(public, path, r"-b(\d+)(?=-|$)")
        if size:  # kept in the public configuration, as a conversion back may have another name
            origin = {"family": self.name, "config": {**public, "block_size": size}}
            return {"block_size": size, "public": origin}
        if path.rstrip("/").split("/")[-1] not in {known_id.split("/")[-1] for known_id in self.ids}:
            logger.warning(
                '%s: blocks of %d are assumed; for others, say "block_size" in config.json', path, SDAR_BLOCK
            )
        return {"block_size": SDAR_BLOCK}


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
        return stock_decoder({name: x for name, x in public.items() if name != "bd_size"}, "qwen2")

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """Blocks; see `Family`."""
        del path
        return {"block_size": whole(public, "bd_size", default=32)}
