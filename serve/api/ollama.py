"""The part of Ollama's interface that clients need: answers, and what there is of models.

Paths: /api/chat, /api/generate, /api/tags, /api/show, /api/ps, /api/version.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from decoding.answer import Output
from dlm.device import QUANTIZED
from dlm.prepacking import prepacked_layers
from dlm.tokenizer import Message
from dlm.version import __version__
from serve.api import schema
from serve.api.lines import LinesResponse
from serve.api.openai import PLAIN_ERRORS, confirmed_part, raw_ids
from serve.api.parameters import Body, Generation, Sampling, Texts, faults_named, stop_texts
from serve.api.sse import sse_line
from serve.errors import APIError
from serve.job import Sample
from serve.service import Service

NEVER = "9999-12-31T23:59:59Z"
"""Time at which a model that stays is unloaded."""


class Options(Sampling):
    """Ollama's options, and ours."""

    num_predict: int | None = Field(None, description="Longest answer; below 1 for the model's own.")
    stop: Texts | None = None
    repeat_penalty: float | None = Field(None, ge=0.01, le=100)
    num_ctx: int | None = Field(None, description="Taken, and not used: rows are as long as they need.")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mirostat": (0,),
        "return_metadata": (False,),
        "repeat_last_n": (64, -1),
        "num_keep": (0,),
        "num_gpu": (),
        "num_thread": (),
        "num_batch": (),
        "typical_p": (1, 1.0),
        "tfs_z": (1, 1.0),
    }


class OllamaRequest(Body):
    """Parameters of both paths."""

    model: str
    stream: bool | None = Field(None, description="True by default.")
    options: Options | None = None
    keep_alive: str | float | int | None = Field(None, description="Taken, and not used.")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "format": ("",),
        "tools": ([],),
        "think": (False,),
        "images": ([],),
        "template": ("",),
        "context": ([],),
        "suffix": ("",),
    }


class OllamaChatRequest(OllamaRequest):
    """Body of /api/chat."""

    messages: list[schema.ChatMessage] = Field(default=[], description="Without any, the model is loaded.")


class OllamaGenerateRequest(OllamaRequest):
    """Body of /api/generate."""

    prompt: str = Field("", description="Without one, the model is loaded.")
    system: str | None = None
    raw: bool | None = None


