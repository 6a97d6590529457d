import torch

from dlm.noise import _mix, cell_noise, fold, key_of, uniform


def python_mix(x: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    m = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & m
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
    return x ^ (x >> 31)


def test_mixer_equals_integer_arithmetic():
    values = [0, 1, -1, 2**62, -(2**63), 123456789, -987654321012345678]
    got = _mix(torch.tensor(values)).tolist()
    assert [g % 2**64 for g in got] == [python_mix(v % 2**64) for v in values]


def test_uniform_is_flat_open_and_uncorrelated_along_both_counters():
    u = uniform(fold(key_of(1), torch.arange(400))[:, None], torch.arange(500))
    assert u.dtype == torch.float32
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    counts = torch.histc(u, 50, 0, 1)
    expected = u.numel() / 50
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 49 + 5 * (2 * 49) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        corr = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(corr) < 5 / a.numel() ** 0.5


def test_keys_depend_on_every_part_and_their_order():
    keys = {
        int(key_of(*parts)) for parts in [(1, "a"), ("a", 1), (1, "b"), (2, "a"), ("1", "a"), (1, b"a"), (1,)]
    }
    assert len(keys) == 7
    assert int(key_of(1, "a")) == int(key_of(1, "a"))


def test_numbers_do_not_depend_on_shape_or_neighbours():
    key = key_of(7)
    long = uniform(key, torch.arange(100))
    assert torch.equal(uniform(key, torch.arange(10)), long[:10])
    assert torch.equal(uniform(key, torch.tensor([57])), long[57:58])


def test_noise_of_cells_is_that_of_nested_keys():
    key, count = torch.tensor([key_of("a"), key_of("b"), key_of("c")]), torch.tensor([0, 7, 2**40])
    for stream in (0, 1, 2):
        slowly = [
            [float(uniform(fold(fold(k, c), torch.tensor(stream)), position)) for position in range(9)]
            for k, c in zip(key, count, strict=True)
        ]
        assert cell_noise(key, count, 9, stream).tolist() == slowly
