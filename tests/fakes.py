"""Stand-ins for a model and a tokenizer: logits are a pure function of position and row content."""

from __future__ import annotations

import itertools
from functools import lru_cache
from types import SimpleNamespace

import torch

from dlm.noise import fold, key_of, uniform


@lru_cache(2**16)
def row_key(row: str) -> int:
    """The key of a row's ids."""
    return int(key_of("row", row))


class FakeDenoiser:
    """Logits that depend on (position, whole row) by a hash, so that any change of context shows.

    With `context=False` they depend on the position alone, which closed forms can follow.
    """

    def __init__(
        self, vocab: int = 23, mask_id: int = 22, eos_id: int = 0, context: bool = True, eos_bias: float = 0.0
    ):
        self.vocab, self.mask_id, self.eos_id, self.context, self.eos_bias = (
            vocab,
            mask_id,
            eos_id,
            context,
            eos_bias,
        )
        self.config = SimpleNamespace(mask_token_id=mask_id, eos_token_id=eos_id, generation=None)
        self.device = torch.device("cpu")
        self.calls = 0
        self.rows = 0

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        self.rows += len(input_ids)
        rows = input_ids.tolist()
        if attention_mask is not None:
            real = attention_mask.bool().tolist()
            rows = [list(itertools.compress(row, seen)) for row, seen in zip(rows, real, strict=True)]
        known = torch.tensor([row_key(repr(row) if self.context else "") for row in rows])
        return fold(known[:, None], torch.arange(input_ids.shape[1]))[..., None]  # [B, L, 1] int64

    capabilities = frozenset({"shadows"})

    def packed_hidden(self, ids, lengths, shadows=()):
        """States of packed rows; those of shadows are of the row with a mask there."""
        valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = ids.new_zeros(valid.shape)
        padded[valid] = ids
        for each in shadows:
            rows = [padded[i, : lengths[i]].tolist() for i in each.rows.tolist()]
            for row, position in zip(rows, each.positions.tolist(), strict=True):
                row[position] = self.mask_id
            known = torch.tensor([row_key(repr(row) if self.context else "") for row in rows])
            each.states = fold(known, each.positions)[:, None]
        return self.hidden(padded, valid)[valid]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        noise = uniform(hidden, torch.arange(self.vocab))  # [N, V]
        logits = 6 * noise
        logits[..., self.eos_id] += self.eos_bias
        logits[..., self.mask_id] = float("-inf")
        return logits


class FakeTokenizer:
    """Letters to ids 1 … 21; every prompt is `text` as it stands."""

    chat_template = "x"
    all_special_tokens = ("<eos>",)

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return "".join(m["content"] for m in messages)

    def __call__(self, text, add_special_tokens=False, **kwargs):
        return {"input_ids": [1 + (ord(c) % 21) for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i) for i in ids if i != 0)
