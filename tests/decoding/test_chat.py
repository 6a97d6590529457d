"""`dlm chat`: what is typed is text or a command, and no error of one line ends the conversation."""

import contextlib
import io
import json
import logging
import sys
import threading

import pytest

from decoding.chat.conversation import Conversation
from decoding.commands.chat import COMMAND as CHAT
from decoding.commands.chat import Chat, piped_lines, typed_lines
from decoding.commands.display import plain_console, watch
from dlm.cli import main
from dlm.errors import DataError
from tests.decoding.chat.test_conversation import Scripted, contents
from tests.eval.endpoint import serving


class Echo(Scripted):
    """Answers with the question."""

    def stream(self, messages, request, seed=0):
        for _ in super().stream(messages, request, seed):
            yield messages[-1]["content"]


@pytest.fixture
def chat():
    out = io.StringIO()
    chat = Chat(plain_console(file=out, width=70), Conversation(Echo()))
    chat.said = lambda: (out.getvalue(), out.seek(0), out.truncate())[0]
    return chat


@pytest.mark.parametrize(
    "text",
    ["/x/[/foo]", "[bold]x[/bold]", "a [/", ":bug: :smile:", "/etc/hosts what is it?", " /help", "x" * 300],
)
def test_a_text_is_shown_and_asked_as_it_stands(chat, text):
    assert chat.take(text)
    assert chat.said().startswith(f"{text}\n")
    assert contents(chat.conversation) == [text, text]


def test_several_lines_are_one_message(chat):
    chat.take("def f():\n    return [/x]\n")
    assert contents(chat.conversation)[0] == "def f():\n    return [/x]"


def test_commands_do_what_help_says(chat, tmp_path):
    assert chat.take("/help")
    listed = chat.said()
    assert all(name in listed for name in chat.commands)
    chat.take("one")
    chat.take("/retry")
    assert chat.conversation.source.asked[-1][2] == 1
    assert "draws nothing at random" in chat.said()
    chat.take("/decoder temperature=0.7")
    assert "decoder: llada, the model's own temperature=0.7" in chat.said()
    assert (chat.conversation.request.decoder, chat.conversation.request.options) == (
        None,
        {"temperature": 0.7},
    )
    chat.take("/retry")
    assert "draws nothing at random" not in chat.said()
    chat.take("/system Be short. [/b]")
    assert chat.conversation.system == "Be short. [/b]"
    chat.take("/system -")
    assert chat.conversation.system == ""
    chat.take("/decoder llada temperature=0.5")
    assert "decoder: llada temperature=0.5" in chat.said()
    assert chat.conversation.request.options == {"temperature": 0.5}
    chat.take("/decoder -")
    assert chat.conversation.request.decoder is None
    chat.take(f"/save {tmp_path / 'a.jsonl'}")
    chat.take("two")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [m["content"] for m in rows[0]["messages"]] == ["one", "one", "two", "two"]
    chat.take("/new")
    assert chat.conversation.messages == []
    assert not chat.take("/quit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/helo", "/helo is not a command. Did you mean '/help'?"),
        ("/foo bar", "/foo is not a command."),
        ("/retry", "nothing has been asked yet"),
        ("/decoder cnov", "Did you mean 'conv'?"),
        ("/decoder conv kernel_size", "'kernel_size' is not OPTION=VALUE"),
        ("/decoder conv tau=1", "unknown option of decoder 'conv': 'tau'"),
        ("/save", "name the file"),
        ("/save /nowhere/at/all.txt", "there is no folder /nowhere/at"),
    ],
)
def test_a_wrong_command_is_told_and_changes_nothing(chat, line, message):
    assert chat.take(line)
    assert message in chat.said()
    assert chat.conversation.source.asked == []


def test_a_file_that_is_there_is_not_overwritten(chat, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    chat.take(f"/save {tmp_path / 'a.jsonl'}")
    assert "is there already" in chat.said()
    assert (tmp_path / "a.jsonl").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("[/x] broke"), KeyboardInterrupt(), MemoryError()])
