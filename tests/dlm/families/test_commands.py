"""Every command on public checkpoints as they lie, by one family of each kind."""

import io
import json
import sys

import pytest

from dlm import load_model
from dlm.cli import main
from dlm.data.config import DataConfig
from dlm.errors import CheckpointError
from finetune.config import LoraConfig, R2FTConfig, StartConfig
from finetune.r2ft import r2ft
from tests.dlm.families.layouts import LAYOUTS
from tests.serve.rig import Running

KINDS = ("llada", "llada-moe", "dream", "bert-chat", "diffugpt", "sdar", "fast-dllm-v2")
"""Without and with a shift, experts, local attention, GPT-2, blocks, blocks with a shift."""

TALKING = ["--device", "cpu", "--dtype", "float32", "--max_tokens", "8", "--decoder", "conv"]


@pytest.fixture(params=KINDS)
def public(request, tmp_path, base, monkeypatch):
    """A folder with the checkpoint and a few rows, in which commands run."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Count to {i}.", "output": "One, two, three."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(LAYOUTS[request.param]().write(tmp_path / f"public-{request.param}", base))


def run(*words):
    assert main([*map(str, words)]) == 0


def test_commands_that_write_texts_and_measure_them(public, capsys, monkeypatch):
    run("inspect", public)
    capsys.readouterr()
    run("generate", "--model", public, *TALKING, "--json", "true", "Say it.")
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) >= {"text", "finish_reason"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    run("chat", "--model", public, *TALKING)
    capsys.readouterr()
    run("infill", "--model", public, "--device", "cpu", "--dtype", "float32", "one <mask:2> three")
    assert capsys.readouterr().out.startswith("one")
    asked = ["--data", "rows.json", "--limit", "2", "--reader", "", "--nelbo_draws", "1", "--output", "runs"]
    run("eval", "alpaca_eval", "--model", public, "--decoders", "conv", "--max_tokens", "8", *asked)
    asked = ["--decoders", "conv", "--max_tokens", "64", "--last", "2", "--output", "paths"]
    run("eval", "path", public, "--data", "rows.json", *asked)


def test_it_is_served(public):
    server = Running(*load_model(public, device="cpu", dtype="float32")).ready()
    try:
        asked = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 8}
        answer = server.post("/v1/chat/completions", decoder="conv", **asked)
        assert answer.status_code == 200, answer.text
        assert 1 <= answer.json()["usage"]["completion_tokens"] <= 8
    finally:
        server.stop()


def test_r2ft_with_an_adapter_and_export(public, tmp_path):
    if public.endswith("diffugpt"):
        pytest.skip("never trained on instructions: see below")
    folder = r2ft(R2FTConfig(
        str(tmp_path / "r2ft"), model=StartConfig(init=public, lora=LoraConfig(r=2, alpha=2)),
        data=DataConfig(source="rules", window=64, limit=40, validation_rows=8), max_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-4, eval_steps=2, save_steps=2, precision="fp32",
        nelbo_tolerance=1.0, watch=0, report_to="none", trainer={"disable_tqdm": True},
    ))  # fmt: skip
    before, _ = load_model(public, device="cpu", dtype="float32")
    after, tokenizer = load_model(folder, device="cpu", dtype="float32")
    assert after.spec.end_token_ids == before.spec.end_token_ids
    assert after.config.public == before.config.public
    run("export", "--model", str(folder), "--output", "exported", "--merge", "true", "--dtype", "float32")
    again, tokens = load_model("exported", device="cpu", dtype="float32")
    assert tokens.chat_template == tokenizer.chat_template
    assert all((p == after.get_parameter(n)).all() for n, p in again.named_parameters())
    run("convert", "--model", "exported", "--output", "back")
    back, _ = load_model("back", device="cpu", dtype="float32")
    assert all((p == after.get_parameter(n)).all() for n, p in back.named_parameters())


@pytest.mark.parametrize("name", ["mdlm", "diffugpt"])
def test_a_public_model_without_a_template_is_no_start_for_r2ft(tmp_path, base, name):
    folder = LAYOUTS[name]().write(tmp_path / "public", base)
    data = DataConfig(source="rules", window=64, limit=40, validation_rows=8)
    with pytest.raises(CheckpointError, match="trained on plain text, never on instructions; fine-tune it"):
        r2ft(R2FTConfig(str(tmp_path / "r2ft"), model=StartConfig(init=str(folder)), data=data))
