"""Finished blocks that see nothing behind themselves, against masks written out cell by cell."""

from dataclasses import replace

import pytest
import torch

from decoding import Request, Sampler
from decoding.canvas import Canvas, make_canvas
from decoding.denoiser import check_capable
from decoding.engine import Engine
from decoding.row_maker import Row
from dlm.attention_weights import AttentionWeights
from dlm.backbone import from_causal_lm
from dlm.errors import ConfigError
from dlm.model import MaskedDiffusionModel
from dlm.spec import Visibility
from tests.dlm.test_model import causal  # noqa: F401

SIZE = 4


@pytest.fixture(params=[False, True], ids=["no shift", "shift"])
def context(request, model):
    model.config.block_size, model.config.causal_context, model.config.shift = SIZE, True, request.param
    return model


def noisy_rows(model, tokenizer, lengths, seed=0):
    """Rows with some finished blocks and some open ones."""
    made = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        row = torch.randint(5, len(tokenizer), (length,), generator=made)
        noise, kept = torch.rand(length, generator=made), torch.rand(length, generator=made)
        for begin in range(0, length, SIZE):  # half of the blocks are finished
            if kept[begin] < 0.5:
                row[begin : begin + SIZE][noise[begin : begin + SIZE] < 0.6] = model.config.mask_token_id
        rows.append(row)
    return rows


def visible(row, mask_id):
    """[L, L] bool by the definition, cell by cell."""
    ids, length = row.tolist(), len(row)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        block = ids[i // SIZE * SIZE : i // SIZE * SIZE + SIZE]
        for j in range(length):
            same, earlier = i // SIZE == j // SIZE, j // SIZE < i // SIZE
            seen[i, j] = earlier or (same and (mask_id in block or j <= i))
    return seen


def states_under(model, row, seen):
    """States of one row by transformers' own attention, under a mask."""
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    embeds = model.get_input_embeddings()(row[None])
    states = model.backbone(inputs_embeds=embeds, attention_mask=bias[None, None], use_cache=False)
    states = states.last_hidden_state[0]
    return torch.cat([states[:1], states[:-1]]) if model.config.shift else states


@torch.no_grad()
def test_every_call_attends_as_the_definition_says(context, tokenizer):
    rows = noisy_rows(context, tokenizer, [13, 8, 22, 3])
    expected = [states_under(context, row, visible(row, context.config.mask_token_id)) for row in rows]
    for row, states in zip(rows, expected, strict=True):
        torch.testing.assert_close(context.hidden(row[None])[0], states, rtol=1e-4, atol=1e-5)
    packed = context.packed_hidden(torch.cat(rows), [len(row) for row in rows])
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-4, atol=1e-5)
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_full((width - len(row),), 7)]) for row in rows])
    valid = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    torch.testing.assert_close(context.hidden(ids, valid)[valid], torch.cat(expected), rtol=1e-4, atol=1e-5)
    memory, numbers = context.new_memory(), torch.arange(len(rows))
    partial = context.partial_hidden(ids, valid, valid, memory, numbers)
    torch.testing.assert_close(partial, torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_written_is_read_as_the_autoregressive_model_reads_it(causal, tokenizer):  # noqa: F811
    place, autoregressive = causal()
    model, _ = from_causal_lm(str(place))
    model.config.block_size, model.config.causal_context = SIZE, True
    row = torch.randint(5, len(tokenizer), (1, 18), generator=torch.Generator().manual_seed(3))
    whole = model.logits(model.hidden(row)[0])[1:]  # a state predicts the token behind it
    theirs = autoregressive(row).logits[0, :-1]
    known = theirs.shape[1]
    finite = whole[:, :known].isfinite()
    torch.testing.assert_close(whole[:, :known][finite], theirs[finite], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_keys_and_values_are_exact(context, tokenizer):
    """A block that has been finished since the last call is computed again, and nothing before it."""
    computed = []
    partial = MaskedDiffusionModel.partial_hidden

    def counted(ids, active, *rest, **more):
        computed.append(int(active.sum()))
        return partial(context, ids, active, *rest, **more)

    prompt = torch.randint(
        5, len(tokenizer), (3 * SIZE + 1,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    for decoder in ("conv", "llada", "entropy-bound"):
        plan = Request(decoder=decoder, max_tokens=21, options={"temperature": 1.0}).resolve(context)
        row = Row(prompt + [plan.mask_id] * 21, len(prompt))
        texts = []
        for capable in (True, False):
            engine = Engine(context, tokenizer)
            if capable:
                context.partial_hidden = counted
            else:
                engine.model = _without_partial(context)
            engine.submit(row, plan, 5)
            while len(engine):
                (update,) = engine.step()
            texts.append(update.output.token_ids)
        assert texts[0] == texts[1]
        assert len(computed) > 3
        assert max(computed[1:]) <= 2 * SIZE
        computed.clear()


def _without_partial(model):
    """The model, as one whose rows are always computed whole."""

    class Plain:
        spec, device = model.spec, model.device
        capabilities = frozenset({"packed"})
        hidden, logits, packed_hidden = model.hidden, model.logits, model.packed_hidden

    return Plain()


@torch.no_grad()
def test_moved_rows_keep_their_text(context, tokenizer):
    plan = Request(decoder="conv", max_tokens=15, rate=2).resolve(context)
    rows = [Row([9, 8, 7] + [plan.mask_id] * 15, 3)]
    texts = []
    for moved in (False, True):
        engine, canvas = Engine(context, tokenizer), make_canvas(rows, [4], plan)
        ticket = engine.add(canvas, plan)
        while len(engine):
            (update,) = engine.step()
            if moved and not update.finished:
                left: Canvas = engine.remove(ticket)
                engine = Engine(context, tokenizer)
                ticket = engine.add(left, plan)
        texts.append(update.output.token_ids)
    assert texts[0] == texts[1]


@torch.no_grad()
def test_recorded_attention_is_that_of_the_call(context, tokenizer):
    (row,) = noisy_rows(context, tokenizer, [20], seed=2)
    positions = (row == context.config.mask_token_id).nonzero()[:, 0][None]
    record = AttentionWeights(torch.tensor([0]), positions, 2)
    context.packed_hidden(row, [len(row)], [record])
    seen = visible(row, context.config.mask_token_id)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    context.set_attn_implementation("eager")
    embeds = context.get_input_embeddings()(row[None])
    out = context.backbone(
        inputs_embeds=embeds, attention_mask=bias[None, None], use_cache=False, output_attentions=True
    )
    weights = torch.stack(out.attentions[-2:]).mean((0, 2))[0]
    from_where = (positions[0] - 1).clamp(min=0) if context.config.shift else positions[0]
    torch.testing.assert_close(record.shares[0], weights[from_where][:, positions[0]], rtol=1e-4, atol=1e-5)


def test_tokens_of_such_a_model_are_not_verified(context):
    request = Request(decoder="conv", options={"verify": 0.1}, max_tokens=9)
    for refused in (request.resolve, replace(request, max_tokens=None).resolve_gaps):
        with pytest.raises(ConfigError, match=r"the decoder wino\) needs a model"):
            refused(context)
    full = replace(context.spec, visibility=Visibility())
    with pytest.raises(ConfigError, match=r"the decoder wino\) needs a model"):
        check_capable(context, request.resolve(full))


def test_it_needs_blocks():
    with pytest.raises(ConfigError, match="needs a block_size"):
        Visibility(causal_context=True)


def test_texts_are_written(context, tokenizer):
    assert Sampler(context, tokenizer).generate("one two", max_tokens=9, decoder="conv").token_ids is not None
