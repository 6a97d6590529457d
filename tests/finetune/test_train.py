"""Whole runs of a tiny model: resuming, killing, distributing, averaging."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlm import load_model
from dlm.checkpointing import (
    MARKER,
    complete_checkpoints,
    discard_incomplete,
    is_complete,
    last_checkpoint,
    mark_complete,
)
from dlm.data.config import DataConfig
from dlm.errors import CheckpointError, ConfigError, DataError, DivergedError
from dlm.quantization import is_quantized
from finetune.config import LoraConfig, ModelConfig, TrainConfig
from finetune.sft import SFT, train
from finetune.start import prepare

TINY = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=400
)


def settings(folder, **kwargs):
    base = {
        "model": TINY,
        "data": DataConfig(source="rules", window=48, limit=150, validation_rows=20),
        "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2,
        "logging_steps": 1, "eval_steps": 0, "save_steps": 4, "precision": "fp32", "report_to": "none",
        "trainer": {"disable_tqdm": True},
    }  # fmt: skip
    return TrainConfig(output_dir=str(folder), **{**base, **kwargs})


def with_faulty_loss(monkeypatch, stage, fault):
    """Have the loss of a stage's runs multiplied by what `fault` makes of the number of steps taken."""
    plain = stage.trainer

    def trainer(self, *words, **fields):
        made = plain(self, *words, **fields)
        loss = made.loss
        made.loss = lambda *arguments: loss(*arguments) * fault(made.state.global_step)
        return made

    monkeypatch.setattr(stage, "trainer", trainer)


def losses(folder):
    return {
        r["step"]: r["loss"] for r in json.loads((Path(folder) / "history.json").read_text()) if "loss" in r
    }


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def unfinish(folder):
    """As if the run had been killed before its end."""
    file = Path(folder) / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    return folder


def test_a_run_learns_and_leaves_what_it_promises(whole):
    curve = losses(whole)
    assert min(list(curve.values())[-4:]) < curve[1] - 0.5
    names = {path.name for path in whole.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "curve.png", "history.json", "run.json",
            "samples.md"} <= names  # fmt: skip
    history = json.loads((whole / "history.json").read_text())
    nelbos = [r["eval_nelbo"] for r in history if "eval_nelbo" in r]
    assert len(nelbos) == 2
    assert nelbos[1] < nelbos[0]
    assert all(r["tokens_per_second"] > 0 for r in history if "loss" in r)
    model, _ = load_model(whole, device="cpu")
    assert model.config.training["data"]["rows"]["kept"] == 150
    assert "Step 12" in (whole / "samples.md").read_text()