class OllamaShowRequest(Body):
    """Body of /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="As `model`, in older clients.")
    verbose: bool | None = Field(None, description="Taken, and not used.")


class _OllamaAnswer:
    """One answer in Ollama's form.

    Args:
        service: decodes.
        body: the request.
        key: name of the field that holds text: "message" or "response".
    """

    def __init__(self, service: Service, body: OllamaRequest, key: str) -> None:
        self.service, self.body, self.key = service, body, key
        self.sample: Sample
        self.begun = time.monotonic_ns()

    @property
    def _timeout(self) -> float | None:
        return self.body.options.timeout if self.body.options else None

    def prepare(self, ids: list[int]) -> None:
        """Make the row; on the thread that encodes."""
        options = self.body.options or Options()
        if options.repeat_penalty is not None:
            if options.repetition_penalty is not None:
                message = "repeat_penalty and repetition_penalty are one thing; give one of them"
                raise APIError(400, message, param="repeat_penalty")
            options = options.model_copy(update={"repetition_penalty": options.repeat_penalty})
        longest = options.num_predict if (options.num_predict or 0) > 0 else None
        generation = Generation(options, longest, stop_texts(options.stop))
        (self.sample,) = generation.samples(self.service, [ids])

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, by which clients have a model loaded."""
        return {**self.line("", None), "done": True, "done_reason": "load"}

    def line(self, text: str, output: Output | None) -> dict[str, Any]:
        """One line of the answer; with `output`, the last."""
        content: Any = {"role": "assistant", "content": text} if self.key == "message" else text
        line = {
            "model": self.service.config.served_name,
            "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            self.key: content,
            "done": output is not None,
        }
        if output is None:
            return line
        elapsed = time.monotonic_ns() - self.begun
        return line | {
            "done_reason": output.finish_reason,
            "total_duration": elapsed,
            "load_duration": 0,
            "prompt_eval_count": self.sample.row.answer_start,
            "prompt_eval_duration": 0,
            "eval_duration": elapsed,
            "eval_count": len(output.token_ids),
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        (output,) = await self.service.results([self.sample], timeout=self._timeout)
        return self.line(output.text, output)

    async def lines(self) -> AsyncIterator[str]:
        """The answer as lines of JSON."""
        sent = 0
        try:
            async with aclosing(
                self.service.notices([self.sample], watch=confirmed_part, timeout=self._timeout)
            ) as notices:
                async for notice in notices:
                    output: Output = notice.value
                    text, sent = output.text[sent:], len(output.text)
                    if text or notice.finished:
                        line = self.line(text, output if notice.finished else None)
                        yield sse_line(line) + "\n"
        except APIError as error:
            yield sse_line({"error": error.message}) + "\n"


class _Handlers:
    """Handlers of this interface.

    Args:
        service: decodes.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def _check(self, body: OllamaRequest) -> None:
        self.service.check_model(body.model.removesuffix(":latest"))
        self.service.check_ready()

    def _templated(self, messages: list[Message]) -> list[int]:
        with faults_named():
            return self.service.rows.prompt(messages)

    def _loaded(self, answer: _OllamaAnswer) -> Response:
        if answer.body.stream is False:
            return JSONResponse(answer.loaded())
        return Response(sse_line(answer.loaded()) + "\n", media_type="application/x-ndjson")

    async def _respond(self, http: Request, answer: _OllamaAnswer) -> Response:
        if answer.body.stream is False:
            return JSONResponse(await self.service.unless_gone(http, answer.whole()))
        return LinesResponse(answer.lines(), media_type="application/x-ndjson")

    async def chat(self, body: OllamaChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        answer = _OllamaAnswer(self.service, body, "message")
        if not body.messages:
            return self._loaded(answer)
        messages = [{"role": turn.role, "content": turn.text} for turn in body.messages]
        await self.service.prepare(http, lambda: answer.prepare(self._templated(messages)))
        return await self._respond(http, answer)

    async def generate(self, body: OllamaGenerateRequest, http: Request) -> Response:
        """Answer a prompt, by the template unless it is raw."""
        self._check(body)
        answer = _OllamaAnswer(self.service, body, "response")
        if not body.prompt:
            return self._loaded(answer)
        messages = [{"role": "user", "content": body.prompt}]
        if body.system and body.raw:
            raise APIError(400, "a raw prompt has no template for a system message", param="system")
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})

        def prepare() -> None:
            raw = body.raw or False
            answer.prepare(raw_ids(self.service, body.prompt) if raw else self._templated(messages))

        await self.service.prepare(http, prepare)
        return await self._respond(http, answer)

    def _card(self) -> dict[str, Any]:
        """The model, with its size in bytes once it is loaded."""
        name = self.service.config.served_name
        size = self._parameters("nbytes")
        return {"name": name, "model": name, "size": size, "digest": "", "details": self._details()}

    def _details(self) -> dict[str, Any]:
        count, dtype = self._parameters("numel"), self.service.config.dtype
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": "dlm",
            "families": ["dlm"],
            "parameter_size": size if count else "",
            "quantization_level": dtype.upper() if dtype in QUANTIZED else "",
        }

    def _parameters(self, measure: str) -> int:
        """Sum of `numel` or `nbytes` over the model's parameters; 0 before it is loaded."""
        if not self.service.worker.loaded.done():
            return 0
        model = self.service.worker.engine.model
        packed: int = sum(getattr(layer, measure) for layer in prepacked_layers(model))
        if measure == "numel" and hasattr(model, "num_parameters"):
            return packed + int(model.num_parameters())  # two in a byte, where weights have 4 bits
        parameters: Iterable[Any] = getattr(model, "parameters", list)()
        values = (getattr(parameter, measure) for parameter in parameters)
        return packed + sum(int(value() if callable(value) else value) for value in values)

    @property
    def _created(self) -> str:
        return datetime.fromtimestamp(self.service.created, UTC).isoformat().replace("+00:00", "Z")

    async def tags(self) -> dict[str, Any]:
        """List the model of this server."""
        return {"models": [{**self._card(), "modified_at": self._created}]}

    async def ps(self) -> dict[str, Any]:
        """List the model once it is loaded; it stays."""
        if not self.service.worker.loaded.done():
            return {"models": []}
        card = self._card()
        on_cpu = self._device() == "cpu"
        return {"models": [{**card, "expires_at": NEVER, "size_vram": 0 if on_cpu else card["size"]}]}

    def _device(self) -> str:
        return str(getattr(getattr(self.service.worker.engine.model, "device", None), "type", "cpu"))

    async def show(self, body: OllamaShowRequest) -> dict[str, Any]:
        """Describe the model."""
        service, name = self.service, body.model or body.name
        if name is None:
            raise APIError(400, "model is missing", param="model", code="missing_parameter")
        service.check_model(name.removesuffix(":latest"))
        service.check_loaded()
        spec = service.spec
        return {
            "modelfile": "",
            "parameters": "",
            "template": str(service.tokenizer.chat_template or ""),
            "details": self._details(),
            "model_info": {
                "general.architecture": "dlm",
                "general.parameter_count": self._parameters("numel"),
                "dlm.context_length": spec.positions,
                "dlm.decoder": spec.defaults.decoder,
            },
            "capabilities": ["completion"],
            "modified_at": self._created,
        }

    async def version(self) -> dict[str, str]:
        """Version of this server."""
        return {"version": __version__}


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api, handlers = APIRouter(prefix="/api", tags=["Ollama"]), _Handlers(service)
    content: dict[str, Any] = {"application/x-ndjson": {}, "application/json": {}}
    answers: dict[int | str, dict[str, Any]] = {200: {"content": content}, **PLAIN_ERRORS}
    api.post("/chat", response_class=Response, responses=answers)(handlers.chat)
    api.post("/generate", response_class=Response, responses=answers)(handlers.generate)
    api.get("/tags", responses=PLAIN_ERRORS)(handlers.tags)
    api.get("/ps", responses=PLAIN_ERRORS)(handlers.ps)
    api.post("/show", responses=PLAIN_ERRORS)(handlers.show)
    api.get("/version", responses=PLAIN_ERRORS)(handlers.version)
    return api
