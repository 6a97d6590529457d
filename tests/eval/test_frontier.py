"""The frontier: entropies in closed form, curves at equal entropy, intervals, and the command as a whole."""

import itertools
import json
import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from dlm.tokenizer import encode_text
from eval.commands.frontier import FrontierConfig, run
from eval.config import EvalConfig
from eval.evaluate import evaluate
from eval.frontier import (
    Curve,
    FrontierSample,
    at_levels,
    entropy,
    interval,
    left_out,
    levels,
    resamples,
    unigram_entropy,
)
from eval.systems import Local


def test_entropy_of_known_counts():
    assert entropy(np.array([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])) == pytest.approx(
        [math.log(4), 0.0]
    )
    assert entropy(np.array([1.0, 3.0])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert math.isnan(entropy(np.zeros(3)))


def test_entropy_of_known_texts():
    assert unigram_entropy([7, 7, 7]) == 0
    assert unigram_entropy(range(9)) == pytest.approx(math.log(9))
    assert unigram_entropy([1, 2, 1, 3]) == pytest.approx(1.5 * math.log(2))
    assert math.isnan(unigram_entropy([]))


def test_a_span_takes_the_length_out():
    """A text of period 4 has log 4 in every run of 4, however long it is; and runs are moved by one token."""
    assert unigram_entropy([1, 2, 3, 4] * 5, span=4) == pytest.approx(math.log(4))
    assert unigram_entropy([1, 2], span=4) == pytest.approx(math.log(2))
    ids = [2, 2, 2, 3, 1, 1, 5]
    runs = [unigram_entropy(ids[i : i + 3]) for i in range(5)]
    assert unigram_entropy(ids, span=3) == pytest.approx(sum(runs) / 5)
    assert len({round(value, 6) for value in runs}) > 2


def sample(entropies, nats, question=None, counts=None):
    numbers = np.arange(len(nats)) if question is None else np.array(question)
    return FrontierSample(1.0, numbers, np.array(nats, float), np.array(entropies, float), counts)


def test_means_of_resamples_are_those_of_repeated_answers():
    rng = np.random.default_rng(0)
    weights = resamples(4, 30, seed=1)
    assert (weights.sum(1) == 4).all()
    assert (weights[0] == 1).all()
    question = [0, 1, 2, 3, 0, 1, 2, 3]
    nats, entropies = rng.random(8), rng.random(8)
    nats[5] = math.nan  # an empty answer
    counts = rng.integers(0, 5, (8, 6)).astype(float)
    counts[:, 0] += 1
    plain, pooled = (sample(entropies, nats, question, c).means(weights) for c in (None, counts))
    for i, row in enumerate(weights):
        chosen = [n for n, q in enumerate(question) for _ in range(row[q]) if n != 5]
        if not chosen:
            continue
        assert plain[0][i] == pytest.approx(np.mean(entropies[chosen]))
        assert plain[1][i] == pytest.approx(np.mean(nats[chosen]))
        assert pooled[0][i] == pytest.approx(entropy(counts[chosen].sum(0)))
        assert pooled[1][i] == pytest.approx(np.average(nats[chosen], weights=counts[chosen].sum(1)))


def line(entropies, nats):
    return Curve(np.array([entropies], float), np.array([nats], float))


def test_a_curve_is_read_between_its_temperatures_and_nowhere_else():
    curve = line([1.0, 2.0, 4.0], [3.0, 3.5, 5.5])
    for level, expected in ((1.0, 3.0), (1.5, 3.25), (2.0, 3.5), (3.0, 4.5), (4.0, 5.5)):
        assert curve.at(level)[0][0] == pytest.approx(expected)
        assert curve.along(level, [3.0, 3.5, 5.5]) == pytest.approx(expected)
    assert curve.along(3.0, [10.0, 20.0, 40.0]) == pytest.approx(30.0)
    for level in (0.999, 4.001):
        assert math.isnan(curve.at(level)[0][0])
        assert math.isnan(curve.along(level, [0.0, 0.0, 0.0]))


def test_where_a_curve_turns_the_frontier_is_the_best_of_it():
    curve = line([1.0, 3.0, 2.0], [3.0, 5.0, 7.0])
    assert curve.at(2.5)[0][0] == pytest.approx(4.5)
    assert curve.at(3.0)[0][0] == pytest.approx(5.0)
    assert line([2.0, 2.0], [4.0, 3.0]).at(2.0)[0][0] == pytest.approx(3.0)
    assert line([1.0, math.nan, 3.0], [1.0, 2.0, 3.0]).range == (1.0, 3.0)
    assert math.isnan(line([1.0, math.nan, 3.0], [1.0, 2.0, 3.0]).at(2.0)[0][0])


def test_levels_are_quarters_of_what_all_curves_reach():
    wide, narrow, far = line([1, 5], [1, 2]), line([2, 4], [1, 2]), line([7, 9], [1, 2])
    assert levels([wide, narrow]) == pytest.approx([2.5, 3.0, 3.5])
    assert levels([wide, far]) == pytest.approx([2.0, 3.0, 4.0])


def test_a_decoder_without_answers_takes_no_level_from_the_others():
    nothing, first, second = (
        line([np.nan, np.nan], [np.nan, np.nan]),
        line([1, 3], [2, 4]),
        line([2, 5], [1, 2]),
    )
    for curves in itertools.permutations([nothing, first, second]):
        assert levels(curves) == levels([first, second]) == [2.25, 2.5, 2.75]
    apart = line([7, 9], [1, 2])
    assert levels([nothing, first, apart]) == levels([first, apart]) == [1.5, 2.0, 2.5]
    assert all(math.isnan(level) for level in levels([nothing]))


def test_a_decoder_that_is_worse_by_a_constant_is_so_on_every_resample():
    """Paired: questions differ much, decoders by 0.3 at equal entropy, and the interval holds that alone."""
    rng = np.random.default_rng(3)
    hard, spread = rng.normal(0, 1, 60), rng.normal(0, 0.1, 60)
    weights = resamples(60, 500)
    curves = {
        name: Curve.of([sample(h + spread, hard + h + plus) for h in (1.0, 2.0, 3.0)], weights)
        for name, plus in (("a", 0.0), ("b", 0.3))
    }
    found = at_levels(curves, [1.7, 3.9], 60)
    inside, outside = found["b"]
    assert inside.difference.mean == pytest.approx(0.3)
    assert inside.difference.high - inside.difference.low < 1e-6
    assert inside.nats.high - inside.nats.low > 0.3
    assert inside.nats.low < inside.nats.mean < inside.nats.high
    assert found["a"][0].difference is None
    assert math.isnan(outside.nats.mean)
    assert math.isnan(outside.difference.mean)


def test_intervals_are_those_of_the_normal_law_for_a_mean():
    values = np.random.default_rng(5).normal(0, 1, 400)
    weights = resamples(400, 4000)
    means = weights @ values / 400
    found = interval(means, 400)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert math.isnan(interval(means, 4).low)  # too few questions
    means[1:400] = math.nan  # a tenth of the resamples do not reach so far
    assert math.isnan(interval(means, 400).low)
    assert interval(means, 400).mean == found.mean


def test_intervals_at_an_entropy_of_all_texts_hold_what_they_estimate():
    """Drawing questions again lowers that entropy: a bootstrap's interval may miss even its own estimate."""
    words, questions = 8000, 60
    law = 1 / np.arange(1, words + 1)

    def curve(rng, heats, length, weights):
        samples = []
        for heat in heats:
            p = law ** (1 / heat)
            counts = rng.multinomial(length, p / p.sum(), size=questions).astype(float)
            nats = 2 + 2 * heat + rng.normal(0, 0.3, questions)
            samples.append(FrontierSample(heat, np.arange(questions), nats, np.ones(questions), counts))
        return Curve.of(samples, weights)

    def estimates(jackknifed):
        weights = left_out(questions) if jackknifed else resamples(questions, 100)
        for seed in range(12):
            rng = np.random.default_rng(seed)
            curves = {"long": curve(rng, (0.7, 1, 1.2), 40, weights)}
            curves["short"] = curve(rng, (0.7, 1, 1.2, 1.6), 15, weights)
            found = at_levels(curves, [5.3], questions, jackknifed=jackknifed)
            yield found["short"][0].difference

    held = {}
    for jackknifed in (True, False):
        differences = list(estimates(jackknifed))
        true = np.mean([each.mean for each in differences])
        held[jackknifed] = sum(each.low < true < each.high for each in differences)
    assert held[True] >= 11
    assert held[False] <= 8


@pytest.fixture
def causal(tokenizer, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def settings(checkpoint, questions_file, causal, tmp_path, **given):
    common = {
        "models": [str(checkpoint)], "task": "file", "data": str(questions_file), "reader": str(causal),
        "decoders": "conv(kernel_size=5),top-k,entropy-bound", "rate": "2", "max_tokens": 8,
        "temperatures": "0.5,1.5", "resamples": 100, "output": str(tmp_path / "out"), "device": "cpu",
    }  # fmt: skip
    return FrontierConfig(**{**common, **given})


def test_the_command_compares_decoders_and_goes_on_where_it_was(
    checkpoint, questions_file, causal, tmp_path, monkeypatch, capsys
):
    config = settings(checkpoint, questions_file, causal, tmp_path, seeds="0,1")
    asked, replies = [], Local.replies

    def dying(self, conversations):
        for reply in replies(self, conversations):
            asked.append(reply)
            if len(asked) == 20:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr(Local, "replies", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert run(config) == 0
    assert len(asked) == 3 * 2 * 2 * 6 + 1  # decoders, temperatures, seeds, questions; one died with the run
    assert "At equal entropy, max=8,rate=2" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert list(figures["equal"]) == ["max=8,rate=2"]
    names = list(figures["points"])
    assert names == [
        "tiny, conv,K=5, max=8,rate=2",
        "tiny, top-k, max=8,rate=2",
        "tiny, entropy-bound, max=8",
    ]
    assert list(figures["equal"]["max=8,rate=2"]) == names
    check_point(config, figures["points"][names[0]][0], checkpoint, questions_file, causal, tmp_path)
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<?xml")
    assert "| temperature |" in (tmp_path / "out" / "frontier.md").read_text()
    before = len(asked)
    assert run(config) == 0
    assert len(asked) == before
    assert json.loads((tmp_path / "out" / "frontier.json").read_text()) == figures


def check_point(config, point, checkpoint, questions_file, causal, tmp_path):
    """The first point again, from the answers of `dlm eval` to the same settings."""
    tokenizer = AutoTokenizer.from_pretrained(causal)
    nats, entropies = [], []
    for seed in (0, 1):
        (result,) = evaluate(
            EvalConfig(
                task="file", model=str(checkpoint), data=str(questions_file), reader=str(causal), seed=seed,
                decoders="conv(kernel_size=5,temperature=0.5)", rate="2", max_tokens=8, device="cpu",
                output=str(tmp_path / f"again-{seed}"),
            )
        )  # fmt: skip
        nats += [row["nll"] for row in result.measured.values()]
        texts = [answer.text for answer in result.answers.values()]
        entropies += [unigram_entropy(encode_text(tokenizer, text)) for text in texts]
    assert point["nats"] == pytest.approx(np.nanmean(nats))
    assert point["entropy"] == pytest.approx(np.nanmean(entropies))


def test_other_entropies_and_a_distance(checkpoint, questions_file, causal, tmp_path):
    rows = [{"instruction": f"Spell {i}.", "output": f"{i} {i} {i + 1}"} for i in range(12)]
    questions_file.write_text(json.dumps(rows))
    given = {"decoders": "conv", "temperatures": "0.5,1,2", "encoder": "package"}
    points = {}
    for kind in ("sequence", "span", "corpus"):
        extra = {"span": 4} if kind == "span" else {}
        config = settings(checkpoint, questions_file, causal, tmp_path, entropy=kind, **given, **extra)
        assert run(config) == 0
        figures = json.loads((tmp_path / "out" / "frontier.json").read_text())
        points[kind] = next(iter(figures["points"].values()))
        assert figures["references"] > 0
    assert points["span"][0]["entropy"] <= math.log(4) + 1e-9
    assert points["corpus"][0]["entropy"] > points["sequence"][0]["entropy"] > points["span"][0]["entropy"]
    assert 0 < points["corpus"][0]["distance"]["value"] <= 1
    assert "distance" in (tmp_path / "out" / "frontier.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": []}, "name one or more checkpoints"),
        ({"models": ["a/tiny", "b/tiny"]}, "different names"),
        ({"temperatures": "1"}, "two or more above 0"),
        ({"temperatures": "0,1"}, "two or more above 0"),
        ({"decoders": "conv(temperature=0.5)"}, "those of --temperatures"),
        ({"decoders": " "}, "decoders is empty"),
        ({"entropy": "joint"}, "unknown entropy 'joint'"),
        ({"span": 8}, "span is for --entropy span"),
        ({"seeds": "-1"}, "whole numbers of at least 0"),
        ({"seeds": ""}, "seeds is empty"),
        ({"reader": ""}, "needs a --reader"),
        ({"resamples": 3}, "resamples must be at least 100"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FrontierConfig(**{"models": ["default"], **given})


def test_a_distance_without_references_is_refused_before_anything_is_asked(
    checkpoint, questions_file, causal, tmp_path, monkeypatch
):
    monkeypatch.setattr(Local, "replies", lambda *_: pytest.fail("a question was asked"))
    for rows in ([{"instruction": "Go."}] * 12, [{"instruction": "Go.", "output": "Gone."}] * 9):
        questions_file.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="a reference to every question, and ten"):
            run(settings(checkpoint, questions_file, causal, tmp_path, encoder="package"))


def test_a_model_without_records_needs_a_reader(checkpoint, questions_file, causal, tmp_path):
    with pytest.raises(ValueError, match="--reader names one"):
        run(settings(checkpoint, questions_file, causal, tmp_path, reader="base"))


def test_on_a_flat_piece_a_curve_and_its_other_figures_are_those_of_the_lower_end():
    curve = Curve(np.array([[2.0, 2.0]]), np.array([[4.0, 3.0]]))
    assert curve.at(2.0)[0].tolist() == [3.0]
    assert curve.along(2.0, [10.0, 20.0]) == 20.0
    assert Curve(np.array([[2.0, 2.0]]), np.array([[4.0, np.inf]])).at(2.0)[0].tolist() == [4.0]
