"""Packed rows and kept keys and values, against plain forward passes."""

import pytest
import torch

from dlm.attention import KeyValues
from dlm.checkpoint import computes_bfloat16
from dlm.config import MaskedDiffusionConfig
from dlm.model import MaskedDiffusionModel

MASK = 59


def tiny(layers=3, shift=False, heads=4, groups=2, dtype=torch.float64):
    torch.manual_seed(layers)
    backbone = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 256,
    }  # fmt: skip
    config = MaskedDiffusionConfig(
        backbone=backbone, vocab_size=60, num_tokens=60, mask_token_id=MASK, eos_token_id=0,
        shift=shift, initializer_range=0.2,
    )  # fmt: skip
    return MaskedDiffusionModel(config).to(dtype).eval()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 11, 1, 6]])
def test_packed_rows_do_not_see_each_other(shift, lengths):
    model = tiny(shift=shift)
    rows = [torch.randint(0, 60, (n,)) for n in lengths]
    with torch.no_grad():
        packed = model.packed_hidden(torch.cat(rows), lengths).split(lengths)
        for row, got in zip(rows, packed, strict=True):
            torch.testing.assert_close(got, model.hidden(row[None])[0])


@pytest.mark.parametrize("shift", [False, True])
def test_with_everything_active_partial_states_are_the_states(shift):
    model, memory = tiny(shift=shift), KeyValues()
    ids = torch.randint(0, 60, (3, 12))
    valid = torch.arange(12) < torch.tensor([[12], [7], [9]])
    with torch.no_grad():
        got = model.partial_hidden(ids, valid, valid, memory, torch.arange(3))
        torch.testing.assert_close(got, model.hidden(ids, valid)[valid])
        again = torch.randint(0, 60, (1, 12))  # a later call on one of the rows leaves nothing of the first
        got = model.partial_hidden(again, valid[1:2], valid[1:2], memory, torch.tensor([1]))
        torch.testing.assert_close(got, model.hidden(again, valid[1:2])[valid[1:2]])


@pytest.mark.skipif(not computes_bfloat16(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("shift", [False, True])
def test_in_blocks_a_row_has_the_same_bits_alone_and_beside_others(shift):
    """Half precision rounds so coarsely that another order of a sum is another text."""
    model = tiny(shift=shift, dtype=torch.bfloat16)
    model.config.block_size = 4
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        lengths = torch.randint(5, 90, (3,), generator=generator)
        ids = torch.randint(0, 60, (3, int(lengths.max())), generator=generator)
        valid = torch.arange(ids.shape[1]) < lengths[:, None]
        open_ = valid & (torch.arange(ids.shape[1]) >= (lengths[:, None] - 1) // 4 * 4)  # the last block
        together, numbers = model.new_memory(), torch.arange(3)
        with torch.inference_mode():
            beside = [
                model.partial_hidden(ids, active, valid, together, numbers).split(active.sum(1).tolist())
                for active in (valid, open_)
            ]
            for row, length in enumerate(lengths.tolist()):
                memory, own = model.new_memory(), slice(row, row + 1)
                for active, states in zip((valid, open_), beside, strict=True):
                    mine = (ids[own, :length], active[own, :length], valid[own, :length], memory, numbers[:1])
                    assert torch.equal(model.partial_hidden(*mine), states[row])


@pytest.mark.parametrize("shift", [False, True])
def test_in_one_layer_keys_depend_on_their_own_token_alone_and_reuse_is_exact(shift):
    model, memory = tiny(layers=1, shift=shift), KeyValues()
    ids = torch.randint(0, 59, (2, 15))
    ids[:, 6:] = MASK
    valid = torch.arange(15) < torch.tensor([[10], [13]])
    rows = torch.arange(2)
    with torch.no_grad():
        model.partial_hidden(ids, valid, valid, memory, rows)
        changed = ids.clone()
        changed[0, 7], changed[1, 6], changed[1, 9] = 3, 4, 5
        active = (changed != ids) | ((changed == MASK) & (torch.arange(15) < 11) & valid)
        valid = valid | (torch.arange(15) < 11)  # the first row has grown by one mask
        active |= (torch.arange(15) == 10) & valid
        got = model.partial_hidden(changed, active, valid, memory, rows)
        torch.testing.assert_close(got, model.hidden(changed, valid)[active])


def test_in_deeper_models_kept_keys_are_those_of_the_earlier_row():
    """Two layers by hand: what is not active keeps the second layer's keys of the earlier row."""
    model, memory = tiny(layers=2), KeyValues()
    ids = torch.randint(0, 59, (1, 9))
    everything = torch.ones(1, 9, dtype=torch.bool)
    rows = torch.arange(1)
    with torch.no_grad():
        model.partial_hidden(ids, everything, everything, memory, rows)
        before = [memory.keys[layer].clone() for layer in range(2)]
        changed = ids.clone()
        changed[0, 4] = (ids[0, 4] + 1) % 59
        active = torch.arange(9)[None] == 4
        got = model.partial_hidden(changed, active, everything, memory, rows)
        exact = model.hidden(changed)[active]
    for layer in range(2):
        same = (memory.keys[layer][0, :9] == before[layer][0, :9]).flatten(1).all(1)
        assert same.tolist() == [i != 4 for i in range(9)]
    assert not torch.allclose(got, exact)  # approximate, and said to be


def test_memory_of_some_rows():
    model, memory = tiny(), KeyValues()
    ids = torch.randint(0, 59, (3, 8))
    everything = torch.ones_like(ids).bool()
    with torch.no_grad():
        model.partial_hidden(ids, everything, everything, memory, torch.arange(3))
        some = memory.take(torch.tensor([2, 0]))
        active = torch.arange(8)[None].expand(2, -1) == 3
        both = model.partial_hidden(ids[[2, 0]], active, everything[:2], some, torch.arange(2))
        alone = model.partial_hidden(ids[2:], active[:1], everything[:1], memory, torch.tensor([2]))
    torch.testing.assert_close(both[:1], alone)
