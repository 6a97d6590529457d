"""`dlm chat`: a conversation in the terminal, in which the canvas can be watched filling."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding.chat.conversation import Conversation, Source
from decoding.commands.display import plain_console, watch
from decoding.config import LoadConfig, request_hint
from decoding.request import Request
from dlm.cli import Command
from dlm.data.prompts import stdin_lines
from dlm.errors import ConfigError, DLMError, did_you_mean
from dlm.lock import check_writable

if TYPE_CHECKING:
    from rich.console import Console

COMMAND_LINE = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
"""A line that is a command and no message; "/etc/hosts" is none."""


@dataclass(frozen=True)
class ChatConfig(Request, LoadConfig):
    """Settings of `dlm chat`.

    Args:
        model: folder or hub id of a checkpoint; "default", "full" and, before R2FT, "default-sft", "full-sft"
            come along. With --endpoint, the name of the model there.
        system: system message, if any.
        endpoint: base URL of an OpenAI-compatible server to talk to, such as http://127.0.0.1:8000/v1 (the
            key, if it needs one, is OPENAI_API_KEY in the environment).
        save: file (.jsonl) to which the conversation is written after each answer, as `dlm train` reads it.
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
    """

    system: str = ""
    endpoint: str = ""
    save: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is a model, or an address."""
        Request.__post_init__(self)
        LoadConfig.__post_init__(self)
        self.check_reuse(self.reuse)
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint must begin with http:// or https://, got {self.endpoint!r}")
        for name in ("device", "dtype", "accelerate", "block_size"):
            if self.endpoint and getattr(self, name) != getattr(LoadConfig, name):
                raise ConfigError(f"{name} is for a model on this machine, not for --endpoint")
        if self.save:
            check_new(self.save)

    def source(self) -> Source:
        """The source of the answers: an endpoint, or a model here."""
        from decoding.chat.sources import EndpointSource, SamplerSource

        if self.endpoint:
            return EndpointSource(self.endpoint, self.model)
        return SamplerSource(self.sampler(Request.read_from(self)))


def check_new(file: str) -> None:
    """Refuse a file that is there already, or cannot be written.

    Raises:
        ConfigError: saying which.
    """
    if Path(file).exists():
        raise ConfigError(f"{file} is there already; name another file")
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{file}: there is no folder {folder}")
    check_writable(folder)


def run(config: ChatConfig) -> int:
    """Talk until `/quit` or the end of input; Ctrl-C stops an answer, and at the prompt the conversation."""
    request = Request.read_from(config)
    conversation = Conversation(config.source(), request, config.system, config.seed)
    conversation.source.check(request)
    console = plain_console()
    chat = Chat(console, conversation, config.save)
    chat.note("/help lists the commands. Shaded cells are not yet written.")
    lines = typed_lines() if sys.stdin.isatty() and sys.stdout.isatty() else piped_lines(console)
    for line in lines:
        if not chat.take(line):
            break
    return 0