def test_an_error_of_one_answer_does_not_end_the_conversation(chat, error, monkeypatch):
    chat.take("one")
    stream = Echo.stream

    def failing(source, *arguments):
        yield "a"
        raise error

    monkeypatch.setattr(Echo, "stream", failing)
    assert chat.take("two")
    assert ("[/x] broke" if isinstance(error, RuntimeError) else "") in chat.said()
    monkeypatch.setattr(Echo, "stream", stream)
    assert chat.take("/retry")
    assert contents(chat.conversation) == ["one", "one", "two", "two"]


def test_a_paste_of_several_lines_is_one_message_and_the_line_can_be_edited(tmp_path, monkeypatch):
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys:
        keys.send_text("\x1b[200~def f():\r\n    return 1\x1b[201~\r")
        keys.send_text("held\x1b[D\x1b[Dl\x1b[C\x1b[C\x7fo\r")  # two left, l, to the end, one back, o
        keys.send_text("a\x1b\rb\r")  # Alt-Enter
        keys.send_text("\x04")
        lines = list(typed_lines(input=keys, output=DummyOutput()))
    assert lines == ["def f():\n    return 1", "hello", "a\nb"]
    (history,) = tmp_path.rglob("chat_history")
    assert history.stat().st_mode & 0o077 == 0
    with create_pipe_input() as keys:
        threading.Timer(1.0, keys.send_text, ["\x1b[A\r\x04"]).start()  # once the history has been read
        assert list(typed_lines(input=keys, output=DummyOutput())) == ["a\nb"], "of the session before"


def test_chat_talks_to_an_endpoint(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/x/[/foo]\n/quit\n"))
    file = tmp_path / "talk.jsonl"
    with serving(lambda body: f"{len(body['messages'])} messages") as endpoint:
        assert main(["chat", "--endpoint", endpoint.url, "--model", "m", "--save", str(file)]) == 0
    out = capsys.readouterr().out
    assert "1 messages" in out
    assert "3 messages" in out
    assert [m["content"] for m in json.loads(file.read_text())["messages"]][2] == "/x/[/foo]"
    assert main(["chat", "--endpoint", "127.0.0.1:1"]) == 2
    assert main(["chat", "--endpoint", "http://x/v1", "--dtype", "float32"]) == 2
    assert main(["chat", "--endpoint", "http://x/v1", "--save", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_terminal_sees_every_text_and_the_last_one_stays():
    out = io.StringIO()
    console = plain_console(file=out, force_terminal=True, width=60)
    assert watch(console, iter(["[/a]", "[/a] b"])) == "[/a] b"
    assert "[/a] b" in out.getvalue()


def test_lines_before_one_that_is_no_utf_8_are_answered(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff\xfe\nho\n")))
    lines = piped_lines(plain_console(file=io.StringIO()))
    assert next(lines) == "hi"
    with pytest.raises(DataError, match="stdin, line 2"):
        next(lines)


def test_options_of_a_decoder_are_numbers_words_and_yes_or_no(chat):
    chat.take("/decoder conv verify=0.1 verify_all=true kernel_size=9 temperature=1e-1")
    options = {"verify": 0.1, "verify_all": True, "kernel_size": 9, "temperature": 0.1}
    assert chat.conversation.request.options == options
    chat.take("/decoder conv kernel_size=wide")
    assert "kernel_size" in chat.said()


def test_clients_of_endpoints_say_nothing_of_their_requests(monkeypatch):
    """openai and huggingface_hub log each one, the former under another name since its version 3."""
    from dlm.cli import _run

    noisy = [logging.getLogger(name) for name in ("httpx", "httpx2", "openai")]
    for logger in noisy:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
        logger.setLevel(logging.NOTSET)
    with contextlib.suppress(SystemExit):
        _run("dlm chat", CHAT, ["--print_config"])
    assert [logger.level for logger in noisy] == [logging.WARNING] * 3
