"""Contents of `config.json`: the backbone's own configuration and the fields that diffusion adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from dlm.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Backbone families (transformers `model_type`) whose attention can be made bidirectional."""

_DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")

_WITHOUT_EFFECT = (
    "transformers_version", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type",
    "return_dict", "output_attentions", "output_hidden_states", "use_cache", "pretraining_tp",
    "reorder_and_upcast_attn", "initializer_range", "chunk_size_feed_forward", "vocab_size",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
)  # fmt: skip
"""Fields of a backbone's configuration that change no hidden state: how it is begun, bounded or called."""


def bidirectional(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a causal decoder, changed in place: every position sees the whole row.

    Sliding windows are opened. Dropout is switched off: the masks of the forward process take its place, and
    all random numbers of a run are counted (`dlm.noise`).
    """
    config.is_causal, config.use_cache = False, False
    changes: dict[str, Any] = dict.fromkeys(_DROPOUTS, 0.0) | {
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if getattr(config, "layer_types", None):
        changes["layer_types"] = ["full_attention"] * config.num_hidden_layers
    for name, value in {**changes, **_CALLED}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


_CALLED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Settings of every call of a backbone, whatever its file says."""

BACKBONES = (*FAMILIES, "qwen3_experts", "ddit", "modernbert_headed")
"""All backbones; those beyond `FAMILIES` are of `dlm.families`."""

_BIDIRECTIONAL = ("ddit", "modernbert_headed")
"""Backbones whose positions see the whole row by birth."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


class MaskedDiffusionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a `MaskedDiffusionModel`.

    Attributes:
        backbone: configuration of the Hugging Face decoder inside, as a dictionary with `model_type`.
        vocab_size: rows of the embedding, the mask token's included.
        num_tokens: tokens that the tokenizer knows; ids from here on never come out.
        mask_token_id: id of the mask token.
        eos_token_id: id of the token that is written behind an answer.
        end_token_ids: further tokens that end an answer.
        closed_token_ids: tokens beside the mask that never come out.
        shift: True when the state at i-1 predicts token i (backbones that were autoregressive).
        training: how the checkpoint was made (initialisation, data, template, objective, steps).
        schedule: noise schedule (name and settings, see `dlm.schedule`); log-linear where it is not given.
        block_size: positions per block of a block-causal model; None where every position sees the whole row.
        block_lead: whether, with a shift, the first position of a block is written first (see `Visibility`).
        causal_context: whether positions of finished blocks see nothing behind themselves (see `Visibility`).
        generation: defaults of `dlm generate` for this checkpoint, fields of a `Request`.
        head_bias: whether the LM head has a bias.
        public: for a checkpoint that came from a public one, its family and its config.json.
    """

    model_type = "masked_diffusion"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden"]

    backbone: dict[str, Any] | None = None
    vocab_size: int = 0
    num_tokens: int = 0
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    end_token_ids: list[int] | None = None
    closed_token_ids: list[int] | None = None
    schedule: dict[str, Any] | None = None
    block_size: int | None = None
    block_lead: bool = True
    causal_context: bool = False
    pad_token_id: int | None = None
    shift: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    is_causal: bool = False
    training: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    head_bias: bool = False
    public: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from a dictionary; sizes that follow from `backbone` are not set from others.

        `peft` reads the config.json of a published base with the class of the model at hand.
        """
        derived = ("hidden_size", "max_positions")
        stored = {name: value for name, value in config_dict.items() if name not in derived}
        return super().from_dict(stored, **kwargs)

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's configuration object, told to attend in both directions.

        Raises:
            ConfigError: when the family is not one of `BACKBONES`.
        """
        settings = dict(self.backbone or {})
        family = str(settings.pop("model_type", None))
        if family not in BACKBONES:
            raise ConfigError(
                f"backbone family {family!r} is not supported; supported: {', '.join(BACKBONES)}"
            )
        config = AutoConfig.for_model(family, **{**settings, **_CALLED, "vocab_size": self.vocab_size})
        return config if family in _BIDIRECTIONAL else bidirectional(config)

    def forward_fields(self) -> dict[str, Any]:
        """Everything but the weights that states depend on, defaults included, under dotted names.

        Visibility is not among them: an adapter may be trained on blocks whose base sees the whole row.
        """
        backbone = {k: v for k, v in self.backbone_config().to_dict().items() if k not in _WITHOUT_EFFECT}
        shared = {name: getattr(self, name) for name in ("shift", "mask_token_id")}
        return flat({**backbone, **shared})

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int((self.backbone or {})["hidden_size"])

    @property
    def max_positions(self) -> int:
        """Longest window, in tokens, that the backbone's positions were made for."""
        return int((self.backbone or {}).get("max_position_embeddings", 2048))
