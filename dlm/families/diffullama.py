"""DiffuGPT and DiffuLLaMA (arXiv 2410.17891): GPT-2 and Llama 2, adapted to fill masks, with their shift."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm.families.base import Family
from dlm.families.fields import Public, is_named, stock_decoder, stock_settings


def _settings(temperature: float) -> dict[str, Any]:
    return {
        "decoder": "categorical",
        "options": {"temperature": temperature, "top_p": 0.9},
        "canvas": "full",
        "max_tokens": 256,
        "steps": 64,
        "eos_fill": False,
    }


class _Adapted(Family):
    """The common part of the adapted families."""

    shift = True
    mask = "[MASK]"

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text alone, behind the first token where there is one: a row cannot begin with a mask."""
        bos = "{{ bos_token }}" if tokenizer.bos_token else ""
        return bos + "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class DiffuGPT(_Adapted):
    """DiffuGPT small and medium; recognised by the names of its tensors, or its own name."""

    name = "diffugpt"
    ids = ("diffusionfamily/diffugpt-s", "diffusionfamily/diffugpt-m")
    model_types = ("gpt2",)
    tensors = {"denoise_model": "backbone", "embed_tokens": "backbone.wte"}  # noqa: RUF012
    derived = r"\.attn\.(masked_)?bias$"
    tokenizer_class = "GPT2Tokenizer"
    generation = _settings(0.95)

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`."""
        if not super().detect(public, path, names):
            return False
        return is_named(public, path, self.name) or any(name.startswith("denoise_model.") for name in names())

    def backbone(self, public: Public) -> dict[str, Any]:
        """A GPT-2, also under the names that other models have for its sizes."""
        settings = stock_settings(public)
        names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        sizes = {ours: settings[name] for name, ours in names.items() if name in settings}
        positions = settings.get("n_positions", 1024)
        return {
            "tie_word_embeddings": True,
            **settings,
            **sizes,
            "max_position_embeddings": positions,
            "model_type": "gpt2",
        }


class DiffuLLaMA(_Adapted):
    """DiffuLLaMA 7B, whose files are those of a Llama: recognised by its name."""

    name = "diffullama"
    ids = ("diffusionfamily/diffullama",)
    model_types = ("llama",)
    derived = r"rotary_emb\.inv_freq$"
    tokenizer_class = "LlamaTokenizer"
    generation = _settings(0.9)

    def detect(self, public: Public, path: str, names: Callable[[], Collection[str]]) -> bool:
        """See `Family`."""
        return super().detect(public, path, names) and is_named(public, path, self.name)

    def backbone(self, public: Public) -> dict[str, Any]:
        """A Llama."""
        return stock_decoder(public, "llama")
