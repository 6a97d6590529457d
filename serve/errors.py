"""Errors as OpenAI's API reports them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from decoding.row_maker import TooLongError
from dlm.errors import DLMError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout",
}
"""OpenAI's `type` for each status."""


class APIError(DLMError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for people.
        param: the parameter at fault, if there is one.
        code: for programs.
        retry_after: seconds after which to try again, if that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


TGI_PATHS = ("/", "/generate", "/generate_stream")
"""Paths of Text Generation Inference's interface."""


def body_for(path: str, error: APIError) -> dict[str, Any]:
    """The body of an error as the interface of the path has it: OpenAI's object, TGI's or Ollama's text."""
    if path in TGI_PATHS:
        kind = {429: "overloaded", 400: "validation", 413: "validation"}.get(error.status, "generation")
        return {"error": error.message, "error_type": kind, "param": error.param, "code": error.code}
    if path.startswith("/api/"):
        return {"error": error.message, "param": error.param, "code": error.code}
    return error.body


def refused(error: DLMError, names: Iterable[str], options: Iterable[str] = ()) -> APIError:
    """A 400 for settings that do not fit, naming the parameter that the message begins with.

    Args:
        error: whose message says what was wrong and what would be right.
        names: parameters of the request.
        options: names within its parameter `options`; a message about one has it as its first word.
    """
    message, own = str(error), set(names)
    words = re.findall(r"\w+", message.removeprefix("option "))
    if message.startswith("unknown option"):
        param: str | None = "options"
    elif words and words[0] in set(options):
        param = words[0] if words[0] in own else f"options.{words[0]}"
    else:
        param = next((word for word in words[:6] if word in own), None)
    code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
    return APIError(400, str(error), param=param, code=code)
