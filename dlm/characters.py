"""Texts that tokenizers take; importable without any of them."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """A text with U+FFFD for every half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
