"""Layouts follow the device of the layer that they are given to."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from dlm.attention import BesideClean, KeyValues, Packed, Partial, Sight, Whole
from dlm.attention_weights import AttentionWeights, Recorded
from dlm.shadows import RowShadows, Shadows

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
    yield BesideClean.of(SIGHT, place, 2, yes)
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


def test_bounds_of_packed_rows_are_on_each_device():
    packed = Packed([2, 3])
    for device in ("cpu", "meta", "cpu"):
        bounds = packed.on_device(torch.device(device))
        assert bounds.device.type == device
        assert bounds.dtype == torch.int32
    assert packed.on_device(torch.device("cpu")).tolist() == [0, 2, 5]


@pytest.fixture(params=["whole", "blocks", "causal context"])
def spread(request, model):
    """A model whose last layer and norm are on another device, with accelerate's hooks.

    The device is torch's "meta", which has shapes without values, and refuses what lies elsewhere.
    """
    if request.param != "whole":
        model.config.block_size = 4
    model.config.causal_context = request.param == "causal context"
    for part in (model.layers[-1], model.backbone.norm):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(execution_device="meta"))
    return model


def test_a_model_may_lie_on_two_devices(spread):
    ids = torch.arange(9).repeat(2, 1) % spread.config.num_tokens
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    width = spread.config.hidden_size

    def weights():
        return [AttentionWeights(torch.tensor([0, 1]), torch.tensor([[1, 2], [3, -1]]), 1)]

    assert spread.hidden(ids, valid, weights()).shape == (2, 9, width)
    packed, lengths = ids[valid], [9, 6]
    assert spread.packed_hidden(packed, lengths, weights()).shape == (15, width)
    if "shadows" in spread.capabilities:
        shadows = Shadows(torch.tensor([0]), torch.tensor([4]))
        assert spread.packed_hidden(packed, lengths, shadows=[shadows]).shape == (15, width)
        assert shadows.states.shape == (1, width)
    memory, rows = spread.new_memory(), torch.tensor([0, 1])
    for active in (valid, valid & (torch.arange(9) > 3)):
        states = spread.partial_hidden(ids, active, valid, memory, rows, weights())
        assert states.shape == (int(active.sum()), width)
    if spread.config.block_size:
        assert spread.hidden_beside(ids, ids, valid).shape == (2, 9, width)
