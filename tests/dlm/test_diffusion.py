import pytest
import torch

from dlm.diffusion import corrupt, corrupt_exactly, stratified_times
from dlm.errors import ConfigError
from dlm.schedule import LogLinear


def test_log_linear_value_and_derivative():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    value, derivative = LogLinear(eps=1e-3).alpha(t)
    assert torch.allclose(value, 1 - 0.999 * t)
    h = 1e-6
    numeric = (LogLinear().alpha(t + h).value - LogLinear().alpha(t - h).value) / (2 * h)
    assert torch.allclose(derivative, numeric, atol=1e-8)
    weight = -derivative[1:] / (1 - value[1:])
    assert torch.allclose(LogLinear().weight(t[1:]), weight)
    with pytest.raises(ConfigError, match=r"eps must lie in \[0, 1\), got 1.5"):
        LogLinear(1.5)


def test_times_fill_every_stratum_once_and_are_uniform_for_each_row():
    total = 16
    for offset in (0.01, 0.5, 0.999):
        t = stratified_times(torch.tensor(offset), torch.arange(total), total, t_min=0.0)
        assert sorted((t * total).floor().int().clamp(max=15).tolist()) == list(range(total))
    draws = torch.stack(
        [stratified_times(torch.tensor(u), torch.arange(4), 4) for u in torch.rand(4000).tolist()]
    )
    assert torch.allclose(draws.mean(0), torch.full((4,), 0.5005), atol=0.02)
    assert float(draws.min()) >= 1e-3
    assert float(draws.max()) <= 1


def test_times_are_stratified_over_processes_and_micro_batches():
    whole = stratified_times(torch.tensor(0.3), torch.arange(8), 8)
    parts = [stratified_times(torch.tensor(0.3), torch.arange(a, a + 2), 8) for a in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_corrupt_masks_the_right_share_of_the_maskable_cells_and_nothing_else():
    x0 = torch.randint(0, 9, (400, 100))
    maskable = torch.arange(100) >= 30
    t = torch.full((400,), 0.4)
    out = corrupt(x0, maskable.expand_as(x0), t, 9, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, :30], x0[:, :30])
    share = float((out[:, 30:] == 9).float().mean())
    assert abs(share - 0.999 * 0.4) < 4 * (0.4 * 0.6 / (400 * 70)) ** 0.5
    kept = out != 9
    assert torch.equal(out[kept], x0[kept])


def test_corrupt_refuses_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"\(2, 3\), \(2, 4\) and \(2,\)"):
        corrupt(torch.zeros(2, 3).long(), torch.ones(2, 4).bool(), torch.ones(2), 9)


def test_a_fixed_number_of_masks_gives_the_nelbo_with_no_level_left_out():
    """Numbers from 1 to n come equally often, sets of a number too; n/l makes every cell count once."""
    n, rows = 6, 60_000
    x0, noise = (
        torch.arange(8).expand(rows, 8),
        torch.rand(rows, 8, generator=torch.Generator().manual_seed(0)),
    )
    maskable = (torch.arange(8) >= 2).expand(rows, 8)
    level = (torch.arange(rows) + 0.5) / rows
    noisy, share = corrupt_exactly(x0, maskable, level, 9, noise)
    hit = noisy == 9
    assert torch.equal(noisy[~hit], x0[~hit])
    assert not hit[:, :2].any()
    masks = hit.sum(1)
    assert torch.equal(masks.bincount(), torch.tensor([0, *[rows // n] * n]))
    torch.testing.assert_close(share, masks / n)
    each = (hit / share[:, None]).mean(0)[2:]
    torch.testing.assert_close(each, torch.ones(n), atol=0.02, rtol=0)
    torch.testing.assert_close((hit.sum(1) / share).mean(), torch.tensor(float(n)))  # without any noise
    pairs = hit[masks == 2].float().T @ hit[masks == 2].float() * n / rows
    off = pairs[2:, 2:][~torch.eye(n).bool()]
    torch.testing.assert_close(off, torch.full_like(off, 1 / 15), atol=0.01, rtol=0)


def test_rows_without_maskable_cells_stay_as_they_are():
    x0 = torch.randint(0, 9, (2, 5))
    noisy, share = corrupt_exactly(
        x0, torch.zeros(2, 5).bool(), torch.tensor([0.0, 0.99]), 9, torch.rand(2, 5)
    )
    assert torch.equal(noisy, x0)
    assert share.tolist() == [1.0, 1.0]
