from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Decoder
from decoding.reveal import (
    Ancestral,
    Decision,
    EntropyBound,
    Quota,
    Remask,
    RevealRule,
    Separated,
    StepView,
    Threshold,
    Verified,
    reveal_probability,
)
from decoding.reveal.base import Evidence, WrappedRule
from decoding.tokens import Choice, TokenRule
from decoding.window import Full
from dlm.errors import ConfigError
from dlm.noise import fold, key_of, uniform
from tests.decoding.rig import decode, decode_in_fresh_engines, plan_of, rows
from tests.fakes import FakeDenoiser


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 30), step=st.integers(0, 9))
def test_reveal_probability_is_the_formula_written_out(seed, length, step):
    g = torch.Generator().manual_seed(seed)
    mass, weight = torch.rand(2, length, generator=g), torch.rand(2, length, generator=g)
    weight[weight < 0.3] = 0
    masked = torch.rand(2, length, generator=g) < 0.6
    t, s = 1 - step / 10, 1 - (step + 1) / 10
    got = reveal_probability(mass, weight, masked, torch.full((2,), t), torch.full((2,), s))
    for row in range(2):
        cells = [i for i in range(length) if masked[row, i]]
        total = sum(float(weight[row, i]) * float(mass[row, i]) for i in cells)
        w = {i: float(weight[row, i]) if total > 0 else 1.0 for i in cells}
        total = sum(w[i] * float(mass[row, i]) for i in cells)
        for i in range(length):
            expected = 0.0
            if i in w and total > 0:
                a = (t - s) * w[i] * float(mass[row, i]) * len(cells) / total
                expected = a / (a + s) if a > 0 else 0.0
            assert float(got[row, i]) == pytest.approx(expected, abs=1e-5)


def test_plain_ancestral_is_mdlm_and_the_last_step_reveals_all():
    mass, weight = torch.ones(1, 8), torch.ones(1, 8)
    masked = torch.ones(1, 8).bool()
    got = reveal_probability(mass, weight, masked, torch.tensor([0.6]), torch.tensor([0.5]))
    assert torch.allclose(got, torch.full((1, 8), (0.6 - 0.5) / 0.6))
    last = reveal_probability(mass, weight, masked, torch.tensor([0.1]), torch.tensor([0.0]))
    assert (last == 1).all()


def test_the_normaliser_is_the_rows_own():
    mass = torch.tensor([[0.5] * 6, [0.1] * 6])
    weight, masked = torch.ones(2, 6), torch.ones(2, 6).bool()
    masked[1, 3:] = False
    t, s = torch.tensor([0.5, 0.9]), torch.tensor([0.4, 0.7])
    both = reveal_probability(mass, weight, masked, t, s)
    for row in range(2):
        alone = reveal_probability(*(x[row : row + 1] for x in (mass, weight, masked, t, s)))
        assert torch.equal(alone[0], both[row])


def view(**kwargs):
    rows, length = kwargs["masked"].shape
    base = {
        "weight": torch.ones(rows, length), "score": torch.ones(rows, length), "t": torch.full((rows,), 0.5),
        "s": torch.full((rows,), 0.4), "quota": torch.full((rows,), 2), "written": ~kwargs["masked"],
        "noise": lambda stream: uniform(
            fold(key_of(stream), torch.arange(rows))[:, None], torch.arange(length)
        ),
    }  # fmt: skip
    return StepView(**{**base, **kwargs})


def test_ancestral_reveals_at_its_probability_by_count():
    rows, length = 4000, 10
    mass = torch.linspace(0.2, 0.9, length).expand(rows, -1)
    weight = torch.linspace(1, 0.1, length).expand(rows, -1)
    masked = torch.ones(rows, length).bool()
    masked[:, 4] = False
    v = view(masked=masked, score=mass, weight=weight)
    chance = reveal_probability(mass[:1], weight[:1], masked[:1], v.t[:1], v.s[:1])[0]
    share = Ancestral().decide(v).reveal.float().mean(0)
    assert share[4] == 0
    assert torch.all((share - chance).abs() < 4.5 * (chance * (1 - chance) / rows).sqrt() + 1e-9)


