"""The kernel against its reference in `decoding.tokens`, by Triton's interpreter where there is no GPU."""

import math

import pytest
import torch

from benchmarks.gpu.step_kernel import MOST, choose
from decoding.tokens import TokenRule
from dlm.noise import key_of, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 128  # logits at a time, so that a small vocabulary takes several turns
RULES = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold, top-p": {"temperature": 0.6, "top_p": 0.7},
    "coldest": {"temperature": 0.1},
    "hot, min-p": {"temperature": 1.7, "min_p": 0.2},
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("benchmarks.gpu.step_kernel.BLOCK", BLOCK)


def noise(n):
    return uniform(key_of("kernel"), torch.arange(n)).to(DEVICE)


@pytest.mark.parametrize(
    ("k", "vocab", "dtype", "rule"),
    [
        (1, BLOCK + 7, torch.float32, "plain"),
        (20, BLOCK + 7, torch.bfloat16, "plain"),
        (MOST, MOST, torch.float32, "plain"),
        (20, BLOCK + 7, torch.float32, "greedy"),
        (20, BLOCK + 7, torch.float32, "cold, top-p"),
        (MOST, BLOCK + 7, torch.bfloat16, "cold, top-p"),
        (20, MOST, torch.float32, "hot, min-p"),
        (5, BLOCK + 7, torch.float32, "hot, min-p"),
        (20, BLOCK + 7, torch.float32, "coldest"),
    ],
)
def test_the_kernel_draws_what_pytorch_draws(k, vocab, dtype, rule):
    cuts = RULES[rule]
    generator = torch.Generator().manual_seed(k + vocab)
    logits = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(6)]).float()
    logits = (logits / vocab * 30 - 20).to(dtype).to(DEVICE)  # distinct, or few ties in bfloat16
    logits[1, vocab // 3 :] = -math.inf
    logits[2] *= 1e-4
    logits[3, vocab // 2] = 60.0
    logits[4] *= 0.1
    rule = TokenRule(top_k=k, **cuts)
    expected = rule.draw(rule.candidates(logits), noise(6))
    token, probability, mass = choose(logits, noise(6), k, **cuts)
    torch.testing.assert_close(probability, expected.probability, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(mass, expected.mass, rtol=2e-5, atol=1e-9)
    if dtype == torch.float32:
        assert torch.equal(token, expected.token)


@pytest.mark.parametrize("cuts", RULES.values(), ids=RULES)
def test_the_kernel_inverts_the_cumulative_distribution(cuts):
    """Evenly spaced noise gives every token its share, computed here in double precision, to within one."""
    logits, n = torch.randn(50, generator=torch.Generator().manual_seed(5)) * 2, 16
    u = (torch.arange(n, device=DEVICE) + 0.5) / n
    token, _, mass = choose(logits.to(DEVICE).expand(n, -1), u, 8, **cuts)
    heat, top_p, min_p = (cuts.get(x, y) for x, y in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0)))
    p, ids = logits.double().softmax(0).topk(8)
    share = p ** (1 / heat) / (p ** (1 / heat)).sum() if heat else p / p.sum()
    kept = (share.cumsum(0) - share < top_p) & (share >= min_p * share[0])
    assert float(mass[0]) == pytest.approx(float(p[kept].sum()), rel=1e-5)
    law = torch.zeros(50, dtype=torch.float64)
    law[ids] = torch.where(kept, share, 0.0) / share[kept].sum() if heat else (p == p[0]).double()
    got = torch.bincount(token.cpu(), minlength=50)
    assert (got[law == 0] == 0).all()
    assert ((got - law * n).abs() <= 1).all()


def test_equal_logits_come_in_the_order_of_tokens():
    u = (torch.arange(8, device=DEVICE) + 0.5) / 8
    token, probability, mass = choose(torch.zeros(8, 1500, device=DEVICE), u, 8)
    assert token.tolist() == list(range(8))
    torch.testing.assert_close(probability, torch.full((8,), 1 / 1500, device=DEVICE))
    torch.testing.assert_close(mass, torch.full((8,), 8 / 1500, device=DEVICE))


def test_values_of_both_signs_keep_their_order():
    values = torch.tensor([[0.0, -0.5, 3.0, -1e30, 1e-30, -1e-30, 88.0, -88.0]], device=DEVICE)
    best = [int(choose(values, noise(1), 1)[0])]
    for _ in range(7):
        values[0, best[-1]] = -math.inf
        best.append(int(choose(values, noise(1), 1)[0]))
    assert best == [6, 2, 4, 0, 5, 1, 7, 3]


def test_a_token_that_cannot_come_out_never_does():
    logits = torch.full((3, 200), -math.inf, device=DEVICE)
    logits[:, 150] = 2.0
    last = torch.tensor([1e-7, 0.5, 1 - 2.0**-24], device=DEVICE)
    assert choose(logits, last, 20)[0].tolist() == [150] * 3


def test_nan_shows_in_the_probabilities():
    logits = torch.randn(2, 500, device=DEVICE)
    logits[1, 77] = math.nan
    _, probability, mass = choose(logits, noise(2), 4)
    assert probability[0].isfinite()
    assert mass[0].isfinite()
    assert probability[1].isnan()
    assert mass[1].isnan()


def test_no_positions_at_all():
    assert [x.shape for x in choose(torch.zeros(0, 9, device=DEVICE), noise(0), 3)] == [(0,)] * 3


def test_the_k_best_have_their_share_of_the_vocabulary():
    found = TokenRule(top_k=2).candidates(torch.tensor([[1.0, 3.0, 2.0, 0.0]]).log())
    assert found.ids.tolist() == [[1, 2]]
    torch.testing.assert_close(found.probability, torch.tensor([[3.0, 2.0]]) / 6)
    torch.testing.assert_close(found.share, torch.tensor([[3.0, 2.0]]) / 5)
