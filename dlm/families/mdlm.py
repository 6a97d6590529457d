"""MDLM (arXiv 2406.07524): a DiT with GPT-2's tokens and a mask behind them."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from dlm.families.base import Family, has_file
from dlm.families.dit import DiTConfig
from dlm.families.fields import Public, layers_only, require, whole

SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_position_embeddings",
    "cond_dim": "cond_dim",
    "adaln": "adaln",
}

TENSORS = {
    "backbone.vocab_embed.embedding": "backbone.embed_tokens.weight",
    "backbone.blocks": "backbone.layers",
    "backbone.output_layer.norm_final": "backbone.norm",
    "backbone.output_layer.adaLN_modulation": "backbone.adaLN_modulation",
    "backbone.output_layer.linear": "lm_head",
}


class MDLM(Family):
    """MDLM trained on OpenWebText."""

    name = "mdlm"
    ids: ClassVar[tuple[str, ...]] = ("kuleshov-group/mdlm-owt",)
    model_types = ("mdlm",)
    mask = "[MASK]"
    tensors = TENSORS
    derived = r"rotary_emb\.inv_freq$"
    generation = {  # noqa: RUF012
        "decoder": "categorical",
        "canvas": "full",
        "window": 1024,
        "steps": 128,
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A DiT."""
        require(public, {"time_conditioning": (False,), "tie_word_embeddings": (False,)})
        return {"model_type": DiTConfig.model_type, **layers_only(public, SETTINGS)}

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """The head has a bias; see `Family`."""
        del public, path
        return {"head_bias": True}

    def mask_id(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> int:
        """The last row of the embedding."""
        del tokenizer
        return whole(public, "vocab_size") - 1

    def load_tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """GPT-2's, from the hub where the folder has none (the published repository has none)."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if has_file(path, "tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(path)
        where = path if has_file(path, "vocab.json") else "openai-community/gpt2"
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text alone, behind the token that every training row began with."""
        del tokenizer
        return "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
