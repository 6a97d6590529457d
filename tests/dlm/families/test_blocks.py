"""Block-causal models: their published loops, exact keys and values, windows that stay inside a block."""

import pytest
import torch

from decoding import Request, Sampler
from decoding.engine import Engine
from decoding.row_maker import Row
from decoding.window import Convolution, Full, Within
from dlm import load_model
from dlm.convert import convert
from dlm.errors import ConfigError
from tests.dlm.families import plain
from tests.dlm.families.layouts import LAYOUTS
from tests.dlm.families.test_public import published, until_end

BLOCKS = {"sdar": 4, "fast-dllm-v2": 32, "bd3lm": 4, "a2d-bd3lm": 32}


@pytest.fixture(params=BLOCKS)
def case(request, tmp_path, base):
    layout = LAYOUTS[request.param]()
    folder = layout.write(tmp_path / "public", base)
    return layout, *load_model(folder, device="cpu", dtype="float32")


def answer(model, tokenizer, prompt, length, **fields):
    """Tokens of the answer to a prompt of token ids."""
    plan = Request(max_tokens=length, **fields).resolve(model)
    engine = Engine(model, tokenizer)
    engine.submit(Row(prompt + [plan.mask_id] * length, len(prompt)), plan, 0)
    while len(engine):
        updates = engine.step()
    return updates[-1].output


def some_prompt(model, length, seed=0):
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.num_tokens - 8, (length,), generator=made)
    return ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("tau", [0.9, 0.1])
@pytest.mark.parametrize("length", [5, 8, 41, 64])
def test_default_decoding_is_the_published_loop(case, tau, length):
    layout, model, tokenizer = case
    if layout.family == "bd3lm":
        pytest.skip("sampled, never greedy")
    if layout.family == "a2d-bd3lm":
        pytest.skip("has no confidence: see the next test")
    mask, size = model.config.mask_token_id, BLOCKS[layout.family]
    prompt = some_prompt(model, length)
    blocks = length // size + 2 if size == 32 else length // size + 8
    more = blocks * size - length
    if layout.family == "sdar":
        theirs = plain.sdar_loop(published(model, layout), prompt, mask, blocks=blocks, tau=tau)
    else:
        theirs = plain.fast_dllm_loop(published(model, layout), prompt, mask, length=more, tau=tau)
    out = answer(model, tokenizer, prompt, more, options={"tau": tau, "temperature": 0.0})
    assert until_end(model, out.token_ids) == until_end(model, theirs)
    assert len(until_end(model, theirs)) > 4
    if tau == 0.1 and layout.family == "sdar":
        assert out.model_calls < len(until_end(model, theirs))


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_dllm_blocks_are_decoded_as_published_behind_whole_blocks(tmp_path, base, blocks):
    layout = LAYOUTS["a2d-bd3lm"]()
    model, tokenizer = load_model(layout.write(tmp_path / "public", base), device="cpu", dtype="float32")
    prompt = some_prompt(model, 32 * blocks)
    theirs = plain.llada_loop(
        published(model, layout), prompt, model.config.mask_token_id, length=64, block=32, steps=32
    )
    out = answer(model, tokenizer, prompt, 64, steps=32, canvas="full")
    assert len(until_end(model, theirs)) > 4
    assert until_end(model, out.token_ids) == until_end(model, theirs)


SIZES = [  # folder, what config.json remembers, its fields, positions per block
    ("SDAR-4B-Chat", None, {}, 4),
    ("SDAR-4B-Chat-b16", None, {}, 16),
    ("SDAR-8B-Chat-b32", "JetLM/SDAR-8B-Chat-b16", {}, 32),
    ("mine", "JetLM/SDAR-8B-Chat-b32", {}, 32),
    ("SDAR-4B-Chat-b16", None, {"block_size": 8}, 8),
    ("SDAR-4B-Chat-b16", None, {"block_length": 8}, 8),
    ("models--JetLM--SDAR-4B-Chat-b16/snapshots/0abc", None, {}, 16),
    ("sdar-b16b", None, {}, 4),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "remembered", "fields", "size"), SIZES)
