"""Runs that have minutes instead of steps, and rows that are encoded already."""

import json
import logging
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlm.data.config import DataConfig
from dlm.data.encode import encode_rows
from dlm.data.encoded import EncodedRows
from dlm.errors import ConfigError
from finetune.deadline import Deadline
from finetune.run import split_rows, step_limit
from finetune.run_folder import RunFolder
from finetune.sft import train
from tests.finetune.test_train import losses, settings, unfinish, weights


def timed(folder, minutes=0.02, **kwargs):
    return settings(folder, max_steps=0, max_minutes=minutes, save_steps=10**6, **kwargs)


def test_the_rate_warms_up_over_steps_and_comes_to_rest_with_the_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    deadline = Deadline(RunFolder(timed(tmp_path, 1.0, warmup_steps=3)), timed(tmp_path, 1.0, warmup_steps=3))
    assert [deadline.pace(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    now[0] = 130.0
    assert deadline.pace(50) == pytest.approx(0.5)
    now[0] = 161.0
    assert deadline.pace(90) == pytest.approx(0.0)


def test_the_rate_comes_to_rest_with_the_steps_where_they_end_first(tmp_path):
    config = timed(tmp_path, 100.0, warmup_steps=0)
    deadline = Deadline(RunFolder(config), config, steps=10)
    rates = [deadline.pace(step) for step in (0, 5, 10)]
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 0}, 3 * 3),  # three passes
        ({"max_steps": 0, "num_train_epochs": 0.6}, 2),
        ({"max_steps": 7, "num_train_epochs": 1}, 3),
        ({"max_steps": 2, "num_train_epochs": 1}, 2),
        ({"max_minutes": 1, "max_steps": 0, "num_train_epochs": 1}, 3),
        ({"max_minutes": 1, "max_steps": 0}, 10**7),
    ],
)
def test_the_first_limit_of_steps_and_passes_holds(tmp_path, limits, steps):
    # of 50 rows in 2 processes of 4 rows 48 fill 3 steps of two micro-batches; one process takes the rest too
    config = settings(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **limits)
    assert step_limit(config, 50, 2) == steps
    assert step_limit(config, 50, 1) >= steps
    assert step_limit(config, 5, 2) >= 1, "fewer rows than a step takes"


def test_passes_count_as_transformers_counts_them(tmp_path):
    train(settings(tmp_path, max_steps=0, num_train_epochs=0.3, gradient_accumulation_steps=2))
    state = json.loads((next(tmp_path.glob("checkpoint-*")) / "trainer_state.json").read_text())
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]["kept"]
    assert state["epoch"] == pytest.approx(0.3, abs=16 / rows)
    assert state["global_step"] == state["max_steps"]


def test_a_pace_that_a_deadline_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lr_scheduler_type 'linear' is for max_steps"):
        timed(tmp_path, lr_scheduler_type="linear")
    with pytest.raises(ConfigError, match="save_minutes is for runs with max_minutes"):
        settings(tmp_path, save_minutes=2.0)


def test_a_run_ends_with_its_time_and_is_finished(tmp_path):
    begun = time.monotonic()
    train(timed(tmp_path, eval_steps=10**6))
    assert time.monotonic() - begun < 30
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["finished"]
    assert stored["stopped"]
    assert stored["seconds"] >= 1.2
    history = json.loads((tmp_path / "history.json").read_text())
    assert [r for r in history if "loss" in r][-1]["learning_rate"] < 3e-4
    assert "eval_nelbo" in history[-2] or "eval_nelbo" in history[-1]


def test_a_run_that_ends_within_its_warm_up_says_so(tmp_path, caplog):
    train(settings(tmp_path / "steps", max_steps=2, warmup_steps=2))
    assert "the run will end within its warm-up, at step 2, before --warmup_steps 2" in caplog.text
    caplog.clear()
    train(timed(tmp_path / "time", warmup_steps=10**6))
    assert "the run has ended within its warm-up, at step " in caplog.text
    caplog.clear()
    train(settings(tmp_path / "longer", max_steps=2, warmup_steps=1))
    assert "warm-up" not in caplog.text


