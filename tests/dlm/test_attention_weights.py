"""Recorded attention weights, against those that transformers returns."""

import copy

import pytest
import torch
from transformers import AutoModel

from dlm import attention_weights
from dlm.attention import KeyValues
from dlm.attention_weights import AttentionWeights
from dlm.config import MaskedDiffusionConfig
from dlm.model import MaskedDiffusionModel

MASK = 59


def model_of(family, *, shift=False, block_size=None, layers=3):
    torch.manual_seed(layers)
    backbone = {
        "model_type": family,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_size": 32,
    }
    if family == "gpt2":
        backbone |= {"n_positions": 256}
    else:
        backbone |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = MaskedDiffusionConfig(
        backbone=backbone, vocab_size=60, num_tokens=60, mask_token_id=MASK, eos_token_id=0,
        shift=shift, block_size=block_size, initializer_range=0.3,
    )  # fmt: skip
    return pointed(MaskedDiffusionModel(config).double().eval())


def pointed(model):
    """The model with larger weights, so that its attention is far from even."""
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if weight.dim() == 2:
                weight.mul_(0.3 / weight.std())
    return model


def eager(model, ids):
    """[layers, H, L, L] attention of one row, as transformers returns it."""
    config = copy.deepcopy(model.backbone.config)
    config._attn_implementation = "eager"
    stock = AutoModel.from_config(config).double().eval()
    stock.load_state_dict(model.backbone.state_dict())
    place, size = torch.arange(len(ids)), model.config.block_size
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
    if size is not None:
        seen = place // size <= (place // size)[:, None]
    mask = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    out = stock(ids[None], attention_mask=mask, output_attentions=True, use_cache=False)
    return torch.stack(out.attentions)[:, 0].detach()


def expected(model, ids, chosen, layers):
    """Shares and incoming attention of the chosen positions, from all attention of the row."""
    size = model.config.block_size
    every = eager(model, ids)[-layers:].mean((0, 1))  # [L, L]
    predicting = [max(i - 1, 0) if model.config.shift else i for i in chosen]
    ends = [len(ids) if size is None else min(len(ids), (j // size + 1) * size) for j in chosen]
    incoming = [float(every[:end, j].mean()) for j, end in zip(chosen, ends, strict=True)]
    return every[predicting][:, chosen], torch.tensor(incoming, dtype=torch.float64)


ROWS = [torch.arange(9) * 7 % 59, torch.arange(13) * 11 % 59, torch.arange(6) * 3 % 59]
CHOSEN = [[5, 6, 8], [9, 2, 10, 12], [4]]


def record(layers):
    """Of the second and third row."""
    positions = torch.tensor([[9, 2, 10, 12], [4, -1, -1, -1]])
    return AttentionWeights(torch.tensor([1, 2]), positions, layers)


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gpt2"])
def family(request):
    return request.param


@pytest.fixture(params=[None, 4])
def block_size(request):
    return request.param


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("way", ["packed", "padded", "partial"])
@torch.inference_mode()
def test_recorded_weights_are_those_of_transformers(family, shift, way, block_size):
    model = model_of(family, shift=shift, block_size=block_size)
    records = [record(2), AttentionWeights(torch.tensor([0]), torch.tensor([[5, 6, 8]]), 9)]
    width = max(map(len, ROWS))
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in ROWS])
    valid = torch.arange(width) < torch.tensor([[len(row)] for row in ROWS])
    if way == "packed":
        states = model.packed_hidden(torch.cat(ROWS), [len(row) for row in ROWS], records)
    elif way == "padded":
        states = model.hidden(ids, valid, records)[valid]
    else:
        states = model.partial_hidden(ids, valid, valid, KeyValues(), torch.arange(3), records)
    plain = model.packed_hidden(torch.cat(ROWS), [len(row) for row in ROWS])
    torch.testing.assert_close(states, plain)
    for row, chosen, layers in ((0, records[1], 3), (1, records[0], 2), (2, records[0], 2)):
        at = chosen.rows.tolist().index(row)
        shares, incoming = expected(model, ROWS[row], CHOSEN[row], layers)
        size = len(CHOSEN[row])
        torch.testing.assert_close(chosen.shares[at, :size, :size], shares, atol=1e-5, rtol=0)
        torch.testing.assert_close(chosen.incoming[at, :size], incoming, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_few_queries_at_a_time_are_all_of_them(monkeypatch):
    model, whole, pieces = model_of("llama"), record(3), record(3)
    ids, lengths = torch.cat(ROWS), [len(row) for row in ROWS]
    model.packed_hidden(ids, lengths, [whole])
    monkeypatch.setattr(attention_weights, "_SCORES", 1)
    model.packed_hidden(ids, lengths, [pieces])
    torch.testing.assert_close(whole.shares, pieces.shares)
    torch.testing.assert_close(whole.incoming, pieces.incoming)


@torch.inference_mode()
def test_finished_blocks_that_are_not_computed_pay_no_attention():
    """A part of a block-causal row records what the whole row does."""
    model, ids, memory = model_of("llama", block_size=4), ROWS[1][None], KeyValues()
    everything = torch.ones_like(ids, dtype=torch.bool)
    whole, part = (AttentionWeights(torch.tensor([0]), torch.tensor([[5, 6, 4]]), 2) for _ in range(2))
    model.partial_hidden(ids, everything, everything, memory, torch.tensor([0]), [whole])
    active = (torch.arange(13) // 4 == 1)[None]
    model.partial_hidden(ids, active, everything, memory, torch.tensor([0]), [part])
    torch.testing.assert_close(whole.shares, part.shares)
    torch.testing.assert_close(whole.incoming, part.incoming)
