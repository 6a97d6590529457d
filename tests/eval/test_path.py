import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from decoding import Decoder
from decoding.presets import PRESETS
from decoding.request import Request
from decoding.reveal.threshold import Threshold
from dlm.errors import ConfigError
from eval.path import path_costs
from tests.fakes import FakeDenoiser

PROMPT = [1, 2]


def planned(model, decoder, **how):
    model.config.max_positions = 64
    return Request(decoder=decoder, **how).resolve(model)


def pace(decoder, steps):
    """Steps, for decoders that do not say themselves how many tokens a step writes."""
    return {"steps": steps} if decoder.reveal.paced else {"rate": None}


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"remdm", "editing", "wino"}))
def test_where_the_context_says_nothing_every_path_costs_the_same(name):
    model = FakeDenoiser(context=False)
    rows = [(PROMPT, [3, 1, 4, 1, 5, 9, 0]), ([7], [2, 0])]
    decoder = Decoder.named(name)
    plan = planned(model, decoder, window=12, **pace(decoder, 4))
    logp = model.logits(model.hidden(torch.zeros(1, 12, dtype=torch.int64))[0]).log_softmax(1)
    for (prompt, answer), cost in zip(rows, path_costs(model, rows, plan, seed=3, batch_size=1), strict=True):
        each = [-float(logp[len(prompt) + i, token]) for i, token in enumerate(answer)]
        assert cost.nats == pytest.approx(each, rel=1e-5)
        assert cost.total == pytest.approx(sum(each), rel=1e-5)
        assert cost.calls >= 1


@pytest.mark.parametrize("name", ["llada", "llada-conv", "margin", "threshold", "entropy-bound"])
def test_the_costs_of_all_answers_are_a_distribution(name):
    # an order that follows from what is written alone: the bound is equal, and the probabilities add up to 1
    model = FakeDenoiser(vocab=6, mask_id=5, eos_id=0, eos_bias=-math.inf)
    rows = [(PROMPT, list(answer)) for answer in itertools.product(range(1, 5), repeat=4)]
    decoder = Decoder.named(name)
    plan = planned(model, decoder, window=6, **pace(decoder, 2))
    costs = list(path_costs(model, rows, plan))
    assert sum(math.exp(-cost.total) for cost in costs) == pytest.approx(1, rel=1e-5)


def test_a_rule_that_fails_ends_the_measurement():
    @dataclass(frozen=True)
    class Broken(Threshold):
        def decide(self, view):
            raise KeyError("broken")

    model = FakeDenoiser()
    plan = planned(model, replace(Decoder.named("threshold"), reveal=Broken()), window=12, rate=None)
    with pytest.raises(KeyError, match="broken"):
        list(path_costs(model, [(PROMPT, [3, 1, 0])], plan))


ENDING = [[*text, 0] for n in range(3) for text in itertools.product(range(1, 4), repeat=n)]
ENDING += [list(text) for text in itertools.product(range(1, 4), repeat=3)]
"""All texts of at most three tokens that can be told apart: with an end, or three tokens long."""


@pytest.mark.parametrize(
    ("name", "options", "steps", "seeds"),
    [
        ("semi-ar", {"block_size": 1}, 3, 1),  # from left to right nothing is drawn behind the end
        ("llada", {}, 1, 1),  # nor is anything seen of it in a single call
        ("categorical", {}, 2, 200),
        ("top-k", {"top_k": 2}, 3, 200),
        ("conv", {"kernel_size": 3}, 2, 200),
        ("llada", {}, 3, 200),
        ("llada-conv", {"kernel_size": 3}, 2, 200),
    ],
)
def test_answers_that_end_are_a_distribution_too(name, options, steps, seeds):
    # p(x) is the mean of exp(-cost) over the orders and over what is drawn behind the end
    model = FakeDenoiser(vocab=5, mask_id=4, eos_id=0)
    rows = [(PROMPT, text) for text in ENDING]
    plan = planned(model, Decoder.named(name, **options), window=5, steps=steps)
    totals = [
        sum(math.exp(-cost.total) for cost in path_costs(model, rows, plan, seed=seed, batch_size=64))
        for seed in range(seeds)
    ]
    if seeds == 1:
        assert totals[0] == pytest.approx(1, rel=1e-5)
    else:
        values = torch.tensor(totals, dtype=torch.float64)
        error = float(values.std()) / seeds**0.5
        assert error < 0.05
        assert abs(float(values.mean()) - 1) < 4 * error + 1e-5


def test_one_call_writes_all_without_seeing_any():
    model = FakeDenoiser()
    answer = [3, 1, 4, 1]
    plan = planned(model, Decoder.named("llada"), window=6, steps=1)
    (cost,) = path_costs(model, [(PROMPT, answer)], plan)
    blank = torch.tensor([PROMPT + [model.mask_id] * 4])
    logp = model.logits(model.hidden(blank)[0]).log_softmax(1)[2:]
    assert cost.nats == pytest.approx([-float(logp[i, token]) for i, token in enumerate(answer)], rel=1e-5)
    assert cost.calls == 1


def test_a_canvas_that_grows_ends_where_the_answer_does():
    model = FakeDenoiser()
    rows = [(PROMPT, [3, 1, 4, 0]), (PROMPT, [5] * 20 + [0])]
    plan = planned(model, Decoder.named("llada-conv", kernel_size=3), max_tokens=30, rate=1.0)
    short, long = path_costs(model, rows, plan)
    assert (len(short.nats), len(long.nats)) == (4, 21)
    assert short.calls < long.calls
    assert all(nats > 0 for nats in short.nats + long.nats)
    assert each_cost(model, rows, plan, 1) == each_cost(model, rows, plan, 2)


def each_cost(model, rows, plan, batch_size):
    return [cost.nats for cost in path_costs(model, rows, plan, batch_size=batch_size)]


def test_what_has_no_such_cost_is_refused():
    model = FakeDenoiser()
    with pytest.raises(ConfigError, match="masks tokens again"):
        next(path_costs(model, [], planned(model, Decoder.named("remdm"), window=8, steps=4)))
    with pytest.raises(ConfigError, match="ranks positions by the token that it draws there"):
        next(path_costs(model, [], planned(model, Decoder.named("llada", temperature=1.0), window=8)))
    with pytest.raises(ConfigError, match="5 tokens does not fit: there is room for 4"):
        next(path_costs(model, [(PROMPT, [1] * 5)], planned(model, Decoder.named("conv"), window=6, steps=2)))


def test_tokens_cost_what_the_model_says_whatever_the_token_rule():
    """One call for all: the order plays no part, and neither does what the rule makes of the logits."""
    model = FakeDenoiser()
    rules = [
        {},
        {"guidance": 2.0},
        {"logit_bias": {5: 8.0}},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 2.0},
    ]
    costs = []
    for rule in rules:
        plan = planned(model, Decoder.named("llada", **rule), window=6, steps=1)
        costs += path_costs(model, [(PROMPT, [3, 1, 4, 1])], plan)
    for cost in costs[1:]:
        assert cost.nats == pytest.approx(costs[0].nats, rel=1e-6)


def test_what_float32_takes_for_impossible_has_its_cost():
    class Sure(FakeDenoiser):
        def logits(self, hidden):
            return super().logits(hidden) * 60

    model = Sure(context=False, eos_bias=-1.0)
    plan = planned(model, Decoder.named("conv"), window=12, steps=4)
    (cost,) = path_costs(model, [(PROMPT, [3, 1, 4, 1, 5])], plan)
    assert max(cost.nats) > 104  # exp(-104) is nothing in float32
    assert math.isfinite(cost.total)
