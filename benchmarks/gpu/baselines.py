"""Baselines of decoding; the one place of this package that knows the insides of `decoding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from eval.bench import Timed, as_causal, published_loop

__all__ = ["Graphed", "Timed", "as_causal", "autoregressive", "published"]


def published(model: Any, prompts: torch.Tensor, window: int, steps: int, tokens: int) -> Callable[[], int]:
    """The loop of the published code, as far as speed goes, for answers of so many tokens."""
    mask = int(model.config.mask_token_id)
    room = torch.full((len(prompts), window - prompts.shape[1]), mask, device=prompts.device)
    ids = torch.cat([prompts, room], dim=1)

    def write() -> int:
        published_loop(model, ids, mask, steps, window // 4 // 2 * 2 + 1, 20)
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


class Graphed:
    """Greedy autoregressive decoding with a static cache, a token being one replay of a CUDA graph.

    On a CPU the call is made instead of replayed.

    Args:
        causal: a causal model of transformers.
        prompts: [B, n] int64.
        tokens: of each answer.
    """

    @torch.inference_mode()
    def __init__(self, causal: Any, prompts: torch.Tensor, tokens: int) -> None:
        self.causal, self.prompts, device = causal, prompts, prompts.device
        rows, self.width = prompts.shape
        self.cache = StaticCache(config=causal.config, max_cache_len=self.width + tokens)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.text = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.places = torch.arange(self.width + tokens, device=device)
        self.replay = self._recorded() if device.type == "cuda" else self._step

    def _recorded(self) -> Callable[[], None]:
        """The call for a token, as a graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._prefill()
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._prefill()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[B, A] ids at `positions` [A] -> [B, V], those of the last."""
        seen = self.places <= positions[:, None]
        return self.causal(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=seen[None, None].expand(len(ids), 1, -1, -1),
            position_ids=positions[None].expand(len(ids), -1), past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    def _prefill(self) -> None:
        """Read the prompts, and write the first token."""
        self.cache.reset()
        self.position.fill_(self.width)
        self.token.copy_(self._logits(self.prompts, self.places[: self.width]).argmax(-1, keepdim=True))
        self.text[:, :1] = self.token

    def _step(self) -> None:
        """Write the next token."""
        self.token.copy_(self._logits(self.token, self.position).argmax(-1, keepdim=True))
        self.position += 1
        self.text.index_copy_(1, self.position - self.width, self.token)

    @torch.inference_mode()
    def write(self) -> int:
        """Write the answers; gives the number of tokens."""
        self._prefill()
        for _ in range(self.text.shape[1] - 1):
            self.replay()
        return self.text.numel()
