"""A judge: any OpenAI-compatible endpoint, asked with care for money and time.

Replies are kept on disk, so that nothing is asked twice, also after a kill. What fails after all retries is
counted and asked again in the next run; it never becomes a verdict.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dlm.errors import CheckpointError, DLMError
from dlm.json_files import read_object
from dlm.progress import progress
from dlm.tokenizer import Message
from eval.config import JudgeConfig
from eval.formats import write_json
from eval.systems import Connection, UnreachableError, client

V = TypeVar("V")

CHARACTERS = 4
"""Of English text in a token, for estimates."""

PAUSES = (1.0, 4.0)
"""Seconds before a reply that is none is asked for again (429, 5xx and timeouts have their own pauses)."""


def conclusion(text: str) -> str:
    """Text of a judge behind its thoughts; of thoughts without an end, nothing is left."""
    if "</think>" in text:
        return text.rsplit("</think>", 1)[1]
    return text.split("<think>", 1)[0]


@dataclass(frozen=True)
class JudgeRequest:
    """One thing to ask.

    Attributes:
        messages: the chat.
        options: what else the endpoint is told, such as max_tokens, temperature, logprobs.
    """

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Price:
    """Requests and tokens that asking would take.

    Attributes:
        calls: requests that are not in the cache.
        tokens_in: tokens to read, at four characters each.
        tokens_out: tokens to write at most.
        dollars: at the prices given.
    """

    calls: int
    tokens_in: int
    tokens_out: int
    dollars: float

    def __str__(self) -> str:
        """One line for people."""
        unknown = ", no prices given (--judge.price_in, --judge.price_out)"
        money = f", ${self.dollars:.2f}" if self.dollars else unknown
        return (
            f"{self.calls} requests to make, about {self.tokens_in:,} tokens to read (at {CHARACTERS} "
            f"characters each) and at most {self.tokens_out:,} to write{money}"
        )


class DryRunError(DLMError):
    """Asked for an estimate only; carries it."""

    def __init__(self, estimate: Price) -> None:
        super().__init__(f"dry run: {estimate}")
        self.estimate = estimate


class Judge:
    """Asks requests, many at a time.

    Args:
        config: who judges.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.folder = Path(config.cache) if config.cache else Path.home() / ".cache" / "dlm" / "judge"
        self.last_failure = ""
        self._client: Connection | None = None

    def ask(self, requests: Sequence[JudgeRequest], label: str = "judge") -> list[dict[str, Any] | None]:
        """The choice that each request got, as the endpoint gave it; None where there is none in the end.

        Raises:
            DryRunError: with an estimate, where only that is wanted.
            DLMError: when the endpoint cannot be reached, refuses for good (wrong key, unknown model), or
                answers nothing.
        """
        if self.config.dry_run:
            raise DryRunError(self.estimate(requests))
        self._client = self._client or client(self.config.url, self.config.timeout, self.config.retries)
        unique = {self._file(request): request for request in requests}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                going = pool.map(self._one, unique.values())
                replies = list(progress(going, label, len(unique), unit="verdict"))
            finally:
                pool.shutdown(cancel_futures=True)
        reply_of = dict(zip(unique, replies, strict=True))
        choices = [reply_of[self._file(request)] for request in requests]
        lost = sum(choice is None for choice in choices)
        if requests and lost == len(requests):
            raise DLMError(
                f"the judge answered none of {lost} requests; the last failure: {self.last_failure}"
            )
        return choices

    def estimate(self, requests: Sequence[JudgeRequest]) -> Price:
        """Requests and tokens that asking would take."""
        new = [r for file, r in {self._file(r): r for r in requests}.items() if not file.exists()]
        read = sum(len(m["content"]) for r in new for m in r.messages) // CHARACTERS
        write = sum(int(r.options.get("max_tokens", 1024)) for r in new)
        dollars = (read * self.config.price_in + write * self.config.price_out) / 1e6
        return Price(len(new), read, write, dollars)

    def _file(self, request: JudgeRequest) -> Path:
        asks = [self.config.url, self.config.model, request.messages, request.options]
        key = hashlib.sha256(json.dumps(asks, sort_keys=True).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"

    def _one(self, request: JudgeRequest) -> dict[str, Any] | None:
        file = self._file(request)
        try:
            stored = read_object(file)
            if isinstance(stored.get("message"), dict):
                return stored
        except CheckpointError:  # not there, or damaged: it is asked for again
            pass
        for pause in (*PAUSES, None):
            try:
                choice = self._asked(request)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, choice)
                return choice
            except _UnansweredError as error:
                self.last_failure = str(error)
                if pause is None or not error.worth_another_try:
                    return None
                time.sleep(pause)
        return None

    def _asked(self, request: JudgeRequest) -> dict[str, Any]:
        import openai

        assert self._client is not None  # `ask` has made it
        try:
            done = self._client.ask(model=self.config.model, messages=request.messages, **request.options)
            choice: dict[str, Any] = done.choices[0].model_dump()
            usage = done.usage.total_tokens if done.usage else 0
        except UnreachableError:
            raise
        except DLMError as error:
            reason = error.__cause__
            if isinstance(reason, openai.APIStatusError) and reason.status_code in (401, 403, 404):
                raise
            retried = isinstance(reason, openai.APIConnectionError | openai.APIStatusError)
            raise _UnansweredError(str(error), not retried) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise _UnansweredError(f"not a chat completion ({error})", True) from error
        text = _message_text(choice.get("message") or {})
        if text is None:
            raise _UnansweredError("the reply has no text", True)
        return {**choice, "message": {"role": "assistant", "content": text}, "total_tokens": usage}


def _message_text(message: dict[str, Any]) -> str | None:
    """Text of a message, or the arguments of the function that it calls."""
    if message.get("content") is not None:
        return str(message["content"])
    calls = [call["function"] for call in message.get("tool_calls") or []]
    call = calls[0] if calls else message.get("function_call")
    return str(call["arguments"]) if call else None


class _UnansweredError(Exception):
    """A reply that is none; `worth_another_try` unless the client has tried again itself."""

    def __init__(self, message: str, worth_another_try: bool) -> None:
        super().__init__(message)
        self.worth_another_try = worth_another_try


@dataclass
class Tally:
    """Counts of readable and unreadable verdicts.

    Attributes:
        judged: verdicts that could be read.
        malformed: replies that hold no verdict.
        unanswered: requests without a reply.
    """

    judged: int = 0
    malformed: int = 0
    unanswered: int = 0

    def read(
        self, choices: Sequence[dict[str, Any] | None], parse: Callable[[str], V | None]
    ) -> list[V | None]:
        """The verdict in each reply; None, and counted, where there is none."""
        verdicts: list[V | None] = []
        for choice in choices:
            verdict = None if choice is None else parse(choice["message"]["content"])
            self.unanswered += choice is None
            self.malformed += choice is not None and verdict is None
            self.judged += verdict is not None
            verdicts.append(verdict)
        return verdicts

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.judged} verdicts, {self.malformed} malformed, {self.unanswered} unanswered"
