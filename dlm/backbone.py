"""First weights of a model: random numbers, or a causal language model made bidirectional."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dlm.adapter_files import base_of, is_adapter
from dlm.causal import read_causal_lm, read_tokenizer
from dlm.config import MaskedDiffusionConfig
from dlm.device import cast_weights
from dlm.errors import ConfigError, check_whole
from dlm.model import MaskedDiffusionModel
from dlm.pretrained.names import located
from dlm.tokenizer import prepare_tokenizer


@dataclass(frozen=True)
class ScratchConfig:
    """Shape of a model that starts from random weights (Llama architecture).

    Args:
        hidden_size: width D of the model.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads per layer.
        intermediate_size: width of the feed-forward part.
        vocab_size: tokens of the byte-level BPE tokenizer that is trained on the data.
        max_position_embeddings: longest window in tokens.
        initializer_range: standard deviation of the first weights; 0 for 1/sqrt(hidden_size).
    """

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1408
    vocab_size: int = 16384
    max_position_embeddings: int = 2048
    initializer_range: float = 0.0

    def __post_init__(self) -> None:
        """Check the sizes: the heads divide the width, and each has an even one, for its rotary positions."""
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            check_whole(name, getattr(self, name))
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads "
                f"{self.num_attention_heads}: each head has an even width"
            )


def from_scratch(
    config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> MaskedDiffusionModel:
    """A Llama-type model with random weights for `tokenizer`."""
    shape = {**vars(config), "model_type": "llama", "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    shape["initializer_range"] = config.initializer_range or config.hidden_size**-0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedDiffusionModel(_wrapping_config(shape, tokenizer, shift=False))


def from_causal_lm(
    path: str | Path, *, template: str = "chatml", shift: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerBase]:
    """Turn an autoregressive checkpoint into a masked diffusion model that is ready to be fine-tuned.

    The weights are kept, attention becomes all-to-all, and a mask token is added whose embedding is the
    mean of the others (arXiv 2410.17891).

    Args:
        path: hub id, folder, or `.gguf` file of a model of one of `FAMILIES`, or folder of an adapter that
            peft saved; or "smollm2-135m-instruct".
        template: name of the chat template to record, or "model" for the checkpoint's own.
        shift: whether the state at i-1 keeps predicting token i.
        dtype: type of the weights.

    Raises:
        CheckpointError: when the checkpoint cannot be read or is of another family.
    """
    causal, tokenizer = load_causal_lm(path, dtype, all_to_all=True)
    new_mask = prepare_tokenizer(tokenizer, template)
    return _wrap(causal, tokenizer, shift, new_mask), tokenizer


def load_causal_lm(
    path: str | Path, dtype: torch.dtype = torch.float32, *, all_to_all: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """An autoregressive model of transformers as it is, and its tokenizer.

    Args:
        path: hub id, folder, or `.gguf` file; the folder of an adapter that peft saved, which is merged; or
            "smollm2-135m-instruct".
        dtype: type of the weights.
        all_to_all: whether every position is to see the whole row; only `FAMILIES` can.

    Raises:
        CheckpointError: when the checkpoint cannot be read, is of another family, or lacks weights.
    """
    path = located(path)
    if not is_adapter(path):
        return read_causal_lm(path, dtype, all_to_all=all_to_all)
    from dlm.adapter import with_adapter

    causal, tokenizer = load_causal_lm(base_of(path), all_to_all=all_to_all)
    tokenizer = _adapters_tokenizer(path) or tokenizer
    if len(tokenizer) > causal.config.vocab_size:  # tokens that were added before the adapter was trained
        causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return cast_weights(with_adapter(causal, path), dtype), tokenizer


def causal_tokenizer(path: str | Path, template: str = "chatml") -> PreTrainedTokenizerBase:
    """The tokenizer that `from_causal_lm` gives, without the weights; errors as there."""
    tokenizer = _causal_tokenizer(located(path))
    prepare_tokenizer(tokenizer, template)
    return tokenizer


def _causal_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if is_adapter(path):
        return _adapters_tokenizer(path) or _causal_tokenizer(located(base_of(path)))
    return read_tokenizer(path)


def _adapters_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder; None where there is none."""
    if not (Path(path) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _wrapping_config(
    backbone: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shift: bool
) -> MaskedDiffusionConfig:
    return MaskedDiffusionConfig(
        backbone=backbone,
        vocab_size=max(backbone["vocab_size"], len(tokenizer)),
        num_tokens=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        shift=shift,
        tie_word_embeddings=bool(backbone.get("tie_word_embeddings", False)),
        initializer_range=float(backbone.get("initializer_range", 0.02)),
    )


_NOT_ARCHITECTURE = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
)


def _wrap(
    causal: Any, tokenizer: PreTrainedTokenizerBase, shift: bool, initialise_mask: bool
) -> MaskedDiffusionModel:
    """Move the weights of a causal LM into a `MaskedDiffusionModel`, mask row included."""
    backbone = {k: v for k, v in causal.config.to_diff_dict().items() if k not in _NOT_ARCHITECTURE}
    backbone.update(model_type=causal.config.model_type, vocab_size=causal.config.vocab_size)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        backbone.setdefault(key, getattr(causal.config, key))
    backbone["tie_word_embeddings"] = bool(causal.config.tie_word_embeddings)
    config = _wrapping_config(backbone, tokenizer, shift)
    _resize(causal, config, initialise_mask)
    with torch.device("meta"):
        model = MaskedDiffusionModel(config)
    model.backbone = causal.base_model
    model.set_attn_implementation(causal.config._attn_implementation)
    model.lm_head.weight = causal.get_output_embeddings().weight
    model.tie_weights()
    return model


def _resize(causal: Any, config: MaskedDiffusionConfig, initialise_mask: bool) -> None:
    """Make room for the added tokens; their rows, and a new mask token's, become the mean of the others."""
    size = causal.get_input_embeddings().weight.shape[0]
    causal.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    tables = [causal.get_input_embeddings().weight, causal.get_output_embeddings().weight]
    new = torch.arange(config.vocab_size) >= size
    if initialise_mask:
        new[config.mask_token_id] = True
    with torch.no_grad():
        for table in tables[: 1 if tables[0] is tables[1] else 2]:
            table[new] = table[~new].mean(dim=0)
