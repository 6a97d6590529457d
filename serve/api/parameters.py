"""Parameters that the interfaces share, and the way from them to a `Request`.

A parameter that has no effect here is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from decoding.canvas import Row
from decoding.presets import option_names
from decoding.request import Plan, Request
from decoding.reveal.order_table import is_name
from dlm.characters import whole_characters
from dlm.errors import ConfigError
from dlm.version import __version__
from serve.config import ServeConfig
from serve.errors import APIError, refused
from serve.job import Sample
from serve.service import Service

SEEDS = 2**63 - 1

Texts = str | list[str]
Seed = Annotated[int, Field(ge=-SEEDS - 1, le=SEEDS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON body: unknown names are refused, and nothing is guessed from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Names of parameters that cannot be honoured, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.unsupported.items():
            if name in body and body[name] is not None and body[name] not in neutral:
                raise PydanticCustomError(
                    "unsupported", "{name} is not supported by this server", {"name": name}
                )
        for name, value in body.items():
            if _has_half_character(value):
                raise PydanticCustomError(
                    "half_character", "{name} holds half of a surrogate pair", {"name": name}
                )
        return {name: value for name, value in body.items() if name not in cls.unsupported}


def _has_half_character(value: Any) -> bool:
    """True for texts that no encoding can write, which JSON may hold, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and whole_characters(value) is not value:
            return True
    return False


NAMED_BY_INTERFACES = ("stop", "max_tokens", "top_logprobs")
"""Fields of a `Request` that each interface has under a name and in a form of its own."""


def _descriptions() -> dict[str, str]:
    """What its docstring says of each field of a `Request`; nothing where no docstrings are read."""
    try:
        from docstring_parser import parse
    except ModuleNotFoundError:  # a bare machine, see docs/air-gapped.md: the schema goes without
        return {}
    kinds = [kind for kind in reversed(Request.__mro__) if is_dataclass(kind)]
    params = [param for kind in kinds for param in parse(inspect.getdoc(kind) or "").params]
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in params}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def _fields_of_request() -> dict[str, Any]:
    """The other fields of a `Request`, with their bounds and what its docstring says of them."""
    texts, kinds, schema = _descriptions(), get_type_hints(Request), {}
    for item in fields(Request):
        if item.name in NAMED_BY_INTERFACES:
            continue
        bounds = {name: item.metadata[name] for name in ("ge", "le") if name in item.metadata}
        choices = item.metadata.get("choices")
        kind = Literal[choices] | None if choices else kinds[item.name]
        schema[item.name] = (kind, Field(None, description=texts.get(item.name), **bounds))
    return schema


RequestFields = create_model("RequestFields", __base__=Body, **_fields_of_request())


class Diffusion(RequestFields):
    """Options of decoding beyond OpenAI's; by `extra_body` of its client. Most are those of a `Request`."""

    if TYPE_CHECKING:
        options: dict[str, Any] | None = None
        window: int | None = None

    kernel_size: int | None = Field(None, description="Width of the convolution, for decoders with one.")
    seed: Seed | None = Field(None, description="Equal seeds and requests give equal texts.")
    timeout: float | None = Field(None, ge=0.001, description="Seconds until the request is given up.")
    return_metadata: bool | None = Field(None, description="Report model calls, steps and reveal steps.")

    @field_validator("options")
    @classmethod
    def _check_files(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse paths: what a client may read of the server's files has a name (`dlm orders`)."""
        table = (options or {}).get("table")
        if table is not None and not is_name(table):
            raise PydanticCustomError("table", "table must be the name of an order table of this server")
        return options


class Sampling(Diffusion):
    """Sampling parameters with OpenAI's names, and those that vLLM adds."""

    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 for all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """Hold options to the bounds of the parameters of their names."""
        for name in sorted(SAMPLED & (self.options or {}).keys()):
            Sampling.__pydantic_validator__.validate_assignment(
                Sampling.model_construct(), name, (self.options or {})[name]
            )
        return self

    def decoder_options(self) -> dict[str, Any]:
        """Options of a decoder that these parameters set."""
        standard = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "kernel_size": self.kernel_size,
        }
        standard = {name: value for name, value in standard.items() if value is not None}
        for name in standard.keys() & (self.options or {}).keys():
            message = f"{name} is given twice, as a parameter and among the options"
            raise APIError(400, message, param=name, code="invalid_value")
        return {**(self.options or {}), **standard}

    def request(self, **given: Any) -> Request:
        """A request with the options of `Diffusion` and of the decoder, and other fields that are given."""
        shared = {name: getattr(self, name) for name in RequestFields.model_fields}
        return Request(**{**shared, "options": self.decoder_options() or None, **given})


SAMPLED = frozenset(set(Sampling.model_fields) - set(Diffusion.model_fields))
"""Parameters that are options of decoders too."""


