"""Dilated unmasking against its definition: strides that fall from half the block to 1."""

import math

import pytest
import torch

from decoding import Decoder
from decoding.reveal import Dilated
from dlm.errors import ConfigError
from tests.decoding.rig import decode, plan_of, rows
from tests.fakes import FakeDenoiser


def calls_of(size, base):
    """The call in which each place of a block is written."""
    born = {}
    for j in range(1, math.ceil(math.log(size, base)) + 1):
        stride = max(size // base**j, 1)
        for place in range(0, size, stride):
            born.setdefault(place, j - 1)
    ranks = sorted(set(born.values()))
    return [ranks.index(born.get(place, ranks[-1])) for place in range(size)]


@pytest.mark.parametrize(("size", "base"), [(8, 2), (16, 2), (12, 2), (9, 3), (16, 4)])
def test_places_are_written_from_the_widest_grid_to_the_closest(size, base):
    model = FakeDenoiser(eos_bias=-50.0)
    decoder = Decoder.named("dilated", block_size=size, base=base)
    canvas = decode(model, rows(model, [3], 3 + 2 * size), plan_of(decoder))
    steps = canvas.reveal_step[0, 3:].tolist()
    expected = calls_of(size, base)
    assert steps[:size] == expected
    assert steps[size:] == [max(expected) + 1 + step for step in expected]  # block after block
    assert int(canvas.model_calls[0]) == 2 * (max(expected) + 1)


def test_a_block_of_a_power_of_two_takes_its_logarithm_of_calls():
    model = FakeDenoiser(eos_bias=-50.0)
    canvas = decode(model, rows(model, [3], 35), plan_of(Decoder.named("dilated", block_size=32)))
    assert int(canvas.step[0]) == 5
    first = canvas.reveal_step[0, 3:] == 0
    assert first.nonzero()[:, 0].tolist() == [0, 16]


def test_given_tokens_inside_a_block_stay():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [3], 19)
    ids[0, 3 + 8] = 7
    canvas = decode(model, ids, plan_of(Decoder.named("dilated", block_size=16)))
    assert canvas.ids[0, 11] == 7
    assert not canvas.masked.any()
    assert torch.equal(canvas.ids[0, :3], ids[0, :3])
    with pytest.raises(ConfigError, match="base must be a whole number of at least 2, got 1"):
        Dilated(1)