class Chat:
    """A conversation, and the commands and messages that are typed into it.

    Args:
        console: where everything is shown; texts are never read as markup.
        conversation: what is talked about.
        file: where it is written after each answer; empty for nowhere.
    """

    def __init__(self, console: Console, conversation: Conversation, file: str = "") -> None:
        self.console, self.conversation, self.file = console, conversation, file
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/new": ("start over", self._new),
            "/retry": ("ask the last question again, under another seed", self._retry),
            "/system": ("TEXT: set the system message; without a text, show it; - for none", self._system),
            "/decoder": (
                "NAME OPTION=VALUE …: decode in another way; options alone are for the model's own decoder; "
                "- is that decoder as it is; without a word, show it",
                self._decoder,
            ),
            "/save": ("FILE.jsonl: write the conversation, as dlm train reads it", self._save),
            "/quit": ("leave", self._help),
        }

    def take(self, line: str) -> bool:
        """Do what a line says; False when it says to leave. No error of one line ends the conversation."""
        command = COMMAND_LINE.fullmatch(line.rstrip())
        try:
            if command is None:
                if line.strip():
                    self._show(self.conversation.ask(line.removesuffix("\n")))
            elif command[1] == "/quit":
                return False
            elif command[1] not in self.commands:
                self._unknown(command[1])
            else:
                self.commands[command[1]][1]((command[2] or "").strip())
        except KeyboardInterrupt:
            self.note("(stopped; the question is forgotten, /retry asks it again)")
        except BrokenPipeError:  # nobody reads any longer
            raise
        except Exception as error:
            self.complain(str(error) if isinstance(error, DLMError) else f"{type(error).__name__}: {error}")
        return True

    def note(self, text: str) -> None:
        """Show a remark."""
        self.console.print(text, style="dim", soft_wrap=True)

    def complain(self, text: str) -> None:
        """Show an error."""
        self.console.print(re.sub(r"\s*\n\s*", " ", text), style="red", soft_wrap=True)

    def _show(self, answer: Iterator[str]) -> None:
        begun, texts = time.perf_counter(), 0

        def counted() -> Iterator[str]:
            nonlocal texts
            for texts, text in enumerate(answer, 1):
                if texts == 1 and self.conversation.forgotten:
                    self.note(f"(there is no room for the {self.conversation.forgotten} oldest messages)")
                yield text

        text = watch(self.console, counted())
        seconds = time.perf_counter() - begun
        tokens = self.conversation.source.count(text)
        if tokens is None:
            self.note(f"{seconds:.1f} s")
        else:
            self.note(
                f"{_counted(tokens, 'token')}, {_counted(texts, 'step')}, {tokens / seconds:.1f} tokens/s"
            )
        if self.file:
            self.conversation.save(self.file)

    def _unknown(self, name: str) -> None:
        hint = did_you_mean(name, self.commands)
        self.complain(
            f"{name} is not a command.{hint} Commands: {', '.join(self.commands)}. "
            "A message that begins like one stands behind a space."
        )

    def _help(self, text: str) -> None:
        del text
        width = max(map(len, self.commands))
        for name, (meaning, _) in self.commands.items():
            self.note(f"{name:<{width}}  {meaning}")
        self.note("Ctrl-C stops an answer. What is pasted is one message; Alt-Enter begins a new line.")

    def _new(self, text: str) -> None:
        del text
        self.conversation.clear()
        self.note("(a new conversation)")

    def _retry(self, text: str) -> None:
        del text
        answer = self.conversation.retry()
        if self.conversation.repeats:
            self.note(
                "(this decoder draws nothing at random: the same answer; /decoder temperature=0.7 varies it)"
            )
        self._show(answer)

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        self.note(f"system message: {self.conversation.system or 'none'}")

    def _decoder(self, text: str) -> None:
        if text:
            words = text.split()
            name = None if words[0] == "-" or "=" in words[0] else words[0]
            options = words if "=" in words[0] else words[1:]
            self.conversation.decode_with(name, _parse_options(options) or None)
        request = self.conversation.request
        own = self.conversation.source.decoder(request)
        called = request.decoder or (f"{own.name}, the model's own" if own else "the model's own")
        shown = " ".join(f"{option}={value}" for option, value in (request.options or {}).items())
        self.note(f"decoder: {called} {shown}".rstrip())

    def _save(self, text: str) -> None:
        if not text and not self.file:
            raise ConfigError("name the file: /save talk.jsonl")
        if text and text != self.file:
            check_new(text)
            self.file = text
        count = self.conversation.save(self.file)
        self.note(f"{self.file}: {_counted(count, 'conversation')}, and from now on each answer")


def _parse_options(words: list[str]) -> dict[str, Any]:
    """Options of a decoder: "kernel_size=9", "verify_all=true", "table=sorted"."""
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise ConfigError(f"{word!r} is not OPTION=VALUE, such as temperature=0.7")
        options[name] = _chat_value(value)
    return options


def _chat_value(text: str) -> bool | int | float | str:
    """A value of an option: true, false, a number, or else a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def piped_lines(console: Console) -> Iterator[str]:
    """Lines of a stdin that is no terminal, in UTF-8.

    Raises:
        DataError: for a line that is not; those before it have been given.
    """
    lines = stdin_lines()
    while True:
        console.print("you> ", end="", markup=False, highlight=False)
        try:
            line = next(lines, None)
        except KeyboardInterrupt:
            line = None
        if line is None:
            console.print()
            return
        yield line.rstrip("\r\n")


def typed_lines(**streams: Any) -> Iterator[str]:
    """Lines from the terminal, with editing and a history; a paste of several lines is one of them.

    Args:
        **streams: `input` and `output` of `prompt_toolkit`, by default those of the terminal.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=_history(), key_bindings=keys, **streams)
    while True:
        try:
            yield session.prompt("you> ")
        except (EOFError, KeyboardInterrupt):
            return


def _history() -> Any:
    """Messages of earlier sessions, in a file of the owner alone; of this session if there can be none."""
    from platformdirs import user_state_path
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        file = Path(user_state_path("dlm", ensure_exists=True)) / "chat_history"
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


COMMAND = Command("talk to a trained model in the terminal", ChatConfig, run, hint=request_hint)
