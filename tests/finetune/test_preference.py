"""DPO and DDRO by differences of NELBOs: the losses, the gains against an enumeration, and whole runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dlm import load_model
from dlm.checkpointing import MARKER, complete_checkpoints
from dlm.data.config import DataConfig
from dlm.data.preferences import ANSWER, joined
from dlm.data.rules import make_examples
from dlm.errors import ConfigError, DataError
from dlm.model import IGNORE
from finetune.config import LoraConfig, StartConfig
from finetune.contrast_config import NegativeConfig, ObjectiveConfig
from finetune.preference import DDRO, DPO, Gains, PreferenceTrainer
from finetune.r2ft import R2FT, r2ft
from finetune.run import build_trainer, split_rows
from finetune.sft import train
from finetune.start import prepare
from tests.dlm.test_objective import told_of_subsets
from tests.finetune.test_r2ft import history, stage
from tests.finetune.test_train import TINY, settings, unfinish

# ---- losses of gains ---------------------------------------------------------------------------------


def gains(good, bad, good_weight=None, bad_weight=None):
    good, bad = torch.tensor(good).double(), torch.tensor(bad).double()
    ones = torch.ones_like(good)
    weights = (ones if w is None else torch.tensor(w).double() for w in (good_weight, bad_weight))
    return Gains(good, bad, *weights)


def test_dpo_is_its_closed_form():
    got = DPO(0.3)(gains([1.0, -2.0, 0.0], [-3.0, 1.0, 0.0]))
    assert got.tolist() == pytest.approx([math.log(1 + math.exp(-0.3 * m)) for m in (4, -3, 0)])


def test_the_optimum_of_dpo_is_the_reference_times_the_reward_of_its_preferences():
    """Of pairs preferred by Bradley and Terry's law with rewards R, p ∝ p_ref exp(R/β): its closed form."""
    beta = 0.5
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    first, second = (torch.tensor(x) for x in zip(*pairs, strict=True))
    preferred = reference[first] * reference[second] * torch.sigmoid(reward[first] - reward[second])

    def closure():
        solver.zero_grad()
        gain = logits.log_softmax(0) - reference.log()
        ones = torch.ones(len(pairs))
        loss = (preferred * DPO(beta)(Gains(gain[first], gain[second], ones, ones))).sum()
        loss.backward()
        return loss

    solver.step(closure)
    expected = (reference.log() + reward / beta).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=0, atol=1e-7)


def test_ddro_of_pairs_is_the_sum_of_both_sides_and_of_single_answers_their_weighted_mean():
    from finetune.density_ratio import bad_loss, good_loss, ratio_loss

    loss = DDRO(theta=0.4, alpha=0.1, kl=0.3)
    good, bad = [0.3, -1.0], [-0.7, 0.4]
    a, b = torch.tensor(good).double(), torch.tensor(bad).double()
    by_hand = good_loss(a, 0.4, 0.1) + 0.3 * 0.4 * ratio_loss(a, 0.4)
    by_hand_bad = bad_loss(b, 0.4, 0.1) + 0.3 * 0.6 * ratio_loss(b, 0.4)
    torch.testing.assert_close(loss(gains(good, bad)), by_hand + by_hand_bad)
    # three rows of four are good: the mean over rows is the sum of the means over either kind
    single = [0.3, -1.0, 0.5, 0.4]
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
    got = loss(gains(single, single, (labels / 0.75).tolist(), ((1 - labels) / 0.25).tolist())).mean()
    s = torch.tensor(single).double()
    plain = (
        loss(gains(single, single, [1.0] * 4, [0.0] * 4))[:3].mean()
        + loss(gains(single, single, [0.0] * 4, [1.0] * 4))[3:].mean()
    )
    torch.testing.assert_close(got, plain)
    assert len(s) == 4


@pytest.mark.parametrize("loss", [DPO(0.3), DDRO(0.4), DDRO(0.4, 0.6), DDRO(0.6, 0.2, kl=0.5)])
def test_gradients_agree_with_finite_differences(loss):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    ones = torch.ones(6)
    assert torch.autograd.gradcheck(lambda v: loss(Gains(v[0], v[1], ones, 2 * ones)), (x,), eps=1e-6)


# ---- gains -------------------------------------------------------------------------------------------

