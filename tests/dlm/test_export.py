"""Export: the same model, smaller, and without the paths of the machine it was trained on."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from decoding.config import LoadConfig
from dlm import load_model
from dlm.adapter import add_adapter, base_of
from dlm.backbone import from_scratch
from dlm.cli import main
from dlm.errors import CheckpointError, ConfigError
from dlm.export import _without_folders, export, merged_defaults
from dlm.origin import notice_of
from dlm.pretrained.names import ADAPTERS, located
from dlm.prior import TokenPrior
from tests.conftest import TINY


@pytest.fixture
def trained(tokenizer, tmp_path):
    """A base and an adapter of it, as `dlm train` leaves them."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = from_scratch(TINY, tokenizer)
    model.config.training = {"init": "/home/me/base", "data": {"source": "/home/me/rows.json", "window": 64}}
    model.config.generation = {"decoder": "conv", "window": 48}
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapted = add_adapter(model, str(base), r=4, alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TokenPrior(torch.arange(400)).save(folder)
    return base, folder


def logits(path):
    model, _ = load_model(path, device="cpu", dtype="float32")
    ids = torch.arange(3, 21).view(2, 9)
    ids[:, 4:7] = model.config.mask_token_id
    with torch.no_grad():
        return model(ids).logits.nan_to_num(neginf=0.0)


def types(file):
    with safe_open(file, "pt") as weights:
        return {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118


def test_an_adapter_in_bfloat16_is_the_same_up_to_rounding(trained, tmp_path):
    _, folder = trained
    out = export(folder, tmp_path / "out")
    assert types(out / "adapter_model.safetensors") == {"BF16"}
    torch.testing.assert_close(logits(out), logits(folder), atol=0.1, rtol=0.02)
    assert (out / "base.json").read_bytes() == (folder / "base.json").read_bytes()
    assert TokenPrior.load(out).counts.tolist() == list(range(400))
    assert not (out / "README.md").exists(), "the card is to be written by hand"
    assert not (out / "NOTICE").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_a_notice_goes_with_the_weights(trained, tmp_path, merge):
    _, folder = trained
    (folder / "NOTICE").write_text("Not for sale.")
    assert (export(folder, tmp_path / "out", merge=merge) / "NOTICE").read_text() == "Not for sale."


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_without_a_notice_goes_with_that_of_its_base(trained, tmp_path, merge):
    base, folder = trained
    (base / "NOTICE").write_text("Of the base.")
    assert (export(folder, tmp_path / "out", merge=merge) / "NOTICE").read_text() == "Of the base."


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_a_model_by_name_finds_its_notice(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    assert notice_of(tmp_path) == Path(located(name)) / "NOTICE"


def test_in_float32_nothing_is_rounded(trained, tmp_path):
    assert torch.equal(logits(export(trained[1], tmp_path / "out", dtype="float32")), logits(trained[1]))


def test_the_base_gets_another_name_and_records_lose_their_folders(trained, tmp_path):
    out = export(trained[1], tmp_path / "out", base="somebody/base")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/base"
    training = json.loads((out / "config.json").read_text())["training"]
    assert training == {"init": "somebody/base", "data": {"source": "rows.json", "window": 64}}


def test_folders_beside_the_process_are_folders_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "me").mkdir(parents=True)
    (tmp_path / "private" / "me" / "rows.jsonl").touch()
    long = "y" * 5000
    records = {
        "data": {"source": "private/me/rows.jsonl"},
        "init": "private/me",
        "hub": "some/model",
        "x": long,
        "elsewhere": ["private/other/rows.csv", "x/rows.jsonl.gz", "x/y.npz", "./runs/sft", "../sft", "."],
    }
    elsewhere = ["rows.csv", "rows.jsonl.gz", "y.npz", "sft", "sft", "."]
    short = {
        "data": {"source": "rows.jsonl"},
        "init": "me",
        "hub": "some/model",
        "x": long,
        "elsewhere": elsewhere,
    }
    assert _without_folders(records) == short


def test_options_stay_with_their_decoder():
    stored = {"decoder": "entropy-bound", "options": {"kernel_size": 3}, "max_tokens": 9}
    assert merged_defaults(stored, {"decoder": "llada"}) == {"decoder": "llada", "max_tokens": 9}
    assert merged_defaults(stored, {"decoder": "entropy-bound", "max_tokens": 7}) == stored | {
        "max_tokens": 7
    }
    options = {"decoder": "conv", "options": {"kernel_size": 5}}
    assert merged_defaults(stored, options) == {**options, "max_tokens": 9}


def test_merged_it_stands_alone(trained, tmp_path):
    base, folder = trained
    out = export(folder, tmp_path / "out", dtype="float32", merge=True)
    expected = logits(folder)
    base.rename(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(out), expected)
    assert "/home" not in (out / "config.json").read_text()


def test_what_cannot_be_is_refused(trained, tmp_path):
    base, folder = trained
    with pytest.raises(ConfigError, match="not empty"):
        export(folder, folder)
    with pytest.raises(ConfigError, match="base is for adapters"):
        export(base, tmp_path / "out", base="x")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="not a whole adapter"):
        export(folder, tmp_path / "out")


def test_the_command(trained, tmp_path, capsys):
    words = ["export", "--model", str(trained[1]), "--output", str(tmp_path / "out")]
    defaults = ["--generation.decoder", "entropy-bound", "--generation.options", '{"kernel_size": 9}']
    assert main([*words, *defaults]) == 0
    assert "MB" in capsys.readouterr().out
    config = load_model(tmp_path / "out", device="cpu")[0].config
    assert config.generation["decoder"] == "entropy-bound"
    assert config.generation["options"] == {"kernel_size": 9}
    assert config.generation["window"] == 48, "what is not named stays"
    assert main(["export", "--model", str(trained[1])]) == 2
    assert "output must name" in capsys.readouterr().err


JUNK = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"{}",
    b"[" * 100_000,
    b'{"peft_type": 3, "r": "x"}',
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_is_not_what_it_should_be_gives_one_clear_error(trained, tmp_path, name, junk):
    """Or none, where the file can be done without."""
    _, folder = trained
    (folder / name).write_bytes(junk)
    for call in (lambda: export(folder, tmp_path / "out"), lambda: base_of(folder)):
        with suppress(CheckpointError):
            call()
    if name == "adapter_config.json":
        with pytest.raises(CheckpointError, match="adapter"):
            base_of(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--generation.decoder=cov"], "unknown decoder 'cov'. Did you mean 'conv'?"),
        (["--generation.stepz=3"], "unknown default of decoding: 'stepz'. Did you mean 'steps'?"),
        (["--generation.steps=0"], "steps must be a whole number of at least 1, got 0"),
        (
            ["--generation.decoder=conv", "--generation.options", '{"kernel_size": 8}'],
            "kernel_size must be odd and positive, got 8; use 7 or 9",
        ),
    ],
)
def test_defaults_that_decoding_would_refuse_are_refused_at_once(words, message, tmp_path, capsys):
    assert main(["export", "--model", "/nowhere", "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_the_decoder_that_stays_does_not_have_are_refused(trained, tmp_path, capsys):
    words = ["export", "--model", str(trained[1]), "--output", str(tmp_path / "out")]
    assert main([*words, "--generation.options", '{"tau": 0.5}']) == 2
    assert "unknown option of decoder 'conv': 'tau'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("canvas=growing", 'canvas "growing" is no default'),
        ("window=100000", "window must be at most the model's"),
    ],
)
def test_defaults_that_decoding_would_pass_over_are_refused(trained, tmp_path, capsys, word, message):
    words = ["export", "--model", str(trained[1]), "--output", str(tmp_path / "out"), f"--generation.{word}"]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_an_export_that_fails_leaves_nothing_and_can_be_repeated(trained, tmp_path, monkeypatch, merge):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("dlm.export.carry_notice", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export(trained[1], out, merge=merge)
    assert not out.exists()
    out.mkdir()
    export(trained[1], out, merge=merge)
    load_model(out, device="cpu")


def test_a_base_on_this_machine_is_said(trained, tmp_path, caplog):
    export(trained[1], tmp_path / "out")
    assert f"names its base by a folder of this machine, {trained[0]}" in caplog.text
    caplog.clear()
    export(trained[1], tmp_path / "named", base="someone/base")
    export(trained[1], tmp_path / "merged", merge=True)
    assert "folder of this machine" not in caplog.text


def block_model(trained, size):
    """The base and its adapter as models in blocks."""
    for folder in trained:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "block_size": size}))
    return trained


