import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Sampler
from decoding.window import Block, Convolution, Full
from dlm.errors import ConfigError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 25), st.integers(0, 10**6), st.floats(0.1, 3))
def test_convolution_equals_a_loop_over_neighbours(length, reach, seed, scale):
    unmasked = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    got = Convolution(2 * reach + 1, scale).weights(unmasked)
    for row in range(3):
        for i in range(length):
            count = sum(bool(unmasked[row, j]) for j in range(max(0, i - reach), min(length, i + reach + 1)))
            assert float(got[row, i]) == pytest.approx(math.tanh(scale * count), abs=1e-6)


def test_full_is_one_everywhere():
    assert (Full().weights(torch.zeros(2, 5).bool()) == 1).all()


def test_even_kernels_name_both_odd_neighbours():
    with pytest.raises(ConfigError, match="got 128; use 127 or 129"):
        Convolution(128)
    for bad in (0, -3):
        with pytest.raises(ConfigError, match="kernel_size must be odd and positive"):
            Convolution(bad)


def test_open_sizes_are_a_quarter_of_the_window():
    assert Convolution().fitted(128).kernel_size == 33
    assert Convolution(9).fitted(128).kernel_size == 9
    assert Convolution().fitted(3).kernel_size == 1
    assert Block().fitted(128).size == 32
    assert Block(5).fitted(128).size == 5


def test_blocks_count_from_the_prompt_and_the_first_open_one_is_current():
    unmasked = torch.zeros(2, 12).bool()
    unmasked[0, :3] = True
    unmasked[1, :8] = True
    start = torch.tensor([3, 4])
    block = Block(4)
    assert block.stages(start, torch.tensor([12, 12])).tolist() == [3, 2]
    assert block.stages(start, torch.tensor([12, 8])).tolist() == [3, 1]
    weights = block.weights(unmasked, start=start)
    assert weights[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert weights[1].nonzero()[:, 0].tolist() == [8, 9, 10, 11]
    later = block.weights(unmasked, start=start, stage=torch.tensor([2, 0]))
    assert later[0].nonzero()[:, 0].tolist() == [11]
    assert later[1].nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    assert block.weights(torch.zeros(1, 6).bool())[0].tolist() == [1, 1, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Block(0)


def test_a_kernel_beyond_the_row_sees_the_row_and_takes_no_more_memory():
    unmasked = torch.arange(30)[None] % 7 == 0
    assert torch.equal(Convolution(2**31 - 1).weights(unmasked), Convolution(61).weights(unmasked))


@pytest.mark.parametrize("name", ["llada", "llada-conv", "margin", "dream", "conv", "threshold"])
@pytest.mark.parametrize("gap", [1, 2])
def test_at_a_rate_the_lead_of_a_block_is_written_alone(model, tokenizer, name, gap):
    model.config.block_size, model.config.shift = 4, True
    sampler, pace = Sampler(model, tokenizer), {} if name == "threshold" else {"rate": 4.0}
    canvas = next(update.canvas for update in sampler._finished(iter([_row(sampler, name, gap, pace)]), 1))
    step = canvas.reveal_step[0]
    for lead in range(4, len(step), 4):
        block = [s for s in step[lead : lead + 4].tolist() if s >= 0]
        if block and int(step[lead]) >= 0:
            assert block.count(int(step[lead])) == 1
            assert min(block) == int(step[lead])


def _row(sampler, name, gap, pace):
    plan = sampler.plan(decoder=name, options={"gap": gap}, max_tokens=24, **pace)
    return sampler.rows.answer_row("Sort the words.", plan), plan, 0