ANSWERS = (("one two", "two one"), ("a b c", "c"), ("yes", "no no"), ("1 2 3 4", "9 9 9 9"))


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "model"
    train(settings(folder, max_steps=60, save_steps=60, logging_steps=50))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs and single answers to the same prompts."""
    folder = tmp_path_factory.mktemp("preferences")
    examples = make_examples(90)
    pairs = [
        {"prompt": e.instruction, "chosen": e.answer, "rejected": " ".join(["no"] * (1 + i % 5))}
        for i, e in enumerate(examples)
    ]
    single = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, p in enumerate(pairs)
    ]
    for name, rows in (("pairs", pairs), ("single", single)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_of(folder, sft, name="ddro", file=None, **kwargs):
    objective = {"name": name, **kwargs.pop("objective", {})}
    data = {"data": DataConfig(source=str(file), window=48, validation_rows=20)} if file else {}
    rejected = "data" if file else "rules"
    return stage(
        folder, sft, objective=ObjectiveConfig(**objective), rejected=rejected,
        **{"watch": 2, "nelbo_tolerance": 9.0, **data, **kwargs},
    )  # fmt: skip


def trainer_of(config):
    run = R2FT(config)
    rows, held_out = split_rows(config.data, config.seed, run.load)
    model, tokenizer = run.first(rows, None)
    model = prepare(model, config.model, config.data.window, config.seed)
    sets = (run.encode(r, tokenizer, config.data.window)[0] for r in (rows, held_out))
    return build_trainer(run, model, tokenizer, *sets)


def moved(trainer, size=0.05):
    """The trainer, its weights moved away from the reference, its dropout off."""
    trainer.model.eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            p += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return trainer


def noised(trainer, n=6, step=0):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(n)])
    return trainer.with_noise(batch, torch.arange(n), n, step)


@pytest.mark.parametrize("name", ["ddro", "dpo"])
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=4)])
def test_at_the_start_every_gain_is_zero(sft, tmp_path, name, lora):
    trainer = trainer_of(config_of(tmp_path / "x", sft, name, model=StartConfig(init=str(sft), lora=lora)))
    trainer.model.eval()
    batch = noised(trainer)
    loss, figures = trainer.rows(trainer.model, batch)
    assert (trainer.reference is None) == bool(lora.r)  # no second copy under an adapter
    assert figures[:, :3].nan_to_num().abs().max() == 0
    start = {"dpo": math.log(2), "ddro": 2 * math.log(2)}[name]
    assert loss[batch["bad"]].tolist() == pytest.approx([start] * int(batch["bad"].sum()), rel=1e-5)
    shifted, _ = moved(trainer).rows(trainer.model, batch)
    assert (shifted - loss).abs().max() > 1e-3
    with torch.no_grad(), trainer.as_reference(trainer.model) as frozen:  # moved by nothing
        ids = batch["input_ids"]
        torch.testing.assert_close(frozen(input_ids=ids).logits, load_model(sft, device="cpu")[0](ids).logits)
    shifted.sum().backward()
    if trainer.reference is not None:
        assert all(p.grad is None for p in trainer.reference.parameters())


def enumerated_nelbo(model, ids, cells, mask_id):
    """-ELBO of the cells of one row: over every number l of masks and all sets of l cells, n/l Σ -log p."""
    places, total = cells.nonzero()[:, 0].tolist(), 0.0
    n = len(places)
    for l in range(1, n + 1):
        told = told_of_subsets(model, ids, places, l, mask_id)
        total -= n / l * sum(told) / len(told) / n
    return total


def test_the_mean_gain_over_draws_is_the_difference_of_the_enumerated_bounds(sft, tmp_path):
    config = config_of(
        tmp_path / "x", sft, negatives=NegativeConfig(span_min=3, span_max=4), objective={"draws": 4}
    )
    trainer = moved(trainer_of(config))
    pair = joined(noised(trainer, n=3))
    generator = torch.Generator().manual_seed(0)
    repeats, together, sums = 400, 20, []  # so many draws of a row in one call
    many = {name: torch.cat([x] * together) for name, x in pair.items()}
    with torch.no_grad():
        for i in range(0, repeats, together):
            levels = torch.rand(together, 1, 3, generator=generator, dtype=torch.float64)
            keys = 1000 * torch.arange(i, i + together)[:, None, None] + torch.arange(3)
            noise = {"level": levels, "key": keys}
            noise = {name: x.expand(-1, 2, -1).flatten() for name, x in noise.items()}
            sums.append(trainer.gain(trainer.model, {**many, **noise}).view(together, 6))
    gains = torch.cat(sums).double()
    mean, error = gains.mean(0), gains.std(0) / math.sqrt(repeats)
    for row in range(6):
        ids, cells = pair["input_ids"][row], pair["maskable"][row]
        exact = enumerated_nelbo(trainer.reference, ids, cells, trainer.mask_id) - enumerated_nelbo(
            trainer.model, ids, cells, trainer.mask_id
        )
        assert abs(float(mean[row]) - exact) < 4 * float(error[row]) + 1e-4, (row, float(mean[row]), exact)
        assert abs(exact) > 1e-3  # there is something to be wrong about


@pytest.mark.parametrize("file", ["pairs", ""])
def test_the_gain_of_the_good_answer_is_that_of_the_chosen_one_alone(sft, tmp_path, files, file):
    """Of pairs, and of true answers with negatives by rule."""
    config = config_of(tmp_path / "x", sft, file=file and files / f"{file}.jsonl")
    trainer, seen = moved(trainer_of(config)), []
    rows = [trainer.train_dataset[i] for i in range(6)]
    batch = noised(trainer)
    if file:
        for row, chosen, rejected in zip(rows, batch["input_ids"], batch["rejected_input_ids"], strict=True):
            assert torch.equal(chosen[: len(row["input_ids"])], row["input_ids"])
            assert torch.equal(rejected[: len(row["rejected_ids"])], row["rejected_ids"])
    chosen = {name: value for name, value in batch.items() if not name.startswith("rejected_")}
    rejected = chosen | {name: batch[f"rejected_{name}"] for name in ANSWER}
    loss = trainer.loss_function
    trainer.loss_function = lambda gains: seen.append(gains) or loss(gains)
    with torch.no_grad():
        trainer.rows(trainer.model, batch)
        good, bad = (trainer.gain(trainer.model, answers) for answers in (chosen, rejected))
    torch.testing.assert_close(seen[0].good, good, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0].bad, bad, rtol=1e-4, atol=1e-4)
    assert ((good - bad).abs() > 0.1).all()


def test_shared_masks_make_the_difference_less_noisy_than_its_parts(sft, tmp_path):
    trainer = moved(trainer_of(config_of(tmp_path / "x", sft)), size=0.01)
    answers = joined(noised(trainer))
    gains, nats = [], []
    with torch.no_grad():
        for i in range(60):
            batch = {**answers, "key": answers["key"] + i, "level": (answers["level"] + 0.618 * i) % 1}
            gains.append(trainer.gain(trainer.model, batch))
            with_reference = trainer.reference
            trainer.reference = Silent()
            nats.append(trainer.gain(trainer.model, batch))
            trainer.reference = with_reference
    assert torch.stack(gains).std(0).mean() < 0.2 * torch.stack(nats).std(0).mean()


class Silent(torch.nn.Module):
    """A reference that gives every token probability 1."""

    def forward(self, targets, **kwargs):
        from types import SimpleNamespace

        return SimpleNamespace(token_logp=torch.zeros(int((targets != IGNORE).sum())))


def test_good_and_bad_answers_of_equal_length_have_equal_masks(sft, tmp_path, files, monkeypatch):
    import finetune.preference as module

    trainer = trainer_of(config_of(tmp_path / "x", sft, file=files / "pairs.jsonl"))
    plain, seen = module.add_exact_noise, []
    monkeypatch.setattr(module, "add_exact_noise", lambda *args: seen.append(plain(*args)) or seen[-1])
    batch = noised(trainer, n=30)
    trainer.rows(trainer.model, batch)
    (rows,) = seen
    good, bad = (rows["noisy_ids"] == trainer.mask_id).chunk(2)
    equal = (batch["maskable"] == batch["rejected_maskable"]).all(1)
    assert int(equal.sum()) > 0
    assert torch.equal(good[equal], bad[equal])
    assert good.any(1).all()


def test_negatives_by_rule_are_both_answers_of_one_stretch(sft, tmp_path):
    short = NegativeConfig(span_min=2, span_max=3)
    trainer = trainer_of(config_of(tmp_path / "x", sft, negatives=short))
    plain = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    batch = noised(trainer, n=8)
    span, true = batch["rejected_maskable"], batch["maskable"]
    answered = torch.arange(span.shape[1]) < plain["length"][:, None]
    assert torch.equal(true, span & answered)
    assert torch.equal(batch["input_ids"][true], plain["input_ids"][true])
    before = ~span & (torch.arange(span.shape[1]) < span.int().argmax(1, keepdim=True))
    for ids in (batch["input_ids"], batch["rejected_input_ids"]):
        assert torch.equal(ids[before], plain["input_ids"][before])  # one context
        behind = ~span & ~before
        assert (ids[behind] == trainer.mask_id).all()  # nothing behind is given away
        assert behind.any()
    assert (batch["rejected_input_ids"] != plain["input_ids"])[span].any()


def test_the_draws_of_a_row_are_spread_over_its_numbers_of_masks_and_depend_on_its_key(
    sft, tmp_path, monkeypatch
):
    import finetune.preference as module

    trainer = trainer_of(config_of(tmp_path / "x", sft, objective={"draws": 4}))
    plain, seen = module.add_exact_noise, []
    monkeypatch.setattr(module, "add_exact_noise", lambda *args: seen.append(plain(*args)) or seen[-1])
    batch = noised(trainer)
    first, _ = trainer.rows(trainer.model.eval(), batch)
    masks = torch.stack([rows["noisy_ids"] == trainer.mask_id for rows in seen])
    cells = (masks & joined(batch)["maskable"]).sum(2) / joined(batch)["maskable"].sum(1)  # [4, 12] shares
    spread = cells.sort(0).values
    count = joined(batch)["maskable"].sum(1)
    for quarter in range(4):  # one draw in each, as far as the numbers of masks of the row allow
        assert (spread[quarter] > quarter / 4 - 1e-6).all()
        assert (spread[quarter] <= (quarter + 1) / 4 + 1 / count + 1e-6).all()
    seen.clear()
    torch.manual_seed(1)
    again, _ = trainer.rows(trainer.model, batch)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b["noisy_ids"] == trainer.mask_id) for a, b in zip(masks, seen, strict=True))


# ---- runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddro", "dpo"])
def test_a_run_resumes_to_the_bit_and_logs_its_figures(sft, tmp_path, name):
    def config(folder):
        return config_of(tmp_path / folder, sft, name, keep_checkpoints=9, logging_steps=3)

    whole, cut = r2ft(config("whole")), r2ft(config("cut"))
    for late in complete_checkpoints(cut)[1:]:
        (late / MARKER).unlink()
    unfinish(cut)
    r2ft(config("cut"))
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load_file(cut / "model.safetensors").items())
    first, second = history(whole), history(cut)
    keep = ("step", "loss", "margin", "accuracy", "gain_good", f"eval_{name}", "eval_gain_bad_p90")
    for a, b in zip(first, second, strict=True):
        assert {k: a[k] for k in keep if k in a} == {k: b[k] for k in keep if k in b}
    evaluated = [r for r in first if "eval_nelbo" in r]
    assert [r["step"] for r in evaluated] == [0, 4, 8, 12]
    for r in evaluated:
        assert r["eval_margin"] == pytest.approx(r["eval_gain_good"] - r["eval_gain_bad"], rel=1e-4, abs=0.2)
        assert r["eval_gain_bad_p10"] <= r["eval_gain_bad_p50"] <= r["eval_gain_bad_p90"]
    assert evaluated[-1][f"eval_{name}"] < evaluated[0][f"eval_{name}"]
    assert any("margin" in r for r in first if "loss" in r)
    assert (whole / f"{name}.png").is_file()
    recorded = json.loads((whole / "config.json").read_text())["training"]
    assert recorded["objective"] == f"{name.upper()} (rule-made negatives)"


def test_micro_batches_give_the_gradients_of_one_batch(sft, tmp_path, files):
    options = {
        "max_steps": 2, "eval_steps": 2, "save_steps": 2, "watch": 0, "learning_rate": 1e-3,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "weight_decay": 0.0,
        "trainer": {"disable_tqdm": True, "optim": "sgd"},
    }  # fmt: skip
    one = r2ft(config_of(tmp_path / "one", sft, "ddro", files / "single.jsonl", **options))
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    two = r2ft(config_of(tmp_path / "two", sft, "ddro", files / "single.jsonl", **options, **halves))
    expected, got = (load_file(folder / "model.safetensors") for folder in (one, two))
    start = load_file(sft / "model.safetensors")
    assert max(float((got[name] - value).abs().max()) for name, value in expected.items()) < 2e-5
    assert max(float((got[name] - value).abs().max()) for name, value in start.items()) > 2e-3
    for key in ("loss", "gain_good", "gain_bad"):
        ours, theirs = ([r[key] for r in history(f) if key in r] for f in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), key


def test_a_block_causal_model_is_measured_by_the_bound_of_its_blocks(tmp_path):
    shape = replace(TINY, visibility="block", block_size=8)
    base = train(settings(tmp_path / "sft", model=shape))
    config = config_of(tmp_path / "run", base, max_steps=4, learning_rate=1e-3)
    trainer = trainer_of(config)
    assert trainer.blocks
    trainer.model.eval()
    loss, _ = trainer.rows(trainer.model, noised(trainer))
    assert loss.tolist() == pytest.approx([2 * math.log(2)] * 6, rel=1e-5)
    first, last = [r for r in history(r2ft(config)) if "eval_margin" in r]
    assert last["eval_margin"] > first["eval_margin"] == 0


@pytest.mark.parametrize(("name", "file"), [("ddro", "pairs"), ("dpo", "pairs"), ("ddro", "single")])
def test_a_run_learns_from_a_file(sft, tmp_path, files, name, file):
    config = config_of(
        tmp_path / "run", sft, name, files / f"{file}.jsonl", learning_rate=1e-3, max_steps=20, eval_steps=10,
        save_steps=10, objective={"draws": 2},
    )  # fmt: skip
    first, *_, last = [r for r in history(r2ft(config)) if "eval_margin" in r]
    assert first["eval_margin"] == 0
    assert last["eval_margin"] > 0.5
    assert last["eval_accuracy"] > 0.8
    assert last[f"eval_{name}"] < first[f"eval_{name}"]


def test_single_answers_weigh_by_the_share_of_their_kind(sft, tmp_path, files):
    trainer = trainer_of(config_of(tmp_path / "x", sft, file=files / "single.jsonl"))
    good = float(sum(trainer.train_dataset["good"])) / len(trainer.train_dataset)
    assert trainer.good_share == good
    batch = noised(trainer, n=12)
    loss, figures = trainer.rows(trainer.model.eval(), batch)
    start = math.log(2)
    expected = [start / good if label else start / (1 - good) for label in batch["good"].tolist()]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(figures[:, 0].isnan(), ~batch["good"])
    assert torch.equal(figures[:, 1].isnan(), batch["good"])
    measured = trainer.measure(trainer.model, batch)
    assert measured[:, :2][~batch["good"]].abs().sum() == 0  # the NELBO is that of good answers
    assert (measured[:, 1][batch["good"]] > 0).all()


def test_what_an_objective_cannot_learn_from_is_refused(sft, tmp_path, files):
    with pytest.raises(DataError, match=r"single\.jsonl: single answers with a label; DPO compares two"):
        r2ft(config_of(tmp_path / "a", sft, "dpo", files / "single.jsonl"))
    alike = tmp_path / "alike.jsonl"
    rows = [{"prompt": "a", "completion": "b", "label": True} for _ in range(30)]
    alike.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="all 10 training rows are good answers; DDRO needs both"):
        r2ft(config_of(tmp_path / "b", sft, "ddro", alike))
    late = tmp_path / "late.jsonl"
    rows = [{"prompt": "say", "completion": "b", "label": i < 20} for i in range(50)]
    late.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="none of the 20 validation rows is a good answer"):
        r2ft(config_of(tmp_path / "d", sft, "ddro", late))
    late.write_text("\n".join(json.dumps({**row, "label": not row["label"]}) for row in rows))
    with pytest.raises(DataError, match="none of the 20 validation rows is a bad answer"):
        r2ft(config_of(tmp_path / "e", sft, "ddro", late))
    for message, changes in (
        ("r2ft sets a negative made by rule", {"name": "r2ft", "file": files / "pairs.jsonl"}),
        ("needs data.source with rejected answers", {"file": "rules"}),
        ('with "data" no negative is made', {"file": "x.jsonl", "negatives": NegativeConfig(left=1.0)}),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(tmp_path / "c", sft, **changes)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("unknown objective 'ppo'", {"name": "ppo"}),
        (r"objective\.theta is for objective\.name ddro, not r2ft", {"theta": 0.4}),
        (r"objective\.gamma is for objective\.name r2ft, not dpo", {"name": "dpo", "gamma": 1.0}),
        (r"objective\.beta is for objective\.name dpo, not ddro", {"name": "ddro", "beta": 1.0}),
        (r"objective\.draws is for objective\.name ddro, not r2ft", {"draws": 2}),
        ("theta must lie in", {"name": "ddro", "theta": 1.0}),
        ("alpha must be 0, or at least floor", {"name": "ddro", "alpha": 0.01}),
        ("floor must lie in", {"name": "ddro", "floor": 0.0}),
        ("kl must not be negative", {"name": "ddro", "kl": -1.0}),
        ("beta must be above 0 and draws at least 1", {"name": "dpo", "draws": 0}),
    ],
)
def test_settings_that_do_not_fit_are_refused(message, options):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**options)


def test_trainers_are_chosen_by_the_name_of_the_objective(sft, tmp_path):
    trainer = trainer_of(config_of(tmp_path / "x", sft, "dpo", objective={"beta": 0.7}))
    assert isinstance(trainer, PreferenceTrainer)
    assert trainer.loss_function == DPO(0.7)
