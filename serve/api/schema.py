"""OpenAI's objects, requests and responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, LiteralString

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve.api.parameters import Body, Sampling, Texts
from serve.errors import APIError

SomeTexts = Annotated[list[str], Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]

_NOTHING: tuple[Any, ...] = (False, [], {})
_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "use_beam_search": _NOTHING,
    "length_penalty": (1, 1.0),
    "early_stopping": _NOTHING,
    "stop_token_ids": _NOTHING,
    "include_stop_str_in_output": _NOTHING,
    "ignore_eos": _NOTHING,
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "bad_words": _NOTHING,
    "allowed_token_ids": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "priority": (0,),
}


SCORING: LiteralString = (
    "echo with logprobs and max_tokens of 0 or 1 asks for log-likelihoods of the prompt, which this server "
    "does not give: a masked diffusion model has none token by token. For lm-evaluation-harness there is "
    "python -m eval.lm_harness run --model dlm --model_args pretrained=MODEL"
)
"""Error of requests that score a prompt."""


class StreamOptions(Body):
    """Options of a stream beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}


class Answering(Sampling):
    """Parameters of both kinds of completion."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    stop: Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusing: bool | None = Field(
        None, description="With stream: each delta is the whole text so far, and replaces the last."
    )
    user: str | None = Field(None, description="Taken, and not used.")
    safety_identifier: str | None = Field(None, description="Taken, and not used.")
    prompt_cache_key: str | None = Field(None, description="Taken, and not used.")


class CompletionRequest(Answering):
    """Body of /v1/completions."""

    prompt: str | SomeTexts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    suffix: str | None = Field(None, description="Text after the answer: the gap before it is filled.")
    max_tokens: int | None = Field(None, ge=1, description="16 by default.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {**_EVERYWHERE, "best_of": (1,)}

    @model_validator(mode="before")
    @classmethod
    def _allow_all(cls, body: Any) -> Any:
        """Take `best_of` where all of so many answers are asked for: it asks for nothing then."""
        if isinstance(body, dict) and body.get("best_of") is not None and body["best_of"] == body.get("n"):
            return {name: value for name, value in body.items() if name != "best_of"}
        return body

    @model_validator(mode="before")
    @classmethod
    def _refuse_scoring(cls, body: Any) -> Any:
        """Refuse to give log-likelihoods of a prompt, which is what others do with these three."""
        echoed = isinstance(body, dict) and body.get("echo") is True and body.get("logprobs") is not None
        if echoed and body.get("max_tokens") in (0, 1):
            raise PydanticCustomError("scoring", SCORING)
        return body


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        """Refuse images and sounds by the name of their kind."""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError("unsupported", "this server reads text alone", {"name": kind})
        return content

    @property
    def text(self) -> str:
        """The content as one text.

        Raises:
            APIError: 400, for a message without content.
        """
        if self.content is None:
            raise APIError(400, "a message needs content", param="messages", code="invalid_value")
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "name": (),
        "tool_calls": _NOTHING,
        "images": _NOTHING,  # of Ollama, as are the next two
        "thinking": ("",),
        "tool_name": ("",),
        "function_call": (),
        "tool_call_id": (),
        "audio": (),
        "refusal": (),
        "annotations": _NOTHING,
        "reasoning": (),
        "reasoning_content": (),
    }


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatRequest(Answering):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message in place of answering it."
    )
    metadata: dict[str, str] | None = Field(None, description="Taken, and not used.")

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_EVERYWHERE,
        "add_generation_prompt": (True,),
        "tools": _NOTHING,
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (False, True),
        "functions": _NOTHING,
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "echo": _NOTHING,
        "chat_template": (),
        "chat_template_kwargs": _NOTHING,
        "documents": _NOTHING,
    }


# ---- responses ---------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Metadata(BaseModel):
    """Calls, steps and times of an answer."""

    model_calls: int
    steps: int
    tokens_per_call: float
    reveal_steps: list[int]
    prompt_tokens: int
    completion_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of tokens when they were written; null for given ones."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    metadata: Metadata | None = None


class Completion(BaseModel):
    """Response of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token that might have been written."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A token that was written."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of tokens when they were written."""

    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    metadata: Metadata | None = None


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    decoder: str


class ModelList(BaseModel):
    """Response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class PlainError(BaseModel):
    """Body of a response that is no success, on the paths of TGI and Ollama."""

    error: str
    error_type: str | None = None
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """Body of every response that is no success."""

    error: ErrorDetail
