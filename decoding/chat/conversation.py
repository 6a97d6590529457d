"""A conversation: its messages and settings, apart from where answers come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from decoding.request import Request
from dlm.atomic import write_whole
from dlm.errors import ConfigError

if TYPE_CHECKING:
    from decoding.presets import Decoder
    from dlm.tokenizer import Message


class Source(Protocol):
    """A source of answers: a model here, or one behind an address."""

    def stream(self, messages: Sequence[Message], request: Request, seed: int = 0) -> Iterator[str]:
        """Answer the last message; every text is the whole answer so far, the last one the answer."""
        ...

    def fitted(self, messages: Sequence[Message], request: Request) -> list[Message]:
        """The messages that there is room for: without the oldest turns, if need be."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be answered.

        Raises:
            ConfigError: saying why.
        """
        ...

    def count(self, text: str) -> int | None:
        """Number of tokens of a text; None where that is not known."""
        ...

    def decoder(self, request: Request) -> Decoder | None:
        """The decoder of a request; None where that is not known."""
        ...


@dataclass
class Conversation:
    """Messages that grow by a question and its answer at a time.

    Attributes:
        source: where answers come from.
        request: how they are decoded.
        system: the system message; empty for none.
        seed: seed of the noise; it grows by 1 when a question is asked again.
        messages: what was said, without the system message. A question without an answer is not in it.
        earlier: conversations of this session that are over.
        forgotten: oldest messages that there was no room for when the last question was asked.
    """

    source: Source
    request: Request = field(default_factory=Request)
    system: str = ""
    seed: int = 0
    messages: list[Message] = field(default_factory=list)
    earlier: list[list[Message]] = field(default_factory=list)
    forgotten: int = 0
    _question: str = ""
    _before: list[Message] = field(default_factory=list)
    _attempt: int = 0

    def ask(self, text: str) -> Iterator[str]:
        """Answer a message; yields the answer as it grows (see `Source.stream`).

        The question and its answer are added to the messages when the answer is complete. An error, or a
        caller who stops listening, leaves the messages as they were.
        """
        self._question, self._before, self._attempt = text, self.messages, 0
        return self._answer()

    def retry(self) -> Iterator[str]:
        """Ask the last question again, under another seed; its answer takes the place of the last one.

        Raises:
            ConfigError: when nothing has been asked.
        """
        if not self._question:
            raise ConfigError("nothing has been asked yet")
        self._attempt += 1
        return self._answer()

    def _answer(self) -> Iterator[str]:
        turns = [*self._before, {"role": "user", "content": self._question}]
        everything = self._with_system(turns)
        fitted = self.source.fitted(everything, self.request)
        self.forgotten, answer = len(everything) - len(fitted), ""
        for answer in self.source.stream(fitted, self.request, self.seed + self._attempt):
            yield answer
        self.messages = [*turns, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Begin a new conversation under the same settings."""
        if self.messages:
            self.earlier.append(self._with_system(self.messages))
        self.messages, self._question, self._before = [], "", []

    def decode_with(self, decoder: str | None, options: dict[str, Any] | None) -> None:
        """Decode the following answers in another way.

        Raises:
            ConfigError: for a decoder that does not exist or cannot go with the other settings.
        """
        changed = replace(self.request, decoder=decoder, options=options)
        self.source.check(changed)
        self.request = changed

    @property
    def repeats(self) -> bool:
        """True where every attempt at a question has the same answer: nothing is drawn at random."""
        decoder = self.source.decoder(self.request)
        return decoder is not None and not decoder.random

    def save(self, file: str | Path) -> int:
        """Write the conversations of this session as JSON lines, as `dlm train` reads them.

        Returns:
            Their number. The file is replaced at once.
        """
        talks = [*self.earlier, *([self._with_system(self.messages)] if self.messages else [])]
        lines = [json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks]
        write_whole(file, "".join(lines), errors="replace")
        return len(talks)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]
