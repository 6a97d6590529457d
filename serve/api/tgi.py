"""The interface of Hugging Face's text-generation-inference: /generate, /generate_stream, /info and /."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from decoding.answer import HALF_CHARACTER, Output
from dlm.version import __version__
from serve.api.openai import ERRORS, PLAIN_ERRORS, confirmed_part, raw_ids
from serve.api.parameters import Body, Generation, Sampling
from serve.api.sse import Events, sse_event, stream
from serve.api.tokens import TokenTexts, logprob
from serve.errors import APIError
from serve.job import Sample
from serve.service import Service

NEW_TOKENS = 100
"""Longest answer where none is given, as TGI's."""


class Parameters(Sampling):
    """TGI's parameters, and ours."""

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = Field(None, description="False takes the likeliest token.")
    stop: Annotated[list[str], Field(max_length=64)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    truncate: int | None = Field(None, ge=1, description="Keep so many of the prompt's last tokens.")
    top_n_tokens: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "watermark": (False,),
        "decoder_input_details": (False,),
        "return_metadata": (False,),
        "typical_p": (1, 1.0),
        "grammar": (),
        "adapter_id": (),
        "frequency_penalty_range": (),
    }


class TGIRequest(Body):
    """Body of /generate and /generate_stream."""

    inputs: str
    parameters: Parameters | None = None


class CompatRequest(TGIRequest):
    """Body of /, which says itself whether it wants a stream."""

    stream: bool | None = None


class Token(BaseModel):
    """A token of the answer."""

    id: int
    text: str
    logprob: float
    special: bool


class Details(BaseModel):
    """Calls, steps and finish reason of an answer."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[dict[str, Any]]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class GenerateResponse(BaseModel):
    """Response of /generate."""

    generated_text: str
    details: Details | None = None


class _TGIAnswer:
    """One answer in TGI's form.

    Args:
        service: decodes.
        body: the request.
        texts: of tokens.
    """

    def __init__(self, service: Service, body: TGIRequest, texts: TokenTexts) -> None:
        self.service, self.texts = service, texts
        self.inputs = body.inputs
        self.parameters = body.parameters or Parameters()
        self.sample: Sample

    def prepare(self) -> None:
        """Encode the prompt; on the thread for that."""
        p = self.parameters
        if p.do_sample is not None and "temperature" in (p.options or {}):
            message = "do_sample and options.temperature say the same thing: give one of them"
            raise APIError(400, message, param="do_sample", code="invalid_value")
        if p.do_sample is False and p.temperature is None:
            p = p.model_copy(update={"temperature": 0.0})
        ids = raw_ids(self.service, self.inputs, cut=bool(p.truncate), param="inputs")
        ids = ids[-p.truncate :] if p.truncate else ids
        longest = (
            None if p.window is not None and p.max_new_tokens is None else p.max_new_tokens or NEW_TOKENS
        )
        (self.sample,) = self._generation(p, longest).samples(self.service, [ids])
        if p.do_sample and p.temperature is None and self.sample.plan.decoder.tokens.temperature == 0:
            p = p.model_copy(update={"temperature": 1.0})
            (self.sample,) = self._generation(p, longest).samples(self.service, [ids])

    def _generation(self, p: Parameters, longest: int | None) -> Generation:
        """The generation that the parameters ask for."""
        return Generation(p, longest, tuple(p.stop or ()), 1, p.top_n_tokens or 0)

    def text(self, output: Output) -> str:
        """The generated text, with the prompt if that was asked for."""
        return self.inputs + output.text if self.parameters.return_full_text else output.text

    def tokens(self, output: Output) -> list[dict[str, Any]]:
        """The tokens, each with its text alone."""
        pairs = zip(output.token_ids, output.confidence, strict=True)
        return [self._token(token, logprob(p)) for token, p in pairs]

    def fresh_tokens(self, output: Output, sent: int) -> Iterator[dict[str, Any]]:
        """Fields of the events of the tokens from `sent` on; their texts join to that of the answer.

        A character of several tokens stands at the last of them, and what an answer's end leaves of one too.
        """
        size = len(output.token_ids)
        for i in range(sent, size):
            shorter, upto = (self._prefix_text(output, n, size) for n in (i, i + 1))
            token = self._token(output.token_ids[i], logprob(output.confidence[i])) | {
                "text": upto[len(shorter) :]
            }
            fields: dict[str, Any] = {"index": i + 1, "token": token}
            if self.parameters.top_n_tokens:
                pairs = output.top_logprobs[i] or []
                fields["top_tokens"] = [self._token(t, x) for t, x in pairs]
            yield {**fields, "generated_text": None, "details": None}

    def _prefix_text(self, output: Output, count: int, size: int) -> str:
        if count == size and output.finish_reason:
            return output.text
        text = str(self.service.tokenizer.decode(output.token_ids[:count], skip_special_tokens=True))
        return text.rstrip(HALF_CHARACTER)[: len(output.text)]

    def _token(self, token: int, value: float | None) -> dict[str, Any]:
        text = self.texts.text(token)
        return {"id": token, "text": text, "logprob": 0.0 if value is None else value, "special": False}

    def _no_token(self, special: bool) -> dict[str, Any]:
        """The token of the event of an answer without a whole one: the end, as yet without text."""
        return self._token(self.service.spec.eos_token_id, None) | {"text": "", "special": special}

    def details(self, output: Output) -> dict[str, Any]:
        """TGI's details."""
        p = self.parameters
        details = {
            "finish_reason": _finish_reason(output),
            "generated_tokens": len(output.token_ids),
            "seed": self.sample.seed,
            "prefill": [],
            "tokens": self.tokens(output),
        }
        if p.top_n_tokens:
            pairs = [pairs or [] for pairs in output.top_logprobs]
            details["top_tokens"] = [[self._token(t, x) for t, x in row] for row in pairs]
        return details

    async def whole(self) -> dict[str, Any]:
        """The response."""
        (output,) = await self.service.results([self.sample], timeout=self.parameters.timeout)
        response: dict[str, Any] = {"generated_text": self.text(output)}
        return response | ({"details": self.details(output)} if self.parameters.details else {})

    async def events(self) -> Events:
        """One event a token, the last with the whole text."""
        notices = self.service.notices([self.sample], watch=confirmed_part, timeout=self.parameters.timeout)
        sent, said, held = 0, 0, None
        async with aclosing(notices):
            async for notice in notices:
                output: Output = notice.value
                for fields in self.fresh_tokens(output, sent):
                    if held is not None:
                        yield sse_event(held)
                    held = fields
                    said += len(fields["token"]["text"])
                sent = len(output.token_ids)
                if notice.finished:
                    end = {k: v for k, v in self.details(output).items() if k in END}
                    held = held or {"index": 0, "token": self._no_token(special=not output.text)}
                    held["token"]["text"] += output.text[said:]  # of a token that a stop text has cut
                    yield sse_event({**held, "generated_text": self.text(output), "details": end})


