"""Sources of the answers of a conversation: a sampler here, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from decoding.request import Request
from dlm.errors import ConfigError, DLMError, first_line, how_to_install

if TYPE_CHECKING:
    from decoding.presets import Decoder
    from decoding.sampler import Sampler
    from dlm.tokenizer import Message

STANDARD = ("max_tokens", "stop")
"""Fields of a request that OpenAI's API has under the same names."""

STANDARD_OPTIONS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
"""Options of decoders that it has."""


class SamplerSource:
    """Answers of a model on this machine: a `decoding.chat.conversation.Source` whose texts show the canvas.

    Args:
        sampler: of the model.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def stream(self, messages: Sequence[Message], request: Request, seed: int = 0) -> Iterator[str]:
        """See `Source`; there is a text for each denoising step."""
        for event in self.sampler.stream(list(messages), request=request, seed=seed):
            yield event.text

    def fitted(self, messages: Sequence[Message], request: Request) -> list[Message]:
        """See `Source`; there is room for what the longest answer leaves, and for half of all at least."""
        plan = self.sampler.plan(request)
        room = plan.positions - min(plan.tokens, plan.positions // 2)
        head = [message for message in messages[:1] if message["role"] == "system"]
        recent = list(messages[len(head) :])
        while len(recent) > 2 and not self.sampler.fits(head + recent, room + 1):
            recent = recent[2:]
        return head + recent

    def check(self, request: Request) -> None:
        """See `Source`."""
        request.check_decoder()
        self.sampler.plan(request)

    def count(self, text: str) -> int | None:
        """See `Source`."""
        return len(self.sampler.rows.text(text))

    def decoder(self, request: Request) -> Decoder | None:
        """See `Source`."""
        return self.sampler.plan(request).decoder


class EndpointSource:
    """Answers of an OpenAI-compatible endpoint (`/v1/chat/completions`), as a `Source` of a conversation.

    Fields of a request that the API does not have are sent under their own names, which servers may refuse.

    Args:
        url: base URL, such as http://127.0.0.1:8000/v1.
        model: name of the model there.

    Raises:
        ConfigError: when the package `openai` is not installed.
    """

    def __init__(self, url: str, model: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"an endpoint needs the package openai: {how_to_install('eval')}") from error
        self.model, self.failure = model, openai.OpenAIError
        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none")

    def stream(self, messages: Sequence[Message], request: Request, seed: int = 0) -> Iterator[str]:
        """See `Source`; there is a text for each piece that arrives."""
        text = ""
        try:
            chunks = self.client.chat.completions.create(
                model=self.model, messages=list(messages), stream=True, seed=seed, **_request_body(request)
            )
            for chunk in chunks:
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    text += piece
                    yield text
        except self.failure as error:
            unknown = getattr(error, "status_code", None) == 401
            key = "; the key is OPENAI_API_KEY in the environment" if unknown else ""
            raise DLMError(f"{self.client.base_url}: {first_line(error)}{key}") from error

    def fitted(self, messages: Sequence[Message], request: Request) -> list[Message]:
        """See `Source`; what there is room for only the server knows."""
        del request
        return list(messages)

    def check(self, request: Request) -> None:
        """See `Source`; only the server knows more than the request says by itself."""

    def count(self, text: str) -> int | None:
        """See `Source`."""
        del text
        return None

    def decoder(self, request: Request) -> Decoder | None:
        """See `Source`; only the server knows."""
        del request
        return None


def _request_body(request: Request) -> dict[str, Any]:
    """The fields of a request to the API, those that are its own under `extra_body`."""
    settings = {item.name: getattr(request, item.name) for item in fields(Request)}
    settings = {name: value for name, value in settings.items() if value is not None}
    options = settings.pop("options", {})
    body = {name: settings.pop(name) for name in STANDARD if name in settings}
    body |= {name: options[name] for name in STANDARD_OPTIONS if name in options}
    decoder_options = {name: value for name, value in options.items() if name not in STANDARD_OPTIONS}
    extra = {**settings, **({"options": decoder_options} if decoder_options else {})}
    return {**body, **({"extra_body": extra} if extra else {})}
