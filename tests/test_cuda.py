"""What must hold on a GPU; skipped where there is none (`make gpu` runs these)."""

import copy
import warnings

import pytest
import torch
from decoding.loop import Settings, denoise
from transformers.utils import is_flash_attn_2_available

from decoding import Decoder
from decoding.canvas import Canvas
from dlm.noise import fold, key_of, uniform

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_noise_is_the_same_on_cpu_and_gpu():
    keys = fold(key_of(3), torch.arange(50))
    cpu = uniform(keys[:, None], torch.arange(100))
    gpu = uniform(keys.cuda()[:, None], torch.arange(100, device="cuda"))
    assert torch.equal(cpu, gpu.cpu())


def test_logits_agree_with_the_cpu(model):
    x = torch.randint(0, 100, (2, 20))
    mask = torch.arange(20).expand(2, -1) < torch.tensor([[20], [13]])
    gpu = copy.deepcopy(model).cuda()
    with torch.no_grad():
        expected = model(input_ids=x, attention_mask=mask).logits
        got = gpu(input_ids=x.cuda(), attention_mask=mask.cuda()).logits.cpu()
    finite = torch.isfinite(expected) & mask[..., None]
    assert torch.allclose(got[finite], expected[finite], atol=1e-3)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attention_agrees_with_sdpa(model):
    x = torch.randint(0, 100, (2, 20), device="cuda")
    mask = torch.arange(20, device="cuda").expand(2, -1) < torch.tensor([[20], [13]], device="cuda")
    half = copy.deepcopy(model).cuda().to(torch.bfloat16)
    with torch.no_grad():
        half.set_attn_implementation("sdpa")
        expected = half.hidden(x, mask)
        half.set_attn_implementation("flash_attention_2")
        got = half.hidden(x, mask)
    assert torch.allclose(got[mask], expected[mask], atol=0.05)


@pytest.mark.parametrize("name", ["top-k", "conv", "llada-conv", "entropy-bound"])
def test_the_host_waits_for_the_gpu_once_for_each_model_call(model, tokenizer, name):
    """The loop reads what was found, and nothing else; what a backbone does is its own affair."""
    ids = torch.full((3, 40), tokenizer.mask_token_id)
    ids[:, :6] = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    gpu = copy.deepcopy(model).cuda()
    states, calls = torch.randn(3, 40, gpu.config.hidden_size, device="cuda"), 0

    class Still:
        logits = gpu.logits

        def hidden(self, input_ids, attention_mask=None):
            nonlocal calls
            calls += 1
            return states[: len(input_ids), : input_ids.shape[1]]

    settings = Settings(10, tokenizer.eos_token_id, tokenizer.mask_token_id)
    canvas = Canvas.of(ids, tokenizer.mask_token_id, torch.arange(3))
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in denoise(Still(), canvas, Decoder.named(name), settings):
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(w.message) for w in caught)
    assert calls > 0
    assert waits <= calls


@pytest.mark.parametrize("name", ["top-k", "conv", "semi-ar", "llada-conv"])
def test_a_small_model_decodes_the_same_text_as_on_the_cpu(model, tokenizer, name):
    ids = torch.full((3, 40), tokenizer.mask_token_id)
    ids[:, :6] = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    texts = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).double().to(device)
        canvas = Canvas.of(ids, tokenizer.mask_token_id, torch.arange(3))
        settings = Settings(10, tokenizer.eos_token_id, tokenizer.mask_token_id)
        with torch.no_grad():
            for _ in denoise(there, canvas, Decoder.named(name), settings):
                pass
        texts.append(canvas.ids)
    assert torch.equal(*texts)


def test_negatives_are_the_same_on_cpu_and_gpu():
    from finetune.negatives import make_negative

    ids = torch.randint(5, 90, (64, 48), generator=torch.Generator().manual_seed(0))
    rows = (ids, torch.arange(64) % 9, torch.arange(64) % 30 + 10, fold(key_of(1), torch.arange(64)))
    frequent, counts = torch.arange(20, 40), torch.arange(1, 21)
    made = [
        make_negative(
            *(x.to(device) for x in rows), mask_id=2, eos_id=1,
            frequent=frequent.to(device), frequent_counts=counts.to(device),
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    for field in ("noisy_ids", "targets", "rejected", "rule"):
        assert torch.equal(getattr(made[0], field), getattr(made[1], field).cpu())


def test_packed_rows_have_the_states_of_padded_ones(model):
    half = copy.deepcopy(model).cuda().to(torch.bfloat16)
    lengths = [20, 7, 13]
    ids = torch.randint(0, 100, (sum(lengths),), device="cuda")
    with torch.no_grad():
        packed = half.packed_hidden(ids, lengths).split(lengths)
        for row, got in zip(ids.split(lengths), packed, strict=True):
            assert torch.allclose(got, half.hidden(row[None])[0], atol=0.05)


def test_graphs_repeat_the_call(model):
    from dlm.graphs import BucketedModel

    gpu = copy.deepcopy(model).cuda()
    graphed = BucketedModel(gpu)
    for rows, length in ((2, 30), (1, 7), (3, 64), (2, 30)):
        ids = torch.randint(0, 100, (rows, length), device="cuda")
        with torch.no_grad():
            assert torch.allclose(graphed.hidden(ids), gpu.hidden(ids), atol=1e-3)


def test_the_kernel_is_taken_on_the_gpu_and_finds_what_pytorch_finds():
    from decoding.kernels import applies
    from decoding.tokens import TokenRule

    logits, rule = torch.randn(100, 49_153, device="cuda"), TokenRule(top_k=20)
    noise = torch.rand(100, device="cuda") * 0.998 + 0.001
    assert applies(logits, 20)
    got, expected = rule.choose(logits, noise), rule.draw(rule.candidates(logits), noise)
    assert torch.allclose(got.mass, expected.mass, rtol=1e-4)
    assert (got.token == expected.token).float().mean() > 0.98  # a draw on the edge of a token may differ