@pytest.mark.parametrize("which", [0, 1], ids=["whole", "adapter"])
def test_a_model_in_blocks_may_be_used_and_given_away_in_smaller_ones(which, trained, tmp_path):
    folder = block_model(trained, 6)[which]
    loaded = load_model(folder, device="cpu", dtype="float32", block_size=3)[0]
    assert loaded.spec.visibility.block_size == 3
    out = export(folder, tmp_path / "out", dtype="float32", block_size=3)
    written = load_model(out, device="cpu", dtype="float32")[0]
    assert written.spec.visibility == loaded.spec.visibility
    ids = torch.arange(3, 12)[None]
    behind = ids.clone()
    behind[:, 3] = 90  # seen by the first three in blocks of six, and not in blocks of three
    own = load_model(folder, device="cpu", dtype="float32")[0]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, written(ids).logits)
        before, after = (loaded(x).logits[:, :3] for x in (ids, behind))
        torch.testing.assert_close(before, after)
        before, after = (own(x).logits[:, :3] for x in (ids, behind))
        assert not torch.allclose(before, after)


def test_commands_load_a_model_in_smaller_blocks(trained, capsys):
    folder = str(block_model(trained, 6)[1])
    assert LoadConfig(model=folder, device="cpu", block_size=3).load()[0].spec.visibility.block_size == 3
    texts = []
    for size in (6, 2):
        words = ["generate", "Add one.", "--model", folder, "--device", "cpu", "--dtype", "float32"]
        assert main([*words, "--max_tokens", "20", "--block_size", str(size)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_blocks_that_are_not_for_the_model_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="block_size is for models in blocks"):
        load_model(trained[0], device="cpu", block_size=2)
    _, folder = block_model(trained, 6)
    for size, message in ((7, "at most the model's own 6, got 7"), (0, "at least 1"), (2.5, "whole number")):
        with pytest.raises(ConfigError, match=message):
            load_model(folder, device="cpu", block_size=size)
        with pytest.raises(ConfigError, match=message):
            export(folder, tmp_path / "out", block_size=size)
    assert not (tmp_path / "out").exists()
    assert main(["export", "--model", str(folder), "--output", str(tmp_path / "o"), "--block_size", "7"]) == 2
