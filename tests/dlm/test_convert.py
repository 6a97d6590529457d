"""Conversion there and back: files byte by byte, tokenizers as published, what the hub gives."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from dlm import load_model
from dlm.convert import convert
from dlm.errors import CheckpointError, ConfigError
from dlm.families import family_named
from dlm.weights import INDEX
from tests.dlm.families.layouts import LAYOUTS

ADDED_MASK = ("mdlm", "bd3lm")
"""Families whose published tokenizer has no mask among its tokens."""


@pytest.fixture(params=LAYOUTS)
def public(request, tmp_path, base):
    return LAYOUTS[request.param]().write(tmp_path / request.param, base, shards=2)


@pytest.fixture
def llada(tmp_path, base):
    return LAYOUTS["llada"]().write(tmp_path / "llada", base, shards=2)


def tokenizer_files(folder):
    """Contents of the files of a tokenizer, JSON parsed."""
    files = [file for file in folder.iterdir() if "token" in file.name or file.suffix == ".jinja"]
    texts = {file.name: file.read_text("utf-8") for file in files}
    return {name: json.loads(x) if name.endswith(".json") else x for name, x in texts.items()}


def test_a_checkpoint_comes_back_as_it_was(public, tmp_path):
    family = family_named(public.name)
    family.load_tokenizer(str(public)).save_pretrained(tmp_path / "published")
    published, folder = tokenizer_files(tmp_path / "published"), public
    for turn in range(2):
        ours = convert(folder, tmp_path / f"ours-{turn}")
        folder = convert(ours, tmp_path / f"public-{turn}")
        back = tokenizer_files(folder)
        if public.name in ADDED_MASK:
            tokens = back["tokenizer.json"]["added_tokens"]
            *rest, mask = tokens
            assert mask["content"] == family.mask
            assert rest == published["tokenizer.json"]["added_tokens"]
            back["tokenizer.json"]["added_tokens"] = rest
        assert back == published
        for name in ("config.json", INDEX):
            assert json.loads((folder / name).read_text()) == json.loads((public / name).read_text())
        for file in public.glob("*.safetensors"):
            assert values((folder / file.name).read_bytes()) == values(file.read_bytes())
            assert values((ours / file.name).read_bytes())[1] == values(file.read_bytes())[1]


def values(data):
    """Header and values of a safetensors file; these begin at a multiple of 8 bytes."""
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("name", ["a2d", "mdlm", "llada"])
def test_a_template_that_the_model_was_trained_with_stays(tmp_path, base, name):
    public = LAYOUTS[name]().write(tmp_path / "public", base)
    ours = convert(public, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(ours)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(ours)
    back = AutoTokenizer.from_pretrained(convert(ours, tmp_path / "back"))
    assert back.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("field", [{"block_size": 4}, {"block_size": 4, "causal_context": True}])
def test_what_the_public_layout_cannot_say_is_not_lost_in_silence(llada, tmp_path, field):
    ours = convert(llada, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | field))
    words = r"another visibility \(block, blocks of 4.*\) than the public layout has \(full\)"
    with pytest.raises(CheckpointError, match=words):
        convert(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_without_a_record_of_its_tokenizer_keeps_the_present_one(llada, tmp_path):
    ours = convert(llada, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    del config["public"]["tokenizer"], config["public"]["template"]
    (ours / "config.json").write_text(json.dumps(config))
    present = AutoTokenizer.from_pretrained(ours)
    back = AutoTokenizer.from_pretrained(convert(ours, tmp_path / "back"))
    assert (back.chat_template, back.mask_token) == (present.chat_template, present.mask_token)


@pytest.fixture
def hub(llada, tmp_path, monkeypatch):
    """A hub that gives the files of a folder that are asked for."""

    def fetched(path, allow_patterns):
        assert path == "someone/llada"
        folder = tmp_path / "snapshot"
        folder.mkdir()
        for file in llada.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr("dlm.convert.snapshot_download", fetched)
    return llada


def test_of_the_hub_all_is_fetched_that_is_needed(hub, tmp_path):
    (hub / "NOTICE").write_text("whose it is")
    (hub / "modeling_llada.py").write_text("raise SystemExit")
    ours = convert("someone/llada", tmp_path / "ours")
    assert (hub / "chat_template.jinja").is_file()
    assert load_model(ours)[1].chat_template == load_model(hub)[1].chat_template
    assert (ours / "NOTICE").read_text() == "whose it is"
    assert not (tmp_path / "snapshot" / "modeling_llada.py").exists()


def test_bin_files_of_the_hub_are_refused_without_being_fetched(hub, tmp_path):
    for file in hub.glob("*.safetensors*"):
        file.unlink()
    (hub / "pytorch_model.bin").write_bytes(b"large")
    with pytest.raises(CheckpointError, match="someone/llada: no safetensors files on the hub"):
        convert("someone/llada", tmp_path / "ours")
    assert not (tmp_path / "snapshot" / "pytorch_model.bin").exists()


def test_a_full_disk_is_said_before_anything_is_written(llada, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="ours: no room .no: needs 0.0 GB of 0.0 GB free in"):
        convert(llada, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_another_schedule_has_no_place_in_a_public_layout(llada, tmp_path):
    ours = convert(llada, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "schedule": {"name": "cosine"}}))
    with pytest.raises(CheckpointError, match="trained further with another schedule"):
        convert(ours, tmp_path / "back")
