import math

import pytest
import torch

from decoding.tokens import TokenRule, _invert, certainty
from dlm.errors import ConfigError
from dlm.noise import key_of, uniform


def noise(n):
    return uniform(key_of("draws"), torch.arange(n))


def mass(rule, logits):
    return rule.choose(logits, noise(len(logits))).mass


VOCAB, MASK = 12, 11


@pytest.fixture
def logits():
    out = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    out[:, MASK] = float("-inf")
    return out


def frequencies(rule, logits, draws=40_000):
    noise = uniform(key_of(5), torch.arange(draws))
    tokens = rule.choose(logits.expand(draws, -1), noise).token
    return torch.bincount(tokens, minlength=VOCAB).double() / draws


def assert_law(rule, logits, expected):
    got = frequencies(rule, logits)
    sigma = (expected * (1 - expected) / 40_000).sqrt()
    assert torch.all((got - expected).abs() < 4.5 * sigma + 1e-9), (got, expected)


def test_categorical_top_k_top_p_and_temperature_follow_their_laws(logits):
    p = logits[0].double().softmax(0)
    assert_law(TokenRule(), logits, p)
    order = p.argsort(descending=True)
    top = torch.zeros_like(p)
    top[order[:4]] = p[order[:4]]
    assert_law(TokenRule(top_k=4), logits, top / top.sum())
    tempered = (logits[0].double() / 0.5).softmax(0)
    assert_law(TokenRule(temperature=0.5), logits, tempered)
    cumulative, kept = 0.0, torch.zeros_like(p)
    for i in order:
        if cumulative < 0.8:
            kept[i] = p[i]
        cumulative += float(p[i])
    assert_law(TokenRule(top_p=0.8), logits, kept / kept.sum())
    both = torch.zeros_like(p)
    both[order[:5]] = tempered[order[:5]]
    assert_law(TokenRule(top_k=5, temperature=0.5), logits, both / both.sum())


