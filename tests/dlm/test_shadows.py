"""States of shadows, against a plain forward pass of transformers with an explicit mask."""

import copy
from functools import lru_cache

import pytest
import torch
from transformers import AutoModel

from dlm.attention_weights import AttentionWeights
from dlm.shadows import Shadows
from tests.dlm.test_attention_weights import MASK, ROWS, model_of


@lru_cache(2)
def stock_of(model):
    """The backbone as transformers has it, with eager attention."""
    config = copy.deepcopy(model.backbone.config)
    config._attn_implementation = "eager"
    stock = AutoModel.from_config(config).double().eval()
    stock.load_state_dict(model.backbone.state_dict())
    return stock


def explicit(model, ids, position):
    """[D] the state that predicts one position of a row without having seen it, by the definition."""
    length, shift, size = len(ids), model.config.shift, model.config.block_size
    pair = [position - 1, position] if shift else [position]
    extra = [ids[position - 1], torch.tensor(MASK)] if shift else [torch.tensor(MASK)]
    every = torch.cat([ids, torch.stack(extra)])
    place = [*range(length), *pair]
    seen = torch.zeros(len(every), len(every), dtype=torch.bool)
    for q in range(len(every)):
        for k in range(len(every)):
            own = k < length if q < length else (k >= length or place[k] not in pair)
            seen[q, k] = own and (size is None or place[k] // size <= place[q] // size)
    mask = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    out = stock_of(model)(
        every[None], attention_mask=mask, position_ids=torch.tensor([place]), use_cache=False
    )
    return out.last_hidden_state[0, length]


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def family(request):
    return request.param


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_a_shadow_sees_all_but_its_position(family, shift, block_size):
    model = model_of(family, shift=shift, block_size=block_size)
    lengths, ids = [len(row) for row in ROWS], torch.cat(ROWS)
    one = Shadows(torch.tensor([1, 0, 1]), torch.tensor([4, 8, 12]))
    two = Shadows(torch.tensor([1, 2]), torch.tensor([5, 1]))
    record = AttentionWeights(torch.tensor([0, 1]), torch.tensor([[1, 2], [3, 8]]), 2)
    plain = AttentionWeights(torch.tensor([0, 1]), torch.tensor([[1, 2], [3, 8]]), 2)
    states = model.packed_hidden(ids, lengths, [record], [one, two])
    torch.testing.assert_close(states, model.packed_hidden(ids, lengths, [plain]))
    torch.testing.assert_close(record.shares, plain.shares)
    torch.testing.assert_close(record.incoming, plain.incoming)
    for shadows in (one, two):
        for row, position, state in zip(
            shadows.rows.tolist(), shadows.positions.tolist(), shadows.states, strict=True
        ):
            logits = model.logits(state)
            expected = model.logits(explicit(model, ROWS[row], position))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_in_one_layer_it_is_the_row_with_a_mask_there(shift):
    model = model_of("llama", layers=1, shift=shift)
    shadows = Shadows(torch.tensor([0, 0]), torch.tensor([5, 9]))
    model.packed_hidden(ROWS[1], [13], shadows=[shadows])
    for position, state in zip((5, 9), shadows.states, strict=True):
        masked = ROWS[1].clone()
        masked[position] = MASK
        torch.testing.assert_close(state, model.hidden(masked[None])[0, position])


@torch.inference_mode()
def test_what_a_shadow_says_does_not_depend_on_its_token_in_one_layer_alone():
    """In deeper models the other positions have seen the token."""
    for layers, same in ((1, True), (3, False)):
        model, states = model_of("llama", layers=layers), []
        for token in (3, 40):
            row, shadows = ROWS[1].clone(), Shadows(torch.tensor([0]), torch.tensor([6]))
            row[6] = token
            model.packed_hidden(row, [13], shadows=[shadows])
            states.append(shadows.states)
        assert torch.allclose(*states) == same
