import itertools

import pytest
import torch

from dlm.diffusion import corrupt
from dlm.model import IGNORE
from dlm.objective import masked_diffusion_loss, token_log_probabilities
from dlm.schedule import LogLinear


def enumerated_nelbo(model, ids, maskable, mask_id):
    """E over all maskings, integrated over t, of a single row: brute force, in float64.

    For k of n maskable cells masked, the integral over t of m^k (1-m)^(n-k) / t with m = (1-eps) t is taken
    by quadrature.
    """
    cells = maskable.nonzero()[:, 0].tolist()
    n = len(cells)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    m = LogLinear().mask_probability(t)
    total = 0.0
    for size in range(1, n + 1):
        weight = float((m**size * (1 - m) ** (n - size) / t).mean())
        total += weight * -sum(told_of_subsets(model, ids, cells, size, mask_id))
    return total / n


def told_of_subsets(model, ids, cells, size, mask_id):
    """For each set of `size` cells, the log-probability of its tokens when it alone is masked."""
    subsets = torch.tensor(list(itertools.combinations(cells, size)))
    with torch.no_grad():
        logp = model(input_ids=ids.repeat(len(subsets), 1).scatter(1, subsets, mask_id)).logits.double()
    logp = logp.log_softmax(-1).gather(2, ids.expand(len(subsets), -1)[..., None])[..., 0]
    return logp.gather(1, subsets).sum(1).tolist()


def test_nelbo_agrees_with_the_enumeration_of_all_maskings(model, tokenizer):
    torch.manual_seed(0)
    mask_id = tokenizer.mask_token_id
    ids = torch.randint(5, len(tokenizer), (9,))
    maskable = torch.arange(9) >= 4  # 5 maskable cells, 31 maskings
    exact = enumerated_nelbo(model, ids, maskable, mask_id)

    draws = 20_000
    t = (torch.arange(draws) + torch.rand(draws)) / draws
    x0, cells = ids.expand(draws, -1), maskable.expand(draws, -1)
    estimates = []
    for rows in torch.arange(draws).split(2000):
        noisy = corrupt(x0[rows], cells[rows], t[rows], mask_id, torch.Generator().manual_seed(int(rows[0])))
        hit = noisy == mask_id
        targets = torch.where(hit, x0[rows], IGNORE)
        with torch.no_grad():
            logp = model(input_ids=noisy, targets=targets).token_logp
        times = t[rows][:, None].expand_as(hit)[hit]
        estimates.append(float(masked_diffusion_loss(logp, times, 5 * len(rows))))
    estimate = torch.tensor(estimates)
    error = float(estimate.std() / len(estimate) ** 0.5)
    assert abs(float(estimate.mean()) - exact) < 4 * error
    assert error < 0.1 * exact


def test_loss_is_the_weighted_sum_over_the_count():
    logp, t = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.5, 0.25, 1.0])
    assert torch.isclose(masked_diffusion_loss(logp, t, 4), torch.tensor((2 + 8 + 0.5) / 4))
    assert float(masked_diffusion_loss(torch.empty(0), torch.empty(0), 4)) == 0


def test_chunked_log_probabilities_and_gradients_equal_the_plain_ones(model):
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, requires_grad=True)
    targets = torch.randint(0, 100, (50,))
    plain = token_log_probabilities(hidden, model.lm_head, targets)
    (gradient,) = torch.autograd.grad(plain.sum(), hidden)
    chunked = token_log_probabilities(hidden, model.lm_head, targets, chunk=7)
    (again,) = torch.autograd.grad(chunked.sum(), hidden)
    assert torch.allclose(plain, chunked, atol=1e-6)
    assert torch.allclose(gradient, again, atol=1e-6)
    reference = model.logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(plain, reference, atol=1e-5)


def test_several_candidates_per_cell_share_one_pass_through_the_head(model):
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, requires_grad=True)
    targets = torch.randint(5, 100, (50, 3))
    targets[torch.rand(50, 3) < 0.3] = IGNORE
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    got = token_log_probabilities(hidden, model.lm_head, targets)
    handle.remove()
    assert len(calls) == 1
    reference = model.logits(hidden).log_softmax(-1)
    for i in range(50):
        for j in range(3):
            expected = 0.0 if targets[i, j] == IGNORE else float(reference[i, targets[i, j]])
            assert abs(float(got[i, j]) - expected) < 1e-5
    (gradient,) = torch.autograd.grad(got.sum(), hidden)
    (again,) = torch.autograd.grad(
        token_log_probabilities(hidden, model.lm_head, targets, chunk=7).sum(), hidden
    )
    assert torch.allclose(gradient, again, atol=1e-6)


def test_the_model_takes_candidates_at_the_cells_that_have_any(model):
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.full((2, 9, 2), IGNORE)
    targets[0, 3] = torch.tensor([7, 8])
    targets[1, 5, 1] = 9
    got = model(input_ids=ids, targets=targets).token_logp
    full = model(input_ids=ids).logits.log_softmax(-1)
    expected = torch.tensor([[full[0, 3, 7], full[0, 3, 8]], [0.0, full[1, 5, 9]]])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_the_loss_is_the_integral_up_to_the_greatest_probability_of_a_mask(eps, power):
    """For masked tokens of S(u) = u^k nats: ∫ S(u)/u du from 0 to 1 - eps, which is (1 - eps)^k / k."""
    schedule = LogLinear(eps)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    nats = schedule.mask_probability(t) ** power
    loss = masked_diffusion_loss(-nats, t, len(t), schedule)
    assert float(loss) == pytest.approx((1 - eps) ** power / power, rel=1e-4)
    lacking = 1 / power - float(loss)  # of the bound
    assert lacking == pytest.approx(eps, rel=power * eps + 0.1)  # eps S(1)
