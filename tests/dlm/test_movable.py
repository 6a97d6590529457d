"""Layouts follow the device of the layer that they are given to."""

import torch

from dlm.attention import BesideClean, KeyValues, Packed, Partial, Sight, Whole
from dlm.attention_weights import AttentionWeights, Recorded
from dlm.shadows import RowShadows

SIGHT = Sight(block_size=2)


def tensors_of(value):
    """Every tensor in a layout, those in what it holds included."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for each in value.values() for x in tensors_of(each)]
    if isinstance(value, Whole | Packed | Partial | BesideClean | RowShadows | Recorded):
        return [x for name, each in vars(value).items() if name != "_copies" for x in tensors_of(each)]
    return []


def layouts():
    place, yes = torch.arange(4), torch.ones(1, 4, dtype=torch.bool)
    shadows = RowShadows(3, place, torch.ones(4, 4, dtype=torch.bool))
    packed = Packed([4], SIGHT, {0: shadows}, torch.ones(4, dtype=torch.bool))
    yield packed
    yield Whole(SIGHT, yes, yes)
    yield BesideClean(SIGHT, place, 2, yes)
    yield Partial(KeyValues(), torch.tensor([0]), place[None], yes[:, None, None], (1, 4), SIGHT, yes)
    yield Recorded(packed, [AttentionWeights(torch.tensor([0]), place[None], 1)], 2, False)


def test_tensors_are_on_the_device_that_is_asked_for_and_copied_once():
    for layout in layouts():
        here = tensors_of(layout)
        assert here, layout
        moved = layout.to("meta", non_blocking=True)
        assert {x.device.type for x in tensors_of(moved)} == {"meta"}
        assert len(tensors_of(moved)) == len(here)
        assert layout.to(torch.device("meta")) is moved
        assert {x.device.type for x in tensors_of(layout)} == {"cpu"}


def test_what_collects_results_is_shared_and_nothing_is_copied_in_vain():
    *_, partial, recorded = layouts()
    assert partial.to("meta").memory is partial.memory
    assert recorded.to("meta").records is recorded.records
    assert partial.to("cpu") is partial
