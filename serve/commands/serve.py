"""`dlm serve`: the text-generation server."""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib.util import find_spec

from decoding.request import Request
from dlm.cli import Command
from dlm.errors import ConfigError, how_to_install
from serve.config import ServeConfig


def run(config: ServeConfig) -> int:
    """Serve until a signal comes."""
    if config.replicas and find_spec("ray") is None:
        raise ConfigError(f"dlm serve --replicas needs Ray: {how_to_install('ray')}")
    try:
        from serve.server import serve
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("serve", "dlm", "decoding"):
            raise
        raise ConfigError(f"dlm serve needs the package {error.name}: {how_to_install('serve')}") from error
    config.keys()
    return serve(config)


BODY = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "logprobs",
    "frequency_penalty",
    "presence_penalty",
)
"""Parameters of a body, besides the fields of a `Request`, that are looked for among the options."""


def body_hint(config: type, name: str) -> str:
    """Say where an unknown option belongs that is a parameter of a request."""
    del config
    theirs = [*(item.name for item in fields(Request)), *BODY]
    near = difflib.get_close_matches(name.partition(".")[0], theirs, n=1, cutoff=0.75)
    return f'Requests bring their own: "{near[0]}" in the body.' if near else ""


COMMAND = Command(
    "serve a model over HTTP (OpenAI's, TGI's and Ollama's interfaces)", ServeConfig, run, hint=body_hint
)
