"""The application: routes, middleware, and errors in one form."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from dlm.errors import DLMError
from dlm.version import __version__
from serve.api import canvas, mercury, ollama, openai, operations, schema, tgi
from serve.api.parameters import Sampling
from serve.config import ServeConfig
from serve.errors import APIError, body_for
from serve.metrics import Metrics
from serve.middleware import BodyLimit, Failures, Keys, OllamaBodies, RequestLog
from serve.service import Service, as_api_error
from serve.worker import Worker

DESCRIPTION = """Masked diffusion language models with convolutional decoding.

Equal seeds and parameters give equal texts, whatever else the server is doing.
"""


def create_app(worker: Worker, config: ServeConfig, metrics: Metrics) -> FastAPI:
    """The ASGI application in front of a worker, which somebody else starts and stops."""
    service = Service(worker, config, metrics)
    app = FastAPI(
        title="dlm",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.service = service
    routers = [module.router(service) for module in (openai, canvas, mercury, tgi, ollama, operations)]
    app.state.paths = sorted({route.path for router in routers for route in router.routes})
    for router in routers:
        app.include_router(router)
    _add_errors(app, metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(OllamaBodies)
    app.add_middleware(Failures)
    app.add_middleware(BodyLimit, limit=config.max_body, metrics=metrics)
    app.add_middleware(Keys, keys=config.keys(), metrics=metrics)
    if config.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestLog, json_lines=config.log_format == "json", bodies=config.log_prompts)
    return app


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error with OpenAI's error object."""

    async def send(request: Request, error: APIError) -> JSONResponse:
        if error.status in (400, 413):
            metrics.refused.inc(label=error.code or "invalid_request")
        return JSONResponse(body_for(request.url.path, error), error.status, error.headers)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return await send(request, error)

    @app.exception_handler(DLMError)
    async def dlm_error(request: Request, error: DLMError) -> JSONResponse:
        return await send(request, as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await send(request, explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail) + (_near(request) if error.status_code == 404 else "")
        api_error = APIError(error.status_code, message, code=_code_of(error))
        body = body_for(request.url.path, api_error)
        return JSONResponse(body, error.status_code, error.headers)


def explain(errors: Sequence[Any]) -> APIError:  # noqa: PLR0911
    """A 400 for a body that does not fit its schema: the first fault, by the name of its parameter."""
    fault = _first_fault(errors)
    kind = str(fault["type"])
    place = [str(part) for part in fault.get("loc", ()) if part != "body"]
    names = [part for part in place if not part[:1].isupper() and "[" not in part and part not in _UNION]
    param = ".".join(names) or None
    if kind == "unsupported":
        name = str(fault["ctx"]["name"])
        param = ".".join([*names, name])
        message = f"{param} is not supported by this server"
        return APIError(400, message, param=param, code="unsupported_parameter")
    if kind == "scoring":
        return APIError(400, str(fault["msg"]), param="echo", code="unsupported_parameter")
    if kind == "half_character":
        param = ".".join([*names, str(fault["ctx"]["name"])])
        return APIError(400, f"{param} holds half of a surrogate pair", param=param, code="invalid_value")
    if kind == "json_invalid":
        return APIError(400, "the body is no JSON", code="invalid_json")
    if not place:
        return APIError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], [n for n in _names() if n != place[-1]], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return APIError(400, f"unknown parameter {param}{hint}", param=param, code="unknown_parameter")
    if kind == "missing":
        return APIError(400, f"{param} is missing", param=param, code="missing_parameter")
    return APIError(400, f"{param}: {fault['msg']}", param=param, code="invalid_value")


def _first_fault(errors: Sequence[Any]) -> Any:
    """The first fault; of a value that fits none of several types, a field too many or few in one of them."""
    place = errors[0].get("loc", ())
    if not place or str(place[-1]) not in _UNION:
        return errors[0]
    of_value = [error for error in errors if error["loc"][: len(place) - 1] == place[:-1]]
    return next((e for e in of_value if e["type"] in ("extra_forbidden", "missing")), errors[0])


def _near(request: Request) -> str:
    """Say which path is near to that of a request, or else where all are listed."""
    near = difflib.get_close_matches(request.url.path.lower(), request.app.state.paths, n=1, cutoff=0.9)
    return f"; did you mean {near[0]}?" if near else f"; the paths are listed at {request.app.openapi_url}"


def _code_of(error: HTTPException) -> str:
    if error.status_code == 400:
        return "invalid_json"
    return str(error.detail).lower().replace(" ", "_")


_UNION = ("str", "int", "float", "list", "dict", "bool")


def _names() -> list[str]:
    """Names of parameters that someone may have meant."""
    bodies: list[type[BaseModel]] = [
        Sampling, schema.ChatRequest, schema.CompletionRequest, canvas.CanvasRequest, tgi.Parameters,
    ]  # fmt: skip
    return sorted({name for body in bodies for name in body.model_fields})


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, without the 422 that never comes, and with the key."""
    if app.openapi_schema is None:
        spec = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in spec["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        parts = spec.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        spec["security"] = [{}, {"key": []}]
        app.openapi_schema = spec
    return app.openapi_schema
