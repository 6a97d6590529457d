"""Paths for those who run the server: /health, /ready, /metrics, /docs; and the page at /."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from dlm.version import __version__
from serve.metrics import CONTENT_TYPE
from serve.service import Service

PAGE = Path(__file__).parent.parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
"""The page loads nothing from elsewhere."""

SWAGGER = Path(str(files("fastapi_offline"))) / "static"
"""Address of the files of Swagger UI."""
DOCS_POLICY = POLICY + "; style-src 'self' 'unsafe-inline'"
"""Swagger UI writes styles into its elements."""


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api = APIRouter(tags=["operations"])

    @api.get("/health")
    async def health() -> JSONResponse:
        """200 while the process does its work, 503 once the worker has died."""
        worker = service.worker
        alive = worker.alive or not worker.loaded.done()
        body = {"status": "alive" if alive else "dead", "version": __version__}
        return JSONResponse(body, 200 if alive else 503)

    @api.get("/ready")
    async def ready() -> JSONResponse:
        """200 when requests will be answered; 503 while the model is loaded, and during shutdown."""
        worker = service.worker
        state = "ready" if worker.ready else "draining" if worker.draining else "loading"
        return JSONResponse({"status": state}, 200 if worker.ready else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    _add_docs(api)
    if service.config.page:
        page_files = [file for file in PAGE.iterdir() if file.suffix in KINDS and file.stem != "docs"]
        _add_files(api, "/", "/page/", PAGE / "index.html", page_files, POLICY)
        return api

    @api.get("/", include_in_schema=False)
    async def alive() -> Response:
        """For clients that look whether there is a server, as Ollama's do."""
        return Response("dlm is running", media_type="text/plain")

    return api


def _add_docs(api: APIRouter) -> None:
    """Serve Swagger UI at /docs."""
    brought = [SWAGGER / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")]
    parts = [PAGE / "docs.js", PAGE / "icon.svg", *brought]
    _add_files(api, "/docs", "/docs/", PAGE / "docs.html", parts, DOCS_POLICY)


def _add_files(
    api: APIRouter, path: str, folder: str, page: Path, parts: Iterable[Path], policy: str
) -> None:
    """Serve a page at `path`, and its parts in `folder`."""

    def add(path: str, file: Path) -> None:
        async def send() -> Response:
            headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
            return Response(file.read_bytes(), media_type=KINDS[file.suffix], headers=headers)

        api.add_api_route(path, send, methods=["GET"], include_in_schema=False)

    add(path, page)
    for part in parts:
        add(folder + part.name, part)
