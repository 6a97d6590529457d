"""What must hold on a GPU, through public names alone; skipped where there is none.

`DLM_GPU_TESTS=cpu` runs the same tests on the CPU, so that faults of the tests themselves show without a GPU.
Figures that a test measures are properties in the JUnit report, and so in that of `benchmarks.gpu`.
"""

import copy
import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from decoding import Decoder, Sampler
from dlm.adapter import add_adapter, merged
from dlm.attention import BesideClean, KeyValues, Packed, Partial, Sight, Whole, torch_varlen
from dlm.diffusion import corrupt
from dlm.errors import DLMError
from dlm.graphs import BucketedModel
from dlm.model import DenoisingHead
from dlm.noise import fold, key_of, uniform
from dlm.objective import masked_diffusion_loss

ON_CPU = os.environ.get("DLM_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason="no CUDA device"),
]
only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = ["Anna counts from 40 to 50.", "Spell bread and cloud.", "Tell how Ben meets the cat.", "Go."]
DECODERS = {
    "conv": {"max_tokens": 24, "rate": 2.0},
    "top-k": {"window": 64, "steps": 12},
    "semi-ar": {"window": 64, "steps": 12},
    "llada-conv": {"window": 64, "steps": 12},
    "entropy-bound": {"max_tokens": 24},
    "remdm": {"window": 64, "steps": 12},
}


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu(model, device):
    return copy.deepcopy(model).to(device)


