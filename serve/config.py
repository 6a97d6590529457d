"""Settings of `dlm serve`; importable without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from decoding.config import LoadConfig
from dlm.errors import ConfigError, DataError, unknown_name


@dataclass(frozen=True)
class ServeConfig(LoadConfig):
    """Settings of `dlm serve`.

    Args:
        host: address to listen on; 0.0.0.0 for all interfaces (give a key then).
        port: port to listen on; 0 takes a free one.
        model_name: name of the model in the API; by default the last part of --model.
        max_rows: answers written at a time; others wait.
        max_positions: tokens of all answers at work, prompts included and each at its longest.
        max_step_positions: tokens of the answers that take a step together, prompts included; requests take
            turns where not all fit. 0 for no limit; by default 512 on a CPU and no limit on a GPU.
        max_waiting: requests that may wait; more are refused with status 429.
        timeout: seconds until a request is given up, unless it says so itself; 0 for none.
        grace: seconds that running requests have to finish after SIGTERM.
        api_key: keys that clients must send; also DLM_API_KEY. Prefer --api_key_file.
        api_key_file: file of keys, one a line.
        max_body: longest body of a request, in bytes.
        max_prompt: longest prompt, in tokens; 0 for what the model can hold.
        max_n: most answers to one prompt.
        max_request_rows: most rows of one request: its prompts times their answers, or the lengths of gaps.
        max_stop: most stop texts of a request.
        max_stop_length: longest stop text, in characters.
        cors: origins whose pages may call the server, such as '["https://example.org"]'; none by default.
        log_format: "plain" or "json", one line a request on stderr.
        log_prompts: write prompts to the log.
        page: serve the page at /.
        replicas: copies of the model, each in a process of its own, run by Ray (the extra `ray`), and
            each with the limits above to itself; 0 for one model in this process.
        max_replicas: most copies; more than --replicas are started while many requests are at work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = ""
    max_rows: int = 32
    max_positions: int = 32768
    max_step_positions: int | None = None
    max_waiting: int = 256
    timeout: float = 600.0
    grace: float = 30.0
    api_key: list[str] = field(default_factory=list)
    api_key_file: str = ""
    max_body: int = 1 << 20
    max_prompt: int = 0
    max_n: int = 16
    max_request_rows: int = 256
    max_stop: int = 16
    max_stop_length: int = 256
    cors: list[str] = field(default_factory=list)
    log_format: str = "plain"
    log_prompts: bool = False
    page: bool = True
    replicas: int = 0
    max_replicas: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        LoadConfig.__post_init__(self)
        for name in ("max_rows", "max_positions", "max_body", "max_n", "max_request_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "max_waiting",
            "timeout",
            "grace",
            "max_prompt",
            "max_stop",
            "max_stop_length",
            "replicas",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_step_positions is not None and self.max_step_positions < 0:
            raise ConfigError(f"max_step_positions must not be negative, got {self.max_step_positions}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie between 0 and 65535, got {self.port}")
        if self.log_format not in ("plain", "json"):
            raise unknown_name("log_format", self.log_format, ("plain", "json"))
        self._check_replicas()

    def _check_replicas(self) -> None:
        if self.max_replicas and not 1 <= self.replicas <= self.max_replicas:
            raise ConfigError(
                f"max_replicas must be at least --replicas, which must be at least 1; "
                f"got {self.max_replicas} and {self.replicas}"
            )
        if self.replicas and ":" in self.device:
            raise ConfigError(f"replicas choose their GPUs: give --device cuda, not {self.device}")

    @property
    def served_name(self) -> str:
        """Name of the model in the API."""
        return self.model_name or Path(self.model).name

    @property
    def public(self) -> bool:
        """True when other machines can reach the address."""
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def keys(self) -> list[str]:
        """Keys that clients may send; none when the server is open.

        Raises:
            DataError: for a file of keys that cannot be read, or holds none.
        """
        keys = [key.strip() for key in self.api_key]
        if "DLM_API_KEY" in os.environ:
            keys.append(os.environ["DLM_API_KEY"].strip())
        if "" in keys:
            raise DataError("a key is empty; give one with --api_key_file, or leave DLM_API_KEY unset")
        if self.api_key_file:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{self.api_key_file}: cannot be read as a file of keys ({error})") from error
            if not any(line.strip() for line in lines):
                raise DataError(f"{self.api_key_file}: holds no key; write one a line")
            keys += [line.strip() for line in lines if line.strip()]
        return keys
