"""`dlm serve`: the text-generation server."""

from __future__ import annotations

from importlib.util import find_spec

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


COMMAND = Command("serve a model over HTTP (OpenAI's, TGI's and Ollama's interfaces)", ServeConfig, run)
