"""The programs in `examples/` that are more than a print-out."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.answer import Output
from dlm.backbone import from_scratch, load_causal_lm
from dlm.data.encode import encode_rows
from dlm.data.rows import load_rows
from dlm.errors import CheckpointError
from examples import autoregressive, default_model
from examples.coloured import coloured, legend, style
from tests.conftest import TINY


@pytest.fixture
def words(tmp_path, tokenizer, rows, monkeypatch):
    """A command line that fine-tunes a tiny causal LM on a file of rows."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    lines = [{"instruction": row["prompt"][0]["content"], "output": row["answer"]} for row in rows]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = {
        "output_dir": tmp_path / "out", "model.init": tmp_path / "base", "model.lora.r": 4,
        "data.source": file, "data.window": 48, "data.validation_rows": 8, "per_device_train_batch_size": 4,
        "max_steps": 4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "warmup_steps": 1,
        "learning_rate": 0.01, "precision": "fp32", "report_to": "none",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["x", *(f"--{key}={value}" for key, value in options.items())])
    return tmp_path


def test_the_baseline_learns_goes_on_and_stands_alone(words, monkeypatch):
    assert autoregressive.main() == 0
    base, tokenizer = load_causal_lm(str(words / "base"))
    tuned, _ = load_causal_lm(str(words / "out"))
    row = encode_rows(load_rows(str(words / "rows.jsonl")), tokenizer, 48)[0][0]
    ids = torch.tensor([row["input_ids"]])
    labels = torch.tensor(autoregressive.labels(row)["labels"])[None]
    assert (labels == autoregressive.UNSEEN).sum() == row["prompt_length"]
    with torch.no_grad():
        before, after = (model(input_ids=ids, labels=labels).loss for model in (base, tuned))
    assert after < before
    state = json.loads((words / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    written = (words / "out" / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
    monkeypatch.setattr(autoregressive.Trainer, "training_step", lambda *_: pytest.fail("trained again"))
    assert autoregressive.main() == 0  # finished: trains no step again
    assert (words / "out" / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns == written
    again, _ = load_causal_lm(str(words / "out"))
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in tuned.state_dict().items())


def test_it_says_in_a_line_what_is_wrong(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--data.source={words / 'none.jsonl'}"])
    assert autoregressive.main() == 1
    error = capsys.readouterr().err
    assert "none.jsonl" in error
    assert "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["x", "--output_dr", "y"])
    assert autoregressive.main() == 2
    assert capsys.readouterr().err.startswith(
        "python -m examples.autoregressive: error: unknown option output_dr"
    )


def test_its_loss_is_that_of_transformers(words, monkeypatch):
    """The mean over the answers' tokens of a whole step, though the head sees a part of the positions."""
    seen = []
    theirs = autoregressive.Trainer.compute_loss

    def both(trainer, model, inputs, *args, **kwargs):
        loss = theirs(trainer, model, inputs, *args, **kwargs)
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            seen.append((float(loss if torch.is_tensor(loss) else loss[0]), float(model(**plain).loss)))
        assert len(inputs["logits_to_keep"]) < inputs["input_ids"].shape[1]
        return loss

    monkeypatch.setattr(autoregressive.Trainer, "compute_loss", both)
    assert autoregressive.main() == 0
    assert len(seen) > 4
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in seen)


def test_gradients_gathered_in_parts_are_those_of_whole_batches(words, monkeypatch):
    """Parts of a step weigh as many tokens as they have, so that 2 x 2 rows learn what 4 rows learn."""
    file = words / "rows.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:12]))  # 4 to learn from, the rest held out
    whole = [*sys.argv, "--max_steps=1", "--save_steps=1", f"--output_dir={words / 'whole'}"]
    parts = [*whole, "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    learnt = []
    for argv, name in ((whole, "whole"), ([*parts, f"--output_dir={words / 'parts'}"], "parts")):
        monkeypatch.setattr(sys, "argv", argv)
        assert autoregressive.main() == 0
        state = json.loads((words / name / "checkpoint-1" / "trainer_state.json").read_text())
        learnt.append(state["log_history"][0]["grad_norm"])
    assert learnt[0] == pytest.approx(learnt[1], rel=1e-4)


def test_characters_of_several_tokens_are_shown_once_in_the_colour_of_the_last(tokenizer):
    text = "a 漢é"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)  # bytes
    output = Output(text, ids, "stop", 9, list(range(len(ids))), len(ids), [1.0] * len(ids))
    shown = coloured(output, SimpleNamespace(tokenizer=tokenizer))
    assert shown.plain == text
    *_, last = shown.spans
    assert (shown.plain[last.start : last.end], last.style) == ("é", style(len(ids) - 1, len(ids)))
    assert len(shown.spans) <= len(text)


class TestTheDefaultModel:
    """The part of the demo that asks it, with a tiny model in its place."""

    @pytest.fixture
    def screen(self, monkeypatch):
        console = Console(file=io.StringIO(), width=200)
        monkeypatch.setattr(default_model, "Console", lambda: console)
        return console.file

    def test_it_answers_with_both_decoders_before_and_after_r2ft(self, screen, tokenizer, monkeypatch):
        torch.manual_seed(0)
        asked = []

        def load(name, prepacked):
            asked.append(name)
            return from_scratch(TINY, tokenizer), tokenizer

        monkeypatch.setattr(default_model, "load_model", load)
        monkeypatch.setattr(sys, "argv", ["demo", "What is two plus two?"])
        assert default_model.main() == 0
        said = screen.getvalue()
        assert asked == ["full-sft", "full", "default"]
        line = r"(llada(?:-conv)?), (SFT(?:\+R2FT)?): (\d+) tokens, (\d+) model calls"
        facts = re.findall(line, said)
        assert [(decoder, model) for decoder, model, *_ in facts] == [
            ("llada", "SFT"), ("llada", "SFT+R2FT"), ("llada-conv", "SFT"), ("llada-conv", "SFT+R2FT"),
        ]  # fmt: skip
        assert all(int(calls) >= int(size) for *_, size, calls in facts), "one token in a call"
        assert "What is two plus two?" in said
        assert "dlm chat" in said

    def test_without_its_base_the_rest_goes_on(self, screen, tmp_path, monkeypatch):
        def refuse(name):
            raise CheckpointError(f"{name} [could not] be had")

        monkeypatch.setenv("DLM_CACHE", str(tmp_path))
        monkeypatch.setattr(default_model, "located", refuse)
        monkeypatch.setattr(sys, "argv", ["demo", "--fetch"])
        assert default_model.main() == 1
        assert "will be left out: smollm2-135m-instruct [could not] be had" in screen.getvalue()
        monkeypatch.setattr(default_model, "load_model", lambda *_, **__: pytest.fail("tried again"))
        monkeypatch.setattr(sys, "argv", ["demo", "--if-fetched"])
        assert default_model.main() == 0
        assert "make demo DEMO=quick" in screen.getvalue(), "said again where the eye is at the end"


def test_colours_go_from_the_first_step_to_the_last():
    assert style(0, 9) == "white on rgb(68,1,84)"
    assert style(9, 9) == "black on rgb(253,231,36)"
    assert style(0, 0) == style(0, 9)
    assert legend(["a", "b"]).plain == "step:  a  b "


def test_many_requests_share_an_engine(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "examples.many_requests", str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True,
    )  # fmt: skip
    for name in ("tips", "capital"):
        assert re.search(rf"^{name}: (stop|length) after \d+ calls$", done.stdout, re.MULTILINE)