def off(found, expected):
    """Largest difference, as a share of the largest value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def ids_and_mask(rows=5, width=40):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, width + 1, (rows, 1), generator=generator)
    return torch.randint(5, 90, (rows, width), generator=generator), torch.arange(width) < lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_equal_seeds_give_the_texts_of_the_cpu(model, tokenizer, device, name, dtype):
    texts = []
    for place in ("cpu", device):
        sampler = Sampler(copy.deepcopy(model).to(place, dtype), tokenizer)
        outs = sampler.generate(PROMPTS, decoder=Decoder.named(name), seed=[1, 2, 3, 4], **DECODERS[name])
        texts.append([out.token_ids for out in outs])
    differing = [i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b]
    assert not differing, f"rows {differing}: {[texts[0][i] for i in differing]} became {texts[1]}"
    assert any(texts[0])


def test_a_text_does_not_depend_on_its_batch_mates(gpu, tokenizer):
    sampler = Sampler(gpu.double(), tokenizer)
    how = {"decoder": Decoder.named("conv"), "max_tokens": 24, "rate": 2.0}
    together = sampler.generate(PROMPTS, seed=[1, 2, 3, 4], batch_size=4, **how)
    alone = [sampler.generate([text], seed=i, **how)[0] for i, text in enumerate(PROMPTS, start=1)]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("name", ["llada", "entropy-bound", "conv"])
def test_drafts_change_no_text(gpu, tokenizer, name, block_size):
    """Drafts are computed beside the rows: packed with them, or as guests of their keys and values."""
    gpu.double()
    gpu.config.block_size, gpu.config.causal_context = block_size, block_size is not None
    sampler, answers = Sampler(gpu, tokenizer), []
    for count in (0, 4):
        outs = sampler.generate(PROMPTS, decoder=name, max_tokens=24, seed=[1, 2, 3, 4], drafts=count)
        answers.append([(out.token_ids, out.reveal_step) for out in outs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_have_the_states_of_padded_ones(gpu, record_property, dtype):
    ids, mask = ids_and_mask()
    gpu.to(dtype)
    with torch.no_grad():
        padded = gpu.hidden(ids.to(gpu.device), mask.to(gpu.device))[mask.to(gpu.device)]
        packed = gpu.packed_hidden(ids[mask], mask.sum(1).tolist())
    record_property(f"packed_off_{dtype}", off(packed, padded))
    assert off(packed, padded) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_packed_rows_are_trained_as_padded_ones(gpu, record_property):
    ids, mask = ids_and_mask()
    gradients = []
    for packed in (False, True):
        gpu.zero_grad()
        with torch.autocast(gpu.device.type, torch.bfloat16):
            if packed:
                states = gpu.packed_hidden(ids[mask], mask.sum(1).tolist())
            else:
                states = gpu.hidden(ids.to(gpu.device), mask.to(gpu.device))[mask.to(gpu.device)]
            loss = gpu.logits(states)[:, 5:90].float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpu.layers.parameters()]))
    record_property("packed_gradient_off", off(gradients[1], gradients[0]))
    assert off(gradients[1], gradients[0]) < 5e-2


@only_cuda
@pytest.mark.parametrize("kernel", ["flash-attn", "varlen"])
def test_kernels_for_rows_of_different_lengths_agree_with_sdpa(gpu, monkeypatch, record_property, kernel):
    there = is_flash_attn_2_available() if kernel == "flash-attn" else torch_varlen() is not None
    if not there:
        pytest.skip(f"{kernel} is not there")
    ids, mask = ids_and_mask(rows=9, width=100)
    gpu.to(torch.bfloat16)
    monkeypatch.setattr("dlm.attention.is_flash_attn_2_available", lambda: kernel == "flash-attn")
    with torch.no_grad():
        found = gpu.packed_hidden(ids[mask], mask.sum(1).tolist())
        monkeypatch.setattr("dlm.attention.is_flash_attn_2_available", lambda: False)
        monkeypatch.setattr("dlm.attention.torch_varlen", lambda: None)
        expected = gpu.packed_hidden(ids[mask], mask.sum(1).tolist())
    record_property(f"{kernel}_off", off(found, expected))
    assert off(found, expected) < 3e-2


BLOCK, LENGTHS = 8, [13, 40, 8, 27]


def heads(rows, width, generator, head_width=32):
    """Queries of six heads, and keys and values of two, [rows, heads, width, head_width] float64."""
    return [torch.randn(rows, n, width, head_width, generator=generator).double() for n in (6, 2, 2)]


def attended(query, key, value, visible):
    """[B, A, H, D] attention by an explicit mask [B, A, W], in float64 on the CPU."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_causal_layouts_attend_as_an_explicit_mask_says(device, record_property, dtype):
    width, rows, sight = max(LENGTHS), len(LENGTHS), Sight(block_size=BLOCK)
    exact = heads(rows, width, torch.Generator().manual_seed(4))
    given = [x.to(device, dtype) for x in exact]
    valid = torch.tensor([[i < n for i in range(width)] for n in LENGTHS])
    visible = torch.tensor(
        [[[j // BLOCK <= i // BLOCK and j < n for j in range(width)] for i in range(width)] for n in LENGTHS]
    )
    expected = attended(*exact, visible)
    found = {"whole": Whole(sight, valid.to(device)).attend(0, *given, None).cpu()[valid]}
    flat = [x.transpose(1, 2)[valid.to(device)].transpose(0, 1)[None] for x in given]
    found["packed"] = Packed(LENGTHS, sight).attend(0, *flat, None)[0].cpu()
    memory, every = KeyValues(), torch.arange(rows)
    first, last = torch.arange(width).expand(rows, -1), torch.tensor(LENGTHS)[:, None] - BLOCK
    Partial.of(memory, every, first, valid, device, sight).attend(0, *given, None)
    place = last + torch.arange(BLOCK)
    at = every[:, None].to(device), slice(None), place.to(device)
    some = [x[at].transpose(1, 2) for x in given]
    found["partial"] = Partial.of(memory, every, place, valid, device, sight).attend(0, *some, None).cpu()
    for name, states in found.items():
        right = expected[every[:, None], place] if name == "partial" else expected[valid]
        record_property(f"block_{name}_off_{dtype}", off(states, right))
        assert off(states, right) < (1e-4 if dtype == torch.float32 else 3e-2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noisy_blocks_see_themselves_and_the_clean_past(device, record_property, dtype):
    width, past = 29, 24
    exact = heads(2, width + past, torch.Generator().manual_seed(5))
    positions = torch.tensor([*range(width), *range(past)])
    visible = torch.zeros(width + past, width + past, dtype=torch.bool)
    for i, a in enumerate(positions.tolist()):
        for j, b in enumerate(positions.tolist()):
            clean = i >= width, j >= width
            later, same = b // BLOCK > a // BLOCK, b // BLOCK == a // BLOCK
            visible[i, j] = {
                (False, False): same, (False, True): not later and not same,
                (True, False): False, (True, True): not later,
            }[clean]  # fmt: skip
    valid = torch.ones(2, width + past, dtype=torch.bool, device=device)
    layout = BesideClean.of(Sight(block_size=BLOCK), positions.to(device), width, valid)
    found = layout.attend(0, *(x.to(device, dtype) for x in exact), None)
    expected = attended(*exact, visible.expand(2, -1, -1))
    record_property(f"beside_clean_off_{dtype}", off(found, expected))
    assert off(found, expected) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_a_block_causal_model_is_that_of_the_cpu(model, gpu, record_property):
    ids, mask = ids_and_mask()
    for each in (model, gpu):
        each.config.block_size = BLOCK
    whole, place = torch.ones_like(mask), gpu.device
    with torch.no_grad():
        pairs = {
            "padded": (gpu.hidden(ids.to(place), mask.to(place)).cpu()[mask], model.hidden(ids, mask)[mask]),
            "packed": (gpu.packed_hidden(ids[mask], mask.sum(1).tolist()), model.hidden(ids, mask)[mask]),
            "partial": (
                gpu.partial_hidden(ids, whole, whole, gpu.new_memory(), torch.arange(len(ids))),
                model.hidden(ids).flatten(0, 1),
            ),
            "beside": (
                gpu.hidden_beside(ids.flip(0).to(place), ids.to(place), whole.to(place)),
                model.hidden_beside(ids.flip(0), ids, whole),
            ),
        }
    for name, (found, expected) in pairs.items():
        record_property(f"block_model_{name}_off", off(found, expected))
        assert off(found, expected) < 1e-4, name


def masses(logits, k):
    probability = logits.double().softmax(-1)
    best = probability.topk(k)
    return best.indices, best.values


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(500, torch.float32), (49_153, torch.bfloat16), (151_936, torch.bfloat16)]
)
def test_the_kernel_of_a_step_finds_what_pytorch_finds(device, record_property, vocab, dtype):
    choose = pytest.importorskip("benchmarks.gpu.step_kernel").choose
    pytest.importorskip("triton")
    if device.type == "cpu" and vocab > 500:
        pytest.skip("the interpreter is slow")
    generator = torch.Generator().manual_seed(vocab)
    count = 200 if device.type == "cuda" else 3
    logits = (torch.randn(count, vocab, generator=generator) * 5).to(dtype).to(device)
    logits[:, 7] = -torch.inf
    noise = (torch.rand(count, generator=generator) * 0.998 + 0.001).to(device)
    token, probability, mass = choose(logits, noise, 20)
    kept, values = masses(logits, 20)
    torch.testing.assert_close(mass.double(), values.sum(-1), rtol=1e-4, atol=1e-7)
    record_property(f"mass_off_{vocab}", off(mass, values.sum(-1)))
    cumulative = values.cumsum(-1)
    place = (cumulative <= noise[:, None].double() * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(max=19)
    expected = values.gather(-1, place)[
        :, 0
    ]  # equal logits may come in another order, with equal probabilities
    agrees = torch.isclose(probability.double(), expected, rtol=1e-3, atol=1e-9)
    agreed = float(agrees.float().mean())
    record_property(f"equal_draws_{vocab}", agreed)
    others = list(zip(*(x[~agrees].tolist() for x in (noise, probability, expected)), strict=True))[:3]
    assert agreed > 0.98, f"{agreed}; noise, probability, expected: {others}"  # one on an edge may differ
    assert (logits.gather(-1, token[:, None])[:, 0].double() >= logits.gather(-1, kept)[:, -1].double()).all()


def test_the_kernel_draws_by_the_law(device):
    """Frequencies of many draws from one row lie within five deviations of the kept probabilities."""
    choose = pytest.importorskip("benchmarks.gpu.step_kernel").choose
    pytest.importorskip("triton")
    count, vocab = (40_000, 2000) if device.type == "cuda" else (4, 300)
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 3
    noise = uniform(key_of("law"), torch.arange(count)).clamp(1e-6, 1 - 1e-6).float().to(device)
    token, _, _ = choose(row.to(device).expand(count, vocab), noise, 20)
    kept, values = masses(row[None], 20)
    share = values[0] / values[0].sum()
    seen = torch.bincount(token.cpu(), minlength=vocab)[kept[0]].double()
    assert seen.sum() == count
    assert ((seen - count * share).abs() <= 5 * (count * share * (1 - share)).sqrt() + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_repeat_the_call(gpu, record_property, dtype):
    gpu.to(dtype)
    graphed, worst = BucketedModel(gpu), 0.0
    for rows, width in ((2, 30), (1, 7), (3, 64), (2, 30), (1, 100)):
        ids = torch.randint(0, 100, (rows, width), device=gpu.device)
        with torch.inference_mode():
            worst = max(worst, off(graphed.hidden(ids), gpu.hidden(ids)))
    record_property(f"graphs_off_{dtype}", worst)
    assert worst < (1e-4 if dtype == torch.float32 else 3e-2)


def test_graphs_give_the_texts_of_the_model(gpu, tokenizer):
    how = {"decoder": Decoder.named("conv"), "max_tokens": 24, "rate": 2.0, "seed": [1, 2, 3, 4]}
    plain, graphed = (Sampler(m, tokenizer).generate(PROMPTS, **how) for m in (gpu, BucketedModel(gpu)))
    assert [out.token_ids for out in plain] == [out.token_ids for out in graphed]


class Still:
    """A model whose states are on the device already, so that what waits for them is the loop."""

    def __init__(self, model):
        self.config, self.device, self.dtype, self.logits = (
            model.config,
            model.device,
            model.dtype,
            model.logits,
        )
        self.states = torch.randn(8, 256, model.config.hidden_size, device=model.device)
        self.calls = 0

    def hidden(self, input_ids, attention_mask=None):
        self.calls += 1
        return self.states[: len(input_ids), : input_ids.shape[1]]


@pytest.mark.parametrize("name", ["conv", "top-k", "llada-conv", "entropy-bound"])
def test_the_host_waits_once_for_each_model_call(gpu, tokenizer, record_property, name):
    still = Still(gpu)
    sampler = Sampler(still, tokenizer)
    how = {"decoder": Decoder.named(name), "batch_size": 4, **DECODERS[name]}
    sampler.generate(PROMPTS, **how)
    still.calls = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if gpu.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            sampler.generate(PROMPTS, **how)
        finally:
            if gpu.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    told = [w for w in caught if "called a synchronizing" in str(w.message)]  # the mode warns of itself, too
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)
    waits = places.total()
    record_property(f"waits_{name}", f"{waits} in {still.calls} calls: {dict(places)}")
    assert still.calls > 0
    assert waits <= still.calls, f"{waits} waits in {still.calls} calls, at {dict(places.most_common(8))}"


class Broken:
    """A model that returns NaN for rows with a certain token."""

    def __init__(self, model, token):
        self.model, self.token = model, token
        self.config, self.device, self.dtype, self.logits = (
            model.config,
            model.device,
            model.dtype,
            model.logits,
        )

    def hidden(self, input_ids, attention_mask=None):
        states = self.model.hidden(input_ids, attention_mask)
        bad = (input_ids == self.token).any(1).to(states.device)
        return torch.where(bad[:, None, None], torch.nan, states)


def test_a_row_of_nan_is_named(gpu, tokenizer):
    token = tokenizer("Spell", add_special_tokens=False)["input_ids"][0]
    sampler = Sampler(Broken(gpu, token), tokenizer)
    with pytest.raises(DLMError, match="prompt 1"):
        sampler.generate(PROMPTS, decoder=Decoder.named("conv"), max_tokens=16, rate=2.0)


@pytest.mark.parametrize("cells", [255, 256])
def test_the_head_is_a_linear_layer_for_few_cells_and_many(gpu, record_property, cells):
    """An odd vocabulary, of which many cells are computed with rows behind it."""
    head = DenoisingHead(gpu.config.backbone_config().hidden_size, 97, 3, 95).to(gpu.device)
    hidden = torch.randn(cells, head.in_features, device=gpu.device, requires_grad=True)
    expected, found = torch.nn.functional.linear(hidden, head.weight, head.offsets(hidden)), head(hidden)
    seen = expected > -torch.inf
    assert torch.equal(seen, found > -torch.inf)
    record_property(f"head_off_{cells}", off(found[seen], expected[seen]))
    assert off(found[seen], expected[seen]) < 1e-4
    ours, theirs = (torch.autograd.grad(x[seen].square().sum(), hidden)[0] for x in (found, expected))
    assert off(ours, theirs) < 1e-4


def test_memory_is_flat_over_many_requests(gpu, tokenizer, record_property):
    count = 1000 if gpu.device.type == "cuda" else 40
    sampler, used = Sampler(gpu, tokenizer), []
    for start in range(0, count, count // 5):
        prompts = [f"{PROMPTS[i % 4]} {i}" for i in range(start, start + count // 5)]
        sampler.generate(prompts, decoder=Decoder.named("conv"), max_tokens=12, rate=4.0, batch_size=100)
        if gpu.device.type == "cuda":
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    record_property("bytes_after_each_fifth", str(used))
    assert not used or used[-1] - used[1] < 2**20


@pytest.mark.parametrize("folded", [False, True])
def test_adapters_are_the_model_that_they_are_merged_to(model, device, record_property, folded):
    ids = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(1)).to(device)
    adapted = add_adapter(copy.deepcopy(model), "base", r=4, alpha=4, folded=folded).to(device)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        expected = adapted.hidden(ids)
        plain = merged(adapted)
    record_property(f"adapter_off_folded_{folded}", off(plain.hidden(ids), expected))
    assert off(plain.hidden(ids), expected) < 1e-4
    assert off(model.to(device).hidden(ids), expected) > 1e-2


def loss_and_gradient(model, dtype=None):
    """Of one training step, on fixed noise."""
    ids = torch.randint(5, 90, (6, 32), generator=torch.Generator().manual_seed(2)).to(model.device)
    t = torch.linspace(0.1, 1, 6, device=model.device)
    noise = uniform(fold(key_of(5, device=model.device), torch.arange(6, device=model.device))[:, None],
                    torch.arange(32, device=model.device))  # fmt: skip
    noisy = corrupt(ids, torch.ones_like(ids).bool(), t, model.config.mask_token_id, noise=noise)
    cells = noisy == model.config.mask_token_id
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(input_ids=noisy, targets=torch.where(cells, ids, -100))
        loss = masked_diffusion_loss(out.token_logp, t[:, None].expand_as(cells)[cells], ids.numel())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss), gradient


def test_a_training_step_is_that_of_the_cpu(model, gpu, record_property):
    expected, found = loss_and_gradient(model.train()), loss_and_gradient(gpu.train())
    record_property("gradient_off", off(found[1], expected[1]))
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert off(found[1], expected[1]) < 1e-3


def test_bfloat16_is_as_near_as_its_digits_allow(model, gpu, record_property):
    ids, mask = ids_and_mask()
    half = copy.deepcopy(gpu).to(torch.bfloat16)
    with torch.no_grad():
        expected = model.logits(model.hidden(ids, mask))[mask]
        found = half.logits(half.hidden(ids.to(gpu.device), mask.to(gpu.device)))[mask.to(gpu.device)].cpu()
    finite = torch.isfinite(expected)
    record_property("bf16_logits_off", off(found[finite], expected[finite]))
    record_property("bf16_same_best", float((found.argmax(-1) == expected.argmax(-1)).float().mean()))
    assert off(found[finite], expected[finite]) < 5e-2
    losses = loss_and_gradient(model.train()), loss_and_gradient(gpu.train(), torch.bfloat16)
    record_property("bf16_loss_off", abs(losses[1][0] / losses[0][0] - 1))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=2e-2)


def test_noise_is_the_same_on_cpu_and_gpu(device):
    keys = fold(key_of(3), torch.arange(50))
    cpu = uniform(keys[:, None], torch.arange(100))
    gpu = uniform(keys.to(device)[:, None], torch.arange(100, device=device))
    assert torch.equal(cpu, gpu.cpu())


def test_logits_agree_with_the_cpu(model, gpu):
    ids, mask = ids_and_mask()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        found = gpu(input_ids=ids.to(gpu.device), attention_mask=mask.to(gpu.device)).logits.cpu()
    finite = torch.isfinite(expected) & mask[..., None]
    assert torch.allclose(found[finite], expected[finite], atol=1e-3)


def test_negatives_are_the_same_on_cpu_and_gpu(device):
    from finetune.negatives import make_negative

    ids = torch.randint(5, 90, (64, 48), generator=torch.Generator().manual_seed(0))
    rows = (ids, torch.arange(64) % 9, torch.arange(64) % 30 + 10, fold(key_of(1), torch.arange(64)))
    frequent, counts = torch.arange(20, 40), torch.arange(1, 21)
    made = [
        make_negative(
            *(x.to(place) for x in rows), mask_id=2, eos_id=1,
            frequent=frequent.to(place), frequent_counts=counts.to(place),
        )
        for place in ("cpu", device)
    ]  # fmt: skip
    for field in ("noisy_ids", "targets", "rejected", "rule"):
        assert torch.equal(getattr(made[0], field), getattr(made[1], field).cpu())