END = ("finish_reason", "generated_tokens", "seed")
"""Details that the last event of a stream holds."""


def _finish_reason(output: Output) -> str:
    if output.finish_reason == "length":
        return "length"
    return "eos_token" if output.stop_text is None else "stop_sequence"


class _Handlers:
    """Handlers of this interface.

    Args:
        service: decodes.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    async def _prepared(self, http: Request, body: TGIRequest) -> _TGIAnswer:
        self.service.check_ready()
        answer = _TGIAnswer(self.service, body, TokenTexts(self.service.tokenizer))
        await self.service.prepare(http, answer.prepare)
        return answer

    async def generate(self, body: TGIRequest, http: Request) -> Response:
        """Go on with a text as it is."""
        answer = await self._prepared(http, body)
        return JSONResponse(await self.service.unless_gone(http, answer.whole()))

    async def generate_stream(self, body: TGIRequest, http: Request) -> Response:
        """Go on with a text, one event a token."""
        answer = await self._prepared(http, body)
        return stream(answer.events(), done=False, path=http.url.path)

    async def root(self, body: CompatRequest, http: Request) -> Response:
        """Answer like /generate or /generate_stream, by `stream`; the answer in a list of one."""
        answer = await self._prepared(http, body)
        if body.stream:
            return stream(answer.events(), done=False, path=http.url.path)
        return JSONResponse([await self.service.unless_gone(http, answer.whole())])

    async def info(self) -> dict[str, Any]:
        """Describe the model and the limits."""
        self.service.check_loaded()
        positions, config = self.service.spec.positions, self.service.config
        model = self.service.worker.engine.model
        return {
            "model_id": config.served_name,
            "model_dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
            "model_device_type": getattr(getattr(model, "device", None), "type", ""),
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": config.max_waiting,
            "max_best_of": 1,
            "max_stop_sequences": config.max_stop,
            "max_input_tokens": config.max_prompt or positions - 1,
            "max_total_tokens": min(positions, config.max_positions),
            "version": __version__,
            "router": "dlm",
        }


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api, handlers = APIRouter(tags=["TGI"]), _Handlers(service)
    events: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}, **PLAIN_ERRORS}
    api.post("/generate", responses={200: {"model": GenerateResponse}, **PLAIN_ERRORS})(handlers.generate)
    api.post("/generate_stream", response_class=Response, responses=events)(handlers.generate_stream)
    api.post("/", responses={200: {"model": list[GenerateResponse]}, **PLAIN_ERRORS})(handlers.root)
    api.get("/info", responses=ERRORS)(handlers.info)
    return api