@dataclass(frozen=True)
class Generation:
    """Answers to be written: parameters of any interface, in one form.

    Attributes:
        sampling: the parameters that all interfaces share.
        max_tokens: longest answer; None for the model's default.
        stop: texts that end it.
        n: answers to each prompt.
        logprobs: likeliest tokens noted beside each token written.
    """

    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int = 0

    def check(self, config: ServeConfig) -> None:
        """Hold to the server's limits.

        Raises:
            APIError: 400, naming the parameter.
        """
        if self.n > config.max_n:
            raise APIError(400, f"n must be at most {config.max_n}, got {self.n}", param="n")
        if len(self.stop) > config.max_stop:
            message = f"stop must hold at most {config.max_stop} texts, got {len(self.stop)}"
            raise APIError(400, message, param="stop")
        for text in self.stop:
            if len(text) > config.max_stop_length:
                message = (
                    f"stop must hold texts of at most {config.max_stop_length} characters, got {len(text)}"
                )
                raise APIError(400, message, param="stop")

    def request(self, prompt_tokens: int) -> Request:
        """The request, for a prompt of this length."""
        s = self.sampling
        if s.window is not None and self.max_tokens is not None:
            raise ConfigError("window is the length of prompt and answer together; give no max_tokens then")
        if s.window is not None and prompt_tokens >= s.window:
            raise ConfigError(f"window {s.window} is too short for a prompt of {prompt_tokens} tokens")
        return s.request(
            max_tokens=self.max_tokens,
            stop=list(self.stop) or None,
            top_logprobs=self.logprobs or None,
        )

    def samples(self, service: Service, prompts: list[list[int]]) -> list[Sample]:
        """Rows for all answers, those of the first prompt first; the i-th answer has the seed `seed + i`.

        Raises:
            APIError: 400, for prompts that do not fit and parameters out of range.
        """
        self.check(service.config)
        check_rows(service.config, len(prompts) * self.n)
        check_bias(service, self.sampling)
        seed = first_seed(self.sampling.seed)
        out = []
        for ids in prompts:
            with_limits(service, ids, self.max_tokens)
            with faults_named():
                plan = self.plan(service, ids)
                row = service.rows.answer_row(ids, plan)
                row.stages(plan)  # refused here, before a stream begins
            out += [Sample(row, plan, wrapped(seed + i)) for i in range(self.n)]
        service.check_samples(out)
        return out

    def plan(self, service: Service, ids: list[int]) -> Plan:
        """The plan for a prompt of these tokens."""
        request = self.request(len(ids))
        request.check_decoder()
        return request.resolve(service.spec)


def check_rows(config: ServeConfig, rows: int, param: str | None = "n") -> None:
    """Refuse requests of too many rows, before any is made; `param` asks for them.

    Raises:
        APIError: 400.
    """
    if rows > config.max_request_rows:
        message = f"the request has {rows} rows; this server takes {config.max_request_rows}"
        raise APIError(400, message, param=param, code="too_many_rows")


def with_limits(service: Service, ids: list[int], max_tokens: int | None) -> None:
    """Refuse a prompt that leaves no room for its answer.

    Raises:
        APIError: 400, naming both lengths.
    """
    positions, tokens = service.spec.positions, len(ids)
    if not tokens:
        raise APIError(400, "the prompt is empty", param="prompt", code="invalid_value")
    if tokens >= positions or tokens + (max_tokens or 1) > positions:
        answer = f" and max_tokens asks for {max_tokens} more" if max_tokens and tokens < positions else ""
        raise APIError(
            400,
            f"the prompt has {tokens} tokens{answer}; this model has {positions} positions",
            param="max_tokens" if answer else "prompt",
            code="context_length_exceeded",
        )


@contextmanager
def faults_named(param: str | None = None) -> Iterator[None]:
    """Settings that do not fit become a 400 that names the parameter.

    Args:
        param: the parameter, where the message names none.

    Raises:
        APIError: 400.
    """
    try:
        yield
    except ConfigError as error:
        fault = refused(error, PARAMETERS, option_names())
        fault.param = fault.param or param
        raise fault from error


def first_seed(seed: int | None) -> int:
    """The seed given, or a random one."""
    return secrets.randbelow(2**31) if seed is None else seed


def wrapped(seed: int) -> int:
    """A seed within 64 bits, where counting up has left them."""
    return (seed + SEEDS + 1) % (2 * SEEDS + 2) - SEEDS - 1


def stop_texts(stop: Texts | None) -> tuple[str, ...]:
    """The texts that end an answer; an empty one is refused by `Request`."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def new_id(prefix: str) -> str:
    """An id for a response."""
    return f"{prefix}-{secrets.token_hex(12)}"


def head(prefix: str, model: str) -> dict[str, Any]:
    """Fields that every response of OpenAI's form begins with."""
    return {
        "id": new_id(prefix),
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"dlm-{__version__}",
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def metadata(row: Row, output: Any) -> dict[str, Any]:
    """Fields that `return_metadata` adds to an answer."""
    tokens = len(output.token_ids)
    return {
        "model_calls": output.model_calls,
        "steps": output.steps,
        "tokens_per_call": round(tokens / max(1, output.model_calls), 4),
        "reveal_steps": output.reveal_step,
        "prompt_tokens": row.answer_start,
        "completion_tokens": tokens,
    }


PARAMETERS = frozenset({*Sampling.model_fields, "stop", "max_tokens", "text", "n"})


def check_bias(service: Service, sampling: Sampling) -> None:
    """Refuse a bias of a token that there is not.

    Raises:
        APIError: 400.
    """
    bias = sampling.decoder_options().get("logit_bias") or {}
    for token in map(int, bias if isinstance(bias, dict) else ()):
        if token >= len(service.tokenizer):
            message = f"logit_bias names token {token}, and there are {len(service.tokenizer)}"
            raise APIError(400, message, param="logit_bias", code="invalid_value")
