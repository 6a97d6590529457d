"""Masks on the path of a decoder, complementary masks and the autoregressive loss: laws and bounds."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from decoding.window import Convolution
from dlm import load_model
from dlm.data.config import DataConfig
from dlm.errors import ConfigError
from dlm.model import IGNORE
from dlm.noise import fold, key_of
from dlm.noising import Blocks, add_noise
from dlm.objective import weighted_loss
from dlm.schedule import Cosine
from dlm.trainer import DiffusionTrainer
from finetune.config import LoraConfig, MaskConfig, ModelConfig, R2FTConfig, StartConfig, TrainConfig
from finetune.masks import complementary_noise, path_masks, path_noise
from finetune.r2ft import r2ft
from finetune.sft import SFTTrainer, train
from tests.dlm.test_noising import batch_of
from tests.dlm.test_objective import enumerated_nelbo
from tests.finetune.test_train import losses, settings


def paths(start, n, kernel_size):
    """Probability of each set of written cells after k steps, from a prompt of `start` tokens: all orders."""
    window, length = Convolution(kernel_size), start + n
    law = {}
    for order in itertools.permutations(range(start, length)):
        chance, unmasked = 1.0, torch.arange(length) < start
        for step, cell in enumerate((*order, None)):
            key = frozenset(order[:step])
            if cell is None:
                break
            weight = torch.where(unmasked, 0.0, window.weights(unmasked[None])[0]).double()
            law.setdefault(key, {})
            law[key][order[:step]] = chance
            chance *= float(weight[cell] / weight.sum())
            unmasked = unmasked.clone()
            unmasked[cell] = True
    return {written: sum(ways.values()) for written, ways in law.items()}


def counted(masked):
    """How often each set of masks was drawn."""
    counts = {}
    for row in masked.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    return counts


def agrees(counts, law, rows):
    """A chi-squared test of counts against a law."""
    assert all(law.get(seen, 0) > 0 for seen in counts)
    expected = {seen: rows * chance for seen, chance in law.items() if chance > 0}
    chi2 = sum((counts.get(seen, 0) - e) ** 2 / e for seen, e in expected.items())
    return chi2 < len(expected) + 5 * math.sqrt(2 * len(expected))


def masks_law(start, n, kernel_size):
    """Probability of each row of masks, n positions to write behind `start` known ones."""
    return {
        tuple(i >= start and i not in written for i in range(start + n)): chance / n
        for written, chance in paths(start, n, kernel_size).items()
    }


def drawn_paths(rows, start, n, kernel_size, share):
    """`path_masks` of so many equal rows."""
    masked = (torch.arange(start + n) >= start).expand(rows, -1)
    return path_masks(
        masked,
        torch.ones_like(masked),
        share,
        fold(key_of("test"), torch.arange(rows)),
        torch.arange(start + n).expand(rows, -1),
        kernel_size,
    )


def test_masks_on_a_path_have_the_law_of_all_orders():
    start, n, kernel_size, rows = 2, 4, 3, 40_000
    law = masks_law(start, n, kernel_size)
    assert sum(law.values()) == pytest.approx(1)
    assert any(chance == 0 for chance in law.values())
    share = (torch.arange(rows) + 0.5) / rows
    masked, weight = drawn_paths(rows, start, n, kernel_size, share)
    assert agrees(counted(masked), law, rows)
    open_ = Convolution(kernel_size).weights(~masked) * masked
    torch.testing.assert_close(weight, n * open_ / open_.sum(1, keepdim=True))


def test_a_path_from_nothing_begins_anywhere():
    masked, weight = drawn_paths(600, 0, 5, 3, torch.full((600,), 0.2))
    assert (masked.sum(1) == 4).all()
    assert ((~masked).float().mean(0) > 0.1).all()
    assert torch.allclose(weight.sum(1), torch.full((600,), 5.0))


@pytest.mark.parametrize(("size", "lead"), [(4, True), (4, False), (3, True)])
def test_each_block_has_a_path_of_its_own_from_the_clean_text_before_it(size, lead, tokenizer):
    start, length, kernel_size, rows = 2, 11, 5, 30_000
    mask, blocks = tokenizer.mask_token_id, Blocks(size, lead=lead)
    batch = batch_of(torch.full((rows, length), 7), start)
    noised = path_noise(batch, torch.arange(rows), rows, 0, 0, mask, kernel_size, blocks)
    masked = noised["noisy_ids"] == mask
    for first in range(0, length, size):
        # What is known when the block begins: all before it, and its lead, which is written alone.
        last = min(first + size, length)
        known = max(start, first + (lead and first >= start and first > 0))
        law = masks_law(known, last - known, kernel_size) if last > known else {(False,) * last: 1.0}
        inside = {row[first:]: chance for row, chance in law.items()}
        assert agrees(counted(masked[:, first:last]), inside, rows)
    assert not masked[:, :start].any()
    if not lead:
        return
    leads = [i for i in range(size, length, size) if i >= start]
    assert (noised["targets"][:, leads] == 7).all()
    assert (noised["weight"][:, leads] == 1).all()


@torch.no_grad()
def test_the_loss_on_a_path_is_the_bound_of_that_order(model, tokenizer):
    torch.manual_seed(0)
    mask, start, n, kernel_size = tokenizer.mask_token_id, 3, 4, 3
    ids = torch.randint(5, len(tokenizer), (start + n,))
    exact = path_bound(model, ids, start, kernel_size, mask)
    batch = batch_of(ids.expand(4000, -1), start)
    noised = path_noise(batch, torch.arange(4000), 4000, 0, 0, mask, kernel_size)
    cells = noised["targets"] != IGNORE
    assert (noised["weight"][cells] > 0).all()
    out = model(input_ids=noised["noisy_ids"], targets=noised["targets"])
    assert float(weighted_loss(out.token_logp, noised["weight"][cells], 4000)) == pytest.approx(
        exact, rel=0.01
    )


def path_bound(model, ids, start, kernel_size, mask):
    """The bound on -log p of what stands behind `start`, over all orders: sum over the sets written."""
    n, total = len(ids) - start, 0.0
    for written, chance in paths(start, n, kernel_size).items():
        masked = torch.tensor([i >= start and i not in written for i in range(len(ids))])
        noisy = torch.where(masked, mask, ids)
        logp = model(input_ids=noisy[None]).logits[0].double().log_softmax(-1)
        weight = torch.where(masked, Convolution(kernel_size).weights(~masked[None])[0], 0.0).double()
        cells = masked.nonzero()[:, 0].tolist()
        total -= chance * sum(float(weight[i] / weight.sum() * logp[i, ids[i]]) for i in cells)
    return total


@torch.no_grad()
@pytest.mark.parametrize("lead", [True, False])
def test_the_loss_on_paths_in_blocks_is_the_bound_of_blocks(lead, model, tokenizer):
    torch.manual_seed(0)
    model.config.block_size, model.config.shift, model.config.block_lead = 4, True, lead
    mask, start, length, size, kernel_size, rows = tokenizer.mask_token_id, 2, 8, 4, 3, 4000
    blocks = Blocks.of(model.spec)
    ids = torch.randint(5, len(tokenizer), (length,))
    exact = path_bound(model, ids[:size], start, kernel_size, mask)
    if lead:  # written first: nothing else of its block is there
        before = torch.where(torch.arange(length) < size, ids, mask)
        exact -= float(model(input_ids=before[None]).logits[0, size].double().log_softmax(-1)[ids[size]])
    exact += path_bound(model, ids, size + lead, kernel_size, mask)
    batch = batch_of(ids.expand(rows, -1), start)
    noised = path_noise(batch, torch.arange(rows), rows, 0, 0, mask, kernel_size, blocks)
    cells = noised["targets"] != IGNORE
    out = model(input_ids=noised["noisy_ids"], clean_ids=noised["input_ids"], targets=noised["targets"])
    assert float(weighted_loss(out.token_logp, noised["weight"][cells], rows)) == pytest.approx(
        exact, rel=0.01
    )


@torch.no_grad()
@pytest.mark.parametrize("schedule", [None, Cosine()])
def test_complementary_rows_predict_every_token_once_and_give_the_nelbo(schedule, model, tokenizer):
    torch.manual_seed(0)
    mask, rows = tokenizer.mask_token_id, 8000
    ids = torch.randint(5, len(tokenizer), (8,))
    batch = batch_of(ids.expand(rows, -1), 4)
    noised = complementary_noise(batch, torch.arange(rows), rows, 0, 0, mask, schedule)
    first, second = (noised["noisy_ids"] == mask).split(rows)
    assert torch.equal(first ^ second, batch["maskable"])
    out = model(input_ids=noised["noisy_ids"], targets=noised["targets"])
    loss = weighted_loss(out.token_logp, noised["weight"][noised["targets"] != IGNORE], 2 * rows * 4)
    exact = enumerated_nelbo(model, ids, batch["maskable"][0], mask)
    assert float(loss) == pytest.approx(exact, rel=0.02)
    share = 0.5 if schedule is None else 2 / torch.pi  # the mean of sin(pi t / 2)
    assert float(first.sum()) / (rows * 4) == pytest.approx(share, abs=0.01)


def test_complementary_blocks_keep_their_leads(tokenizer):
    mask = tokenizer.mask_token_id
    batch = batch_of(torch.full((16, 24), 7), 3)
    noised = complementary_noise(batch, torch.arange(16), 16, 0, 0, mask, blocks=Blocks(8, lead=True))
    masks = (noised["noisy_ids"] == mask).split(16)
    leads = torch.arange(24) % 8 == 0
    assert not (masks[0] & masks[1]).any()
    assert torch.equal(masks[0] | masks[1], batch["maskable"] & ~leads)
    assert (noised["targets"][:, [8, 16]] == 7).all()
    assert (noised["weight"][:, [8, 16]] == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskConfig(path=1.5), "masks.path must lie in"),
        (lambda: MaskConfig(path=0.5, kernel_size=8), "must be odd"),
        (lambda: MaskConfig(kernel_size=11), "masks.kernel_size is for masks on a path"),
        (lambda: MaskConfig(path=0.5, complementary=True), "give one"),
        (lambda: MaskConfig(autoregressive=-1.0), "must not be negative"),
        (lambda: ModelConfig(block_size=8), "block_size is for model.visibility"),
        (lambda: ModelConfig(visibility="block"), "needs model.block_size"),
    ],
)
def test_masks_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@torch.no_grad()
def test_the_autoregressive_loss_is_that_of_tokens_behind_their_past(model, tokenizer):
    model.config.shift = True
    trainer = SFTTrainer.__new__(SFTTrainer)
    noted = {}
    trainer.watch = lambda name, total: noted.update({name: float(total)})
    trainer.masks, trainer.model = MaskConfig(autoregressive=0.5), model
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda inner: inner)
    torch.manual_seed(0)
    batch = batch_of(torch.randint(5, len(tokenizer), (3, 9)), 0)
    noised = add_noise(batch, torch.arange(3), 3, 0, 0, tokenizer.mask_token_id)
    count = batch["loss_mask"].sum()
    loss = trainer.loss(model, noised, count)
    expected = 0.0
    for ids in batch["input_ids"]:
        for i in range(1, 9):  # each from its past alone
            past = model(input_ids=torch.cat([ids[:i], ids[:1]])[None], causal=True).logits[0, i]
            expected -= float(past.log_softmax(-1)[ids[i]])
    assert noted["autoregressive"] == pytest.approx(expected / int(count), rel=1e-4)
    plain = DiffusionTrainer.loss(trainer, model, noised, count)
    assert float(loss) == pytest.approx(float(plain) + 0.5 * noted["autoregressive"])

    trainer.masks = MaskConfig(autoregressive=0.5, complementary=True)
    twice = {name: torch.cat([values, values]) for name, values in noised.items()}
    assert float(trainer.loss(model, twice, 2 * count)) == pytest.approx(float(loss))


def test_an_autoregressive_loss_needs_a_shift(tmp_path):
    with pytest.raises(ConfigError, match="for models with a shift"):
        train(settings(tmp_path / "run", masks=MaskConfig(autoregressive=0.3)))


def test_an_adapter_in_blocks_goes_through_fine_tuning_loading_and_r2ft(tmp_path):
    common = {
        "data": DataConfig(source="rules", window=48, limit=60, validation_rows=10), "precision": "fp32",
        "per_device_train_batch_size": 4, "report_to": "none", "trainer": {"disable_tqdm": True},
    }  # fmt: skip
    base = train(settings(tmp_path / "base", max_steps=2, eval_steps=0))
    start = ModelConfig(init=str(base), visibility="block", block_size=8, lora=LoraConfig(r=2))
    sft = train(TrainConfig(str(tmp_path / "sft"), model=start, max_steps=2, eval_steps=0, **common))
    model, _ = load_model(sft, device="cpu")
    assert model.spec.visibility.block_size == 8
    again = r2ft(R2FTConfig(
        str(tmp_path / "r2ft"), model=StartConfig(init=str(sft), lora=LoraConfig(r=2)), max_steps=2,
        eval_steps=2, save_steps=2, nelbo_tolerance=1.0, watch=0, **common,
    ))  # fmt: skip
    assert load_model(again, device="cpu")[0].spec.visibility.block_size == 8


@pytest.mark.parametrize("masks", [MaskConfig(complementary=True), MaskConfig(path=0.5, kernel_size=5)])
def test_a_run_with_other_masks_has_losses_of_the_same_size(tmp_path, masks):
    runs = {}
    for name, config in (("plain", MaskConfig()), ("other", masks)):
        runs[name] = train(settings(tmp_path / name, masks=config, max_steps=3, eval_steps=0))
    plain, other = (sum(losses(folder).values()) / 3 for folder in runs.values())
    assert other == pytest.approx(plain, rel=0.15)
    recorded = json.loads((runs["other"] / "config.json").read_text())["training"]["masks"]
    assert recorded["complementary"] == masks.complementary