def test_greedy_takes_the_best_token_whatever_the_noise(logits):
    choice = TokenRule(temperature=0).choose(logits.expand(50, -1), uniform(key_of(1), torch.arange(50)))
    assert set(choice.token.tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize("k", [1, 3, 7, 11])
def test_top_k_keeps_exactly_k_real_tokens(logits, k):
    rule = TokenRule(top_k=k)
    p = logits[0].softmax(0).sort(descending=True).values
    assert float(mass(rule, logits)[0]) == pytest.approx(float(p[:k].sum()), abs=1e-6)
    assert int((frequencies(rule, logits) > 0).sum()) == k


def test_more_than_the_vocabulary_is_all_real_tokens(logits):
    assert float(mass(TokenRule(top_k=99), logits)[0]) == pytest.approx(1.0, abs=1e-6)
    assert frequencies(TokenRule(top_k=99), logits)[MASK] == 0


def test_mass_and_confidence_are_the_models_own_probabilities(logits):
    p = logits[0].softmax(0)
    rule = TokenRule(top_k=3, temperature=0.3)
    choice = rule.choose(logits, torch.tensor([0.5]))
    assert float(choice.probability[0]) == pytest.approx(float(p[choice.token[0]]), abs=1e-6)
    assert float(mass(rule, logits)[0]) == pytest.approx(float(p.sort().values[-3:].sum()), abs=1e-6)
    assert mass(TokenRule(), logits).tolist() == [1.0]


def test_a_token_of_weight_zero_never_comes_out_even_at_the_edges():
    weight = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    edges = torch.tensor([2.0**-24, 0.3, 0.5, 1 - 2.0**-24])
    assert set(_invert(weight.expand(4, -1), edges).tolist()) <= {1, 3}
    tiny = torch.full((1, 50_000), 1e-9)
    tiny[0, -1] = 0
    assert int(_invert(tiny, torch.tensor([1 - 2.0**-24]))[0]) < 49_999


def test_settings_out_of_range_are_refused():
    bad = [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_k", 2.5), ("top_p", 0)]
    for name, value in bad:
        with pytest.raises(ConfigError, match=name):
            TokenRule(**{name: value})


def test_min_p_keeps_what_has_a_share_of_the_likeliest():
    probability = torch.tensor([[0.5, 0.3, 0.06, 0.04, 0.1]])
    rule = TokenRule(min_p=0.15)  # 0.075 and more
    assert float(mass(rule, probability.log())) == pytest.approx(0.9)
    draws = rule.choose(probability.log().expand(4000, -1), noise(4000)).token
    share = torch.bincount(draws, minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([5 / 9, 3 / 9, 0, 0, 1 / 9]), atol=0.03, rtol=0)
    hot = TokenRule(min_p=0.3, temperature=2.0)  # shares in proportion to the roots: 0.1 is not cut
    assert hot.candidates(torch.tensor([[0.6, 0.3, 0.1]]).log(), 3).kept.all()
    both = TokenRule(min_p=0.15, top_p=0.7)
    assert float(mass(both, probability.log())) == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="min_p must lie"):
        TokenRule(min_p=1.5)


def test_forbidden_tokens_are_shut_before_anything_is_cut():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    for rule in (
        TokenRule(forbidden=(0, 99)),
        TokenRule(top_k=2, forbidden=(0,)),
        TokenRule(0.0, forbidden=(0,)),
    ):
        tokens = rule.choose(logits.expand(500, -1), noise(500)).token
        assert 0 not in tokens.tolist()
    left = logits[:, 1:].softmax(1)
    assert float(mass(TokenRule(top_k=2, forbidden=(0,)), logits)) == pytest.approx(float(left[0, :2].sum()))
    with pytest.raises(ConfigError, match="token ids"):
        TokenRule(forbidden=(-1,))


def test_certainties_are_those_of_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(7, 12) * 3
    logits[:, 4] = -math.inf
    for i, row in enumerate(logits.double()):
        p = sorted((math.exp(float(x)) for x in row), reverse=True)
        p = [x / sum(p) for x in p]
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        assert float(certainty(logits, "entropy")[i]) == pytest.approx(math.exp(-entropy), rel=1e-5)
        assert float(certainty(logits, "margin")[i]) == pytest.approx(p[0] - p[1], abs=1e-6)
        certain = TokenRule(0.0).certainty(logits, "entropy")
        assert float(certain[i]) == pytest.approx(math.exp(-entropy), rel=1e-5)
        choice = TokenRule(0.0).choose(logits, noise(7))
        assert int(choice.token[i]) == int(row.argmax())


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0, -math.inf]])
    seen = torch.tensor([[True, True, False, False, True]])
    got = TokenRule(repetition_penalty=1.25).penalised(logits, seen, torch.zeros(1, 5))
    assert got[0].tolist() == pytest.approx([1.6, -2.5, 3.0, -1.0, -math.inf])
    with pytest.raises(ConfigError, match="repetition_penalty must be above 0"):
        TokenRule(repetition_penalty=0)


