"""Weights can be read by whoever the umask allows."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from dlm.adapter import add_adapter
from dlm.cli import main
from dlm.modes import share


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request):
    """The mode of new files under some umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_weights_get_the_mode_of_new_files_and_other_files_keep_theirs(tmp_path, mode):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "b.safetensors").chmod(0o640)
    (tmp_path / "secret").touch(mode=0o600)
    share(tmp_path)
    assert modes(tmp_path) == {"a.safetensors": mode, "b.safetensors": 0o640, "secret": 0o600}
    assert len(list(tmp_path.iterdir())) == 3


def test_models_adapters_and_exports_can_be_read(model, tokenizer, tmp_path, mode):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapted = add_adapter(model, str(tmp_path / "model"), r=2, alpha=4)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for name in ("model", "adapter"):
        words = ["export", "--model", str(tmp_path / name), "--output", str(tmp_path / f"of {name}")]
        assert main(words) == 0
    found = [set(modes(tmp_path / name).values()) for name in ("model", "adapter", "of model", "of adapter")]
    assert found == [{mode}] * 4


TRAIN = (
    "train --data.source rules --data.limit 20 --data.validation_rows 2 --max_steps 2 --warmup_steps 0 "
    "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 1 --eval_steps 0 "
    "--save_steps 1 --ema_decay 0.5 --report_to none --output_dir"
)


def test_everything_that_a_training_run_writes_can_be_read(tmp_path, mode):
    assert main([*TRAIN.split(), str(tmp_path / "run")]) == 0
    found = modes(tmp_path / "run")
    assert {"model.safetensors", "token_counts.safetensors", "optimizer.pt"} <= found.keys()
    assert set(found.values()) == {mode}
