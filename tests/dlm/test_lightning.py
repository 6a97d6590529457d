"""Checkpoints of Lightning: read without the packages that wrote them, and nothing in them is run."""

import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from dlm import load_model
from dlm.cli import main
from dlm.errors import CheckpointError
from dlm.pretrained.lightning import unpacked
from dlm.spec import ModelSpec
from tests.dlm.families.layouts import LAYOUTS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))


class Foreign:
    """What OmegaConf's nodes look like in a pickle: a class of another package with a dictionary of state."""

    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


def node(value):
    """A configuration as nodes."""
    inner = {k: node(v) for k, v in value.items()} if isinstance(value, dict) else value
    name = "_content" if isinstance(value, dict) else "_val"
    return Foreign({"_metadata": Foreign({"ref_type": Foreign({})}), "_parent": None, name: inner})


class Hostile:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def trainer_file(file, monkeypatch, layout, *, ema=True, extra=None, **settings):
    """A file as the trainer writes it; its weights are the layout's in the moving average."""
    config = {
        "backbone": "dit", "parameterization": "subs", "time_conditioning": False,
        "model": {"hidden_size": layout.public["hidden_dim"], "cond_dim": layout.public["cond_dim"],
                  "length": 512, "n_blocks": layout.public["n_blocks"], "n_heads": layout.public["n_heads"]},
        **settings,
    }  # fmt: skip
    buffers = {name for name in layout.state if name.endswith("inv_freq")}
    average = [value for name, value in layout.state.items() if name not in buffers]
    state = {name: value if name in buffers else value + 1 for name, value in layout.state.items()}
    contents = {
        "state_dict": {**state, "train_metrics.nll.weight": torch.zeros(1)},
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": average},
        "hyper_parameters": {"config": node(config), "tokenizer": Foreign({"vocab": {}})},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "loops": {"fit_loop": {}},
        **(extra or {}),
    }
    if not ema:
        del contents["ema"]
    package = types.ModuleType("omegaconf_of_another_machine")
    package.Foreign = Foreign
    monkeypatch.setattr(Foreign, "__module__", package.__name__)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    torch.save(contents, file)
    monkeypatch.delitem(sys.modules, package.__name__)  # there is no such package when the file is read
    return file


@pytest.fixture
def public(tmp_path, base):
    """The published folder, its layout, and a folder with the tokenizer alone."""
    layout = LAYOUTS["mdlm"]()
    folder = layout.write(tmp_path / "public", base)
    beside = tmp_path / "trainer"
    beside.mkdir()
    for file in folder.glob("token*.json"):
        (beside / file.name).write_bytes(file.read_bytes())
    return folder, layout, beside


def logits(model):
    ids = torch.arange(12)[None]
    return model.logits(model.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))


@torch.no_grad()
def test_the_moving_average_in_a_file_is_the_published_model(public, monkeypatch):
    folder, layout, beside = public
    expected, _ = load_model(folder, device="cpu", dtype="float32")
    model, tokenizer = load_model(
        str(trainer_file(beside / "best.ckpt", monkeypatch, layout)), device="cpu", dtype="float32"
    )
    assert torch.equal(logits(model), logits(expected))
    assert ModelSpec.of(model).positions == 512
    assert len(tokenizer) == len(load_model(folder)[1])


@torch.no_grad()
def test_without_an_average_the_weights_themselves_are_read(public, monkeypatch):
    _, layout, beside = public
    average, _ = load_model(
        trainer_file(beside / "a.ckpt", monkeypatch, layout), device="cpu", dtype="float32"
    )
    plain, _ = load_model(
        trainer_file(beside / "b.ckpt", monkeypatch, layout, ema=False), device="cpu", dtype="float32"
    )
    names = dict(average.named_parameters())
    for name, value in plain.named_parameters():
        assert torch.allclose(value, names[name] + 1), name


def test_a_file_without_readable_settings_has_what_its_shapes_say(public, monkeypatch):
    _, layout, beside = public
    file = trainer_file(beside / "a.ckpt", monkeypatch, layout, extra={"hyper_parameters": None})
    stored = json.loads((unpacked(file) / "config.json").read_text())
    for name in ("vocab_size", "hidden_dim", "n_blocks", "cond_dim"):
        assert stored[name] == layout.public[name]
    assert stored["model_length"] == 1024


def test_nothing_in_a_file_is_run(public, monkeypatch, tmp_path):
    _, layout, beside = public
    extra = {"callbacks": Hostile(f"touch {tmp_path / 'run'}")}
    file = trainer_file(beside / "a.ckpt", monkeypatch, layout, extra=extra)
    with pytest.raises(Exception, match="Foreign|omegaconf"):  # the usual way needs the package …
        torch.load(file, weights_only=False)
    load_model(file)
    assert not (tmp_path / "run").exists()
    torch.save({"x": Hostile(f"touch {tmp_path / 'run'}")}, tmp_path / "y.ckpt")
    torch.load(tmp_path / "y.ckpt", weights_only=False)
    assert (tmp_path / "run").exists()  # … and runs what it is told


def test_the_folder_is_made_once_and_anew_where_a_file_has_changed(public, monkeypatch):
    _, layout, beside = public
    file = trainer_file(beside / "a.ckpt", monkeypatch, layout)
    first = unpacked(file)
    weights = first / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert unpacked(file) == first
    assert weights.stat().st_mtime_ns == made
    before = load_file(weights)
    trainer_file(beside / "a.ckpt", monkeypatch, layout, ema=False)
    assert unpacked(file) == first  # in the same place: the old one would be of no use
    assert all(torch.allclose(x, before[name] + 1) for name, x in load_file(weights).items())
    made = weights.stat().st_mtime_ns
    (beside / "tokenizer_config.json").write_text((beside / "tokenizer_config.json").read_text() + "\n")
    unpacked(file)
    assert weights.stat().st_mtime_ns > made
    assert (first / "tokenizer_config.json").read_text().endswith("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameterization": "sedd"}, "parameterization 'sedd' is not supported, only 'subs'"),
        ({"backbone": "dimamba"}, "backbone 'dimamba' is not supported"),
        ({"time_conditioning": True}, "time_conditioning"),
        (
            {"extra": {"state_dict": {"model.weight": torch.zeros(2)}}},
            "not a checkpoint of MDLM's transformer",
        ),
        ({"extra": {"ema": {"shadow_params": [torch.zeros(2)]}}}, "its moving average .ema. does not belong"),
    ],
)
def test_other_models_are_refused_by_name(public, monkeypatch, change, message):
    _, layout, beside = public
    file = trainer_file(beside / "a.ckpt", monkeypatch, layout, **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(file)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: damaged, or not a checkpoint"):
        load_model(file)
    with pytest.raises(CheckpointError, match=r"y\.ckpt: no such file"):
        load_model(tmp_path / "y.ckpt")


def test_commands_take_a_file(public, monkeypatch, capsys):
    _, layout, beside = public
    file = str(trainer_file(beside / "a.ckpt", monkeypatch, layout))
    assert main(["inspect", file]) == 0
    assert "mdlm" in capsys.readouterr().out
    words = [
        "generate",
        "--model",
        file,
        "--device",
        "cpu",
        "--max_tokens",
        "4",
        "--steps",
        "2",
        "--window",
        "16",
    ]
    assert main([*words[:5], "--window", "16", "--steps", "2", "a"]) == 0