def test_resuming_repeats_the_interrupted_run_to_the_bit(whole, tmp_path):
    folder = tmp_path / "cut"
    train(settings(folder, max_steps=12, eval_steps=6, keep_checkpoints=5))
    for late in complete_checkpoints(folder)[1:]:  # as if killed just after step 4
        (late / MARKER).unlink()
    unfinish(folder)
    train(settings(folder, max_steps=12, eval_steps=6, keep_checkpoints=5))
    assert losses(folder) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_a_killed_run_resumes_to_the_same_curve(whole, tmp_path):
    folder = tmp_path / "killed"
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.finetune.test_train import *; import torch;"
        f"torch.set_num_threads(1); train(settings({str(folder)!r}, eval_steps=6, keep_checkpoints=5))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-8").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoint-8").exists()
    assert not (folder / "model.safetensors").exists()
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    assert losses(folder) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_half_written_checkpoints_are_never_taken_for_whole_ones(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = last_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-12"
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_complete(newest)
    assert last_checkpoint(folder).name == "checkpoint-8"
    (folder / "checkpoint-8" / MARKER).unlink()
    assert last_checkpoint(folder).name == "checkpoint-4"
    unfinish(folder)
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    assert losses(folder) == losses(whole)


def test_old_checkpoints_are_deleted_only_when_newer_ones_are_whole(tmp_path):
    folder = tmp_path / "run"
    train(settings(folder, keep_checkpoints=2, save_steps=3))
    assert [p.name for p in complete_checkpoints(folder)] == ["checkpoint-9", "checkpoint-12"]


def on_two_processes(script):
    """Run a script under accelerate on two CPU processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0", str(script)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def gradient_step(folder, **kwargs):
    """Weights after one step of plain SGD: the gradient, up to the learning rate."""
    return settings(
        folder, max_steps=2, logging_steps=1, save_steps=100, learning_rate=0.5, warmup_steps=0,
        lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.0,
        trainer={"disable_tqdm": True, "optim": "sgd"}, **kwargs,
    )  # fmt: skip


def windows_of(kind):
    tail = {"eos_tail": 8} if kind == "grouped" else {}
    return DataConfig(source="rules", window=48, limit=150, validation_rows=20, windows=kind, **tail)


AGAIN = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 9}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Runs of two processes: a step in windows of both kinds, and the end of a run that one process began."""
    folder = tmp_path_factory.mktemp("shared")
    train(settings(folder / "one", **AGAIN))
    shutil.copytree(folder / "one", folder / "two")
    for late in complete_checkpoints(folder / "two")[1:]:  # back to step 4
        (late / MARKER).unlink()
    unfinish(folder / "two")
    script = folder / "script.py"
    script.write_text(
        "from tests.finetune.test_train import *\n"
        "torch.set_num_threads(1)\n"
        "for kind in ('fixed', 'grouped'):\n"
        f"    folder = {str(folder)!r} + '/' + kind\n"
        "    train(gradient_step(folder, per_device_train_batch_size=4, data=windows_of(kind)))\n"
        f"train(settings({str(folder / 'two')!r}, **AGAIN))\n"
    )
    on_two_processes(script)
    return folder


@pytest.mark.parametrize("windows", ["fixed", "grouped"])
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(shared, tmp_path, windows):
    data = windows_of(windows)
    one, accumulated, two = tmp_path / "one", tmp_path / "accumulated", shared / windows
    train(gradient_step(one, per_device_train_batch_size=8, data=data))
    train(gradient_step(accumulated, per_device_train_batch_size=4, gradient_accumulation_steps=2, data=data))
    expected = weights(one)
    start_scale = max(float(v.abs().max()) for v in expected.values())
    for other in (accumulated, two):
        got = weights(other)
        worst = max(float((got[name] - value).abs().max()) for name, value in expected.items())
        assert worst < 2e-5 * max(1.0, start_scale), (other.name, worst)
    assert losses(two)[1] == pytest.approx(losses(one)[1], rel=1e-4)


def test_a_run_goes_on_with_another_number_of_processes_to_the_same_weights(shared):
    expected = weights(shared / "one")
    for name, value in weights(shared / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert losses(shared / "two") == pytest.approx(losses(shared / "one"), rel=1e-4)
    (log,) = (
        json.loads((c / "log_state.json").read_text()) for c in complete_checkpoints(shared / "two")[-1:]
    )
    assert log["parts"] == 2


def test_micro_batches_are_dealt_out_to_the_processes_that_there_are(whole, tmp_path):
    from finetune.run import accumulation

    newest = last_checkpoint(whole)
    four = settings(whole, gradient_accumulation_steps=4)
    assert accumulation(four, None, 2) == 4
    assert accumulation(settings(whole), newest, 1) == 1
    with pytest.raises(ConfigError, match=r"has 1 batches of 8 rows, which 2 processes cannot share"):
        accumulation(settings(whole), newest, 2)
    copy = shutil.copytree(newest, tmp_path / newest.name)
    state = json.loads((copy / "log_state.json").read_text())
    (copy / "log_state.json").write_text(json.dumps({**state, "parts": 8}))
    assert [accumulation(four, copy, n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="a number that divides 8"):
        accumulation(four, copy, 3)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    from dlm.lock import alone_in

    with alone_in(tmp_path / "run"), pytest.raises(ConfigError, match="another process is writing there"):
        train(settings(tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()
    train(settings(tmp_path / "run", max_steps=1))


def test_an_output_folder_is_tried_before_the_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("finetune.run.split_rows", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match="cannot be written to"):
        train(settings(tmp_path / "file" / "run"))


def test_ema_is_updated_saved_and_what_the_final_model_holds(tmp_path):
    folder = tmp_path / "ema"
    train(settings(folder, ema_decay=0.9, max_steps=8))
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    raw = weights(folder / "checkpoint-8")
    final = weights(folder)
    name = "backbone.layers.0.mlp.up_proj.weight"
    assert torch.equal(final[name], average[name])
    assert not torch.equal(raw[name], average[name])
    again = tmp_path / "again"
    train(settings(again, ema_decay=0.9, max_steps=8))
    for late in complete_checkpoints(again)[1:]:
        (late / MARKER).unlink()
    unfinish(again)
    train(settings(again, ema_decay=0.9, max_steps=8))
    assert torch.equal(weights(again)[name], final[name])


def test_validation_is_the_same_number_whatever_the_batch_size(whole):
    from dlm.data.encode import encode_rows
    from finetune.run import build_trainer, split_rows

    model, tokenizer = load_model(whole, device="cpu")
    values = []
    for size in (4, 16):
        config = settings(whole / "x", per_device_train_batch_size=size)
        rows, held_out = split_rows(config.data, config.seed)
        trainer = build_trainer(
            SFT(config),
            model,
            tokenizer,
            encode_rows(rows, tokenizer, 48)[0],
            encode_rows(held_out, tokenizer, 48)[0],
        )
        values.append(trainer.evaluate()["eval_nelbo"])
    history = json.loads((whole / "history.json").read_text())
    last = [r["eval_nelbo"] for r in history if "eval_nelbo" in r][-1]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] == pytest.approx(last, rel=1e-4)


def test_settings_that_cannot_work_say_so(tmp_path, whole):
    with pytest.raises(ConfigError, match="'lerning_rate'.*Did you mean 'learning_rate'"):
        train(settings(tmp_path / "a", trainer={"lerning_rate": 1}))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' * 5)
    with pytest.raises(DataError, match="5 rows leave none .* with 5 held out; lower --data.valid"):
        train(settings(tmp_path / "b", data=DataConfig(source=str(file), validation_rows=5)))
    long = DataConfig(source="rules", window=4096, limit=99, validation_rows=9)
    with pytest.raises(ConfigError, match="longer than the"):
        train(settings(tmp_path / "c", model=ModelConfig(init=str(whole)), data=long))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(init="x", hidden_size=64), "model.hidden_size is for random weights"),
        (lambda: ModelConfig(init="x", vocab_size=500), "model.vocab_size is for random weights"),
        (lambda: ModelConfig(shift=False), "model.shift is for a causal LM"),
        (lambda: LoraConfig(alpha=32.0), "lora.alpha is for an adapter: give lora.r"),
        (lambda: LoraConfig(merge=True), "lora.merge is for an adapter"),
        (lambda: DataConfig(eos_tail=8), "eos_tail needs windows: grouped"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_checkpoint_keeps_its_template_and_says_so(whole, tmp_path):
    with pytest.raises(
        ConfigError, match=r"model.template 'instruct' is for other starts; .* keeps 'chatml'"
    ):
        train(settings(tmp_path / "run", model=ModelConfig(init=str(whole), template="instruct")))


def few_rows(folder, long=0):
    """A file of rows, the last of them longer than the window."""
    file = folder / "rows.jsonl"
    rows = [{"instruction": f"Count {i}.", "output": f"{i} {i + 1}"} for i in range(40)]
    rows += [{"instruction": "Count on. " * 200, "output": "x"}] * long
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_run_may_do_without_validation_rows(tmp_path):
    from finetune.run import split_rows

    data = DataConfig(source=str(few_rows(tmp_path)), window=48, validation_rows=0)
    rows, held_out = split_rows(data, 0)
    assert (len(rows), len(held_out)) == (40, 0)
    train(settings(tmp_path / "run", data=data, max_steps=2, eval_steps=1))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_validation_rows_that_are_all_too_long_are_told_apart(tmp_path, caplog):
    data = DataConfig(source=str(few_rows(tmp_path, long=5)), window=48, validation_rows=5)
    with pytest.raises(
        DataError, match=r"validation rows \(the last 5\), none of the 5 rows .*--eval_steps 0"
    ):
        train(settings(tmp_path / "a", data=data, max_steps=2, eval_steps=1))
    train(settings(tmp_path / "b", data=data, max_steps=2, eval_steps=0))
    assert "goes on without them" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"config": 3}', "[" * 10_000])
def test_a_record_that_is_none_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: damaged \(.*; choose another output_dir"):
        train(settings(tmp_path))


@pytest.mark.parametrize(
    "junk", ["", "{", "[]", "null", "{}", '{"global_step": "x"}', '{"parts": []}', "[" * 9999]
)
@pytest.mark.parametrize("name", ["trainer_state.json", "log_state.json"])
def test_a_damaged_state_of_a_checkpoint_is_one_line_before_the_data_are_read(
    whole, tmp_path, monkeypatch, name, junk
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinish(folder)
    last = last_checkpoint(folder)
    (last / name).write_text(junk)
    (last / MARKER).unlink()
    mark_complete(last, 12)  # as far as sizes tell
    monkeypatch.setattr("finetune.run.split_rows", lambda *_: pytest.fail("data were read"))
    with pytest.raises(CheckpointError) as error:
        train(settings(folder, eval_steps=6, keep_checkpoints=5))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{last / name}: damaged (")
    assert line.endswith("; remove this checkpoint's folder, and the run goes on from the one before")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinish(folder)
    shutil.rmtree(last_checkpoint(folder))
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
    means = [json.loads((path / "history.json").read_text())[-1]["train_loss"] for path in (whole, folder)]
    assert means[0] == pytest.approx(means[1], rel=1e-5), "of all steps, not of those since the resume"


def test_a_finished_run_is_left_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    train(settings(whole, eval_steps=6, keep_checkpoints=1))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_finished_run_whose_weights_are_gone_writes_them_again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_a_run_killed_before_its_final_model_does_not_train_on(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinish(folder)
    (folder / "model.safetensors").unlink()
    train(settings(folder, eval_steps=6, keep_checkpoints=5))
    assert [p.name for p in complete_checkpoints(folder)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_two_runs_are_never_mixed_in_one_folder(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a run with learning_rate = 0.003, not 1e-05"):
        train(settings(whole, learning_rate=1e-5))
    with pytest.raises(ConfigError, match=r"holds a run with data.window = 48, not 40"):
        train(settings(whole, data=DataConfig(source="rules", window=40, limit=150, validation_rows=20)))
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"checkpoint-500 but no run.json"):
        train(settings(tmp_path))
    assert (foreign / "model.safetensors").read_bytes() == b"precious"


def test_the_curve_is_the_same_when_a_checkpoint_falls_between_two_log_lines(tmp_path):
    options = {"logging_steps": 3, "keep_checkpoints": 5}
    train(settings(tmp_path / "a", **options))
    train(settings(tmp_path / "b", **options))
    for late in complete_checkpoints(tmp_path / "b")[1:]:  # back to step 4
        (late / MARKER).unlink()
    unfinish(tmp_path / "b")
    train(settings(tmp_path / "b", **options))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-6)


def test_sample_prompts_that_do_not_fit_are_left_out(tmp_path, caplog):
    long = "very long " * 60
    train(settings(tmp_path / "run", eval_steps=12, samples=[long, "Count from 9 to 50."]))
    text = (tmp_path / "run" / "samples.md").read_text()
    assert "Count from 9" in text
    assert "very long" not in text


def test_a_model_of_plain_text_is_sampled_without_a_template(tmp_path):
    from decoding import Sampler
    from dlm.data.rules import make_examples

    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": e.answer}) for e in make_examples(150)))
    data = DataConfig(source=str(file), window=48, validation_rows=20)
    train(settings(tmp_path / "run", data=data, eval_steps=12))
    model, tokenizer = load_model(tmp_path / "run", device="cpu")
    assert model.config.training["template"] == "plain"
    sampler = Sampler(model, tokenizer)
    assert sampler.prompt_length("") == 0
    assert len(sampler.generate(["", "First Anna"], window=32, steps=4)) == 2
    assert "Step 12" in (tmp_path / "run" / "samples.md").read_text()


def trainer_on(rows, tokenizer, folder, **kwargs):
    from dlm.backbone import from_scratch
    from dlm.data.encode import encode_rows
    from finetune.run import build_trainer
    from tests.conftest import TINY as SHAPE

    config = settings(folder, **kwargs)
    encoded, _ = encode_rows(rows, tokenizer, config.data.window)
    return build_trainer(SFT(config), from_scratch(SHAPE, tokenizer), tokenizer, encoded, encoded)


def test_training_noise_and_weights_follow_the_models_schedule(rows, tokenizer, tmp_path):
    from datasets import Dataset

    from dlm.schedule import Cosine

    encoded = Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows])
    trainer = trainer_on(encoded, tokenizer, tmp_path)
    trainer.model.config.schedule = Cosine().as_dict()
    assert trainer.spec.schedule == Cosine()
    ids = torch.full((400, 64), 7)
    batch = {
        "input_ids": ids,
        "maskable": torch.ones_like(ids).bool(),
        "loss_mask": torch.ones_like(ids).bool(),
    }
    noised = trainer.with_noise(batch, torch.arange(400), 400, 0)
    share = (noised["noisy_ids"] == trainer.mask_id).double().mean(1)
    expected = torch.sin(math.pi / 2 * noised["t"].double())
    assert float((share - expected).abs().mean()) < 0.05
    assert float((share - noised["t"].double()).mean()) > 0.1  # more masks than log-linear has
    cosine = replace(TINY, schedule="cosine")
    model, _ = load_model(train(settings(tmp_path / "run", max_steps=2, model=cosine)), device="cpu")
    assert model.spec.schedule == Cosine()


def test_a_part_of_the_held_out_rows_can_be_measured(tmp_path):
    from dlm.data.encode import encode_rows
    from finetune.run import build_trainer, split_rows

    config = settings(tmp_path / "run", max_steps=2, eval_steps=2, eval_rows=5)
    model, tokenizer = load_model(train(config), device="cpu")
    rows, held_out = (encode_rows(part, tokenizer, 48)[0] for part in split_rows(config.data, config.seed))
    values = [
        build_trainer(SFT(config), model, tokenizer, rows, part).evaluate()["eval_nelbo"]
        for part in (held_out.select(range(5)), held_out)
    ]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    measured = [r["eval_nelbo"] for r in history if "eval_nelbo" in r][-1]
    assert measured == pytest.approx(values[0], rel=1e-5)
    assert abs(measured - values[1]) > 1e-3


def test_validation_windows_do_not_change_with_the_epoch(rows, tokenizer, tmp_path):
    data = DataConfig(source="rules", window=48, windows="grouped", eos_tail=20)
    trainer = trainer_on(rows.select(range(16)), tokenizer, tmp_path, data=data)
    trainer._get_train_sampler()
    values = []
    for epoch in (0, 1, 2):
        trainer.set_epoch(epoch)
        values.append(trainer.evaluate()["eval_nelbo"])
    assert values[0] == values[1] == values[2]


def test_the_trainers_nelbo_is_that_of_the_enumeration(tokenizer, tmp_path):
    from datasets import Dataset

    from dlm.data.rows import features
    from tests.dlm.test_objective import enumerated_nelbo

    row = {"prompt": [{"role": "user", "content": "Go"}], "answer": "cat dog"}
    rows = Dataset.from_list([row] * 100, features=features())  # a row each time with noise of its own
    trainer = trainer_on(rows, tokenizer, tmp_path, data=DataConfig(source="rules", window=32), eval_draws=60)
    row = trainer.eval_dataset[0]
    ids, start = row["input_ids"], int(row["prompt_length"])
    assert 3 <= len(ids) - start <= 8
    window = torch.full((len(ids),), tokenizer.eos_token_id)
    window[: len(ids)] = ids
    trainer.data_collator.window = len(ids)  # no padding: every maskable cell carries loss
    trainer.model.eval()
    exact = enumerated_nelbo(trainer.model, window, torch.arange(len(ids)) >= start, tokenizer.mask_token_id)
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(exact, rel=0.01)


def test_a_run_in_small_blocks_has_a_step_for_each_in_its_samples_and_its_model(tmp_path):
    model = replace(TINY, visibility="block", block_size=4, causal_context=True)
    train(settings(tmp_path, model=model, max_steps=1, eval_steps=1, sample_steps=2, samples=["Count."]))
    assert "## Step 1" in (tmp_path / "samples.md").read_text()
    assert load_model(tmp_path, device="cpu")[0].spec.visibility.causal_context
    assert json.loads((tmp_path / "config.json").read_text())["generation"]["steps"] == 48 // 4


def test_a_run_goes_on_with_the_rows_it_began_with(tmp_path):
    """Also within its first epoch: more rows have another order."""
    rows = [json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) for i in range(90)]
    file, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("\n".join(rows[:48]))
    given = {"data": DataConfig(source=str(file), window=48, validation_rows=8), "max_steps": 4}
    train(settings(folder, per_device_train_batch_size=4, save_steps=2, **given))
    shutil.rmtree(folder / "checkpoint-4")
    unfinish(folder)
    file.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="this run had 40 rows, and now 82"):
        train(settings(folder, per_device_train_batch_size=4, save_steps=2, **given))


def test_other_sizes_of_blocks_keep_what_else_a_checkpoint_says_of_them(tmp_path):
    model = replace(TINY, visibility="block", block_size=4, causal_context=True)
    train(settings(tmp_path / "a", model=model, max_steps=1, eval_steps=0))
    again = ModelConfig(init=str(tmp_path / "a"), visibility="block", block_size=8)
    train(settings(tmp_path / "b", model=again, max_steps=1, eval_steps=0))
    visibility = load_model(tmp_path / "b", device="cpu")[0].spec.visibility
    assert (visibility.block_size, visibility.causal_context) == (8, True)
    again = replace(again, causal_context=False)
    train(settings(tmp_path / "c", model=again, max_steps=1, eval_steps=0))
    assert not load_model(tmp_path / "c", device="cpu")[0].spec.visibility.causal_context
    with pytest.raises(ConfigError, match="without one no position leads"):
        replace(TINY, visibility="block", block_size=4, block_lead=False)


def test_a_run_keeps_the_decoding_defaults_of_the_model_that_it_starts_from(tmp_path, whole):
    begun, tokenizer = load_model(whole, device="cpu", dtype="float32")
    new = {"decoder": "conv", "window": 48, "steps": 32}
    assert begun.config.generation == new, "of a model without any"
    own = {"decoder": "entropy-bound", "options": {"kernel_size": 9}, "max_tokens": 40}
    begun.config.generation = own
    begun.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    for name, changes, kept in (
        ("same", {}, own),
        ("blocks", {"visibility": "block", "block_size": 4}, new),
    ):
        model = ModelConfig(init=str(tmp_path / "start"), template="model", **changes)
        train(settings(tmp_path / name, model=model, max_steps=1))
        stored = json.loads((tmp_path / name / "config.json").read_text())["generation"]
        assert stored == kept, name


def test_frozen_weights_may_be_bfloat16_and_what_is_trained_is_float32(tmp_path, whole):
    def run(name, **lora):
        model = ModelConfig(init=str(whole), template="model", lora=LoraConfig(r=4, alpha=8, **lora))
        common = {"max_steps": 6, "precision": "bf16", "eval_steps": 3, "eval_draws": 2}
        return settings(tmp_path / name, model=model, **common)

    half, full = run("half", base_dtype="bfloat16"), run("full")
    model = prepare(load_model(whole, device="cpu", dtype="bfloat16")[0], half.model, 48, 0)
    named = [(name, weight) for name, weight in model.named_parameters() if "mask_shift.original" not in name]
    kinds = {(weight.requires_grad, weight.dtype) for _, weight in named}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    train(half), train(full)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("half", "full"))
    assert {x.dtype for x in ours.values()} == {torch.float32}
    moved = [name for name in ours if "lora_B" in name]
    assert all(ours[name].abs().max() > 0 for name in moved)
    alike = [torch.cosine_similarity(ours[n].flatten(), theirs[n].flatten(), dim=0) for n in moved]
    assert min(alike) > 0.8  # the same training, but for the rounding of the base
    load_model(tmp_path / "half", device="cpu")  # its base is known again
    with pytest.raises(ConfigError, match="base_dtype bfloat16 computes in bfloat16: give precision bf16"):
        train(replace(run("c", base_dtype="bfloat16"), precision="fp32"))
    with pytest.raises(ConfigError, match=r"lora.base_dtype is for an adapter"):
        LoraConfig(base_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_an_adapter_on_8_and_4_bits_is_trained_much_as_on_bfloat16(tmp_path, whole, dtype):
    pytest.importorskip("bitsandbytes")

    def run(name, base_dtype):
        lora = LoraConfig(r=4, alpha=8, base_dtype=base_dtype)
        model = ModelConfig(init=str(whole), template="model", lora=lora)
        common = {"max_steps": 6, "precision": "bf16", "eval_steps": 3, "eval_draws": 2}
        return settings(tmp_path / name, model=model, **common)

    train(run("rounded", dtype)), train(run("half", "bfloat16"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rounded", "half"))
    moved = [name for name in ours if "lora_B" in name]
    alike = [torch.cosine_similarity(ours[n].flatten(), theirs[n].flatten(), dim=0) for n in moved]
    assert min(alike) > {"int8": 0.99, "nf4": 0.0}[dtype]  # 14 directions: by chance in one of 2^14
    merged, _ = load_model(tmp_path / "rounded", device="cpu", dtype="float32")  # its base is known again
    assert not is_quantized(merged)
    assert is_quantized(load_model(tmp_path / "rounded", device="cpu", dtype=dtype)[0])
    with pytest.raises(ConfigError, match=f"base_dtype {dtype} computes in bfloat16: give precision bf16"):
        train(replace(run("c", dtype), precision="fp32"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
)
@pytest.mark.parametrize("byte", [b"\0", b"\xa7"])
def test_a_file_of_a_checkpoint_that_is_damaged_at_equal_size_is_one_line(whole, tmp_path, name, byte):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinish(folder)
    shutil.rmtree(last_checkpoint(folder))  # so that there is something left to train
    file = last_checkpoint(folder) / name
    file.write_bytes(byte * file.stat().st_size)
    with pytest.raises(CheckpointError) as error:
        train(settings(folder, eval_steps=6, keep_checkpoints=5))
    (line,) = str(error.value).splitlines()
    assert "damaged (" in line
    assert line.endswith("; remove this checkpoint's folder, and the run goes on from the one before")


def test_links_among_checkpoints_are_not_followed_when_something_is_deleted(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "checkpoint-2").symlink_to(tmp_path / "nowhere")
    (run / "checkpoint-3").write_text("a file")
    assert discard_incomplete(run) == ["checkpoint-1", "checkpoint-2"]
    assert (elsewhere / "weights").read_text() == "mine"
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("eval_steps", [0, 2])
def test_a_run_that_diverges_ends_with_an_error_and_keeps_no_broken_checkpoint(tmp_path, eval_steps):
    """Weights of 1e20 are finite, and nothing that is computed with them is."""
    config = settings(tmp_path, learning_rate=1e20, eval_steps=eval_steps, save_steps=1, keep_checkpoints=9)
    for _ in range(2):  # asking again changes nothing
        with pytest.raises(
            DivergedError, match=r"at step \d+ the .* is (nan|inf).*lower --learning_rate \(now 1e\+20\)"
        ):
            train(config)
    assert not (tmp_path / "model.safetensors").exists()
    assert all(math.isfinite(loss) and loss for loss in losses(tmp_path).values())
    for folder in complete_checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_a_loss_that_is_no_number_names_the_checkpoint_before_it(tmp_path, monkeypatch):
    with_faulty_loss(monkeypatch, SFT, lambda step: math.nan if step == 6 else 1.0)
    with pytest.raises(DivergedError, match="at step 7 the loss is nan.*before it is .*checkpoint-4"):
        train(settings(tmp_path))


def test_a_run_that_goes_on_takes_the_steps_that_it_is_given_now(tmp_path):
    train(settings(tmp_path, max_steps=16, logging_steps=8, save_steps=8, eval_steps=8, keep_checkpoints=9))
    for late in complete_checkpoints(tmp_path)[1:]:  # as if killed just after step 8
        (late / MARKER).unlink()
    unfinish(tmp_path)
    train(settings(tmp_path, max_steps=16, logging_steps=3, save_steps=2, eval_steps=5, keep_checkpoints=9))
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(tmp_path)] == [8, 10, 12, 14, 16]
    records = json.loads((tmp_path / "history.json").read_text())
    assert [r["step"] for r in records if "loss" in r] == [8, 9, 12, 15]
    assert [r["step"] for r in records if "eval_nelbo" in r] == [8, 10, 15, 16]


def test_equal_prompts_have_samples_of_their_own(tmp_path):
    prompt = "Count to 5."
    train(settings(tmp_path, samples=[prompt] * 3, max_steps=2, eval_steps=2))
    texts = re.findall(r"^  (.*) \(\w+\)$", (tmp_path / "samples.md").read_text(), re.MULTILINE)
    assert len(texts) == len(set(texts)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"intermediate_size": 0}, "intermediate_size must be"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"hidden_size": 33, "num_attention_heads": 3}, "each head has an even width"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_the_data_are_read(changes, message, tmp_path):
    nowhere = DataConfig(source=str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match=message):
        train(settings(tmp_path / "run", data=nowhere, model=replace(TINY, **changes)))


def test_what_would_be_ignored_is_refused(tmp_path):
    rules = DataConfig(source="rules", split="test", window=48)
    with pytest.raises(ConfigError, match="rules makes its own rows: give no --data.split"):
        train(settings(tmp_path / "a", data=rules))
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"One and {i}."}) for i in range(40)))
    data = DataConfig(source=str(file), window=48, validation_rows=4)
    with pytest.raises(ConfigError, match="model.template 'instruct' is for rows with a prompt"):
        train(settings(tmp_path / "b", data=data, model=replace(TINY, template="instruct")))
    with pytest.raises(ConfigError, match="seed must be a whole number that is not negative, got -1"):
        settings(tmp_path / "c", seed=-1)
