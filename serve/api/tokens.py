"""Tokens and their log-probabilities, as OpenAI's two interfaces show them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from decoding.answer import Detokenizer, Output

LEAST = -9999.0
"""Log-probability that stands for one too small to be a number."""


class TokenTexts:
    """Texts and bytes of single tokens.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet()
        self._decode = cache(self._text)

    def text(self, token: int) -> str:
        """Text of a token; U+FFFD for bytes that are no whole character."""
        return self._decode(token)

    def join(self, tokens: list[int]) -> str:
        """Text of several tokens, control tokens included."""
        return str(self._tokenizer.decode(tokens)) if tokens else ""

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def bytes(self, token: int) -> list[int]:
        """Bytes of a token."""
        text = self.text(token)
        if "\N{REPLACEMENT CHARACTER}" in text:
            written = self._tokenizer.convert_ids_to_tokens(token)
            if all(character in self._alphabet for character in written):
                return [self._alphabet[character] for character in written]
        return list(text.encode())

    def offsets(self, tokens: list[int], first: int = 0, controls: bool = False) -> list[int]:
        """Characters of the text before each token from `first` on; one that it completes is not before it.

        Args:
            tokens: from the beginning of the text.
            first: index of the first token that is asked for.
            controls: control tokens have a text; in an answer they have none.
        """
        detokenizer = Detokenizer(_WithControls(self._tokenizer) if controls else self._tokenizer)
        prefixes = [detokenizer.prefix(tokens[:i]) for i in range(first, len(tokens))]
        whole = detokenizer.prefix(tokens)  # with U+FFFD for bytes that no later token completed
        places: list[int] = []
        place = 0
        for prefix in prefixes:
            place = max(place, len(prefix) if whole.startswith(prefix) else _common(prefix, whole, place))
            places.append(place)
        return places


def _common(one: str, other: str, least: int) -> int:
    """Number of characters with which two texts begin alike; `least` where not even these are alike."""
    if one[:least] != other[:least]:
        return least
    pairs = enumerate(zip(one[least:], other[least:], strict=False), start=least)
    return next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))


@dataclass(frozen=True)
class _WithControls:
    """A tokenizer that decodes control tokens too."""

    tokenizer: Any

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of tokens."""
        del skip_special_tokens
        return str(self.tokenizer.decode(ids))

    def convert_ids_to_tokens(self, token: int) -> str:
        """A token as the vocabulary has it."""
        return str(self.tokenizer.convert_ids_to_tokens(token))


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones as they are, others from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(unprintable)}


def logprob(probability: float | None) -> float | None:
    """Natural logarithm, at least `LEAST`; None for a token that was given."""
    if probability is None:
        return None
    return max(LEAST, math.log(probability)) if probability > 0 else LEAST


def completion_logprobs(
    output: Output, texts: TokenTexts, offset: int, first: int, count: int
) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions for the tokens from `first` on.

    Args:
        output: the answer, or a part of it.
        texts: of tokens.
        offset: characters before the answer.
        first: index of the first token.
        count: number of alternatives that were asked for.
    """
    tokens = output.token_ids[first:]
    written = [texts.text(token) for token in tokens]
    values = [logprob(p) for p in output.confidence[first:]]
    offsets = [offset + characters for characters in texts.offsets(output.token_ids, first)]
    top: list[dict[str, float] | None] = []
    for i, (token, value) in enumerate(zip(written, values, strict=True)):
        pairs = output.top_logprobs[first + i] if output.top_logprobs else []
        if value is None or pairs is None:
            top.append(None)
            continue
        likeliest = {texts.text(t): max(LEAST, x) for t, x in reversed(pairs[:count])}
        top.append(dict(reversed((likeliest | {token: value}).items())))
    return {"tokens": written, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def given_logprobs(tokens: list[int], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions for tokens that were given: none of them has any."""
    written = [texts.text(token) for token in tokens]
    offsets = texts.offsets(tokens, controls=True)
    nothing = [None] * len(tokens)
    return {"tokens": written, "token_logprobs": nothing, "top_logprobs": nothing, "text_offset": offsets}


def chat_logprobs(output: Output, texts: TokenTexts, first: int, count: int) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions for the tokens from `first` on; see above."""
    content = []
    for i, token in enumerate(output.token_ids[first:], start=first):
        pairs = (output.top_logprobs[i] if output.top_logprobs else None) or []
        content.append(
            {
                **_token_object(texts, token, logprob(output.confidence[i])),
                "top_logprobs": [_token_object(texts, t, max(LEAST, x)) for t, x in pairs[:count]],
            }
        )
    return {"content": content}


def _token_object(texts: TokenTexts, token: int, value: float | None) -> dict[str, Any]:
    return {
        "token": texts.text(token),
        "logprob": 0.0 if value is None else value,
        "bytes": texts.bytes(token),
    }
