"""OpenAI's interface: /v1/completions, /v1/chat/completions, /v1/models.

Both kinds of completion are one thing: prompts of token ids, answers, and a form to put them in (`_Form`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from decoding.answer import Output, until_end
from decoding.engine import Update
from dlm.errors import ConfigError
from serve.api import schema
from serve.api.fill import fill_suffix
from serve.api.parameters import Generation, faults_named, head, metadata, stop_texts, usage
from serve.api.sse import Events, sse_event, stream
from serve.api.tokens import TokenTexts, chat_logprobs, completion_logprobs, given_logprobs
from serve.errors import APIError, refused
from serve.job import Notice, Sample
from serve.service import Service

COMPLETION_TOKENS = 16
"""Longest answer of /v1/completions where none is given, as OpenAI's."""

STATUSES = (400, 401, 404, 408, 413, 429, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": schema.Error} for status in STATUSES}
PLAIN_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": schema.PlainError} for status in STATUSES}


def streamed(model: Any) -> dict[int | str, dict[str, Any]]:
    """Responses of a path that answers with `model`, or with a stream."""
    content: dict[str, Any] = {"text/event-stream": {}}
    return {200: {"model": model, "content": content}, **ERRORS}


class _Form:
    """Form of the answers: what differs between completions and chat.

    Args:
        body: the request.
        texts: of tokens.
        name: of the model.
        prefixes: tokens that answers begin with (`echo`), for each choice; empty for none.
    """

    prefix = "cmpl"
    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, body: Any, texts: TokenTexts, name: str, prefixes: list[list[int]]) -> None:
        self.body, self.texts = body, texts
        self.prefix_ids = prefixes
        self.prefixes = [texts.join(ids) for ids in prefixes]
        self.head = head(self.prefix, name)

    def first(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if there is one before any text."""
        if not self.prefixes[index]:
            return None
        logprobs = None if self.body.logprobs is None else self._prefix_logprobs(index)
        return {"index": index, "text": self.prefixes[index], "logprobs": logprobs, "finish_reason": None}

    def _prefix_logprobs(self, index: int) -> dict[str, Any]:
        """Log-probabilities of the tokens of an echo, which were given and have none."""
        return given_logprobs(self.prefix_ids[index], self.texts)

    def delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """A chunk of a choice."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        """A finished choice."""
        if logprobs is not None and self.prefixes[index]:
            prefix = self._prefix_logprobs(index)
            logprobs = {name: prefix[name] + values for name, values in logprobs.items()}
        return self.delta(index, self.prefixes[index] + text, logprobs, reason)

    def logprobs(self, index: int, output: Output, tokens: int) -> Any:
        """Log-probabilities of the tokens from `tokens` on."""
        if self.body.logprobs is None:
            return None
        offset = len(self.prefixes[index])
        return completion_logprobs(output, self.texts, offset, tokens, self.body.logprobs)


class _ChatForm(_Form):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, index: int, output: Output, tokens: int) -> Any:
        if not self.body.logprobs:
            return None
        return chat_logprobs(output, self.texts, tokens, self.body.top_logprobs or 0)


@dataclass
class _Progress:
    """Progress of the stream of one choice."""

    characters: int = 0
    tokens: int = 0
    last: float = field(default_factory=time.monotonic)


# ---- preparing ---------------------------------------------------------------------------------------


def check_answering(body: schema.Answering) -> None:
    """Refuse options of streams without a stream, and what does not go together.

    Raises:
        APIError: 400.
    """
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream to be true", param="stream_options")
    if body.diffusing and getattr(body, "logprobs", None) not in (None, False):
        raise APIError(400, "logprobs means nothing for snapshots", param="logprobs")
    if body.diffusing and not body.stream:
        raise APIError(400, "diffusing needs stream to be true", param="diffusing")


def chat_generation(body: schema.ChatRequest) -> Generation:
    """Parameters of a chat completion."""
    check_answering(body)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise APIError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    longest = body.max_tokens or body.max_completion_tokens
    return Generation(body, longest, stop_texts(body.stop), body.n or 1, body.top_logprobs or 0)


def completion_generation(body: schema.CompletionRequest) -> Generation:
    """Parameters of a completion."""
    check_answering(body)
    longest = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.window is not None and body.max_tokens is None:
        return Generation(body, None, stop_texts(body.stop), body.n or 1, body.logprobs or 0)
    return Generation(body, longest, stop_texts(body.stop), body.n or 1, body.logprobs or 0)


def chat_prompt(service: Service, body: schema.ChatRequest) -> list[int]:
    """Token ids of a conversation.

    Raises:
        APIError: 400, for a conversation that the template refuses.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in body.messages]
    try:
        if not body.continue_final_message:
            return service.rows.prompt(messages)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise ConfigError("continue_final_message needs a last message of the assistant, after others")
        return service.rows.prompt(messages[:-1]) + service.rows.text(messages[-1]["content"])
    except ConfigError as error:
        fault = refused(error, ())
        raise APIError(400, fault.message, param="messages", code=fault.code) from error


