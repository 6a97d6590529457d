"""BERT-Chat of dllm: ModernBERT (arXiv 2412.13663), bidirectional by birth, tuned to fill masked answers.

Any ModernBERT with a language-model head is read the same way, as a base for training.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, ModernBertConfig, ModernBertModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert.modeling_modernbert import ModernBertPredictionHead

from dlm.families.base import Family
from dlm.families.fields import Public, stock_settings

_CHAT = (
    "{% if messages[0]['role'] == 'system' %}"
    "[SYS]\n{{ messages[0]['content'] | trim }}\n[/SYS]\n\n{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}[Question]\n"
    "{{ message['content'] | trim }}\n[/Question]\n\n{% elif message['role'] == 'assistant' %}[Answer]\n"
    "{{ message['content'] | trim }}\n[/Answer]\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}[Answer]\n{% endif %}"
)


class HeadedConfig(ModernBertConfig):  # type: ignore[misc]
    """Configuration of `HeadedModernBert`."""

    model_type = "modernbert_headed"


class HeadedModernBert(ModernBertModel):  # type: ignore[misc]
    """ModernBERT up to the states that the last linear layer of its language-model head reads."""

    config_class = HeadedConfig

    def __init__(self, config: HeadedConfig) -> None:
        super().__init__(config)
        self.head = ModernBertPredictionHead(config)
        self.post_init()

    def forward(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """States [B, L, D]; with a `layout`, which says itself who attends to whom, no masks are made."""
        kwargs.pop("use_cache", None)
        masks: Any = attention_mask
        if kwargs.get("layout") is not None:
            masks = dict.fromkeys(("full_attention", "sliding_attention"))
        states = super().forward(attention_mask=masks, **kwargs).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.head(states))


class BertChat(Family):
    """ModernBERT base and large, also as BERT-Chat."""

    name = "bert-chat"
    ids = ("dllm-hub/ModernBERT-base-chat-v0.1", "dllm-hub/ModernBERT-large-chat-v0.1")
    model_types = ("modernbert",)
    mask = "[MASK]"
    tensors = {  # noqa: RUF012
        "model": "backbone",
        "head": "backbone.head",
        "decoder": "lm_head",
    }
    generation = {  # noqa: RUF012
        "decoder": "llada",
        "options": {"block_size": 32},
        "canvas": "full",
        "max_tokens": 128,
        "steps": 128,
        "eos_fill": False,
        "stop": ["[/Answer]"],
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A ModernBERT, whose configuration is that of transformers; without dropout, as all bases here."""
        quiet: dict[str, Any] = dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.0)
        quiet["pad_token_id"] = None  # its row of the embedding is trained as the others are
        return {
            "tie_word_embeddings": True,
            **stock_settings(public),
            **quiet,
            "model_type": HeadedConfig.model_type,
        }

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """`head_bias`, true for a head with a bias; see `Family`."""
        del path
        return {"head_bias": bool(public.get("decoder_bias", True))}

    def end_id(self, public: Public, tokenizer: PreTrainedTokenizerBase) -> int:
        """The padding, where the tokenizer has no end token: with it training filled the rows."""
        for token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return int(token)
        return super().end_id(public, tokenizer)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Questions and answers in brackets, where the tokenizer has no template."""
        return str(tokenizer.chat_template or _CHAT)


AutoConfig.register(HeadedConfig.model_type, HeadedConfig, exist_ok=True)
AutoModel.register(HeadedConfig, HeadedModernBert, exist_ok=True)