def test_frequency_and_presence_penalties_are_those_of_openai():
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence, after repetition has had its say."""
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0]])
    seen, written = torch.tensor([[True, True, True, False]]), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    rule = TokenRule(repetition_penalty=2, frequency_penalty=0.5, presence_penalty=0.25)
    assert rule.penalises
    got = rule.penalised(logits, seen, written)
    assert got[0].tolist() == pytest.approx([1.0, -4.0 - 0.5 - 0.25, 1.5 - 1.5 - 0.25, -1.0])
    negative = TokenRule(presence_penalty=-1.0).penalised(logits, seen, written)
    assert negative[0].tolist() == pytest.approx([2.0, -1.0, 4.0, -1.0])
    assert not TokenRule().penalises
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(ConfigError, match=f"{name} must lie within"):
            TokenRule(**{name: math.nan})


def test_the_bias_is_added_to_the_logits_of_its_tokens():
    logits = torch.tensor([[2.0, -2.0, 3.0], [0.0, 1.0, -math.inf]], dtype=torch.bfloat16)
    rule = TokenRule(logit_bias={"0": -100, 2: 1.5, 999: 5})
    assert rule.logit_bias == ((0, -100.0), (2, 1.5), (999, 5.0))
    assert rule.biased(logits).tolist() == [[-98.0, -2.0, 4.5], [-100.0, 1.0, -math.inf]]
    assert TokenRule().biased(logits) is logits
    assert hash(rule) == hash(TokenRule(logit_bias=((999, 5), (2, 1.5), (0, -100))))
    for bad in ({"a": 1}, {-1: 1}, {1: math.inf}, {1: None}, 5):
        with pytest.raises(ConfigError, match="logit_bias must map token ids to"):
            TokenRule(logit_bias=bad)


def test_the_likeliest_tokens_come_with_their_log_probabilities():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    expected, order = logits[:, 1:].double().log_softmax(1).sort(1, descending=True)
    got = TokenRule(temperature=0.3, top_k=2, forbidden=(0,)).likeliest(logits, 4)
    assert got[..., 0].tolist() == (order[:, :4] + 1).tolist()
    assert torch.allclose(got[..., 1], expected[:, :4], atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        TokenRule(top_p=0.6),
        TokenRule(min_p=0.05),
        TokenRule(0.7, 0, 0.8, 0.001),
        TokenRule(0.0, 0, 0.5),
        TokenRule(1.6, top_p=0.95),
    ],
)
def test_a_nucleus_is_found_without_sorting_what_lies_outside(rule, monkeypatch):
    """Rows whose set is small, large, or everything: as if all were sorted."""
    torch.manual_seed(0)
    logits = torch.randn(60, 400) * torch.linspace(0.01, 6, 60)[:, None]
    logits[7] = 0.0
    logits[8, 5:] = -math.inf
    u = noise(60)
    drawn = rule.choose(logits, u)
    monkeypatch.setattr("decoding.tokens.SORTED_FIRST", 8)
    stepwise = rule.choose(logits, u)
    monkeypatch.setattr("decoding.tokens.SORTED_FIRST", 400)
    expected = rule.choose(logits, u)
    torch.testing.assert_close(drawn.mass, expected.mass)
    torch.testing.assert_close(stepwise.mass, expected.mass)
    unequal = torch.arange(60) != 7  # among equal logits the order is nobody's
    assert torch.equal(drawn.token[unequal], expected.token[unequal])
    assert torch.equal(stepwise.token[unequal], expected.token[unequal])
    for row, p in enumerate(logits.double().softmax(1)):
        heat = rule.temperature or 1.0
        shares = (logits[row].double() / heat).softmax(0)
        order = p.argsort(descending=True).tolist()
        kept, total = set(), 0.0
        for i in order:
            if p[i] > 0 and shares[i] >= rule.min_p * shares[order[0]] and total < rule.top_p - 1e-6:
                kept.add(i)
            total += float(shares[i])
        assert float(drawn.mass[row]) == pytest.approx(sum(float(p[i]) for i in kept), abs=0.004)


@pytest.mark.parametrize(
    "cut", [{"top_k": 4}, {"top_k": 9}, {"top_p": 1 - 1e-9}, {"top_k": 4, "top_p": 0.9999999}]
)
def test_a_cut_that_cuts_nothing_changes_no_hot_law(cut):
    """Probabilities that float32 cannot hold are probabilities all the same once they are heated."""
    logits = torch.tensor([[0.0, -120.0, -120.0, -120.0, -torch.inf]]).expand(20_000, 5)
    plain = TokenRule(temperature=100.0).choose(logits, noise(20_000)).token
    token = TokenRule(temperature=100.0, **cut).choose(logits, noise(20_000)).token
    shares = torch.bincount(token, minlength=5) / 20_000
    exact = torch.tensor([0.0, -1.2, -1.2, -1.2]).softmax(0)
    assert ((shares[:4] - exact).abs() < 4 * (exact * (1 - exact) / 20_000).sqrt()).all()
    assert shares[4] == 0
    assert (torch.bincount(plain, minlength=5) / 20_000 - shares).abs().max() < 0.02
