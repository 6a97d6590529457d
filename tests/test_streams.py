"""Output on any terminal or pipe: narrow encodings, no progress bars in files, help without torch."""

import json
import os
import re
import subprocess
import sys

import pytest

from dlm.cli import commands

EMOJI = "\N{SLIGHTLY SMILING FACE}"
EVAL = f"eval alpaca_eval --name {EMOJI} --max_tokens 8 --output"
NEGATIVES = "inspect negatives --data.source rules --data.limit 40 --rows 1 --data.validation_rows 2"
TRAIN = (
    "train --data.source rules --data.limit 20 --data.validation_rows 2 --max_steps 1 --warmup_steps 0 "
    "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 1 --eval_steps 1 "
    "--sample_steps 1 --report_to none --output_dir"
)
DRIVER = """
import sys
from dlm.cli import main
for words in {several!r}:
    sys.stdout.write("--\\n")
    status = main(words)
    sys.stdout.write(f"status {{status}}\\n")
"""


def run(code, encoding="utf-8", **kwargs):
    """Python code in a process of its own, whose streams have this encoding; (stdout, stderr) as bytes."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, **kwargs)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    from dlm.backbone import from_scratch
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("streams") / f"model {EMOJI}"
    model = from_scratch(TINY, tokenizer)
    model.config.generation = {"decoder": "conv", "window": 64, "steps": 4}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_encoding_lacks_ends_no_command(folder, encoding):
    place, model = folder.parent, str(folder)
    (place / "questions.json").write_text(json.dumps([{"instruction": f"Go {EMOJI}.", "output": "Gone."}]))
    short = ["--max-tokens", "6", "--begin", EMOJI]
    several = [
        ["generate", "--model", model, *short, "one", "two"],
        ["generate", "--model", model, *short, "one", "two", "--json"],
        ["infill", "--model", model, f"a {EMOJI} <mask:2>.", f"{EMOJI}<mask:1>"],
        ["infill", "--model", model, f"a {EMOJI} <mask:2>.", "--json"],
        ["infill", "--model", model, f"a {EMOJI} word", "--edit", "word"],
        ["inspect", model],
        ["inspect", model, "--json"],
        ["export", "--model", model, "--output", str(place / f"{encoding} {EMOJI}")],
        [*EVAL.split(), str(place / encoding), "--model", model, "--data", str(place / "questions.json")],
        [*NEGATIVES.split(), model],
        [*TRAIN.split(), str(place / f"run {encoding} {EMOJI}"), "--samples", f'["{EMOJI}"]'],
        ["chat", "--model", model, *short],
    ]
    talk = f"{EMOJI}\n/{EMOJI}\n/quit\n".encode()
    code = f"import io, sys\nsys.stdin = io.TextIOWrapper(io.BytesIO({talk!r}), 'utf-8')\n"
    out, err = run(code + DRIVER.format(several=several), encoding)
    parts = out.decode(encoding).split("--\n")[1:]
    assert len(parts) == len(several), err.decode()
    assert [re.search(r"status (\d+)\n$", part)[1] for part in parts] == ["0"] * len(several), err.decode()
    assert len(parts[0].splitlines()) >= 3, "both answers are written"
    assert parts[0].startswith("?")
    rows = [json.loads(line) for line in parts[1].splitlines()[:-1]]
    assert [row["text"][0] for row in rows] == [EMOJI, EMOJI], "JSON has escapes, and loses nothing"
    assert EMOJI in json.loads(parts[3].splitlines()[0])["text"]
    assert EMOJI in json.loads(parts[6].splitlines()[0])["path"]
    assert b"\r" not in err, "no progress bars where stderr is no terminal"
    assert b"Traceback" not in err


HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib", "openai", "peft")

HELP = """
import contextlib, io, sys
from dlm.cli import commands, main
for name in ["", *commands()]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*name.split("."), "--help"] if name else ["--help"]) == 0
    print(name, [heavy for heavy in {heavy!r} if heavy in sys.modules])
