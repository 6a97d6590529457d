"""Rewards that need a model of their own (found by entry points, see `decoding.tilted.rewards`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dlm.errors import ConfigError


class Likelihood:
    """Mean log-likelihood of a text's tokens, in nats, given the prompt, under an autoregressive model.

    An empty text counts as one token drawn from all alike, -log V.

    Args:
        path: hub id, folder or .gguf file of a causal language model; "smollm2-135m-instruct" is the base of
            the default model.
    """

    def __init__(self, path: str) -> None:
        from eval.fluency import Reader

        if not path:
            raise ConfigError("likelihood needs an autoregressive model, as in likelihood=PATH")
        self.reader = Reader(path)

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """See `decoding.tilted.rewards.Reward`."""
        from dlm.tokenizer import as_messages

        least = -math.log(len(self.reader.tokenizer))
        return [
            -self.reader.nats_per_token(as_messages(prompt), text) if text.strip() else least
            for prompt, text in zip(prompts, completions, strict=True)
        ]


class Closeness:
    """Closeness in meaning to a text: the cosine of their embeddings; 0 for an empty text.

    Args:
        text: what answers should be close to.
    """

    def __init__(self, text: str) -> None:
        from eval.relevance import Encoder

        if not text.strip():
            raise ConfigError("closeness needs a text, as in closeness='a walk by the sea'")
        self.encoder = Encoder()
        self.target = self.encoder.encode([text])[0]  # [D]

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """See `decoding.tilted.rewards.Reward`."""
        if not completions:
            return []
        cosine = self.encoder.encode(completions) @ self.target
        return [float(x) if text.strip() else 0.0 for x, text in zip(cosine, completions, strict=True)]
