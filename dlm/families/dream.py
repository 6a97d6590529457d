"""Dream (arXiv 2508.15487) and DiffuCoder (2506.20639): Qwen2.5 with a shift, and an own tokenizer class."""

from __future__ import annotations

from typing import Any

from dlm.families.base import Family, Public, require

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "initializer_range",
    "tie_word_embeddings",
)


class Dream(Family):
    """Dream 7B Base and Instruct, Dream-Coder, DiffuCoder."""

    name = "dream"
    ids = ("Dream-org/Dream-v0-Base-7B", "Dream-org/Dream-v0-Instruct-7B", "apple/DiffuCoder-7B-Instruct")
    model_types = ("Dream", "dream")
    shift = True
    mask = "<|mask|>"
    ends = ("<|im_end|>", "<|endoftext|>")
    tokenizer_class = "Qwen2Tokenizer"
    generation = {  # noqa: RUF012
        "decoder": "dream",
        "options": {"temperature": 0.2, "top_p": 0.95},
        "canvas": "full",
        "max_tokens": 512,
        "steps": 512,
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Qwen2."""
        require(public, {"use_sliding_window": (False, None), "use_mrope": (False, None)})
        given = {name: public[name] for name in _SHAPE if public.get(name) is not None}
        return {"tie_word_embeddings": False, **given, "model_type": "qwen2"}
