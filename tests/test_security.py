"""A checkpoint is data: nothing that lies beside its weights ever runs, whatever command is given it."""

import builtins
import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dlm.cli import commands, main
from dlm.errors import DLMError
from tests.eval.endpoint import serving

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
TOKENIZER = ["code.EvilTokenizer", "code.EvilTokenizer"]
NAMES = {
    "AutoConfig": "code.EvilConfig",
    "AutoModel": "code.Evil",
    "AutoModelForCausalLM": "code.Evil",
    "AutoModelForMaskedLM": "code.Evil",
    "AutoTokenizer": TOKENIZER,
}
PLANTS = ("unknown", "llama", "masked_diffusion", "llada")
"""Kinds of models beside which code lies: one that nobody knows, and those that all commands take."""


@pytest.fixture(scope="module")
def plants(tmp_path_factory, tokenizer):
    """A folder for each of `PLANTS`, and for an adapter of an unknown model, by name."""
    from dlm.backbone import from_scratch
    from tests.conftest import TINY

    root, marker = tmp_path_factory.mktemp("plants"), str(tmp_path_factory.mktemp("mark") / "marker")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    for kind in PLANTS:
        folder = root / kind
        tokenizer.save_pretrained(folder)
        (from_scratch(TINY, tokenizer) if kind == "masked_diffusion" else causal).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": NAMES, "architectures": ["Evil"], "eos_token_id": tokenizer.eos_token_id}
        config |= {"unknown": {"model_type": "evil"}, "llada": {"model_type": "llada"}}.get(kind, {})
        (folder / "config.json").write_text(json.dumps(config))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": TOKENIZER}, "tokenizer_class": "EvilTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "code.py").write_text(CODE.format(marker=marker))
    adapter = root / "adapter"
    shutil.copytree(root / "unknown", adapter)
    (adapter / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(root / "unknown"), "auto_mapping": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return root, marker


STEPS = dict.fromkeys(("max_steps", "eval_steps", "save_steps", "sample_steps", "data.validation_rows"), "1")
SETTINGS = {**STEPS, "data.source": "{q}", "data.window": "48", "report_to": "none", "output_dir": "{o}/run"}
TINY_RUN = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
ASK = ["alpaca_eval", "--data", "{q}", "--output", "{o}/e", "--max_tokens", "4", "--limit", "1"]
SHORT = ["--max_tokens", "4", "--device", "cpu"]
COMMANDS = {
    "inspect": [["inspect", "{m}"]],
    "inspect.ldw": [["inspect", "ldw", "{m}", "--prompt", "a", "--counts", "{q}", "--output", ""]],
    "inspect.negatives": [["inspect", "negatives", "{m}", "--data.source", "{q}", "--rows", "1"]],
    "generate": [["generate", "--model", "{m}", *SHORT, "hello"]],
    "chat": [["chat", "--model", "{m}", *SHORT]],
    "infill": [["infill", "--model", "{m}", "--device", "cpu", "a <mask:2>"]],
    "bench": [["bench", "--model", "{m}", "--rounds", "1", "--steps", "1", "--window", "60", *SHORT]],
    "export": [["export", "--model", "{m}", "--output", "{o}/x"]],
    "encode": [["encode", "--model", "{m}", "--source", "{q}", "--output", "{o}/r.npz"]],
    "convert": [["convert", "--model", "{m}", "--output", "{o}/c"]],
    "train": [
        ["train", "--model.init", "{m}", *TINY_RUN],
        ["train", "--model.init", "{m}", *TINY_RUN, "--model.lora.r", "1"],
    ],
    "r2ft": [["r2ft", "--model.init", "{m}", *TINY_RUN]],
    "eval": [
        ["eval", *ASK, "--model", "{m}"],
        ["eval", *ASK, "--autoregressive", "{m}"],
        ["eval", *ASK, "--endpoint", "{url}", "--reader", "{m}"],
        ["eval", *ASK, "--endpoint", "{url}", "--encoder", "{m}"],
    ],
    "eval.sweep": [["eval", "sweep", *ASK, "--model", "{m}"]],
    "eval.path": [["eval", "path", "{m}", "--data", "{q}", "--last", "1", "--output", "{o}/p"]],
    "eval.dependence": [["eval", "dependence", "{m}", "--data", "{q}", "--last", "1", "--output", "{o}/d"]],
    "eval.frontier": [
        ["eval", "frontier", "{m}", *ASK[1:], "--task", ASK[0], "--reader", "{m}", "--decoders", "conv"],
        ["eval", "frontier", "{m}", *ASK[1:], "--task", ASK[0], "--encoder", "{m}"],
    ],
    "orders.learn": [
        [
            "orders",
            "learn",
            "--task",
            "file",
            "--data",
            "{q}",
            "--output",
            "{o}/t.json",
            "--reward",
            reward,
            "--model",
            "{m}",
            *SHORT,
        ]
        for reward in ("no-repetition", "likelihood={m}")
    ],
    "serve": [["serve", "--model", "{m}", "--port", "0"]],
    "lm_harness": [],
}
"""By command, all ways to give it a model or a tokenizer."""

WITHOUT_MODEL = {"eval.report", "eval.judge", "orders"}
"""Commands that take none: a judge is an endpoint."""


def test_every_command_that_takes_a_model_is_tried():
    assert set(COMMANDS) - {"lm_harness"} == set(commands()) - WITHOUT_MODEL


def load_alone(server, sockets=None):
    """In place of serving until a signal comes."""
    server.worker.start()
    server.failure = server.worker.loaded.exception(60)


@pytest.mark.parametrize("plant", [*PLANTS, "adapter"])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_beside_a_model_never_runs(plants, tmp_path, monkeypatch, capsys, command, plant):
    root, marker = plants
    rows = [{"instruction": "Go.", "output": "Gone."}] * 3
    (tmp_path / "q.json").write_text(json.dumps(rows))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # to "do you trust this code?"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("serve.server.Server.run", load_alone)
    if command == "lm_harness":
        harness = pytest.importorskip("eval.lm_harness")
        with contextlib.suppress(DLMError):
            harness.DLM(pretrained=str(root / plant), device="cpu", max_tokens=4)
    with serving(lambda body: "An answer.") as endpoint:
        for words in COMMANDS[command]:
            places = {"m": root / plant, "o": tmp_path, "q": tmp_path / "q.json", "url": endpoint.url}
            status = main([word.format(**places) for word in words])
            lines = capsys.readouterr().err.strip().splitlines()
            assert status == 0 or "error" in lines[-1] or "missing" in lines[-1]
            if plant == "unknown":
                assert status in (1, 2)
    assert not Path(marker).exists()
