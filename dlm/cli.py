"""The `dlm` program: finds a subcommand, parses its settings, runs it, turns errors into exit codes.

Each package offers its commands through the entry-point group `dlm.commands` (`inspect.ldw` is the
subcommand `dlm inspect ldw`); the one that is asked for is imported, the others are not. Options come from a
frozen dataclass: `--name value`, dotted for nested ones, or `--config file.yaml`. Exit status 2 is a usage
error, 1 a failure, each with one line on stderr.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import io
import itertools
import json
import locale
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from dlm import packages
from dlm.errors import ConfigError, DLMError, did_you_mean, first_line
from dlm.version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: one line for `dlm --help`.
        config: frozen dataclass of its settings; the docstring's Args section becomes the help.
        run: called with an instance; returns the exit status.
        positional: name of the setting that takes the words which are no options.
        hint: called with `config` and an option that none of its own is near; returns a sentence on what was
            meant, or "".
    """

    help: str
    config: type
    run: Callable[[Any], int]
    positional: str | None = None
    hint: Callable[[type, str], str] = lambda config, name: ""


def commands() -> dict[str, Any]:
    """The installed subcommands by name, not yet imported."""
    return {point.name: point for point in sorted(entry_points(group="dlm.commands"), key=lambda p: p.name)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dlm`; returns the exit status."""
    return _run_guarded(_dispatch, argv)


def program() -> NoReturn:
    """Run `dlm` as a program of its own, and end the process."""
    leave(main())


def leave(status: int) -> NoReturn:
    """End the process without freeing what it holds: a second of work for millions of objects.

    What was registered for the end runs, and streams are flushed. While other threads that must finish are at
    work, the process ends the usual way, which waits for them.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(status)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _fail(f"the output cannot be written: {error.strerror}", status or 1)
    sys.stderr.flush()
    os._exit(status)


def script(prog: str, command: Command, argv: Sequence[str] | None = None) -> int:
    """Run a command that is no subcommand of `dlm`, under the same rules; returns the exit status."""
    return _run_guarded(lambda words: _run(prog, command, words), argv)


def _run_guarded(run: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Call `run` with the words; errors become a line on stderr and an exit status."""
    words, verbatim = _split(list(sys.argv[1:] if argv is None else argv))
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] + verbatim
    prepare_streams()
    try:
        return run(words)
    except DLMError as error:
        if debug:
            raise
        return _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}{_of_encoding(error)}")


def _of_encoding(error: Exception) -> str:
    """A way out for texts and names that this system's encoding lacks; "" for other errors."""
    ours = locale.getpreferredencoding(False)
    if not isinstance(error, UnicodeError) or ours.lower().replace("-", "") == "utf8":
        return ""
    return f"; this system's encoding is {ours}, and PYTHONUTF8=1 makes it UTF-8"


def prepare_streams() -> None:
    """Make output possible on any terminal or pipe.

    A character that the encoding of stdout lacks becomes "?" (JSON has it as an escape, see `json_line`). A
    stderr that is no terminal gets no progress bars: libraries say nothing there, this program has lines.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def json_line(value: Any) -> str:
    """JSON on one line, whose characters stdout can show; others are written as escapes."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return json.dumps(value, ensure_ascii=not encoding.startswith("utf"))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before a lone "--", and that with the words behind it, which are no options."""
    end = words.index("--") if "--" in words else len(words)
    return list(words[:end]), list(words[end:])


def _dispatch(words: list[str]) -> int:
    for line in packages.claim():
        print(f"dlm: note: {line}", file=sys.stderr)
    entries = commands()
    if not words or words[0] in ("-h", "--help"):
        print(_overview(entries))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"dlm {__version__}")
        return 0
    nested = ".".join(words[:2])  # `dlm inspect ldw` is the entry point inspect.ldw
    name, arguments = (nested, words[2:]) if nested in entries and len(words) > 1 else (words[0], words[1:])
    if name not in entries:
        return _fail(
            f"unknown command {name!r}.{did_you_mean(name, entries)} Commands: {_command_names(entries)}", 2
        )
    if wrong := _misspelt_subcommand(words, entries):
        return _fail(wrong, 2)
    return _run(f"dlm {name.replace('.', ' ')}", entries[name].load(), arguments)


def _run(prog: str, command: Command, words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "openai", "datasets", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints what it says itself
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that it would like to fetch
    try:
        config = parse(prog, command, words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return command.run(config)


def _misspelt_subcommand(words: list[str], entries: dict[str, Any]) -> str:
    """Message about `dlm inspect lwd`: a word that is nearly a subcommand, and no file either."""
    if len(words) < 2 or ".".join(words[:2]) in entries or Path(words[1]).exists():
        return ""
    below = [name.split(".")[1] for name in entries if name.startswith(f"{words[0]}.")]
    near = difflib.get_close_matches(words[1], below, n=1, cutoff=0.6)
    return f"unknown command '{words[0]} {words[1]}'. Did you mean '{words[0]} {near[0]}'?" if near else ""


def _command_names(entries: dict[str, Any]) -> str:
    return ", ".join(name.replace(".", " ") for name in entries)


def _overview(entries: dict[str, Any]) -> str:
    width = max((len(name) for name in entries), default=0)
    lines = [f"  {name.replace('.', ' '):<{width}}  {point.load().help}" for name, point in entries.items()]
    return "\n".join(
        [
            "usage: dlm COMMAND [options]",
            "",
            "Masked diffusion language models with convolutional decoding.",
            "",
            "commands:",
            *lines,
            "",
            "`dlm COMMAND --help` lists every option with its default. `--debug` shows tracebacks.",
        ]
    )


class _UsageError(Exception):
    """An error of the command line, in the parser's words."""


def parse(prog: str, command: Command, words: Sequence[str]) -> Any:
    """An instance of the command's settings from words.

    Raises:
        SystemExit: 0 after --help, 2 after a usage error (one line on stderr).
    """
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise _UsageError(str(message)) from ex

    _resolve_annotations(command.config)
    parser = Parser(prog=prog, description=command.help, exit_on_error=True, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(command.config, skip=None)
    if command.positional:
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options, verbatim = _split(words)
    try:
        texts, types = getattr(command.config, "TEXTS", ()), _option_types(command.config)
        normal, nested = _without_nested(_normalise(options, types, texts), types, texts)
        for file in _settings_files(normal):
            _check_settings(_read_settings(file), types)
        namespace = parser.parse_args(normal)
        for name in texts:
            namespace[name] = _decoded(namespace[name])
        for (owner, *names), value in nested:
            namespace[owner] = _with_value(namespace[owner], names, value, owner)
        namespace.pop("config", None)
        rest = [*(namespace.pop("words", None) or ()), *verbatim[1:]]
        if rest:
            _set_positional(namespace, command, rest)
        built = parser.instantiate(namespace)
        return command.config(**{k: v for k, v in vars(built).items() if k != "words"})
    except (_UsageError, ConfigError, TypeError, ValueError) as error:
        message = _explain(str(error), prog, command) + _of_encoding(error)
        raise SystemExit(_fail(message, 2, prog)) from None


def _settings_files(words: Sequence[str]) -> list[str]:
    """The files that --config names."""
    pairs = itertools.pairwise([*words, ""])
    files = [file for word, file in pairs if word == "--config" and not _OPTION.match(file)]
    return [*files, *(word.partition("=")[2] for word in words if word.startswith("--config="))]


def _read_settings(file: str) -> dict[str, Any]:
    """The settings in a YAML file; none of a pipe, which can be read but once, by the parser.

    Raises:
        ConfigError: for a file that cannot be read, or holds none.
    """
    import yaml

    path = Path(file)
    if path.exists() and not path.is_file() and not path.is_dir():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if name := _repeated(yaml.compose(text, yaml.SafeLoader)):
            raise ConfigError(f"--config {file}: {name} is there twice")
        settings = yaml.safe_load(text)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"--config {file}: no such file") from error
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file}: not a file of text in UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"--config {file}{line}: not YAML ({problem})") from error
    if not isinstance(settings, dict) or not settings:
        text = " ".join(str(settings or "").split())
        text = text if len(text) <= 60 else f"{text[:57]} …"
        raise ConfigError(f"--config {file}: a file of settings holds lines such as `seed: 3`, got {text!r}")
    return settings


def _repeated(node: Any) -> str:
    """A name that is twice in one group of a YAML document; "" where there is none."""
    entries = node.value if node is not None and node.id == "mapping" else ()
    names = [key.value for key, _ in entries if key.id == "scalar"]
    twice = next((name for name in names if names.count(name) > 1 and name != "<<"), "")
    return twice or next(filter(None, (_repeated(value) for _, value in entries)), "")


def _check_settings(settings: Mapping[Any, Any], options: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse settings of a file that the parser would pass over, or could not explain.

    A wrong name with nothing in it, such as "modle: {}"; a right one without a value, such as "seed:", where
    the option must have one; and a group that holds no settings, such as "data: 3".

    Raises:
        ConfigError: naming it.
    """
    for name, value in settings.items():
        full = f"{prefix}{name}"
        if value == {} and full not in options:
            raise _UsageError(f"Key '{full}' is not expected")
        if value is None and not _may_be_none(full, options):
            raise ConfigError(f"{full} has no value: give it one, or leave the line out")
        if not is_dataclass(options.get(full)) or value is None or isinstance(value, str):
            continue  # a text names a file of them
        if not isinstance(value, dict):
            within = ", ".join(item.name for item in fields(options[full])[:_SOME])
            raise ConfigError(f"{full} is a group of settings ({within}, …), one a line, got {value!r:.60}")
        _check_settings(value, options, f"{full}.")


def _may_be_none(name: str, options: Mapping[str, Any]) -> bool:
    """True for options that may be None."""
    kind = options.get(name, type(None))
    return kind in (Any, type(None)) or type(None) in get_args(kind)


def _set_positional(namespace: Any, command: Command, words: list[str]) -> None:
    """Put the words that are no options where they belong."""
    if not command.positional:
        raise _UsageError(f"takes no words that are no options, got {' '.join(words)}")
    is_list = get_type_hints(command.config)[command.positional] is not str
    if not is_list and len(words) > 1:
        raise _UsageError(f"one {command.positional} at a time, got {len(words)}: {' '.join(words)}")
    namespace[command.positional] = words if is_list else words[0]


def _resolve_annotations(config: type) -> None:
    """Replace the texts of a settings dataclass's annotations by the types that they name.

    jsonargparse would otherwise run the `TYPE_CHECKING` blocks of its module, which may import torch.
    """
    hints = get_type_hints(config)
    config.__init__.__annotations__.update({item.name: hints[item.name] for item in fields(config)})  # type: ignore[misc]
    for kind in hints.values():
        if is_dataclass(kind):
            _resolve_annotations(kind)  # type: ignore[arg-type]


_OPTION = re.compile(r"--[\w.-]+\+?(=|$)")

_TEXT = "verbatim-text-"
"""Before the hexadecimal digits of a text that the parser would take for something else."""


def _normalise(words: Sequence[str], options: dict[str, Any], texts: Collection[str]) -> list[str]:
    """`--eos-fill` as `--eos_fill`, a switch without a value as `--switch=true`, and texts in a safe form.

    Args:
        words: of the command line.
        options: names of all options, with their types.
        texts: names of those that may be any text, which the parser would read as YAML: in it "# Tips" is
            nothing and "[END]" a list. `_decoded` makes texts of them again.
    """
    out: list[str] = []
    given: set[str] = set()  # options that take several texts
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not _OPTION.match(word):
            out.append(word)
            continue
        option, equals, value = word.partition("=")
        option, plus = (option[:-1], "+") if option.endswith("+") else (option, "")  # adds to a list
        owner, dot, key = option[2:].partition(".")
        owner = owner.replace("-", "_")
        name = owner + dot + (key if owner in texts else key.replace("-", "_"))
        if not equals and options.get(name) in (bool, bool | None):
            is_value = bool(remaining) and remaining[0].lower() in ("true", "false")
            equals, value = ("", "") if is_value else ("=", "true")
        elif owner in texts and (dot or str in get_args(options[owner])):
            if not equals and remaining and not _OPTION.match(remaining[0]):
                equals, value = "=", remaining.pop(0)
            plus = "+" if name in given else plus  # what is given again is one more
            given |= {name} if any(get_origin(kind) is list for kind in get_args(options[owner])) else set()
            value = _encoded(value, options[owner]) if equals else value
        out.append(f"--{name}{plus}{equals}{value}")
    return out


Nested = list[tuple[list[str], Any]]
"""Names from the option inwards, and the value."""


def _without_nested(
    words: Sequence[str], options: Mapping[str, Any], texts: Collection[str]
) -> tuple[list[str], Nested]:
    """The words without values within those of names with values, as `--generation.options.gap 3`; and these.

    The parser would take such a value as a text, and forget what stands beside it.

    Raises:
        _UsageError: for one without a value.
    """
    out: list[str] = []
    nested: Nested = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        option, equals, value = word.partition("=")
        owner, *names = option.removeprefix("--").split(".")
        if not (
            _OPTION.match(word) and len(names) > 1 and owner not in texts and _holds_names(options.get(owner))
        ):
            out.append(word)
            continue
        if not equals and (not remaining or _OPTION.match(remaining[0])):
            raise _UsageError(f"{option} expects a value")
        nested.append(([owner, *names], _loaded(value if equals else remaining.pop(0))))
    return out, nested


def _holds_names(kind: Any) -> bool:
    """True for options that are names with values, such as `dict[str, Any]`."""
    return any(get_origin(member) is dict for member in (kind, *get_args(kind)))


def _with_value(values: Any, names: Sequence[str], value: Any, place: str) -> dict[str, Any]:
    """Names with values, one of which is set within those inside.

    Raises:
        _UsageError: where something else stands in its place.
    """
    if values is not None and not isinstance(values, dict):
        raise _UsageError(f"--{place} is {values!r} already, and holds no {names[0]}")
    name, *inner = names
    known: dict[str, Any] = dict(values or {})
    return known | {name: _with_value(known.get(name), inner, value, f"{place}.{name}") if inner else value}


def _loaded(text: str) -> Any:
    """The value that a text stands for: a number, true, a list or names with values; else the text."""
    import yaml

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            pass
    try:
        return float(text)
    except ValueError:
        return text


def _encoded(text: str, kind: Any) -> str:
    """A text as the parser takes it for one; as it is where that is so, or a JSON list where one is taken."""
    import yaml

    try:
        if any(get_origin(member) is list for member in get_args(kind)):
            listed = json.loads(text)
            if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
                return text
    except (ValueError, RecursionError):
        pass
    try:
        if text == yaml.safe_load(text) and not text.startswith(_TEXT):
            return text
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    return _TEXT + text.encode("utf-8", "surrogatepass").hex()


def _decoded(value: Any) -> Any:
    """A value with the texts in it that `_encoded` has made safe."""
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    if isinstance(value, str) and value.startswith(_TEXT):
        return bytes.fromhex(value.removeprefix(_TEXT)).decode("utf-8", "surrogatepass")
    return value


def _option_types(config: type, prefix: str = "") -> dict[str, Any]:
    """All dotted option names of a settings dataclass, with their types."""
    hints = get_type_hints(config)
    options: dict[str, Any] = {}
    for item in fields(config):
        kind = hints[item.name]
        options[prefix + item.name] = kind
        if is_dataclass(kind):
            options |= _option_types(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return options


def _explain(message: str, prog: str, command: Command) -> str:
    """The parser's message on one line, with the option that was meant when a name was wrong."""
    message = re.sub(r"\s+", " ", message).strip()
    if stray := re.search(r"[Uu]nrecognized arguments: ((?!--).+)", message):
        return _stray(stray[1], command)
    options = _option_types(command.config)
    if mistyped := _mistyped(message) or _no_settings(message, options):
        return mistyped
    wrong = re.search(r"[Uu]nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    wrong = wrong or re.search(r"Option '([\w.]+)' is not accepted", message)
    wrong = wrong or re.search(r"[Kk]ey '?\"?([\w.]+)'?\"? is not expected", message)
    if not wrong:
        return message
    name = next(group for group in wrong.groups() if group)
    group = re.search(r"Group '([\w.]+)'", message)
    full = f"{group[1]}.{name}" if group else name
    return " ".join(
        filter(None, (f"unknown option {full}.", _hint(full, options, prog, command), "See --help."))
    )


def _stray(words: str, command: Command) -> str:
    """What is wrong with words that the parser knows no place for."""
    if re.match(r"-\w", words):
        option = words.split(maxsplit=1)[0]
        return f'unknown option {option}: options begin with "--", and words with a dash stand behind "--"'
    if not command.positional:
        return f"takes no words that are no options, got {words}. See --help."
    return (
        f"{words!r}: words that are no options stand together, before or behind all options; "
        'what begins with "-" stands behind "--"'
    )


def _hint(name: str, options: Collection[str], prog: str, command: Command) -> str:
    """A sentence on what was meant by the name of no option; "" where nothing is near."""
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    if not near:
        return command.hint(command.config, name)
    alone = f', or the words alone: {prog} "…"' if near == [command.positional] else ""
    return f"Did you mean {near[0]}{alone}?"


_SOME = 4
"""Options of a group that a message names."""


def _no_settings(message: str, options: Mapping[str, Any]) -> str:
    """The parser's words about settings that are none, in ours; "" for other messages."""
    if config := re.fullmatch(r"Unexpected config:(.*)", message):
        return f"--config takes a file of lines such as `seed: 3`, got {config[1].strip()[:60]!r}"
    group = re.search(r"""Parser key "([\w.]+)": Unable to load config ['"](.*?)['"](?: - |$)""", message)
    if not group:
        return ""
    below = [name for name in options if name.startswith(f"{group[1]}.")]
    wrong = "holds none" if Path(group[2]).is_file() else "is no file"
    return (
        f"--{group[1]} takes a YAML file of settings, and {group[2]!r} {wrong}; its options one by one are "
        f"{', '.join(f'--{name}' for name in below[:_SOME])}{' and others' if len(below) > _SOME else ''}"
    )


_KINDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list",
    "dict": "names with values",
}  # fmt: skip
"""Types of settings, in words."""


def _mistyped(message: str) -> str:
    """The parser's words about a value of the wrong type, in ours; empty for other messages."""
    found = re.search(r'Parser key "([\w.]+)":? (.*?)(?:Got value:|Given value:) (.*)$', message)
    if found and (choices := re.search(r"typing\.Literal\[(.*?)\]", message)):
        return f"{found[1]} must be one of {choices[1]}, got {found[3]!r}"
    kinds = [_KINDS[kind] for kind in re.findall(r"Expected an? <class '(\w+)'>", message) if kind in _KINDS]
    if not found or not kinds:
        return ""
    return f"{found[1]} must be {' or '.join(dict.fromkeys(kinds))}, got {found[3]!r}"


def _fail(message: str, status: int = 1, prog: str = "dlm") -> int:
    """One line on stderr; returns the status."""
    line = re.sub(r"\s*\n\s*", " ", message).strip()
    print(f"{prog}: error: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    program()
