"""Every family: its logits against an independent forward pass, and back to the public layout bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from decoding import Request, Sampler
from dlm import load_model
from dlm.adapter import add_adapter, merged
from dlm.commands.inspect import describe
from dlm.convert import convert
from dlm.errors import CheckpointError, ConfigError
from dlm.families import PUBLIC, family_named
from dlm.prepacking import prepack
from tests.dlm.families import plain
from tests.dlm.families.layouts import LAYERS, LAYOUTS

LENGTHS = (11, 7, 41)


@pytest.fixture(params=LAYOUTS)
def case(request, tmp_path, base):
    layout = LAYOUTS[request.param]()
    folder = layout.write(tmp_path / "public", base, shards=2)
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    return layout, folder, model, tokenizer


def some_rows(model, seed=0):
    """Rows of different lengths, a third of them masks."""
    made = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, model.config.num_tokens, (n,), generator=made) for n in LENGTHS]
    return [
        torch.where(torch.rand(len(x), generator=made) < 0.3, model.config.mask_token_id, x) for x in rows
    ]


def allowed(model, logits):
    """The columns of tokens that may come out."""
    known = torch.arange(logits.shape[-1]) < model.config.num_tokens
    known[model.config.mask_token_id] = False
    assert torch.isinf(logits[..., ~known]).all()
    return logits[..., known], known


def difference(model, ours, theirs):
    ours, known = allowed(model, ours)
    return float((ours - theirs[..., known]).abs().max())


@torch.no_grad()
def test_logits_are_those_of_the_published_model(case):
    layout, _, model, _ = case
    rows = some_rows(model)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded = torch.zeros(valid.shape, dtype=torch.int64)
    padded[valid] = torch.cat(rows)
    logits = model.logits(model.hidden(padded, valid))
    packed = model.logits(model.packed_hidden(torch.cat(rows), LENGTHS)).split(LENGTHS)
    memory = model.new_memory()
    number = torch.arange(len(rows))
    whole = model.logits(model.partial_hidden(padded, valid, valid, memory, number)).split(LENGTHS)
    some = valid & (torch.arange(valid.shape[1]) % 3 == 1)
    again = model.logits(model.partial_hidden(padded, some, valid, memory, number))
    again = again.split(some.sum(1).tolist())
    for i, row in enumerate(rows):
        alone = layout.forward(row)
        assert alone.std() > 0.1
        for ours in (model(row[None]).logits[0], logits[i, valid[i]], packed[i], whole[i]):
            assert difference(model, ours, alone) < 1e-4
        assert difference(model, again[i], alone[some[i, : len(row)]]) < 1e-4
    quicker = prepack(model)
    torch.testing.assert_close(
        quicker.logits(quicker.hidden(padded, valid))[valid], logits[valid], rtol=1e-4, atol=1e-4
    )


def written(model, tokenizer, **fields):
    """Prompt, and the tokens of the answer up to the first end, by the sampler."""
    out = Sampler(model, tokenizer).generate("Name two fruits.", **fields)
    return Sampler(model, tokenizer).rows.prompt("Name two fruits."), out.token_ids


def published(model, layout):
    """Logits [L, V] as the loops see them."""

    def logits(ids):
        found = layout.forward(ids).clone()
        found[:, model.config.num_tokens :] = -torch.inf
        found[:, model.config.mask_token_id] = -torch.inf
        return found

    return logits


def until_end(model, tokens):
    ends = model.spec.end_token_ids
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:first]


SHORT = {
    "llada": ({"max_tokens": 64}, {"length": 64, "block": 32, "steps": 64}),
    "llada-moe": ({"max_tokens": 64}, {"length": 64, "block": 32, "steps": 64}),
    "a2d": ({}, {"length": 128, "block": 32, "steps": 128}),
    "bert-chat": ({"max_tokens": 64}, {"length": 64, "block": 32, "steps": 64}),
    "dream": ({"max_tokens": 48, "steps": 20, "canvas": "full"}, {"length": 48, "steps": 20, "top_p": 0.95}),
}


@torch.no_grad()
def test_default_decoding_is_the_authors_loop_at_temperature_0(case):
    layout, _, model, tokenizer = case
    if layout.family not in SHORT:
        pytest.skip("sampled, never greedy: its plan is tested in test_defaults_are_the_authors")
    fields, settings = SHORT[layout.family]
    loop = plain.dream_loop if layout.family == "dream" else plain.llada_loop
    prompt, ours = written(model, tokenizer, options={"temperature": 0.0}, **fields)
    theirs = loop(published(model, layout), prompt, model.config.mask_token_id, **settings)
    assert len(until_end(model, theirs)) > 10
    assert until_end(model, ours) == until_end(model, theirs)


def bits(folder):
    """Every tensor of a folder, and the file that holds it."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: (x, file.name) for file in files for name, x in load_file(file).items()}


