"""`dlm chat`: a conversation in the terminal, in which the canvas can be watched filling."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from decoding.config import LoadConfig, decoder_option
from decoding.request import Request
from dlm.cli import Command
from dlm.errors import ConfigError

COMMANDS = "/new starts over, /quit leaves, Ctrl-C stops an answer."


@dataclass(frozen=True)
class ChatConfig(Request, LoadConfig):
    """Settings of `dlm chat`.

    Args:
        system: system message, if any.
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
    """

    system: str = ""
    seed: int = 0

    meant = staticmethod(decoder_option)

    def __post_init__(self) -> None:
        """Check that there is a model."""
        Request.__post_init__(self)
        LoadConfig.__post_init__(self)
        self.check_reuse(self.reuse)


def run(config: ChatConfig) -> int:
    """Talk until `/quit` or the end of input; Ctrl-C stops an answer, and at the prompt the conversation."""
    from rich.console import Console

    from decoding.sampler import Sampler

    console = Console()
    request = Request.read_from(config)
    request.check_decoder()
    sampler = Sampler(*config.load())
    console.print(f"[dim]{COMMANDS} Shaded cells are not yet written.[/dim]")
    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(system)
    while True:
        try:
            line = console.input("[bold]you>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if line == "/quit":
            return 0
        if line == "/new":
            messages = list(system)
            console.print("[dim](a new conversation)[/dim]")
        elif line.startswith("/") and len(line.split()) == 1:
            console.print(f"[red]{line} is not a command.[/red] [dim]{COMMANDS}[/dim]")
        elif line:
            messages.append({"role": "user", "content": line})
            messages = _turn(console, sampler, messages, request, config.seed)


def _turn(
    console: Any, sampler: Any, messages: list[dict[str, str]], request: Request, seed: int
) -> list[Any]:
    """Answer the last message; returns the conversation to go on with."""
    conversation = _fitted(sampler, messages, _room(sampler, request))
    if len(conversation) < len(messages):
        console.print(
            f"[dim](the window is full: {len(messages) - len(conversation)} old messages are forgotten)[/dim]"
        )
    try:
        text = _watch(console, sampler, conversation, request, seed)
    except ConfigError as error:
        console.print(f"[red]{error}[/red]")
        return conversation[:-1]
    except KeyboardInterrupt:
        console.print("[dim](stopped; the question is forgotten)[/dim]")
        return conversation[:-1]
    return [*conversation, {"role": "assistant", "content": text}]


def _room(sampler: Any, request: Request) -> int:
    """Tokens that the conversation may have: what the longest answer leaves, and half of all at least."""
    plan = sampler.plan(request)
    return int(plan.positions - min(plan.tokens, plan.positions // 2))


def _fitted(sampler: Any, messages: list[dict[str, str]], room: int) -> list[dict[str, str]]:
    """The conversation without its oldest turns, so that it fits and leaves room for the answer."""
    head = [m for m in messages[:1] if m["role"] == "system"]
    rest = messages[len(head) :]
    while len(rest) > 2 and sampler.prompt_length(head + rest) > room:
        rest = rest[2:]
    return head + rest


def _watch(console: Any, sampler: Any, messages: list[dict[str, str]], request: Request, seed: int) -> str:
    """Show the canvas as it fills and return the finished text."""
    from rich.live import Live
    from rich.text import Text

    begun = time.perf_counter()
    event = None
    with Live(console=console, refresh_per_second=12, transient=not sys.stdout.isatty()) as live:
        for event in sampler.stream(messages, request=request, seed=seed):
            live.update(Text(event.text))
    if event is None:
        return ""
    ids = event.token_ids
    ends = [i for i, token in enumerate(ids) if token in sampler.spec.end_token_ids]
    size = ends[0] if ends else len(ids)
    if not sys.stdout.isatty():
        console.print(Text(event.text))
    seconds = time.perf_counter() - begun
    tokens, steps = _counted(size, "token"), _counted(event.step + 1, "step")
    console.print(f"[dim]{tokens}, {steps}, {size / seconds:.1f} tokens/s[/dim]")
    return str(event.text)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


COMMAND = Command("talk to a trained model in the terminal", ChatConfig, run)