def each_prompt(prompt: Any) -> list[Any]:
    """The prompts, texts or token ids, of which there may be one alone."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def raw_ids(service: Service, prompt: str | list[int], cut: bool = False, param: str = "prompt") -> list[int]:
    """Token ids of a text as it is, without a template; token ids are checked by the maker of rows.

    Control tokens in a text are control tokens.

    Args:
        service: has the tokenizer.
        prompt: the text, or its token ids.
        cut: the caller keeps the end of it alone, so that no text is too long.
        param: what the request calls it.
    """
    rows = service.rows
    with faults_named(param):
        if isinstance(prompt, str):
            if not cut:
                rows.check_length(prompt)
            prompt = list(rows.tokenizer(prompt)["input_ids"]) if prompt else [service.spec.eos_token_id]
        return rows.prompt(prompt)


# ---- answering ---------------------------------------------------------------------------------------


class Answers:
    """Answers of one request, whole or as a stream.

    Args:
        service: decodes.
        samples: the rows, one for each choice.
        form: what they are put in.
        prompt_tokens: tokens of all prompts.
    """

    def __init__(self, service: Service, samples: list[Sample], form: _Form, prompt_tokens: int) -> None:
        self.service, self.samples, self.form = service, samples, form
        self.prompt_tokens = prompt_tokens

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """OpenAI's usage object, for the prompts of this request."""
        return usage(self.prompt_tokens, completion_tokens)

    async def whole(self) -> dict[str, Any]:
        """The response when all answers are finished."""
        outputs = await self.service.results(
            self.samples, timeout=self.form.body.timeout, prompt_tokens=self.prompt_tokens
        )
        choices = []
        for i, output in enumerate(outputs):
            logprobs = self.form.logprobs(i, output, 0)
            choice = self.form.choice(i, output.text, logprobs, output.finish_reason)
            choices.append(choice | self._metadata(i, output))
        tokens = self.usage(sum(len(output.token_ids) for output in outputs))
        return {**self.form.head, "object": self.form.object, "choices": choices, "usage": tokens}

    def _metadata(self, index: int, output: Output) -> dict[str, Any]:
        if not self.form.body.return_metadata:
            return {}
        return {"metadata": metadata(self.samples[index].row, output)}

    async def events(self) -> Events:
        """The response as a stream: deltas of confirmed text, or snapshots of the whole canvas."""
        body = self.form.body
        options = body.stream_options or schema.StreamOptions()
        progress = [_Progress() for _ in self.samples]
        for i in range(len(self.samples)):
            if (first := self.form.first(i)) is not None:
                yield sse_event(self._chunk([first], progress, options))
        stops = self.samples[0].plan.stop
        watch = partial(_snapshot, stops=stops) if body.diffusing else confirmed_part
        notices = self.service.notices(
            self.samples, watch=watch, timeout=body.timeout, prompt_tokens=self.prompt_tokens
        )
        async with aclosing(notices):
            async for notice in notices:
                for choice in self._deltas(notice, progress[notice.index]):
                    yield sse_event(self._chunk([choice], progress, options))
        if options.include_usage:
            tokens = sum(row.tokens for row in progress)
            yield sse_event(self._chunk([], progress, options) | {"usage": self.usage(tokens)})

    def _chunk(
        self, choices: list[Any], progress: list[_Progress], options: schema.StreamOptions
    ) -> dict[str, Any]:
        chunk = {**self.form.head, "object": self.form.chunk, "choices": choices}
        if options.continuous_usage_stats:
            return chunk | {"usage": self.usage(sum(row.tokens for row in progress))}
        return chunk | ({"usage": None} if options.include_usage else {})

    def _deltas(self, notice: Notice, progress: _Progress) -> Iterator[dict[str, Any]]:
        """Chunks that a notice gives rise to."""
        if isinstance(notice.value, Snapshot):
            progress.tokens = notice.value.tokens
            text = self.form.prefixes[notice.index] + notice.value.text
            yield self.form.delta(notice.index, text, None, None)
            return
        output: Output = notice.value
        if self.form.body.diffusing:
            progress.tokens = len(output.token_ids)
            yield self._last(notice.index, output, self.form.prefixes[notice.index] + output.text, None)
            return
        text = output.text[progress.characters :]
        fresh = len(output.token_ids) - progress.tokens
        if not notice.finished and not text and not fresh:
            return
        logprobs = None
        if fresh:
            logprobs = self.form.logprobs(notice.index, output, progress.tokens)
        self._measure(progress, fresh)
        progress.characters, progress.tokens = len(output.text), len(output.token_ids)
        if notice.finished:
            yield self._last(notice.index, output, text, logprobs)
        else:
            yield self.form.delta(notice.index, text, logprobs, None)

    def _last(self, index: int, output: Output, text: str, logprobs: Any) -> dict[str, Any]:
        """The chunk that holds the finish reason."""
        chunk = self.form.delta(index, text, logprobs, output.finish_reason)
        return chunk | self._metadata(index, output)

    def _measure(self, progress: _Progress, fresh: int) -> None:
        """Note times of deltas."""
        time_now, metrics = time.monotonic(), self.service.metrics
        if fresh and not progress.tokens:
            metrics.first_token.observe(time_now - progress.last)
        elif fresh:
            metrics.between.observe((time_now - progress.last) / fresh)
        if fresh:
            progress.last = time_now


