"""Models for benchmarks: the shape of a real one with random weights, and answers that end where they should.

Speed does not depend on the values of weights, but it does on where answers end; so a random model is given
answers of a fixed length (`Ending`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dlm.backbone import ScratchConfig, from_scratch
from dlm.config import MaskedDiffusionConfig
from dlm.data.rules import make_examples
from dlm.device import to_device
from dlm.model import MaskedDiffusionModel
from dlm.spec import ModelSpec
from dlm.tokenizer import train_tokenizer

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
VOCAB = 49_153
MASK, EOS = VOCAB - 1, 2


def smollm2(device: str, dtype: torch.dtype) -> MaskedDiffusionModel:
    """A model of SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = MaskedDiffusionConfig(
        backbone=SMOLLM2,
        vocab_size=VOCAB,
        num_tokens=VOCAB,
        mask_token_id=MASK,
        eos_token_id=EOS,
        shift=True,
    )
    model = MaskedDiffusionModel(config)
    model.to(device, dtype).eval()
    return model


def tiny(seed: int = 1) -> tuple[MaskedDiffusionModel, PreTrainedTokenizerFast]:
    """A model of two small layers that writes letters at random and ends now and then, and its tokenizer."""
    examples = make_examples(200, seed=5)
    tokenizer = train_tokenizer([text for e in examples for text in (e.instruction, e.answer)], 400)
    torch.manual_seed(seed)
    sizes = ScratchConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = from_scratch(sizes, tokenizer).eval()
    model.config.generation = {"decoder": "conv", "rate": 2.0}
    return model, tokenizer


class Ending:
    """A model whose answers end at a given position, and nowhere before.

    Args:
        model: the model.
        at: position of the end token.
        padding: whether every position behind it is an end token too, as in models that were trained with
            `eos_loss: all`; else those behind it get anything but an end, as with `eos_loss: first`.
    """

    def __init__(self, model: MaskedDiffusionModel, at: int, padding: bool = False) -> None:
        self.model, self.at, self.padding = model, at, padding
        self.config, self.device, self.dtype, self.backbone = (
            model.config,
            model.device,
            model.dtype,
            model.backbone,
        )

    @property
    def spec(self) -> ModelSpec:
        """See `MaskedDiffusionModel`."""
        return self.model.spec

    @property
    def capabilities(self) -> frozenset[str]:
        """See `MaskedDiffusionModel`; states of shadows would have no mark."""
        return self.model.capabilities - {"shadows"}

    def _marked(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D + 1], the last number saying whether the answer ends there."""
        ends = to_device(position >= self.at if self.padding else position == self.at, hidden.device)
        return torch.cat([hidden, ends.to(hidden.dtype).expand(hidden.shape[:-1])[..., None]], dim=-1)

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **records: Any
    ) -> torch.Tensor:
        """[B, L] -> [B, L, D + 1]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self._marked(self.model.hidden(input_ids, attention_mask, **records), position)

    def packed_hidden(self, input_ids: torch.Tensor, lengths: Sequence[int], **records: Any) -> torch.Tensor:
        """[N] -> [N, D + 1]."""
        position = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths])
        return self._marked(self.model.packed_hidden(input_ids, lengths, **records), position)

    def new_memory(self) -> Any:
        """See `MaskedDiffusionModel`."""
        return self.model.new_memory()

    def partial_hidden(
        self, input_ids: torch.Tensor, active: torch.Tensor, *rest: Any, **records: Any
    ) -> torch.Tensor:
        """[B, L] -> [N, D + 1]."""
        return self._marked(
            self.model.partial_hidden(input_ids, active, *rest, **records), active.nonzero()[:, 1]
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D + 1] -> [..., V]."""
        logits = self.model.logits(hidden[..., :-1])
        ends = hidden[..., -1] > 0.5
        end = torch.where(ends, 1e4, -1e4).to(logits.dtype)
        logits[..., EOS] = end
        return logits