@torch.no_grad()
def test_conversion_there_and_back_keeps_every_bit(case, tmp_path):
    _, folder, model, tokenizer = case
    ours = convert(folder, tmp_path / "ours")
    back = convert(ours, tmp_path / "back")
    before, after = bits(folder), bits(back)
    assert {name: file for name, (_, file) in before.items()} == {
        name: file for name, (_, file) in after.items()
    }
    assert all(torch.equal(x, after[name][0]) for name, (x, _) in before.items())
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    row = some_rows(model)[0][None]
    for path in (ours, back):
        again, tokens = load_model(path, device="cpu", dtype="float32")
        assert torch.equal(again(row).logits, model(row).logits)
        assert tokens.mask_token_id == model.config.mask_token_id
        assert again.spec == model.spec
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved, _ = load_model(tmp_path / "saved", device="cpu", dtype="float32")
    assert torch.equal(saved(row).logits, model(row).logits)
    assert saved.spec == model.spec


def test_inspect_says_what_a_checkpoint_is_and_whether_it_fits(case):
    layout, folder, model, _ = case
    facts = describe(str(folder))
    assert facts["published as"] == layout.family
    assert facts["shift"] == model.config.shift
    assert facts["visibility"].startswith(model.spec.visibility.name)
    assert facts["generation"] == model.config.generation
    assert str(model.config.mask_token_id) in facts["vocabulary"]
    assert facts["fits"].startswith("yes: needs 0.0 GB of")


def test_low_rank_adapters_fit(case):
    _, _, model, _ = case
    row = some_rows(model)[0][None]
    with torch.no_grad():
        before = model(row).logits
    adapted = add_adapter(model, "base", r=4, alpha=8)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sum("lora_A" in name for name in trainable) >= LAYERS * 3
    adapted(
        input_ids=row, targets=torch.where(row == model.config.mask_token_id, 5, -100)
    ).token_logp.sum().backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n
    )
    with torch.no_grad():
        assert torch.allclose(merged(adapted)(row).logits, before, atol=1e-5)


def test_a_mixture_of_experts_may_call_itself_llada(tmp_path, base):
    folder = LAYOUTS["llada-moe"](model_type="llada").write(tmp_path / "public", base)
    assert describe(str(folder))["published as"] == "llada-moe"
    config = json.loads((folder / "config.json").read_text())
    config["shared_expert_intermediate_size"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="config.json says shared_expert_intermediate_size = 24; known: None"
    ):
        load_model(folder)


def test_dreamon_is_a_dream_whose_gaps_keep_their_length(tmp_path, base):
    layout = LAYOUTS["dream"]()
    layout.specials += ("<|expand|>", "<|delete|>")
    folder = layout.write(tmp_path / "DreamOn-v0-7B", base)
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    expand, delete = tokenizer.convert_tokens_to_ids(["<|expand|>", "<|delete|>"])
    logits, row = model(torch.arange(20)[None]).logits[0], layout.forward(torch.arange(20))
    shut = torch.isinf(logits[0])
    assert shut[[expand, delete, model.config.mask_token_id]].all()
    assert (logits - row)[:, ~shut].abs().max() < 1e-4
    assert int(shut[: model.config.num_tokens].sum()) == 3
    assert describe(str(folder))["published as"] == "dreamon"
    again, _ = load_model(convert(folder, tmp_path / "ours"), device="cpu", dtype="float32")
    assert torch.equal(again(torch.arange(20)[None]).logits[0], logits)
    assert Request().resolve(model).decoder.tokens.top_p == 0.9


def test_families_have_names():
    assert [family_named(family.name) for family in PUBLIC] == list(PUBLIC)
    with pytest.raises(
        ConfigError, match="unknown family of public checkpoints 'lada'. Did you mean 'llada'"
    ):
        family_named("lada")