def test_quota_ranks_by_confidence_times_weight_and_never_takes_more():
    masked = torch.tensor([[True, True, False, True, True]])
    score = torch.tensor([[0.9, 0.5, 1.0, 0.8, 0.99]])
    weight = torch.tensor([[0.5, 1.0, 1.0, 0.9, 0.0]])
    rule = Quota()
    assert rule.decide(view(masked=masked, score=score, weight=weight)).reveal.tolist() == [
        [False, True, False, True, False]
    ]
    many = view(masked=masked, score=score, weight=weight, quota=torch.tensor([4]))
    assert rule.decide(many).reveal.tolist() == masked.tolist()
    needed = {
        quota: rule.evidence(view(masked=masked, weight=weight, quota=torch.tensor([quota]))).scored
        for quota in (0, 3, 4)
    }
    assert needed[3].tolist() == [[True, True, False, True, False]]
    assert needed[4].tolist() == masked.tolist()
    assert not needed[0].any()


def test_quota_keeps_the_order_of_tiny_confidences_and_prefers_open_positions():
    masked = torch.ones(1, 4).bool()
    score = torch.tensor([[1e-8, 3e-8, 5e-8, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    v = view(masked=masked, score=score, weight=weight, quota=torch.tensor([2]))
    assert Quota().decide(v).reveal.tolist() == [[False, True, True, False]]


def test_threshold_takes_the_confident_and_at_least_one():
    masked = torch.tensor([[True, True, True, False]])
    score = torch.tensor([[0.95, 0.3, 0.92, 1.0]])
    assert Threshold(0.9).decide(view(masked=masked, score=score)).reveal.tolist() == [
        [True, False, True, False]
    ]
    assert Threshold(0.99).decide(view(masked=masked, score=score)).reveal.tolist() == [
        [True, False, False, False]
    ]


def test_remdm_follows_its_three_phases():
    rule = Remask()
    t = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.05, 0.025, 0.0])
    expected = [1.0, 1 - 0.2 * 0.9 / 0.45, 0.1, 0.1, 0.05 * 0.1 / 0.05, 0.05, 0.0]
    assert torch.allclose(rule.mask_probability(t), torch.tensor(expected), atol=1e-6)
    rows, length = 3000, 6
    masked = (torch.arange(length) < 3).expand(rows, -1)
    mass = torch.full((rows, length), 0.8)
    loop = view(masked=masked, score=mass, t=torch.full((rows,), 0.5), s=torch.full((rows,), 0.4))
    decision = rule.decide(loop)
    assert float(decision.reveal[:, :3].float().mean()) == pytest.approx(0.8 * 0.9 * 0.04 / 0.1, abs=0.02)
    assert float(decision.remask[:, 3:].float().mean()) == pytest.approx(0.04, abs=0.008)
    assert not decision.remask[:, :3].any()
    before = view(masked=masked, score=mass, t=torch.full((rows,), 0.9), s=torch.full((rows,), 0.8))
    assert not rule.decide(before).remask.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(0), "tau must lie in"),
        (lambda: Quota(0), "per_step must be a whole number of at least 1"),
        (lambda: Remask(t_on=0.05, t_off=0.5), "t_off < t_on"),
        (lambda: Remask(eta=1.0), "eta in"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_entropy_bound_takes_the_longest_prefix_that_fits():
    torch.manual_seed(3)
    for gamma in (0.0, 0.3, 1.0, 50.0):
        entropy = torch.rand(200, 9) * 0.8
        weight = (torch.rand(200, 9) < 0.8).float()
        masked = torch.rand(200, 9) < 0.9
        given_view = view(masked=masked, score=(-entropy).exp(), weight=weight)
        got = EntropyBound(gamma).decide(given_view).reveal
        for i in range(200):
            opened = [j for j in range(9) if masked[i, j] and weight[i, j] > 0]
            expected, before = set(), 0.0
            for j in sorted(opened, key=lambda j: float(entropy[i, j])):
                if before > gamma:
                    break
                expected.add(j)
                before += float(entropy[i, j])
            assert set(got[i].nonzero()[:, 0].tolist()) == expected
    with pytest.raises(ConfigError, match="gamma must be a finite number that is not negative"):
        EntropyBound(-1)


def test_a_quota_can_be_ordered_by_another_certainty():
    logits, tokens = torch.randn(50, 9), TokenRule(temperature=0)
    choice = tokens.choose(logits, torch.full((50,), 0.5))
    p = logits.softmax(1).sort(1, descending=True).values
    expected = {"confidence": p[:, 0], "margin": p[:, 0] - p[:, 1], "entropy": (p * p.log()).sum(1).exp()}
    for order, certain in expected.items():
        rule = Quota(order=order)
        torch.testing.assert_close(rule.score(logits, choice, {}, tokens), certain)
        assert rule.sees_token is (order == "confidence")
    with pytest.raises(ConfigError, match="Did you mean 'margin'"):
        Quota(order="margn")


@dataclass(frozen=True)
class Alternating(RevealRule):
    """Looks at every second position only, in turn, but reads the confidence of all of them."""

    def evidence(self, view):
        return Evidence(view.open & ((torch.arange(view.open.shape[1]) + view.step[:, None]) % 2 == 0))

    def decide(self, view):
        best = torch.where(view.open, view.confidence, -1.0)
        return Decision(view.open & (best == best.amax(1, keepdim=True)))


@pytest.mark.parametrize("seed", range(5))
def test_a_rule_sees_nothing_that_it_did_not_ask_for(seed):
    """Else what an earlier step has left in a cache decides, and a row that is moved changes its text."""
    model, plan = FakeDenoiser(eos_bias=-50.0), plan_of(Decoder(Full(), Alternating()), rate=1.0)
    ids = rows(model, [3], 34)
    stayed = decode(model, ids, plan, [seed])
    moved = decode_in_fresh_engines(model, ids[0], plan, seed)
    assert torch.equal(moved.ids, stayed.ids)


class Counted(RevealRule):
    """Notes which of its members are asked for."""

    def __init__(self):
        self.asked = set()

    def __getattribute__(self, name):
        if not name.startswith("_") and name != "asked":
            self.asked.add(name)
        return super().__getattribute__(name)


def test_a_rule_around_another_answers_nothing_by_itself():
    inner = Counted()
    around = WrappedRule(inner)
    members = {name for name in vars(RevealRule) if not name.startswith("_")}
    view = StepView(
        *(torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3), *torch.ones(2, 1)),
        quota=torch.ones(1, dtype=torch.int64),
        written=torch.zeros(1, 3, dtype=torch.bool),
        noise=lambda stream: torch.zeros(1, 3),
        score=torch.ones(1, 3),
    )
    choice = Choice(*(torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.ones(3)))
    arguments = {
        "with_given_pace": (), "evidence": (view,), "observe": (torch.zeros(3, 5), {}, TokenRule()),
        "score": (torch.zeros(3, 5), choice, {}, TokenRule()), "initial_state": (2, 3),
        "precedence": (view,),
    }  # fmt: skip
    for name in members - {"decide"}:
        member = getattr(around, name)
        if callable(member):
            member(*arguments[name])
    assert inner.asked >= members - {"decide"}


def test_tokens_are_kept_apart_before_they_are_verified():
    assert Verified(Separated(Threshold(0.1), 2), 0.9).requires == {"shadows"}
    with pytest.raises(ConfigError, match="apart before they are verified"):
        Separated(Verified(Threshold(0.1), 0.9), 2)


def test_a_wrapped_rule_answers_for_everything_that_rules_can_be_asked():
    """A member that a wrapper forgot would silently be the default of all rules."""
    members = {name for name in vars(RevealRule) if not name.startswith("_")}
    assert members - {"decide"} <= vars(WrappedRule).keys()