"""


def test_help_imports_no_heavy_library():
    out, _ = run(HELP.format(heavy=HEAVY))
    assert out.decode().splitlines() == [f"{name} []" for name in ["", *commands()]]


WRONG = [
    ["generate", "--modle", "x", "hi"],
    ["generate", "--seed", "x", "hi"],
    ["generate", "--max-tokens", "0", "hi"],
    ["generate", "--rate", "0.5", "hi"],
    ["generate", "--rate", "2", "--steps", "4", "hi"],
    ["generate", "--window", "64", "--max-tokens", "4", "hi"],
    ["generate", "--canvas", "big", "hi"],
    ["generate", "--reuse", "all", "hi"],
    ["generate", "--refresh", "3", "hi"],
    ["generate", "--batch-size", "0", "hi"],
    ["generate", "--limit", "-1", "hi"],
    ["generate", "--stop", "", "hi"],
    ["generate", "--forced.x", "nine", "hi"],
    ["generate", "--accelerate", "fast", "hi"],
    ["generate", "--dtype", "int4", "hi"],
    ["generate", "--device", "gpu", "hi"],
    ["generate", "--model", "", "hi"],
    ["generate", "--file", "a.txt", "hi"],
    ["generate", "--prompt-file", "a.txt", "--file", "b.txt"],
    ["generate", "--samples", "0", "hi"],
    ["generate", "--config", "nowhere.yaml"],
    ["generate", "hi", "--seed", "1", "there"],
    ["chat", "--max-tokens", "-2"],
    ["chat", "--dtype", "int4"],
    ["chat", "--endpoint", "localhost:8000"],
    ["chat", "--endpoint", "http://localhost:8000", "--dtype", "float32"],
    ["chat", "--save", "/nowhere/at/all.jsonl"],
    ["chat", "hello"],
    ["infill", "--edit", "a", "--length", "x", "a b"],
    ["infill", "--length", "3", "a <mask:2>"],
    ["infill", "--steps", "0", "a <mask:2>"],
    ["infill", "a text without a gap"],
    ["infill", "<mask:9-2> too"],
    ["infill", "a b", "--edit", "c"],
    ["inspect"],
    ["inspect", "ldw", "x"],
    ["inspect", "ldw", "x", "--prompt", "a", "--output", "a.txt"],
    ["inspect", "negatives"],
    ["inspect", "negatives", "a", "b"],
    ["export"],
    ["export", "--output", "x", "--dtype", "int8"],
    ["serve", "--port", "70000"],
    ["serve", "--log_format", "xml"],
    ["serve", "hello"],
    ["bench", "--rows", "0"],
    ["bench", "--dtype", "int4"],
    ["train"],
    ["train", "--output_dir", "x", "--max_steps", "-1"],
    ["train", "--output_dir", "x", "--precision", "int8"],
    ["train", "--output_dir", "x", "--model.schedule", "linear"],
    ["train", "--output_dir", "x", "--model.template", "alpaca"],
    ["r2ft", "--output_dir", "x"],
    ["r2ft", "--output_dir", "x", "--model.init", "y", "--negatives.span_min", "90"],
    ["eval"],
    ["eval", "alpaca", "--model", "x"],
    ["eval", "rules", "--model", "x", "--rate", "0.5"],
    ["eval", "rules", "--model", "x", "--steps", "8", "--rate", "2"],
    ["eval", "rules", "--model", "x", "--dtype", "int4"],
    ["eval", "rules", "--model", "x", "--decoders", "conv("],
    ["eval", "sweep", "rules", "--model", "x", "--kernel", "a"],
    ["eval", "judge"],
    ["eval", "judge", "x", "--method", "chess", "--judge.model", "y"],
    ["eval", "report"],
    ["eval", "path"],
    ["eval", "path", "x", "--rate", "0.5"],
    ["eval", "path", "x", "--dtype", "int4"],
]
OF_DECODERS = [  # whose values are checked by their own classes, which are made of tensors
    ["generate", "--decoder", "cnov", "hi"],
    ["generate", "--decoder", "conv", "--options.kernel_size", "8", "hi"],
    ["generate", "--decoder", "conv", "--options.tau", "8", "hi"],
    ["chat", "--decoder", "cnov"],
    ["infill", "--decoder", "cnov", "a <mask:2>"],
    ["eval", "rules", "--model", "x", "--decoders", "cnov"],
    ["eval", "sweep", "rules", "--model", "x", "--decoders", "conv", "--kernel", "32"],
    ["eval", "path", "x", "--decoders", "cnov"],
]

TABLE = """
import contextlib, io, json, sys
from dlm.cli import main

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in {heavy!r}:
            raise SystemError(f"{{name}} was loaded")

sys.meta_path.insert(0, Refusing())
for words in {several!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(words)
    print(json.dumps([words, status, said.getvalue()]))
"""


@pytest.mark.parametrize(
    ("several", "heavy"),
    [(WRONG, ["torch", "transformers"]), (OF_DECODERS, ["dlm.checkpoint", "dlm.model", "datasets"])],
    ids=["settings", "decoders"],
)
def test_a_wrong_command_is_told_before_anything_heavy_is_loaded(several, heavy, tmp_path):
    out, _ = run(TABLE.format(several=several, heavy=heavy), cwd=tmp_path)
    found = [json.loads(line) for line in out.decode().splitlines()]
    assert len(found) == len(several)
    wrong = [row for row in found if row[1] != 2 or len(row[2].splitlines()) != 1]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_system_that_knows_ascii_alone_is_told_the_way_out(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("prompts: [h\N{LATIN SMALL LETTER E WITH ACUTE}]\n", encoding="utf-8")
    code = f"from dlm.cli import main; print(main(['generate', '--config', {str(config)!r}]))"
    narrow = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, **narrow}, text=True
    )
    assert done.stdout.strip() == "2"
    assert "this system's encoding is ANSI_X3.4-1968, and PYTHONUTF8=1 makes it UTF-8" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_program_whose_streams_are_closed_runs(folder, closed):
    words = f"generate --model '{folder}' --max-tokens 4 one"
    line = f"exec '{sys.executable}' -m dlm.cli {words} {closed}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
