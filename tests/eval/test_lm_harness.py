"""A task of lm-evaluation-harness, run by the harness itself."""

import json
import re

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dlm.errors import ConfigError
from dlm.tokenizer import set_template
from eval.lm_harness import DLM, main
from eval.nelbo import _drawn_sets, bounds, nelbo
from eval.path import path_costs

GENERATE = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
CHOOSE = """
task: choosing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["1 2 3", "the cat"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def dlm(checkpoint):
    return DLM(str(checkpoint), decoder="conv(kernel_size=9;top_k=5)", draws=4, device="cpu", dtype="float32")


def test_the_harness_runs_both_kinds_of_task(dlm, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"Count from {i}.", "answer": "1"}) + "\n" for i in range(3))
    )
    for name, text in (("counting", GENERATE), ("choosing", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=dlm, tasks=["counting", "choosing"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert set(found["results"]) == {"counting", "choosing"}
    assert 0 <= found["results"]["choosing"]["acc,none"] <= 1
    (texts,) = found["samples"]["counting"][0]["resps"]
    expected = answers(dlm, "Count from 0.", stop=["\n"], max_tokens=12)
    assert texts == [expected[0].text]


def answers(dlm, prompt, **fields):
    """Those of the sampler itself."""
    return dlm.sampler.generate([prompt], request=dlm.variant.request(**fields), seed=dlm.seed)


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihoods_are_the_nelbo(dlm):
    """Of the continuation as an answer: the template stands around the context, as it does for texts."""
    ((value, greedy),) = dlm.loglikelihood([instance("loglikelihood", "Count from 1 to 3:", " 1 2 3")])
    text = dlm.sampler.rows.text
    before = dlm.sampler.rows.prompt("Count from 1 to 3:")
    (bound,) = bounds(dlm.model, [(before, text("1 2 3"))], 4, questions=["Count from 1 to 3:"])
    assert value == pytest.approx(-bound.nats)
    assert greedy in (True, False)
    ((value, _),) = dlm.loglikelihood([instance("loglikelihood", "", "1 2 3")])
    (bound,) = bounds(dlm.model, [([dlm.model.config.eos_token_id], text("1 2 3"))], 4, questions=[""])
    assert value == pytest.approx(-bound.nats)
    whole, twice = dlm.loglikelihood_rolling(
        [instance("loglikelihood_rolling", text) for text in ("1 2 3", "Count from 1. " * 400)]
    )
    eos = dlm.model.config.eos_token_id
    assert whole == pytest.approx(-nelbo(dlm.model, [([eos], text("1 2 3"))], 4)[0], rel=1e-4)
    assert len(text("Count from 1. " * 400)) > dlm.sampler.spec.positions
    assert twice < whole


def test_models_of_plain_text_see_the_bare_context(dlm):
    set_template(dlm.tokenizer, "plain")
    whole, before = (dlm.sampler.rows.text(text) for text in ("Count from 1: 1 2", "Count from 1:"))
    assert dlm._encoded("Count from 1: ", "1 2") == (before, whole[len(before) :])


def test_a_likelihood_depends_on_nothing_but_its_own_request(dlm):
    asks = [("Count from 1 to 3:", " 1 2 3"), ("Who?", " the cat, a dog"), ("Count from 1 to 3:", " 3 2 1")]
    requests = [instance("loglikelihood", *ask) for ask in asks]
    together = [value for value, _ in dlm.loglikelihood(requests)]
    assert [value for value, _ in dlm.loglikelihood(requests[::-1])] == pytest.approx(
        together[::-1], rel=1e-5
    )
    assert [dlm.loglikelihood([request])[0][0] for request in requests] == pytest.approx(together, rel=1e-5)


def test_the_path_is_another_bound_one_token_a_call(checkpoint):
    path = DLM(str(checkpoint), likelihood="path", device="cpu", dtype="float32")
    drawn = DLM(str(checkpoint), draws=1, device="cpu", dtype="float32")
    exact = [instance("loglikelihood", "Count from 1:", text) for text in (" 1", " 2")]
    assert path.loglikelihood(exact)[0][0] == pytest.approx(drawn.loglikelihood(exact)[0][0], rel=1e-4)
    assert path.loglikelihood(exact)[1][0] == pytest.approx(drawn.loglikelihood(exact)[1][0], rel=1e-4)
    mixed = [instance("loglikelihood", "Count:", text) for text in (" 1 2 3", " 4", " the cat", " 3 2 1")]
    alone = [path.loglikelihood([request])[0][0] for request in mixed]
    assert [value for value, _ in path.loglikelihood(mixed)] == pytest.approx(alone, rel=1e-5)
    before, after = path._encoded("Count:", " 1 2 3")
    plan = path.sampler.plan(max_tokens=len(after), rate=1.0)
    (cost,) = path_costs(path.model, [(before, after)], plan)
    assert cost.calls == len(after)
    assert alone[0] == pytest.approx(-cost.total)
    with pytest.raises(ConfigError, match="nelbo, path"):
        DLM(str(checkpoint), likelihood="pth")


def test_the_log_says_how_sure_likelihoods_are(dlm, caplog):
    caplog.set_level("INFO", "lm_eval")
    dlm.loglikelihood([instance("loglikelihood", "Count:", text) for text in (" 1", " 1 2 3 4 5 6 7 8 9")])
    assert "2 log-likelihoods, 1 of them exact" in caplog.text
    assert re.search(r"standard error of the others: [\d.]+ nats in the mean, .* \(draws=4\)", caplog.text)


def test_requests_that_ask_for_the_same_share_the_model_calls(dlm):
    asks = [("Count from 1.", 12), ("Count from 2.", 12), ("Count from 3.", 6), ("Count from 1.", 12)]
    requests = [instance("generate_until", text, {"until": "x", "max_gen_toks": n}) for text, n in asks]
    texts = dlm.generate_until(requests, disable_tqdm=True)
    alone = [dlm.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert texts == alone
    assert texts[0] == texts[3]


def test_conversations_of_one_turn(dlm):
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert dlm.apply_chat_template(talk) == "Be short.\n\nHi"
    with pytest.raises(ConfigError, match="gen_prefix"):
        dlm.apply_chat_template([*talk, {"role": "assistant", "content": "x"}])


def test_few_shot_examples_are_turns_of_the_conversation(dlm):
    talk = [
        {"role": role, "content": f"Count from {i}."}
        for i in range(3)
        for role in (("user", "assistant") if i < 2 else ("user",))
    ]
    text = dlm.apply_chat_template(talk)
    (answer,) = dlm.generate_until([instance("generate_until", text, {"until": []})], disable_tqdm=True)
    assert answer == answers(dlm, talk, max_tokens=256)[0].text
    before, _ = dlm._encoded(text, " 1")
    assert before == dlm.sampler.rows.prompt(talk)
    long = [{**turn, "content": turn["content"] * 400} for turn in talk[:4]]
    kept = dlm._fitting(dlm.apply_chat_template([*long, *talk]))
    assert kept == talk, "the first examples go"


def test_the_harness_runs_few_shot_conversations(dlm, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"Count from {i}.", "answer": "1"}) + "\n" for i in range(4))
    )
    (tmp_path / "counting.yaml").write_text(GENERATE.format(file=data) + "fewshot_split: test\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=dlm, tasks=["counting"], task_manager=manager, bootstrap_iters=0, log_samples=True,
        num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=True, limit=2,
    )  # fmt: skip
    assert "counting" in found["results"]
    assert any(len(talk) == 5 for talk in dlm._talks.values())


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_longest_answer_has_several_names(dlm, name):
    (short,) = dlm.generate_until(
        [instance("generate_until", "Count from 1.", {"until": [], name: 3})], disable_tqdm=True
    )
    expected = answers(dlm, "Count from 1.", max_tokens=3)[0]
    assert short == expected.text


def test_options_of_tasks_that_are_not_followed_are_named_once(dlm, caplog):
    given = {"until": [], "temperature": 0.0, "do_sample": False, "max_length": 99, "max_gen_toks": 3}
    dlm.generate_until([instance("generate_until", "Count.", given)] * 2, disable_tqdm=True)
    for name in ("temperature", "do_sample", "max_length"):
        assert caplog.text.count(f"the task's {name} is not followed") == 1
    assert "max_gen_toks is not" not in caplog.text


def test_a_window_is_a_fixed_canvas_with_or_without_steps(checkpoint):
    long = [instance("generate_until", "Count from 1.", {"until": []})]
    for arguments in ({"window": 40}, {"window": 40, "steps": 4}, {"window": 40, "rate": 2}, {"steps": 4}):
        model = DLM(str(checkpoint), device="cpu", dtype="float32", **arguments)
        expected = model.sampler.generate(["Count from 1."], decoder=None, **arguments)[0]
        assert model.generate_until(long, disable_tqdm=True) == [expected.text], arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 40, "max_tokens": 20}, "max_tokens is for a canvas that grows"),
        ({"steps": 4, "rate": 2}, "either steps or a rate"),
        ({"likelihood": "path", "draws": 8}, "draws are for likelihood=nelbo"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
        ({"draws": "x"}, "draws: 'x' is not a number"),
        ({"max_tokens": "1.5"}, "max_tokens must be a whole number"),
        ({"rate": "x"}, "rate: 'x' is not a number"),
        ({"decoder": "threshold", "rate": 2}, "give no rate"),
    ],
)
def test_model_args_that_would_be_ignored_are_refused(checkpoint, wrong, message):
    with pytest.raises(ConfigError, match=message):
        DLM(str(checkpoint), device="cpu", dtype="float32", **wrong)


def test_the_name_is_registered_and_a_model_needed():
    from lm_eval.api.registry import get_model

    assert get_model("dlm") is DLM
    with pytest.raises(ConfigError, match="pretrained"):
        DLM()
    with pytest.raises(ConfigError, match="Did you mean 'decoder'"):
        DLM("x", decodr="conv")


def test_its_own_command_runs_without_a_gpu(checkpoint, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "Count from 1.", "answer": "1"}) + "\n")
    (tmp_path / "counting.yaml").write_text(GENERATE.format(file=data))
    words = [
        "run", "--model", "dlm", "--model_args", f"pretrained={checkpoint},decoder=conv,dtype=float32",
        "--tasks", "counting", "--include_path", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    main(words)
    assert "exact_match" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words[:4], f"pretrained={checkpoint},decodr=conv", *words[5:]])
    assert stop.value.code == 2
    assert "Did you mean 'decoder'" in capsys.readouterr().err


def test_long_contexts_are_cut_from_the_left(checkpoint):
    small = DLM(str(checkpoint), window=48, steps=4, draws=2, device="cpu", dtype="float32")
    long = " ".join(["Count"] * 300) + " from 1 to 3."
    (text,) = small.generate_until([instance("generate_until", long, {"until": []})], disable_tqdm=True)
    assert isinstance(text, str)
    assert small._fitting("short") == "short"
    assert small._fitting(long).endswith("1 to 3.")


def test_conversations_are_cut_until_the_whole_continuation_is_scored(checkpoint, caplog):
    model = DLM(str(checkpoint), draws=2, device="cpu", dtype="float32")
    positions, answer = model.sampler.spec.positions, model.maker.text("1 2 3 4 5 6 7")
    for turns in (positions // 4, positions):
        talk = [
            {"role": "user", "content": "Count to 2."}, {"role": "assistant", "content": "1 2"},
            {"role": "user", "content": " ".join(["Count"] * turns) + " to 7."},
        ]  # fmt: skip
        before, after = model._encoded(model.apply_chat_template(talk), " 1 2 3 4 5 6 7")
        assert after == answer
        assert len(before) + len(after) <= positions
        assert model.tokenizer.decode(before).count("to 7.") == 1, "what is cut is the beginning"
    assert not caplog.records
    long = " ".join(["1"] * positions)
    before, after = model._encoded("Count.", long)
    assert 0 < len(after) < len(model.maker.text(long))
    assert "is scored by its first" in caplog.text
    with pytest.raises(ConfigError, match="cannot be cut"):
        model._scored_part(answer, 0)


def test_choices_of_one_token_have_the_winner_of_the_exact_bound_in_every_way(checkpoint):
    from benchmarks.likelihood import WAYS, choices, winners

    asked = choices(6, seed=1)
    for choice in asked:
        assert len(set(choice.answers)) == 4
        a, sign, b = choice.question.removeprefix("What is ").removesuffix("?").split()
        assert int(choice.answers[choice.right]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    ways = {
        name: DLM(str(checkpoint), device="cpu", dtype="float32", **given) for name, given in WAYS.items()
    }
    exact = winners(ways["exact"], asked, "")
    assert all(winners(model, asked, "") == exact for model in ways.values())
    assert len(set(exact)) > 1


def test_only_the_space_of_the_harness_is_taken_from_a_continuation(dlm):
    text = dlm.sampler.rows.text
    for continuation, answer in (
        (" x = 1", "x = 1"),
        ("   x = 1", "  x = 1"),
        ("\n    x = 1", "\n    x = 1"),
    ):
        assert dlm._encoded("def f():", continuation)[1] == text(answer)
    assert text("x = 1") != text("\n    x = 1")


def test_choices_that_stand_in_the_context_share_their_noise(dlm, monkeypatch):
    """As in Winogrande: two contexts, one ending, one document."""
    drawn = []
    monkeypatch.setattr(
        "eval.nelbo._drawn_sets",
        lambda n, draws, key, original=_drawn_sets: drawn.append(int(key)) or original(n, draws, key),
    )
    ending = " counts from one to nine again."

    def asked(*docs):
        drawn.clear()
        dlm.loglikelihood(
            [Instance("loglikelihood", doc, (f"{name} says that he", ending), 0) for name, doc in docs]
        )
        return list(drawn)

    first, second = asked(("Ann", {"sentence": "x"}), ("Bob", {"sentence": "x"}))
    assert first == second
    first, second = asked(("Ann", {"sentence": "x"}), ("Bob", {"sentence": "y"}))
    assert first != second
    first, second = asked(("Ann", {}), ("Bob", {}))
    assert first != second
