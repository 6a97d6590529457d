"""The R2FT loss against hand computations, and whole R2FT runs of a tiny model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decoding import Sampler
from dlm import load_model
from dlm.data.config import DataConfig
from dlm.errors import CheckpointError, ConfigError, DivergedError, DLMError
from dlm.model import IGNORE
from dlm.prior import TokenPrior
from finetune.commands.negatives import NegativesConfig, run
from finetune.config import (
    LoraConfig,
    ModelConfig,
    R2FTConfig,
    StartConfig,
)
from finetune.contrast_config import NegativeConfig, ObjectiveConfig
from finetune.r2ft import R2FT, r2ft, r2ft_loss
from finetune.run import build_trainer, split_rows
from finetune.sft import train
from tests.finetune.test_train import on_two_processes, settings, unfinish, with_faulty_loss

# ---- the pure loss -----------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_is_the_formula_by_hand():
    logp_w, n_w = [-6.0, -2.0], [3, 4]
    logp_l, n_l = [-20.0, -1.0], [5, 2]
    for beta_w, beta_l, gamma, beta_a in ((1, 1, 0, 0.1), (2, 0.5, 1.5, 0.0), (0.3, 3, -1, 2)):
        by_hand = 0.0
        for w, nw, l, nl in zip(logp_w, n_w, logp_l, n_l, strict=True):
            by_hand += -math.log(sigmoid(beta_w * w / nw - beta_l * l / nl - gamma)) - beta_a * w / nw
        got = r2ft_loss(
            *map(torch.tensor, (logp_w, n_w, logp_l, n_l)),
            beta_w=beta_w, beta_l=beta_l, gamma=gamma, beta_a=beta_a,
        )  # fmt: skip
        assert float(got) == pytest.approx(by_hand / 2, rel=1e-6)
    plain = r2ft_loss(*map(torch.tensor, (logp_w, n_w, logp_l, n_l)))
    assert float(plain) == pytest.approx(
        (-math.log(sigmoid(-2 + 4)) + 0.2 - math.log(sigmoid(-0.5 + 0.5)) + 0.05) / 2, rel=1e-6
    )


def test_the_reference_is_subtracted_inside_the_contrast_only():
    args = tuple(map(torch.tensor, ([-6.0], [3], [-20.0], [5])))
    got = r2ft_loss(*args, reference_w=torch.tensor([-3.0]), reference_l=torch.tensor([-10.0]))
    assert float(got) == pytest.approx(-math.log(sigmoid((-2 + 1) - (-4 + 2))) + 0.2, rel=1e-6)
    same = r2ft_loss(*args, reference_w=args[0], reference_l=args[2], beta_a=0.0)
    assert float(same) == pytest.approx(math.log(2))


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    n_w, n_l = torch.tensor([3, 1, 7]), torch.tensor([4, 2, 0])
    x = torch.randn(2, 3, dtype=torch.float64) * 4
    options = {"beta_w": 0.7, "beta_l": 1.3, "gamma": 0.4, "beta_a": 0.2}

    def loss(v):
        # r2ft_loss computes in float32: widen the step so that its rounding does not count
        return float(r2ft_loss(v[0], n_w, v[1], n_l, **options))

    leaf = x.clone().requires_grad_()
    r2ft_loss(leaf[0], n_w, leaf[1], n_l, **options).backward()
    step = 1e-2
    for i in range(2):
        for j in range(3):
            up, down = x.clone(), x.clone()
            up[i, j] += step
            down[i, j] -= step
            slope = (loss(up) - loss(down)) / (2 * step)
            assert float(leaf.grad[i, j]) == pytest.approx(slope, abs=2e-4)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_the_log_sigmoid_is_stable(size):
    logp_l = torch.tensor([-size], requires_grad=True)
    logp_w = torch.tensor([0.0], requires_grad=True)
    loss = r2ft_loss(logp_w, torch.tensor([1]), logp_l, torch.tensor([1]), beta_a=0.0)
    loss.backward()
    assert float(loss) == pytest.approx(max(0.0, -size))
    assert float(logp_l.grad) == pytest.approx(1.0 if size < 0 else 0.0)
    assert float(logp_w.grad) == pytest.approx(-1.0 if size < 0 else 0.0)


def test_a_row_without_a_negative_keeps_its_anchor_and_nothing_else():
    logp_l = torch.tensor([0.0], requires_grad=True)
    loss = r2ft_loss(torch.tensor([-6.0]), torch.tensor([3]), logp_l, torch.tensor([0]))
    assert float(loss) == pytest.approx(0.2)
    loss.backward()
    assert float(logp_l.grad) == 0


def test_half_a_reference_is_refused():
    args = tuple(map(torch.tensor, ([-6.0], [3], [-20.0], [5])))
    with pytest.raises(ConfigError, match="both"):
        r2ft_loss(*args, reference_w=args[0])


# ---- the trainer -------------------------------------------------------------------------------------

DATA = DataConfig(source="rules", window=48, limit=150, validation_rows=20)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "model"
    train(settings(folder, max_steps=400, save_steps=400, logging_steps=50))
    return folder


def stage(folder, sft, **kwargs):
    base = {
        "model": StartConfig(init=str(sft)), "data": DATA, "max_steps": 12, "warmup_steps": 2,
        "per_device_train_batch_size": 8, "learning_rate": 1e-4, "logging_steps": 1, "eval_steps": 4,
        "save_steps": 4, "precision": "fp32", "report_to": "none", "watch": 4, "sample_steps": 6,
        "trainer": {"disable_tqdm": True},
    }  # fmt: skip
    return R2FTConfig(output_dir=str(folder), **{**base, **kwargs})


def trainer_of(config):
    from dlm.data.encode import encode_rows
    from finetune.start import prepare

    own = R2FT(config)
    rows, held_out = split_rows(config.data, config.seed)
    model, tokenizer = own.first(rows, None)
    model = prepare(model, config.model, config.data.window, config.seed)
    sets = (encode_rows(r, tokenizer, config.data.window)[0] for r in (rows, held_out))
    return build_trainer(own, model, tokenizer, *sets)


def batch_of(trainer, n=6):
    rows = [trainer.train_dataset[i] for i in range(n)]
    return trainer.data_collator(rows)


def history(folder):
    return json.loads((Path(folder) / "history.json").read_text())


def by_hand(trainer, noised):
    """Losses, and (ℓ_w, n_w, ℓ_l, n_l) of each row, from full logits, one cell at a time."""
    model = trainer.model
    with torch.no_grad():
        logp = model(input_ids=noised["noisy_ids"]).logits.double().log_softmax(-1)
    losses, sums = [], []
    for i in range(len(noised["row"])):
        total, n = [0.0, 0.0], [0, 0]
        for j in range(noised["noisy_ids"].shape[1]):
            for side in (0, 1):
                token = int(noised["candidates"][i, j, side])
                if token != IGNORE:
                    assert noised["noisy_ids"][i, j] == trainer.mask_id
                    total[side] += float(logp[i, j, token])
                    n[side] += 1
        w, l = total[0] / n[0], total[1] / max(1, n[1])
        losses.append((-math.log(sigmoid(w - l)) if n[1] else 0.0) - 0.1 * w)
        sums.append((total[0], n[0], total[1], n[1]))
    return losses, sums


def test_one_forward_pass_gives_both_sides_over_masked_cells_only(sft, tmp_path):
    trainer = trainer_of(stage(tmp_path / "x", sft))
    trainer.model.eval()
    batch = batch_of(trainer)
    noised = trainer.with_noise(batch, torch.arange(6), 6, step=0)
    calls = []
    handle = trainer.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    loss, figures = trainer.rows(trainer.model, noised)
    handle.remove()
    assert len(calls) == 1
    expected, sums = by_hand(trainer, noised)
    torch.testing.assert_close(
        loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )
    for row, (w, n_w, l, n_l) in zip(figures.tolist(), sums, strict=True):
        assert row == pytest.approx([w / n_w, l / n_l, w / n_w - l / n_l, float(w / n_w > l / n_l)], rel=1e-4)
    total = trainer.compute_loss(trainer.model, noised)
    assert float(total) == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_cells_where_negative_and_truth_agree_do_not_count(sft, tmp_path):
    trainer = trainer_of(stage(tmp_path / "x", sft))
    trainer.model.eval()
    noised = trainer.with_noise(batch_of(trainer), torch.arange(6), 6, step=0)
    both = noised["candidates"].clone()
    shared = (both != IGNORE).all(-1)
    assert not (both[..., 0] == both[..., 1])[shared].any()
    alone = {**noised, "candidates": torch.stack([both[..., 0], torch.full_like(both[..., 0], IGNORE)], -1)}
    loss, _ = trainer.rows(trainer.model, alone)
    _, sums = by_hand(trainer, noised)
    assert loss.tolist() == pytest.approx([-0.1 * w / n for w, n, _, _ in sums], rel=1e-4)


def test_rows_without_a_negative_count_in_no_margin_and_no_accuracy(sft, tmp_path):
    """Of six rows, two lose their negatives: the log is the mean over the four others."""
    trainer = trainer_of(stage(tmp_path / "x", sft))
    trainer.model.eval()
    noised = trainer.with_noise(batch_of(trainer), torch.arange(6), 6, step=0)
    noised["candidates"][:2, :, 1] = IGNORE
    _, sums = by_hand(trainer, noised)
    trainer.compute_loss(trainer.model, noised)
    logged = trainer._watched_means()
    sides = [(w / n_w, l / n_l) for w, n_w, l, n_l in sums[2:]]
    assert logged["margin"] == pytest.approx(sum(w - l for w, l in sides) / 4, rel=1e-4)
    assert logged["accuracy"] == sum(w > l for w, l in sides) / 4
    assert logged["logp_negative"] == pytest.approx(sum(l for _, l in sides) / 4, rel=1e-4)
    assert logged["logp_true"] == pytest.approx(sum(w / n for w, n, _, _ in sums) / 6, rel=1e-4)
    _, figures = trainer.rows(trainer.model, noised)
    loss = torch.zeros(6, 3)
    validated = trainer.metrics(torch.cat([loss + 1, figures], 1).double())
    assert validated["margin"] == pytest.approx(logged["margin"], rel=1e-5)
    noised["candidates"][..., 1] = IGNORE
    trainer._watched.clear()
    trainer.compute_loss(trainer.model, noised)
    assert set(trainer._watched_means()) == {"logp_true"}  # nothing to take a mean of


def test_confidence_weights_favour_likely_negatives_and_keep_their_mean(sft, tmp_path):
    trainer = trainer_of(stage(tmp_path / "x", sft, objective=ObjectiveConfig(weighting="confidence")))
    logp = torch.log(torch.tensor([[[0.5, 0.2], [0.5, 0.6], [1.0, 1.0]]]))
    cells = torch.tensor([[[True, True], [True, True], [True, False]]])
    weight = trainer._weights(logp, cells)
    assert weight[..., 0].tolist() == [[1.0, 1.0, 1.0]]
    assert weight[0, :, 1].tolist() == pytest.approx([0.5, 1.5, 0.0])
    unlikely = trainer._weights(torch.tensor([[[0.0, -110.0], [0.0, -120.0]]]), torch.ones(1, 2, 2).bool())
    assert unlikely[0, :, 1].tolist() == pytest.approx([2.0, 2 * math.exp(-10)], rel=1e-3)  # no underflow
    assert all(
        trainer._weights(logp.requires_grad_().detach(), cells).sum((0, 1)) == torch.tensor([3.0, 2.0])
    )


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=4)])
def test_the_reference_is_the_model_that_the_run_starts_from(sft, tmp_path, lora):
    config = stage(
        tmp_path / "x", sft, model=StartConfig(init=str(sft), lora=lora),
        objective=ObjectiveConfig(reference=True, beta_a=0.0),
    )  # fmt: skip
    trainer = trainer_of(config)
    trainer.model.eval()
    noised = trainer.with_noise(batch_of(trainer), torch.arange(6), 6, step=0)
    loss, _ = trainer.rows(trainer.model, noised)
    assert loss.tolist() == pytest.approx([math.log(2)] * 6, rel=1e-5)  # no gain yet on either side
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    moved, _ = trainer.rows(trainer.model, noised)
    assert max(abs(x - math.log(2)) for x in moved.tolist()) > 1e-3
    moved.sum().backward()
    assert (trainer.reference is None) == bool(lora.r)
    if trainer.reference is not None:
        assert all(p.grad is None for p in trainer.reference.parameters())


def test_a_run_leaves_curves_counts_and_the_best_model(sft, tmp_path):
    folder = r2ft(stage(tmp_path / "run", sft, keep_checkpoints=1))
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "r2ft.png", "samples.md", "token_counts.safetensors"} <= names
    records = history(folder)
    evaluated = [r for r in records if "eval_nelbo" in r]
    assert [r["step"] for r in evaluated] == [0, 4, 8, 12]
    for r in evaluated:
        assert r["eval_margin"] == pytest.approx(r["eval_logp_true"] - r["eval_logp_negative"], rel=1e-5)
        assert 0 <= r["eval_accuracy"] <= 1
    trained = [r for r in records if "loss" in r]
    assert len(trained) == 12
    assert all({"logp_true", "logp_negative", "margin", "accuracy"} <= set(r) for r in trained)
    assert len([r for r in records if "sample_repetition" in r]) == 4
    best = min((r for r in evaluated[1:]), key=lambda r: r["eval_r2ft"])["step"]
    kept = load_file(folder / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in kept.items())
    model, _ = load_model(folder, device="cpu")
    assert model.config.training["after"]["objective"].startswith("masked diffusion NELBO")
    assert model.config.training["loss"]["beta_a"] == 0.1
    counts = TokenPrior.load(folder)
    assert counts is not None
    assert int(counts.counts.sum()) > 150 * 10


@pytest.mark.parametrize(("r", "file"), [(0, "model.safetensors"), (4, "adapter_model.safetensors")])
def test_the_best_state_is_kept_though_a_later_one_is_the_last(sft, tmp_path, monkeypatch, r, file):
    """Validation losses and NELBO are scripted: 0.5, 0.1, then 0.01 with a NELBO beyond the tolerance."""
    from finetune.r2ft import R2FTTrainer

    scripted = iter([(2.0, 1.0), (2.0, 0.5), (2.03, 0.1), (2.05, 0.01)])
    plain = R2FTTrainer.metrics

    def metrics(self, measured):
        nelbo, loss = next(scripted)
        return {**plain(self, measured), "nelbo": nelbo, "r2ft": loss}

    monkeypatch.setattr(R2FTTrainer, "metrics", metrics)
    start = StartConfig(init=str(sft), lora=LoraConfig(r=r))
    config = stage(tmp_path / "run", sft, model=start, keep_checkpoints=1, max_steps=16, watch=0)
    folder = r2ft(config)
    assert [r["step"] for r in history(folder) if "eval_r2ft" in r] == [0, 4, 8, 12]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    final = load_file(folder / file)
    best, last = (load_file(folder / f"checkpoint-{n}" / file) for n in (8, 12))
    assert all(torch.equal(value, final[name]) for name, value in best.items())
    assert not all(torch.equal(value, final[name]) for name, value in last.items())
    # killed after the stop, before the final model: the same model, and no step more
    (folder / file).unlink()
    unfinish(folder)
    r2ft(config)
    again = load_file(folder / file)
    assert all(torch.equal(value, final[name]) for name, value in again.items())


def test_resuming_repeats_the_interrupted_run(sft, tmp_path):
    from dlm.checkpointing import MARKER, complete_checkpoints

    whole = r2ft(stage(tmp_path / "whole", sft, keep_checkpoints=9, logging_steps=3))
    cut = r2ft(stage(tmp_path / "cut", sft, keep_checkpoints=9, logging_steps=3))
    for late in complete_checkpoints(cut)[1:]:
        (late / MARKER).unlink()
    unfinish(cut)
    r2ft(stage(tmp_path / "cut", sft, keep_checkpoints=9, logging_steps=3))

    def figures(folder):
        keep = ("step", "loss", "margin", "accuracy", "eval_nelbo", "eval_r2ft", "sample_log_prior")
        return [{k: r[k] for k in keep if k in r} for r in history(folder)]

    for a, b in zip(figures(whole), figures(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load_file(cut / "model.safetensors").items())


def test_a_run_that_harms_the_language_ends_and_says_so(sft, tmp_path, caplog):
    config = stage(tmp_path / "run", sft, learning_rate=5e-2, max_steps=40)
    for _ in range(2):  # asking again changes nothing
        with pytest.raises(DLMError, match="no validated state kept the NELBO.*Try a lower learning_rate"):
            r2ft(config)
    steps = [r["step"] for r in history(tmp_path / "run") if "eval_nelbo" in r]
    assert steps == [0, 4]
    assert "is above" in caplog.text
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


def test_a_validation_that_is_not_a_number_ends_the_run(sft, tmp_path, monkeypatch):
    from finetune.r2ft import R2FTTrainer

    plain, calls = R2FTTrainer.metrics, []

    def metrics(self, measured):
        calls.append(1)
        return plain(self, measured) | ({"nelbo": math.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(R2FTTrainer, "metrics", metrics)
    folder = r2ft(stage(tmp_path / "run", sft, max_steps=16, watch=0, nelbo_tolerance=9.0))
    assert len(calls) == 3
    final = load_file(folder / "model.safetensors")
    best = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in best.items())


def test_a_run_that_diverges_keeps_its_best_state(sft, tmp_path, monkeypatch, caplog):
    with_faulty_loss(monkeypatch, R2FT, lambda step: math.nan if step == 6 else 1.0)
    folder = r2ft(stage(tmp_path / "run", sft, max_steps=16, nelbo_tolerance=9.0))
    assert "training has diverged: at step 7 the loss is nan" in caplog.text
    final = load_file(folder / "model.safetensors")
    best = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in best.items())


def test_a_run_that_diverged_without_a_state_to_keep_begins_anew(sft, tmp_path, monkeypatch):
    """What it had written down about its end is not true of the run that follows."""
    at = 2

    def fault(step):
        if step == at == 5:
            raise KeyboardInterrupt
        return math.nan if step == at else 1.0

    with_faulty_loss(monkeypatch, R2FT, fault)
    config = stage(tmp_path / "run", sft, max_steps=8, watch=0, nelbo_tolerance=9.0)
    with pytest.raises(DivergedError, match="at step 3 the loss is nan.*there is no checkpoint before it"):
        r2ft(config)
    at = 5  # the fault is gone, and the run is killed behind its first checkpoint
    with pytest.raises(KeyboardInterrupt):
        r2ft(config)
    at = -1
    r2ft(config)
    assert max(r["step"] for r in history(tmp_path / "run") if "loss" in r) == 8


def test_a_start_that_is_broken_is_named_as_such(sft, tmp_path, monkeypatch):
    from finetune.r2ft import R2FTTrainer

    plain = R2FTTrainer.metrics
    monkeypatch.setattr(R2FTTrainer, "metrics", lambda *a: plain(*a) | {"nelbo": math.nan})
    with pytest.raises(DivergedError, match="before the first step the validation NELBO is nan: the model"):
        r2ft(stage(tmp_path / "run", sft, watch=0))


def test_settings_that_choose_the_kept_weights_cannot_change_on_the_way(sft, tmp_path):
    r2ft(stage(tmp_path / "run", sft, max_steps=4))
    with pytest.raises(ConfigError, match="holds a run with eval_draws = 4, not 8"):
        r2ft(stage(tmp_path / "run", sft, max_steps=4, eval_draws=8))


def test_r2ft_starts_from_an_adapter_and_trains_all_weights(sft, tmp_path):
    lora = ModelConfig(init=str(sft), lora=LoraConfig(r=4))
    adapter = train(settings(tmp_path / "sft", model=lora, max_steps=4))
    before = TokenPrior.load(adapter)
    (adapter / "NOTICE").write_text("Not for sale.")
    more = DataConfig(source="rules", window=48, limit=60, validation_rows=20)
    folder = r2ft(stage(tmp_path / "run", adapter, data=more, max_steps=4, nelbo_tolerance=9.0, watch=0))
    assert (folder / "NOTICE").read_text() == "Not for sale."
    assert load_model(folder, device="cpu")[0].config.training["after"]["init"] == str(sft)
    after = TokenPrior.load(folder)
    assert torch.equal(before.counts, after.counts)  # the counts of fine-tuning, not of these fewer rows


def test_an_adapter_run_resumes_to_the_bit_and_starts_from_a_causal_model(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlm.checkpointing import MARKER, complete_checkpoints

    torch.manual_seed(0)
    shape = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        vocab_size=len(tokenizer), tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    model = ModelConfig(init=str(tmp_path / "causal"), lora=LoraConfig(r=4), template="model")
    whole, cut = (
        train(settings(tmp_path / name, model=model, keep_checkpoints=9)) for name in ("whole", "cut")
    )
    for late in complete_checkpoints(cut)[1:]:
        (late / MARKER).unlink()
    unfinish(cut)
    train(settings(cut, model=model, keep_checkpoints=9))
    expected = load_file(whole / "adapter_model.safetensors")
    again = load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in expected.items())
    assert not any("embed_tokens" in name for name in expected)
    assert load_model(whole, device="cpu")[0].config.shift


def test_the_average_of_the_best_state_is_what_is_kept(sft, tmp_path, monkeypatch):
    from finetune.r2ft import R2FTTrainer

    scripted = iter([(2.0, 1.0), (2.0, 0.1), (2.0, 0.5)])
    plain = R2FTTrainer.metrics

    def metrics(self, measured):
        return plain(self, measured) | dict(zip(("nelbo", "r2ft"), next(scripted), strict=True))

    monkeypatch.setattr(R2FTTrainer, "metrics", metrics)
    folder = r2ft(stage(tmp_path / "run", sft, max_steps=8, watch=0, ema_decay=0.9))
    final = load_file(folder / "model.safetensors")
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    raw = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in average.items())
    assert not all(torch.equal(final[name], value) for name, value in raw.items())


def test_watched_samples_are_measured(sft, tmp_path):
    from transformers import TrainerState

    from decoding import Decoder
    from dlm.repetition import repetition, stutter
    from finetune.samples import answers, held_out_prompts
    from finetune.watch import WatchCallback

    config = stage(tmp_path / "x", sft)
    trainer = trainer_of(config)
    rows = split_rows(config.data, config.seed)[1]
    watch = WatchCallback(trainer, trainer.processing_class, config, rows)
    state = trainer.state = TrainerState(is_world_process_zero=True)
    watch.on_evaluate(config, state, None)
    (record,) = [r for r in state.log_history if "sample_stutter" in r]
    prompts = held_out_prompts(trainer, trainer.processing_class, config, rows, 4)
    outputs = answers(trainer, trainer.processing_class, config, prompts, Decoder.named("top-k"))
    tokens = [t for o in outputs for t in o.token_ids]
    assert record["sample_repetition"] == pytest.approx(sum(repetition(o.text) for o in outputs) / 4)
    assert record["sample_stutter"] == pytest.approx(sum(stutter(o.text) for o in outputs) / 4)
    log_prior = trainer.prior.log_prior()
    assert record["sample_log_prior"] == pytest.approx(sum(float(log_prior[t]) for t in tokens) / len(tokens))


def test_the_plot_marks_the_step_that_is_kept():
    from finetune.watch import draw_r2ft, kept_step

    records = [
        {"step": step, "eval_nelbo": nelbo, "eval_r2ft": loss, "eval_margin": 1.0, "eval_accuracy": 0.5}
        for step, nelbo, loss in ((0, 2.0, 0.1), (5, 2.0, 0.5), (10, 2.03, 0.2), (15, 2.1, 0.1))
    ]
    assert kept_step(records, 0.02) == 10
    assert kept_step(records, 0.5) == 15
    assert kept_step(records[:1], 0.02) is None
    figure = draw_r2ft(records, 0.02)
    assert len(figure.axes) == 5, "none of samples where none were drawn; one panel has two scales"
    assert any(list(line.get_xdata()) == [10, 10] for line in figure.axes[0].lines)
    records[1] |= {"sample_repetition": 0.1, "sample_stutter": 0.0, "sample_log_prior": -7.0}
    assert len(draw_r2ft(records, 0.02).axes) == 7


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(sft, tmp_path):
    options = {
        "max_steps": 2, "learning_rate": 0.5, "warmup_steps": 0, "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9, "weight_decay": 0.0, "eval_steps": 2, "save_steps": 2, "watch": 0,
        "nelbo_tolerance": 1e9,
        "trainer": {"disable_tqdm": True, "optim": "sgd"},
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    r2ft(stage(one, sft, **options))
    r2ft(stage(tmp_path / "half", sft, **{**options, "per_device_train_batch_size": 4,
                                          "gradient_accumulation_steps": 2}))  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.finetune.test_r2ft import *\n"
        "torch.set_num_threads(1)\n"
        f"r2ft(stage({str(two)!r}, {str(sft)!r}, per_device_train_batch_size=4, **{options!r}))\n"
    )
    on_two_processes(script)
    expected = load_file(one / "model.safetensors")
    for other in (tmp_path / "half", two):
        got = load_file(other / "model.safetensors")
        worst = max(float((got[name] - value).abs().max()) for name, value in expected.items())
        assert worst < 2e-5, (other.name, worst)
        for key in ("loss", "margin", "accuracy"):
            ours, theirs = ([r[key] for r in history(f) if key in r] for f in (other, one))
            assert ours == pytest.approx(theirs, rel=1e-4), key


def test_repetition_becomes_unlikely_while_the_nelbo_holds(sft, tmp_path):
    """50 steps: the probability of left-context repetition falls, validation NELBO rises by less than 2 %."""
    config = stage(
        tmp_path / "run", sft, max_steps=50, eval_steps=50, save_steps=50, learning_rate=2e-4,
        negatives=NegativeConfig(left=1, right=0, prior=0, mixed=0, run=0, eos_p=0), watch=0,
    )  # fmt: skip
    before, after = [r for r in history(r2ft(config)) if "eval_nelbo" in r]
    assert math.exp(after["eval_logp_negative"]) < 0.9 * math.exp(before["eval_logp_negative"])
    assert after["eval_nelbo"] < 1.02 * before["eval_nelbo"]
    assert after["eval_margin"] > before["eval_margin"] + 0.1


def test_an_adapter_can_be_kept_apart_or_merged(sft, tmp_path):
    options = {"max_steps": 4, "learning_rate": 1e-2, "nelbo_tolerance": 9.0, "watch": 0}
    apart, whole = (
        r2ft(stage(tmp_path / name, sft, model=StartConfig(
            init=str(sft), lora=LoraConfig(r=4, targets="attention", merge=merge)), **options))
        for name, merge in (("apart", False), ("merged", True))
    )  # fmt: skip
    assert (apart / "adapter_model.safetensors").is_file()
    assert not (apart / "model.safetensors").exists()
    assert (whole / "model.safetensors").is_file()
    assert not (whole / "adapter_config.json").exists()
    ids = torch.arange(5, 25)[None]
    one, _ = load_model(apart, device="cpu")
    two, _ = load_model(whole, device="cpu")
    start, _ = load_model(sft, device="cpu")
    torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=1e-4, atol=1e-4)
    assert (one(ids).logits - start(ids).logits).nan_to_num().abs().max() > 1e-3


def test_sft_takes_an_adapter_too(sft, tmp_path):
    model = ModelConfig(init=str(sft), lora=LoraConfig(r=4))
    folder = train(settings(tmp_path / "run", model=model, max_steps=4, eval_steps=4))
    assert (folder / "adapter_model.safetensors").stat().st_size < (sft / "model.safetensors").stat().st_size
    assert load_model(folder, device="cpu")[0].config.training["init"] == str(sft)


def test_a_model_that_was_never_fine_tuned_is_refused(tokenizer, tmp_path):
    from dlm.backbone import from_scratch
    from tests.conftest import TINY

    folder = tmp_path / "raw"
    from_scratch(TINY, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="records no training; fine-tune it first: dlm train"):
        r2ft(stage(tmp_path / "a", folder))
    causal = tmp_path / "causal"
    causal.mkdir()
    (causal / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="autoregressive model, never trained to fill masks"):
        r2ft(stage(tmp_path / "b", causal))
    with pytest.raises(ConfigError, match=r"model\.init must name"):
        stage(tmp_path / "c", "")
    with pytest.raises(ConfigError, match="save_steps must equal eval_steps"):
        stage(tmp_path / "c", folder, save_steps=3)
    with pytest.raises(ConfigError, match="must not be 0"):
        stage(tmp_path / "c", folder, eval_steps=0)
    with pytest.raises(ConfigError, match=r"trainer\.eval_delay is not free"):
        stage(tmp_path / "c", folder, trainer={"eval_delay": 3})
    with pytest.raises(ConfigError, match="R2FT with those that its guard chooses"):
        stage(tmp_path / "c", folder, trainer={"load_best_model_at_end": True})
    with pytest.raises(CheckpointError, match="no such folder"):
        r2ft(stage(tmp_path / "d", "/nowhere", data=DataConfig(source="/nor/this.json")))


def test_text_without_prompts_is_rejected_in_and_out_of_spans(tmp_path):
    from dlm.data.rules import make_examples

    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": e.answer}) for e in make_examples(150)))
    data = DataConfig(source=str(file), window=48, validation_rows=20)
    base = train(settings(tmp_path / "sft", data=data, max_steps=6))
    folder = r2ft(stage(tmp_path / "run", base, data=data, max_steps=4, nelbo_tolerance=1.0))
    assert [r["step"] for r in history(folder) if "eval_margin" in r] == [0, 4]
    with pytest.raises(CheckpointError, match="trained on plain text, never on instructions"):
        r2ft(stage(tmp_path / "other", base))


def test_the_contrast_of_validation_is_the_same_at_every_evaluation(sft, tmp_path):
    trainer = trainer_of(stage(tmp_path / "x", sft))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_r2ft"] == second["eval_r2ft"]
    assert first["eval_nelbo"] == second["eval_nelbo"]


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    """A fine-tuned model in blocks of 8."""
    shape = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=400,
        visibility="block", block_size=8,
    )  # fmt: skip
    return train(settings(tmp_path_factory.mktemp("blocks") / "sft", model=shape))


def test_a_block_causal_model_goes_through_fine_tuning_and_r2ft(in_blocks, tmp_path, capsys):
    folder = r2ft(R2FTConfig(
        output_dir=str(tmp_path / "r2ft"), model=StartConfig(init=str(in_blocks)),
        data=DataConfig(source="rules", window=48, limit=150, validation_rows=20), max_steps=4,
        per_device_train_batch_size=8, learning_rate=1e-5, eval_steps=2, save_steps=2, precision="fp32",
        nelbo_tolerance=0.5, watch=2, report_to="none", trainer={"disable_tqdm": True},
    ))  # fmt: skip
    model, tokenizer = load_model(folder, device="cpu")
    assert model.spec.visibility.block_size == 8
    out = Sampler(model, tokenizer).generate("copy: 1 2 3", max_tokens=12)
    assert tokenizer.mask_token_id not in out.token_ids
    data = DataConfig(source="rules", window=48, limit=150, validation_rows=20)
    run(NegativesConfig(model=str(folder), data=data, rows=4))
    assert len(re.findall(r"rule: (.*)", capsys.readouterr().out)) == 4