def test_sdar_has_the_blocks_of_its_configuration_or_its_name(
    tmp_path, base, name, remembered, fields, size, caplog
):
    layout = LAYOUTS["sdar"](size)
    layout.public |= {"_name_or_path": remembered, **fields}
    folder = layout.write(tmp_path / name, base)
    model, _ = load_model(folder, device="cpu", dtype="float32")
    assert model.spec.visibility.block_size == size
    row = torch.tensor(some_prompt(model, 70))
    allowed = torch.isfinite(model(row[None]).logits[0])
    difference = (model(row[None]).logits[0] - layout.forward(row))[allowed].abs().max()
    assert difference < 1e-4
    assert ("blocks of 4 are assumed" in caplog.text) == (name == "sdar-b16b")
    back = convert(convert(folder, tmp_path / "ours"), tmp_path / "back")
    again, _ = load_model(back, device="cpu", dtype="float32")
    assert again.spec.visibility.block_size == size


@torch.no_grad()
def test_keys_and_values_of_finished_blocks_are_exact_and_never_computed_again(case, monkeypatch):
    layout, model, tokenizer = case
    size = BLOCKS[layout.family]
    prompt = some_prompt(model, 3 * size + 1)
    computed = []
    partial = model.partial_hidden
    monkeypatch.setattr(
        model,
        "partial_hidden",
        lambda ids, active, *rest: (computed.append(int(active.sum())), partial(ids, active, *rest))[1],
    )
    cached = answer(model, tokenizer, prompt, 40, options={"temperature": 1.0})
    assert computed[0] >= len(prompt)
    assert max(computed[1:]) <= 2 * size  # the block that was finished, and the next
    monkeypatch.setattr(type(model), "capabilities", frozenset({"packed"}))
    plainly = answer(model, tokenizer, prompt, 40, options={"temperature": 1.0})
    assert plainly.token_ids == cached.token_ids


@torch.no_grad()
def test_states_that_are_reused_are_those_of_the_whole_row(case):
    layout, model, _ = case
    size = BLOCKS[layout.family]
    row = torch.tensor(some_prompt(model, 3 * size + 2))[None]
    memory, valid = model.new_memory(), torch.ones_like(row, dtype=torch.bool)
    number = torch.zeros(1, dtype=torch.int64)
    model.partial_hidden(row, valid, valid, memory, number)
    row[0, 2 * size + 1] = 3
    late = valid & (torch.arange(row.shape[1]) >= 2 * size)
    again = model.partial_hidden(row, late, valid, memory, number)
    torch.testing.assert_close(again, model.hidden(row)[late], rtol=1e-4, atol=1e-5)


def test_any_decoder_stays_inside_the_current_block(case):
    _, model, tokenizer = case
    for name in ("conv", "categorical", "semi-ar", "entropy-bound"):
        prompt = some_prompt(model, 30)
        out = answer(model, tokenizer, prompt, 20, decoder=name)
        block = [(len(prompt) + i) // model.config.block_size for i in range(len(out.reveal_step))]
        written = [(b, step) for b, step in zip(block, out.reveal_step, strict=True) if step >= 0]
        for number in set(block):
            before = [step for b, step in written if b < number]
            here = [step for b, step in written if b == number]
            assert not before or not here or max(before) < min(here)
    with pytest.raises(ConfigError, match="slides, and the model sees no further than blocks of"):
        Request(decoder="sliding", window=40, steps=20).resolve(model)


def test_a_window_within_blocks_counts_from_the_row():
    window = Within(Full(), 4)
    unmasked = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1, 1, 0, 0]]).bool()
    start = torch.tensor([3, 3])
    assert window.current(~unmasked, start).tolist() == [0, 1]
    assert window.weights(unmasked, start=start).int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
    ]
    assert window.stages(start, torch.tensor([10, 8])).tolist() == [3, 2]
    assert Within(Full(), 4, lead=True).weights(unmasked, start=start)[1].tolist() == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        1,
        0,
        0,
    ]
    fresh = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    alone = Within(Full(), 4, lead=True).weights(fresh, start=torch.tensor([4]))
    assert alone.int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 0]]
    inner = Within(Convolution(5), 4).weights(fresh, start=torch.tensor([4]))
    assert (inner[0] > 0).int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_steps_are_spread_over_blocks(case):
    _, model, tokenizer = case
    out = Sampler(model, tokenizer).generate(
        "One two three", decoder="llada", max_tokens=24, canvas="full", steps=24, eos_fill=False
    )
    assert len(out.token_ids) <= 24