def confirmed_part(update: Update) -> Output | None:
    """The confirmed part of an answer; None where there is nothing."""
    part = update.partial
    return part if part.text or part.token_ids else None


@dataclass(frozen=True)
class Snapshot:
    """The whole text of an answer as it stands, a blank for each mask, and its number of tokens."""

    text: str
    tokens: int


def _snapshot(update: Update, stops: Sequence[str]) -> Snapshot:
    """The answer as it stands, up to the first stop text, which may still be taken back."""
    event = update.event
    places = [place for place in map(event.text.find, stops) if place >= 0]
    written = sum(token != update.plan.mask_id for token in until_end(event.token_ids, update.plan))
    return Snapshot(event.text[: min(places)] if places else event.text, written)


# ---- paths -------------------------------------------------------------------------------------------


class _Handlers:
    """Handlers of this interface.

    Args:
        service: decodes.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._texts: TokenTexts | None = None

    def token_texts(self) -> TokenTexts:
        """Texts of tokens, once the model is there."""
        if self._texts is None:
            self._texts = TokenTexts(self.service.tokenizer)
        return self._texts

    async def _respond(self, http: Request, answers: Answers) -> Response:
        if answers.form.body.stream:
            return stream(answers.events())
        return JSONResponse(await self.service.unless_gone(http, answers.whole()))

    async def chat_completions(self, body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        service = self.service
        service.check_model(body.model)
        service.check_ready()

        def prepare() -> tuple[list[Sample], int]:
            generation = chat_generation(body)
            ids = chat_prompt(service, body)
            return generation.samples(service, [ids]), len(ids)

        samples, tokens = await service.prepare(http, prepare)
        form = _ChatForm(body, self.token_texts(), service.config.served_name, [[]] * len(samples))
        return await self._respond(http, Answers(service, samples, form, tokens))

    async def completions(self, body: schema.CompletionRequest, http: Request) -> Response:
        """Go on with texts as they are, or fill the gap before a suffix."""
        service = self.service
        service.check_model(body.model)
        service.check_ready()
        if body.suffix is not None:
            return await fill_suffix(service, body, http)

        def prepare() -> tuple[list[Sample], int, list[list[int]]]:
            generation = completion_generation(body)
            given = each_prompt(body.prompt)
            prompts = [raw_ids(service, each) for each in given]
            echoes = [ids if body.echo and each else [] for ids, each in zip(prompts, given, strict=True)]
            samples = generation.samples(service, prompts)
            return samples, sum(map(len, prompts)), [ids for ids in echoes for _ in range(generation.n)]

        samples, tokens, prefixes = await service.prepare(http, prepare)
        form = _Form(body, self.token_texts(), service.config.served_name, prefixes)
        return await self._respond(http, Answers(service, samples, form, tokens))

    def _card(self) -> dict[str, Any]:
        spec, service = self.service.spec, self.service
        return {
            "id": service.config.served_name,
            "object": "model",
            "created": service.created,
            "owned_by": "dlm",
            "max_model_len": spec.positions,
            "decoder": spec.defaults.decoder,
        }

    async def models(self) -> Any:
        """List the model of this server."""
        self.service.check_loaded()
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> Any:
        """Describe a model."""
        self.service.check_loaded()
        self.service.check_model(name)
        return self._card()


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api, handlers = APIRouter(prefix="/v1", tags=["OpenAI"]), _Handlers(service)
    api.post("/chat/completions", responses=streamed(schema.ChatCompletion))(handlers.chat_completions)
    api.post("/completions", responses=streamed(schema.Completion))(handlers.completions)
    api.get("/models", response_model=schema.ModelList, responses=ERRORS)(handlers.models)
    api.get("/models/{name:path}", response_model=schema.ModelCard, responses=ERRORS)(handlers.model)
    return api