def test_a_run_that_ended_before_its_first_checkpoint_keeps_no_other_out(tmp_path):
    with pytest.raises(ValueError, match="Invalid beta parameter"):
        train(settings(tmp_path, max_steps=2, trainer={"disable_tqdm": True, "adam_beta1": 2.0}))
    train(settings(tmp_path, max_steps=2))
    with pytest.raises(ConfigError, match="holds a run with max_steps = 2, not 3"):
        train(settings(tmp_path, max_steps=3))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
        ({"max_steps": True}, "max_steps must be a whole number, got True"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
    ],
)
def test_a_setting_that_is_no_number_is_refused(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings(tmp_path, **wrong)


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = settings(tmp_path, max_steps=np.int64(3), learning_rate=np.float32(0.5))
    assert (type(config.max_steps), type(config.learning_rate)) == (int, float)


@pytest.mark.parametrize(
    "wrong", [{"lr_scheduler_type": "foo"}, {"trainer": {"optim": "foo"}}, {"trainer": {"adam_beta1": "x"}}]
)
def test_what_transformers_refuses_is_a_wrong_setting(tmp_path, wrong):
    with pytest.raises(ConfigError):
        train(settings(tmp_path, **wrong))


def test_without_a_terminal_the_figures_are_lines(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dlm.trainer.SECONDS_BETWEEN_LINES", 3600.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    shown = {"trainer": {"disable_tqdm": False}}
    train(settings(tmp_path, max_steps=6, warmup_steps=1, logging_steps=1, eval_steps=3, **shown))
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1 of 6", "step 3 of 6", "step 6 of 6"]
    assert "loss " in lines[0]
    assert "val " in lines[1]


def test_a_killed_run_has_only_the_rest_of_its_time(tmp_path):
    train(timed(tmp_path))
    unfinish(tmp_path)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stopped": False, "seconds": 1.0}))
    before = max(losses(tmp_path))
    train(timed(tmp_path))
    assert json.loads(file.read_text())["seconds"] == pytest.approx(1.2, abs=0.5)
    assert max(losses(tmp_path)) > before


def test_minutes_between_checkpoints(tmp_path):
    train(timed(tmp_path, save_minutes=0.005, keep_checkpoints=20))
    assert len(list(tmp_path.glob("checkpoint-*"))) >= 3


def test_a_negative_time_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_minutes must not be negative"):
        timed(tmp_path, -1.0)


def test_encoded_rows_train_the_model_of_their_text(tmp_path):
    from dataclasses import replace

    from transformers import AutoTokenizer

    from finetune.config import ModelConfig

    train(settings(tmp_path / "first"))
    config = settings(tmp_path / "text", model=ModelConfig(init=str(tmp_path / "first")), max_steps=4)
    train(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    parts = split_rows(config.data, config.seed)
    rows = [encode_rows(part, tokenizer, 48)[0] for part in parts]
    ids = [row for part in rows for row in part["input_ids"]]
    starts = [n for part in rows for n in part["prompt_length"]]
    EncodedRows.packed(ids, starts, tokenizer, 48).save(tmp_path / "rows.npz")
    data = replace(config.data, source=str(tmp_path / "rows.npz"), limit=0)
    train(settings(tmp_path / "ids", model=config.model, max_steps=4, data=data))
    assert losses(Path(tmp_path / "ids")) == losses(Path(tmp_path / "text"))
    assert all((weights(tmp_path / "ids")[k] == w).all() for k, w in weights(tmp_path / "text").items())


def test_encoded_rows_need_the_model_that_they_are_for(tmp_path):
    from transformers import AutoTokenizer

    train(settings(tmp_path / "first", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    EncodedRows.packed([[5, 6, 7]] * 30, [1] * 30, tokenizer, 48).save(tmp_path / "rows.npz")
    data = DataConfig(source=str(tmp_path / "rows.npz"), window=48, validation_rows=3)
    with pytest.raises(ConfigError, match="name the model that they are for, --model.init"):
        train(settings(tmp_path / "ids", data=data))


def test_windows_of_plain_text_are_not_cut_answers(tmp_path):
    from transformers import AutoTokenizer

    train(settings(tmp_path / "first", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    full = [[5] * 48] * 4
    rows = EncodedRows.packed(full, [0, 0, 3, 0], tokenizer, 48)
    assert rows.truncated(tokenizer.eos_token_id) == 1


def test_workers_that_stay_are_refused(tmp_path):
    trainer = {"disable_tqdm": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(ConfigError, match="dataloader_persistent_workers"):
        train(settings(tmp_path / "run", trainer=trainer))
