"""Noise schedules: closed forms, and one that is set is followed everywhere."""

import math

import pytest
import torch

from dlm.errors import ConfigError
from dlm.model import MaskedDiffusionModel
from dlm.objective import masked_diffusion_loss
from dlm.schedule import Cosine, LogLinear, schedule_named
from dlm.spec import ModelSpec
from finetune.config import SCHEDULES, ModelConfig

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(0.2), Cosine()], ids=str)
def test_the_derivative_and_the_weight_are_those_of_the_curve(schedule):
    step = 1e-6
    slope = (schedule(TIMES + step).value - schedule(TIMES - step).value) / (2 * step)
    torch.testing.assert_close(schedule(TIMES).derivative, slope, rtol=1e-6, atol=1e-8)
    probability = schedule.mask_probability(TIMES)
    torch.testing.assert_close(schedule.weight(TIMES), -slope / probability, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        schedule.mask_share(TIMES),
        probability / schedule.mask_probability(torch.ones(1, dtype=torch.float64)),
    )


def test_closed_forms():
    t = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(LogLinear(0.1)(t).value, 1 - 0.9 * t)
    torch.testing.assert_close(LogLinear(0.1).weight(t), 1 / t)
    torch.testing.assert_close(Cosine().mask_probability(t), torch.sin(math.pi * t / 2))
    torch.testing.assert_close(Cosine().weight(t), math.pi / 2 / torch.tan(math.pi * t / 2))


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine()], ids=str)
def test_the_bound_does_not_depend_on_the_schedule(schedule):
    """A model that gives p to a masked token whatever else it sees: the mean loss is -log p."""
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    logp = torch.full_like(times, math.log(0.3))
    expected = schedule.mask_probability(times) * logp  # of one token, masked so often
    loss = masked_diffusion_loss(expected, times.float(), len(times), schedule)
    assert float(loss) == pytest.approx(-math.log(0.3), rel=1e-4)


def test_names():
    assert schedule_named() == LogLinear()
    assert schedule_named("log-linear", eps=0.01) == LogLinear(0.01)
    for name in SCHEDULES:
        assert schedule_named(**schedule_named(name).as_dict()) == schedule_named(name)
    with pytest.raises(ConfigError, match="'cosin'. Did you mean 'cosine'"):
        schedule_named("cosin")
    with pytest.raises(ConfigError, match="unexpected keyword"):
        schedule_named("cosine", eps=0.1)
    with pytest.raises(ConfigError, match="'cos'"):
        ModelConfig(schedule="cos")


def test_a_models_schedule_goes_with_it(model, tmp_path):
    model.config.schedule = Cosine().as_dict()
    model.save_pretrained(tmp_path)
    again = MaskedDiffusionModel.from_pretrained(tmp_path)
    assert again.spec.schedule == Cosine()
    assert ModelSpec.of_config(again.config).schedule == Cosine()
    model.config.schedule = None
