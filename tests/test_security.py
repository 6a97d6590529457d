"""A checkpoint is data: nothing that lies beside its weights ever runs."""

import builtins
import json

import pytest

from dlm.cli import main

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig
class EvilConfig(PretrainedConfig):
    model_type = "evil"
"""


@pytest.fixture
def evil(tmp_path, tokenizer):
    folder = tmp_path / "evil"
    tokenizer.save_pretrained(folder)
    names = {
        "AutoConfig": "code.EvilConfig",
        "AutoModelForCausalLM": "code.Evil",
        "AutoTokenizer": ["code.E", None],
    }
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["code.E", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{m}"],
        ["generate", "--model", "{m}", "hello"],
        ["infill", "--model", "{m}", "a <mask:2>"],
        ["export", "--model", "{m}", "--output", "{o}/x"],
        ["train", "--model.init", "{m}", "--data.source", "rules", "--output_dir", "{o}/t"],
        ["r2ft", "--model.init", "{m}", "--data.source", "rules", "--output_dir", "{o}/r"],
        ["eval", "alpaca_eval", "--model", "{m}", "--data", "{o}/q.json", "--output", "{o}/e"],
        ["bench", "--model", "{m}"],
    ],
    ids=lambda words: words[0],
)
def test_code_of_a_checkpoint_never_runs(evil, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "q.json").write_text(json.dumps([{"instruction": "Go.", "output": "Gone."}]))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    words = [word.format(m=evil, o=tmp_path) for word in words]
    status = main(words)
    assert not (tmp_path / "marker").exists()
    assert status in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error" in lines[-1]
