"""The model as decoding sees it, and one call over rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dlm.device import sent


class Denoiser(Protocol):
    """A model as decoding sees it; `MaskedDiffusionModel` is one, and tests bring their own.

    Ids and masks come from the host, whatever device the model is on. What a model can do beyond this it
    declares in `capabilities`: "packed" (`packed_hidden`) and "partial" (`partial_hidden`, `new_memory`; keys
    and values can be reused), see `dlm.model`.
    """

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V], the mask column -inf."""
        ...


def can(model: Any, capability: str) -> bool:
    """True when the model declares a capability."""
    return capability in getattr(model, "capabilities", frozenset())


def hidden_of_rows(model: Any, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """One model call over rows of these lengths: packed end to end where the model can, else padded.

    Args:
        model: see `Denoiser`.
        ids: [N] int64, the rows end to end.
        lengths: of each row; their sum is N.

    Returns:
        [N, D].
    """
    if len(set(lengths)) == 1:
        return model.hidden(ids.view(len(lengths), -1)).flatten(0, 1)  # type: ignore[no-any-return]
    if can(model, "packed"):
        return model.packed_hidden(ids, lengths)  # type: ignore[no-any-return]
    size = torch.tensor(lengths)
    valid = torch.arange(int(max(lengths))) < size[:, None]
    padded = ids.new_zeros(valid.shape)
    padded[valid] = ids
    states = model.hidden(padded, valid)
    row, position = (sent(x, states.device) for x in valid.nonzero().unbind(1))
    return states[row, position]  # type: ignore[no-any-return]
