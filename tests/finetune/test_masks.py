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


def test_masks_on_a_path_have_the_law_of_all_orders():
    start, n, kernel_size, rows = 2, 4, 3, 40_000
    law = paths(start, n, kernel_size)
    assert sum(law.values()) == pytest.approx(n)  # one for each number of written tokens
    assert any(chance == 0 for chance in law.values())
    batch = batch_of(torch.full((rows, start + n), 7), start)
    share = (torch.arange(rows) + 0.5) / rows
    masked, weight = path_masks(batch, share, fold(key_of("test"), torch.arange(rows)), kernel_size)
    counts = {}
    for row in masked.tolist():
        written = frozenset(i for i in range(start, start + n) if not row[i])
        counts[written] = counts.get(written, 0) + 1
    assert all(law[written] > 0 for written in counts)
    expected = {written: rows * chance / n for written, chance in law.items() if chance > 0}
    chi2 = sum((counts.get(written, 0) - e) ** 2 / e for written, e in expected.items())
    assert chi2 < len(expected) + 5 * math.sqrt(2 * len(expected))
    open_ = Convolution(kernel_size).weights(~masked) * masked
    torch.testing.assert_close(weight, n * open_ / open_.sum(1, keepdim=True))


def test_a_path_from_nothing_begins_anywhere():
    batch = batch_of(torch.full((600, 5), 7), 0)
    masked, weight = path_masks(batch, torch.full((600,), 0.2), fold(key_of(1), torch.arange(600)), 3)
    assert (masked.sum(1) == 4).all()
    assert ((~masked).float().mean(0) > 0.1).all()
    assert torch.allclose(weight.sum(1), torch.full((600,), 5.0))


@torch.no_grad()
def test_the_loss_on_a_path_is_the_bound_of_that_order(model, tokenizer):
    torch.manual_seed(0)
    mask, start, n, kernel_size = tokenizer.mask_token_id, 3, 4, 3
    ids = torch.randint(5, len(tokenizer), (start + n,))
    exact = 0.0
    for written, chance in paths(start, n, kernel_size).items():
        masked = torch.tensor([i >= start and i not in written for i in range(start + n)])
        noisy = torch.where(masked, mask, ids)
        logp = model(input_ids=noisy[None]).logits[0].double().log_softmax(-1)
        weight = torch.where(masked, Convolution(kernel_size).weights(~masked[None])[0], 0.0).double()
        cells = masked.nonzero()[:, 0].tolist()
        exact -= chance * sum(float(weight[i] / weight.sum() * logp[i, ids[i]]) for i in cells)
    batch = batch_of(ids.expand(4000, -1), start)
    noised = path_noise(batch, torch.arange(4000), 4000, 0, 0, mask, kernel_size)
    cells = noised["targets"] != IGNORE
    assert (noised["weight"][cells] > 0).all()
    out = model(input_ids=noised["noisy_ids"], targets=noised["targets"])
    assert float(weighted_loss(out.token_logp, noised["weight"][cells], 4000)) == pytest.approx(
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
        (
            lambda: TrainConfig(
                "x", model=ModelConfig(visibility="block", block_size=4), masks=MaskConfig(path=0.5)
            ),
            "masks.path is for models whose positions see the whole row",
        ),
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
