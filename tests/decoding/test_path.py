import itertools
import math

import pytest
import torch

from decoding import Decoder
from decoding.path import path_costs
from decoding.presets import PRESETS
from decoding.request import Planner
from dlm.errors import ConfigError
from tests.fakes import FakeDenoiser

PROMPT = [1, 2]


def planned(model, decoder, **how):
    return Planner(model.mask_id, model.eos_id, 64, {}).plan(decoder, **how)


def pace(decoder, steps):
    """Steps, for decoders that do not say themselves how many tokens a step writes."""
    return {"steps": steps} if decoder.reveal.paced else {"rate": None}


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"remdm"}))
def test_where_the_context_says_nothing_every_path_costs_the_same(name):
    model = FakeDenoiser(context=False)
    rows = [(PROMPT, [3, 1, 4, 1, 5, 9, 0]), ([7], [2, 0])]
    decoder = Decoder.named(name)
    plan = planned(model, decoder, window=12, **pace(decoder, 4))
    logp = model.logits(model.hidden(torch.zeros(1, 12, dtype=torch.int64))[0]).log_softmax(1)
    for (prompt, answer), cost in zip(rows, path_costs(model, rows, plan, seed=3, batch_size=1), strict=True):
        each = [-float(logp[len(prompt) + i, token]) for i, token in enumerate(answer)]
        assert cost.answer == pytest.approx(each, rel=1e-5)
        most = -float(logp[len(prompt) + len(answer) :, model.eos_id].sum())
        assert -1e-6 <= cost.behind <= most * (1 + 1e-5)
    assert cost.calls >= 1


@pytest.mark.parametrize("name", ["llada", "llada-conv", "margin", "threshold", "entropy-bound"])
def test_the_costs_of_all_answers_are_a_distribution(name):
    # an order that follows from what is written alone: the bound is equal, and the probabilities add up to 1
    model = FakeDenoiser(vocab=6, mask_id=5, eos_id=0, eos_bias=-math.inf)
    rows = [(PROMPT, list(answer)) for answer in itertools.product(range(1, 5), repeat=4)]
    decoder = Decoder.named(name)
    plan = planned(model, decoder, window=6, **pace(decoder, 2))
    costs = list(path_costs(model, rows, plan))
    assert sum(math.exp(-sum(cost.answer)) for cost in costs) == pytest.approx(1, rel=1e-5)
    assert {cost.behind for cost in costs} == {0}


def test_answers_that_end_are_a_distribution_too():
    model = FakeDenoiser(vocab=5, mask_id=4, eos_id=0)
    texts = [[*text, 0] for n in range(3) for text in itertools.product(range(1, 4), repeat=n)]
    texts += [list(text) for text in itertools.product(range(1, 4), repeat=3)]
    rows = [(PROMPT, text) for text in texts]
    total = {}
    for name, options in (("semi-ar", {"block_size": 1}), ("llada", {})):
        plan = planned(model, Decoder.named(name, **options), window=5, steps=3)
        costs = list(path_costs(model, rows, plan))
        total[name] = sum(math.exp(-sum(cost.answer) - cost.behind) for cost in costs)
    assert total["semi-ar"] == pytest.approx(1, rel=1e-5)  # from left to right nothing stands behind the end
    assert 0 < total["llada"] < 1  # elsewhere it does, and only end tokens are counted there


def test_one_call_writes_all_without_seeing_any():
    model = FakeDenoiser()
    answer = [3, 1, 4, 1]
    plan = planned(model, Decoder.named("llada"), window=6, steps=1)
    (cost,) = path_costs(model, [(PROMPT, answer)], plan)
    blank = torch.tensor([PROMPT + [model.mask_id] * 4])
    logp = model.logits(model.hidden(blank)[0]).log_softmax(1)[2:]
    assert cost.answer == pytest.approx([-float(logp[i, token]) for i, token in enumerate(answer)], rel=1e-5)
    assert (cost.calls, cost.behind) == (1, 0)


def test_a_canvas_that_grows_ends_where_the_answer_does():
    model = FakeDenoiser()
    rows = [(PROMPT, [3, 1, 4, 0]), (PROMPT, [5] * 20 + [0])]
    plan = planned(model, Decoder.named("llada-conv", kernel_size=3), max_tokens=30, rate=1.0)
    short, long = path_costs(model, rows, plan)
    assert (len(short.answer), len(long.answer)) == (4, 21)
    assert short.calls < long.calls
    assert all(nats > 0 for nats in short.answer + long.answer)
    assert path_costs_sum(model, rows, plan, 1) == path_costs_sum(model, rows, plan, 2)


def path_costs_sum(model, rows, plan, batch_size):
    return [cost.answer for cost in path_costs(model, rows, plan, batch_size=batch_size)]


def test_what_has_no_such_cost_is_refused():
    model = FakeDenoiser()
    with pytest.raises(ConfigError, match="masks tokens again"):
        next(path_costs(model, [], planned(model, Decoder.named("remdm"), window=8, steps=4)))
    with pytest.raises(ConfigError, match="5 tokens does not fit: there is room for 4"):
        next(path_costs(model, [(PROMPT, [1] * 5)], planned(model, Decoder.named("conv"), window=6, steps=2)))
