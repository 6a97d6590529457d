"""Dream (arXiv 2508.15487) and DiffuCoder (2506.20639): Qwen2.5 with a shift, and an own tokenizer class."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from dlm.config import MaskedDiffusionConfig
from dlm.families.base import Family
from dlm.families.fields import Public, is_named, key_value_heads, places, require, rotary

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
    "initializer_range",
    "tie_word_embeddings",
)


class Dream(Family):
    """Dream 7B Base and Instruct, Dream-Coder."""

    name = "dream"
    ids: ClassVar[tuple[str, ...]] = (
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-v0-Instruct-7B",
    )
    model_types = ("Dream", "dream")
    shift = True
    mask = "<|mask|>"
    ends: ClassVar[tuple[str, ...]] = ("<|im_end|>", "<|endoftext|>")
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
        settings = {name: public[name] for name in _SHAPE if public.get(name) is not None}
        return {
            "tie_word_embeddings": False,
            **settings,
            **key_value_heads(public),
            "rope_parameters": rotary(public),
            "model_type": "qwen2",
        }


class DiffuCoder(Dream):
    """DiffuCoder 7B Base, Instruct and cpGRPO: Dream's layout, known by its name; each has a temperature."""

    name = "diffucoder"
    ids: ClassVar[tuple[str, ...]] = tuple(
        f"apple/DiffuCoder-7B-{kind}" for kind in ("Base", "Instruct", "cpGRPO")
    )
    ends: ClassVar[tuple[str, ...]] = (*Dream.ends, "<|dlm_pad|>")
    generation = {  # noqa: RUF012
        **Dream.generation,
        "options": {"temperature": 0.3, "top_p": 0.95},
        "max_tokens": 256,
        "steps": 256,
    }

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`; known by its name."""
        return super().detect(public, path, names) and is_named(public, path, self.name)

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """The temperature of Base, Instruct or cpGRPO, by the name; see `Family`."""
        temperatures = {"-base": 0.2, "-instruct": 0.3, "-cpgrpo": 0.4}
        named = [
            temperatures[kind] for place in places(public, path) for kind in temperatures if kind in place
        ]
        options = {**self.generation["options"], "temperature": [*named, 0.3][0]}
        return {"generation": {**self.generation, "options": options}}


class DreamOn(Dream):
    """DreamOn (arXiv 2602.01326): Dream that was taught to make gaps longer and shorter while it fills them.

    It is read as a Dream, and gaps keep their length: <|expand|> and <|delete|> never come out.
    """

    name = "dreamon"
    ids: ClassVar[tuple[str, ...]] = ("Dream-org/DreamOn-v0-7B",)
    generation = {**Dream.generation, "options": {"temperature": 0.2, "top_p": 0.9}}  # noqa: RUF012

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`; known by its name."""
        return super().detect(public, path, names) and is_named(public, path, "dreamon")

    def config(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> MaskedDiffusionConfig:
        """See `Family`."""
        config = super().config(public, tokenizer)
        vocab = tokenizer.get_vocab()
        config.closed_token_ids = [vocab[token] for token in ("<|expand|>", "<|delete|>") if token in vocab]
        return config
