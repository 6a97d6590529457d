"""What decoding is compared with; the one place of this package that knows the insides of `decoding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eval.bench import Timed, as_causal, plain

__all__ = ["Timed", "as_causal", "autoregressive", "published"]


def published(model: Any, prompts: torch.Tensor, window: int, steps: int, tokens: int) -> Callable[[], int]:
    """The loop of the published code, as far as speed goes, for answers of so many tokens."""
    mask = int(model.config.mask_token_id)
    room = torch.full((len(prompts), window - prompts.shape[1]), mask, device=prompts.device)
    ids = torch.cat([prompts, room], dim=1)

    def write() -> int:
        plain(model, ids, mask, steps, window // 4 // 2 * 2 + 1, 20)
        return tokens * len(prompts)

    return write


def autoregressive(
    causal: Any, prompts: torch.Tensor, tokens: int, cache: str, compiled: bool
) -> Callable[[], int]:
    """`generate` of transformers with a cache ("dynamic" or "static"); gives the tokens written."""
    more = {} if cache == "dynamic" else {"cache_implementation": cache}

    @torch.inference_mode()
    def write() -> int:
        causal.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens,
            min_new_tokens=tokens, pad_token_id=0, disable_compile=not compiled, **more,
        )  # fmt: skip
        return tokens * len(prompts)

    return write
