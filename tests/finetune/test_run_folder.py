"""Which runs a folder continues: those with the same settings, however old the folder is."""

import json
from pathlib import Path

import pytest

from dlm.errors import ConfigError
from finetune.config import MaskConfig, TrainConfig
from finetune.run import training_arguments
from finetune.run_folder import SAMPLES, RunFolder


@pytest.fixture
def folder(tmp_path):
    """A folder with the settings of a run that has validated, and the way to change what is written there."""
    report = type("Report", (), {"as_dict": lambda self: {}})()
    RunFolder(TrainConfig(str(tmp_path), max_steps=5)).begin(report)
    (tmp_path / SAMPLES).touch()

    def rewrite(change):
        stored = json.loads((tmp_path / "run.json").read_text())
        change(stored["config"])
        (tmp_path / "run.json").write_text(json.dumps(stored))

    return str(tmp_path), rewrite


def test_the_same_settings_go_on_and_others_do_not(folder):
    path, _ = folder
    RunFolder(TrainConfig(path, max_steps=5))
    RunFolder(TrainConfig(path, max_steps=5, logging_steps=3))
    with pytest.raises(ConfigError, match="max_steps = 5, not 6"):
        RunFolder(TrainConfig(path, max_steps=6))


def test_a_run_that_left_nothing_keeps_no_other_out(folder):
    path, _ = folder
    (Path(path) / SAMPLES).unlink()
    run = RunFolder(TrainConfig(path, max_steps=6))
    assert run.resume_from is None
    assert not run.finished


def test_a_setting_that_an_older_version_did_not_have_had_its_default(folder):
    path, rewrite = folder
    rewrite(lambda config: config.pop("masks"))
    RunFolder(TrainConfig(path, max_steps=5))
    with pytest.raises(ConfigError, match=r"masks.complementary = False, not True"):
        RunFolder(TrainConfig(path, max_steps=5, masks=MaskConfig(complementary=True)))


def test_a_setting_that_is_none_any_more_is_no_obstacle(folder):
    path, rewrite = folder
    rewrite(lambda config: config.update(forgotten=3))
    RunFolder(TrainConfig(path, max_steps=5))


def test_settings_of_transformers_are_compared_where_only_one_run_has_them(folder):
    path, rewrite = folder
    with pytest.raises(ConfigError, match=r"trainer.adam_beta1 = None, not 0.5"):
        RunFolder(TrainConfig(path, max_steps=5, trainer={"adam_beta1": 0.5}))
    rewrite(lambda config: config.update(trainer={"adam_beta1": 0.5}))
    with pytest.raises(ConfigError, match=r"trainer.adam_beta1 = 0.5, not None"):
        RunFolder(TrainConfig(path, max_steps=5))


def test_blocks_had_values_of_their_own_where_none_were_given(folder):
    path, rewrite = folder
    rewrite(lambda config: config["model"].update(block_lead=True, causal_context=False))
    RunFolder(TrainConfig(path, max_steps=5))
    rewrite(lambda config: config["model"].update(causal_context=True))
    with pytest.raises(ConfigError, match=r"model.causal_context = True, not None"):
        RunFolder(TrainConfig(path, max_steps=5))


def test_three_epochs_were_written_where_none_were_given(folder):
    path, rewrite = folder
    rewrite(lambda config: config.update(num_train_epochs=3.0))
    RunFolder(TrainConfig(path, max_steps=5))
    rewrite(lambda config: config.update(num_train_epochs=2.0))
    with pytest.raises(ConfigError, match=r"num_train_epochs = 2.0, not 0.0"):
        RunFolder(TrainConfig(path, max_steps=5))


def test_a_folder_that_holds_another_model_is_not_written_to(tmp_path):
    for name in (".lock", "log.txt", "lost+found"):
        (tmp_path / name).touch()
    RunFolder(TrainConfig(str(tmp_path), max_steps=5))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds model.safetensors but no run.json"):
        RunFolder(TrainConfig(str(tmp_path), max_steps=5))


def test_what_would_make_a_run_another_one_is_not_free():
    for name in (
        "load_best_model_at_end",
        "save_only_model",
        "label_smoothing_factor",
        "resume_from_checkpoint",
    ):
        with pytest.raises(ConfigError, match=f"trainer.{name} is not free"):
            TrainConfig("x", trainer={name: True})
    for name in ("learning_rate", "num_train_epochs", "weight_decay"):
        with pytest.raises(ConfigError, match=name):
            TrainConfig("x", **{name: float("nan")})
        with pytest.raises(ConfigError, match=name):
            TrainConfig("x", **{name: float("inf")})
    with pytest.raises(ConfigError, match="unknown report_to 'lalala'"):
        training_arguments(TrainConfig("x", report_to="lalala"), True, 5)
    with pytest.raises(ConfigError, match="unknown report_to 'none'"):
        training_arguments(TrainConfig("x", report_to="none, tensorboard"), True, 5)
    both = training_arguments(TrainConfig("x", report_to="tensorboard, mlflow"), True, 5)
    assert both.report_to == ["tensorboard", "mlflow"]
