"""The kernel against its reference, by Triton's interpreter where there is no GPU."""

import math

import pytest
import torch

from decoding.kernels import BLOCK, MOST, by_torch, by_triton, top_probabilities

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


@pytest.mark.parametrize("k", [1, 20, MOST])
@pytest.mark.parametrize("vocab", [MOST, BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_finds_what_pytorch_finds(k, vocab, dtype):
    generator = torch.Generator().manual_seed(k + vocab)
    logits = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(4)]).float()
    logits = (logits / vocab * 30 - 20).to(dtype).to(DEVICE)  # distinct, or few ties in bfloat16
    logits[1, vocab // 3 :] = -math.inf
    logits[2] *= 1e-4
    logits[3, vocab // 2] = 60.0
    probability, ids = by_triton(logits, k)
    expected, where = by_torch(logits, k)
    torch.testing.assert_close(probability, expected, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(logits.float().gather(1, ids), logits.float().gather(1, where))
    if dtype == torch.float32:
        finite = expected > 0
        assert torch.equal(ids[finite], where[finite])
    assert all(len(set(row)) == k for row in ids.tolist())


def test_equal_logits_come_in_the_order_of_tokens():
    probability, ids = by_triton(torch.zeros(2, 1500, device=DEVICE), 8)
    assert ids.tolist() == [list(range(8))] * 2
    torch.testing.assert_close(probability, torch.full((2, 8), 1 / 1500, device=DEVICE))


def test_values_of_both_signs_keep_their_order():
    values = torch.tensor([[0.0, -0.5, 3.0, -1e30, 1e-30, -1e-30, 88.0, -88.0]], device=DEVICE)
    _, ids = by_triton(values, 8)
    assert ids.tolist() == [[6, 2, 4, 0, 5, 1, 7, 3]]


def test_nan_shows_in_the_probabilities():
    logits = torch.randn(2, 500, device=DEVICE)
    logits[1, 77] = math.nan
    probability, _ = by_triton(logits, 4)
    assert probability[0].isfinite().all()
    assert probability[1].isnan().any()


def test_no_positions_at_all_and_a_cpu_have_the_reference():
    assert by_triton(torch.zeros(0, 9, device=DEVICE), 3)[0].shape == (0, 3)
    logits = torch.randn(4, 40)
    for got, expected in zip(top_probabilities(logits, 5), by_torch(logits, 5), strict=True):
        assert torch.equal(got, expected)
