"""Order tables that learn: on a toy with one right order, from recorded answers, and by the commands."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch

from decoding import Request, Sampler
from decoding.reveal.order_table import OrderTable
from dlm.cli import main, parse, script
from dlm.errors import ConfigError, DataError
from eval.answers import Answer
from eval.commands.orders import COMMAND, LEARN
from eval.orders import Progress, credit, learn_offline, learn_online, relative, run_folders
from eval.tasks import Question
from tests.fakes import FakeDenoiser, FakeTokenizer

RIGHT, WRONG, LONG, SHAPE = 1, 2, 8, (8, 16, 1)
QUESTIONS = [Question(str(i), (chr(97 + i) + "x",)) for i in range(16)]
HOW = Request(window=2 + LONG, steps=LONG)
EARLY = {"warm_up": 0.0, "switch": 0.0, "ready": 8}


class Leftmost(FakeDenoiser):
    """A right token, of middling confidence, where the left neighbour is written; else a wrong one.

    Wrong ones are surer than that at odd positions and less sure at even ones, so that neither the most nor
    the least confident first is right.
    """

    def hidden(self, input_ids, attention_mask=None):
        before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0), value=1)
        told = (before != self.mask_id).long() * 100
        return (told + torch.arange(input_ids.shape[1]))[..., None]

    def logits(self, hidden):
        code = hidden[:, 0]
        p = torch.where(code >= 100, 0.45, torch.where(code % 2 == 1, 0.6, 0.3)).double()
        token = torch.where(code >= 100, RIGHT, WRONG)
        others = ((1 - p) / (self.vocab - 2)).log()[:, None].expand(-1, self.vocab)
        logits = others.scatter(1, token[:, None], p.log()[:, None]).float()
        logits[:, self.mask_id] = -math.inf
        return logits


def right(question, answer):
    """Twice the number of right tokens of an answer."""
    return 2 * answer.count(chr(97 + RIGHT))


def mean_reward(sampler, decoder, **options):
    outs = sampler.generate([q.opening for q in QUESTIONS], decoder=decoder, options=options, window=2 + LONG,
                            steps=LONG, seed=77)  # fmt: skip
    return sum(right(None, out.text) for out in outs) / len(outs)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(Leftmost(), FakeTokenizer())


@pytest.fixture(scope="module")
def learnt(sampler):
    options = {**EARLY, "draws": 4}
    going = learn_online(sampler, QUESTIONS, right, OrderTable.empty(SHAPE), HOW, options=options,
                         rounds=25, seed=5)  # fmt: skip
    return list(going)


def test_a_table_that_has_learnt_finds_the_one_right_order(sampler, learnt):
    table = learnt[-1].table
    assert mean_reward(sampler, "dprm", table=table, **EARLY) >= 13  # of 16
    others = {"confidence": mean_reward(sampler, "llada")}
    for control in ("gate", "counts", "shuffled", "entropy"):
        others[control] = mean_reward(sampler, "dprm", table=table, control=control, **EARLY)
    assert max(others.values()) <= 10, others
    first, last = ([r for part in parts for r in part.rewards] for parts in (learnt[:5], learnt[-5:]))
    assert sum(last) / len(last) > sum(first) / len(first)


def test_every_token_of_every_answer_is_credited_once(learnt):
    assert [progress.table.tokens for progress in learnt] == [16 * LONG * (i + 1) for i in range(25)]
    rewards = [reward for progress in learnt for reward in progress.rewards]
    total = float(learnt[-1].table.log_sums.flatten().logsumexp(0))
    assert total == pytest.approx(math.log(LONG * sum(math.exp(reward) for reward in rewards)))


def test_learning_is_the_same_again_and_goes_on_from_a_table(sampler, learnt):
    settings = {"options": {**EARLY, "draws": 4}}
    once = list(
        learn_online(sampler, QUESTIONS, right, OrderTable.empty(SHAPE), HOW, rounds=2, seed=5, **settings)
    )
    assert [progress.table for progress in once] == [progress.table for progress in learnt[:2]]
    start = once[0].table
    (again,) = learn_online(sampler, QUESTIONS, right, start, HOW, seed=6, **settings)
    assert again.table == once[1].table


def test_traces_that_were_recorded_teach_the_same(sampler):
    empty = OrderTable.empty()
    online = list(learn_online(sampler, QUESTIONS, right, empty, HOW, seed=3))[-1].table
    settings = {"window": 2 + LONG, "steps": LONG, "seed": 3, "decoder": "dprm"}
    written = sampler.iter_traced([q.opening for q in QUESTIONS], **settings)
    answers = [
        (question, Answer(question.id, 0, out.text, trace=json.loads(json.dumps(asdict(trace)))))
        for question, (out, trace) in zip(QUESTIONS, written, strict=True)
    ]
    assert learn_offline(answers, right, empty).table == online


def test_an_answer_without_a_reward_teaches_nothing():
    trace = {"elapsed": [0.1, 0.5], "confidence": [0.2, 0.9], "place": [0.0, 0.5]}
    table = credit(OrderTable.empty(), trace, 2.0)
    assert table.tokens == 2
    assert credit(table, trace, math.nan) == table
    assert credit(table, {name: [] for name in trace}, 1.0) == table
    progress = learn_offline([(QUESTIONS[0], Answer("0", 0, "x", trace=trace))], lambda *_: math.nan, table)
    assert isinstance(progress, Progress)
    assert progress.table == table


def test_traces_that_are_none_are_named():
    for trace, message in (
        (None, "question 7 has no trace: run dlm eval with --trace"),
        ({"elapsed": [0.1]}, "the trace of the answer to question 7 is none"),
        ({"elapsed": ["a"], "confidence": [1], "place": [1]}, "question 7 is none"),
        ({"elapsed": [0.1, 0.2, 0.3], "confidence": [1, 1], "place": [1]}, "question 7 is none"),
    ):
        with pytest.raises(DataError, match=message):
            learn_offline([(QUESTIONS[0], Answer("7", 0, "x", trace=trace))], right, OrderTable.empty())
    with pytest.raises(DataError, match="no run of `dlm eval` there"):
        run_folders(["nowhere"])


def test_rewards_within_a_prompt_count_from_its_free_energy():
    rewards, groups = [1.0, 3.0, 5.0, math.nan, 2.0, math.nan], ["a", "a", "b", "b", "c", "d"]
    level = math.log((math.exp(2) + math.exp(6)) / 2) / 2
    got = relative(rewards, groups, beta=2.0)
    assert got == pytest.approx([1 - level, 3 - level, 0, math.nan, 0, math.nan], nan_ok=True)
    assert relative([1e9, -1e9], ["a", "a"], 1.0)[0] == pytest.approx(math.log(2))


def test_easy_prompts_do_not_make_good_cells(sampler):
    """Two prompts, of which one gives much whatever is written: what is left is what the order did."""

    def unfair(question, answer):
        return right(question, answer) / 4 + (10 if question.id == "3" else -10)

    def learnt_from(**how):
        empty = OrderTable.empty((1, 16, 1))
        going = learn_online(
            sampler, QUESTIONS[2:4], unfair, empty, HOW, options={"draws": 1}, rounds=6, **how
        )
        return list(going)[-1]

    samples = learnt_from(samples=8)
    assert len(samples.rewards) == 16
    assert samples.table.tokens == 6 * 16 * LONG
    assert abs(samples.table.overall) < 1e-9  # every prompt counts from its own level
    assert learnt_from().table.overall > 8


def test_samples_have_seeds_of_their_own_and_stay_together(sampler):
    asked = []

    class Asked:
        def iter_traced(self, prompts, *, seed, **rest):
            asked.append((len(prompts), tuple(seed)))
            return sampler.iter_traced(prompts, seed=seed, **rest)

    settings = {"rounds": 2, "samples": 3, "seed": 4, "batch_size": 7}
    list(learn_online(Asked(), QUESTIONS[:3], right, OrderTable.empty(), HOW, **settings))
    first, second = (4, 5, 6), (7, 8, 9)
    assert asked == [(6, first * 2), (3, first), (6, second * 2), (3, second)]


# ---- the commands ------------------------------------------------------------------------------------


def none(prompts, completions):
    """A reward of no answer."""
    return [math.nan for _ in completions]


def length(prompts, completions):
    """A reward."""
    return [len(text) / 100 for text in completions]


@pytest.fixture
def place(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "home"))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"instruction": f"Count to {i}.", "output": "One, two."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


OWN = ["--reward", "tests.eval.test_orders:length"]
ASK = ["--model", "model", "--task", "file", "--data", "rows.json", "--max_tokens", "12", *OWN]


def learn(*words):
    return script("dlm orders learn", LEARN, list(words))


def test_a_table_is_learnt_saved_under_a_name_and_used(place, capsys):
    assert learn(*ASK, "--output", "mine", "--batch_size", "2", "--rounds", "2") == 0
    out = capsys.readouterr().out
    assert "8 of 8 answers with a reward" in out
    table = OrderTable.named("mine")
    assert str(place / "home" / "orders" / "mine.json") in out
    assert table.shape == (8, 16, 4)
    assert learn(*ASK, "--output", "mine") == 2
    assert "is there already" in capsys.readouterr().err
    assert learn(*ASK, "--start", "mine", "--output", "b.safetensors") == 0
    assert OrderTable.load("b.safetensors").tokens > table.tokens
    capsys.readouterr()
    assert script("dlm orders", COMMAND, []) == 0
    shown = capsys.readouterr().out
    assert f"mine: {table.tokens} tokens" in shown
    assert shown.count("phase") == 8
    assert script("dlm orders", COMMAND, ["b.safetensors"]) == 0
    assert script("dlm orders", COMMAND, ["other"]) == 2
    assert "unknown order table 'other'" in capsys.readouterr().err


def test_what_is_shown_is_the_mean_of_the_cells(place, capsys):
    rewards = torch.tensor([1.0, 3.0, -2.0])
    table = OrderTable.empty((2, 2, 1)).credited(torch.tensor([0, 1, 3]), rewards)
    table.save("t.json")
    assert script("dlm orders", COMMAND, ["t.json"]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    early = math.log((math.exp(1) + math.exp(3)) / 2)
    assert ["phase", "0", "2", f"{early:+.3f}"] in lines
    assert ["phase", "0.5", "1", "-2.000"] in lines
    assert ["confidence", "0.5", "2", f"{math.log((math.exp(3) + math.exp(-2)) / 2):+.3f}"] in lines


def evaluated(words):
    from eval.commands.eval import COMMAND as EVAL

    return script(
        "dlm eval", EVAL, ["file", "--model", "model", "--data", "rows.json", "--reader", "", *words]
    )


def test_recorded_answers_teach_a_table_and_its_contents_are_part_of_a_run(place, capsys):
    fast = ["--max_tokens", "12", "--output", "runs"]
    assert evaluated([*fast, "--decoders", "llada,conv(kernel_size=5)", "--trace"]) == 0
    assert learn("runs", "--output", "within", "--within_prompts", *OWN) == 0
    assert abs(OrderTable.named("within").overall) < 1
    assert learn("runs", "--output", "late", *OWN) == 0
    assert OrderTable.named("late").tokens == OrderTable.named("within").tokens
    assert OrderTable.named("late") != OrderTable.named("within")
    capsys.readouterr()
    assert learn("runs", "--output", "late2", *OWN) == 0
    table = OrderTable.named("late")
    assert "8 of 8 answers" in capsys.readouterr().out
    assert evaluated([*fast, "--decoders", "dprm(table=late,control=shuffled,normalise=true)"]) == 0
    (folder,) = (place / "runs" / "file").glob("*dprm*")
    assert "dprm,table=late,control=shuffled,normalise=true" in folder.name
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["table"] == table.digest
    assert settings["control"] == "shuffled"
    (place / "home" / "orders" / "late.json").unlink()
    OrderTable.empty().save(place / "home" / "orders" / "late.json")
    capsys.readouterr()
    assert evaluated([*fast, "--decoders", "dprm(table=late,control=shuffled,normalise=true)"]) == 2
    assert "holds a run whose settings was" in capsys.readouterr().err
    assert learn("runs", "--output", "more", *OWN) == 1
    assert "has no trace: run dlm eval with --trace" in capsys.readouterr().err


def test_a_table_goes_from_the_command_line_to_the_plan(place, capsys):
    from decoding.commands.generate import COMMAND as GENERATE

    OrderTable.empty().save("t.json")
    words = ["--model", "model", "--max_tokens", "6", "--decoder", "dprm", "--options.table"]
    assert script("dlm generate", GENERATE, [*words, "t.json", "--options.normalise", "true", "hello"]) == 0
    assert script("dlm generate", GENERATE, [*words, "missing.json", "hello"]) == 1
    assert "missing.json: no such order table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--task", "rules"], "give --output"),
        (["--output", "t"], "give folders of runs, or --model and --task"),
        (["--output", "t", "--model", "m", "--task", "wiki"], "task 'wiki' has no program's check"),
        (["--output", "t", "runs", "--task", "rules"], "give no --task with runs"),
        (["--output", "t", "runs", "--draws", "2"], "give no --draws with runs"),
        (["--output", "t", "--model", "m", "--task", "rules", "--within_prompts"], "give --samples"),
        (["--output", "t", "--model", "m", "--task", "rules", "--samples", "32"], "at least 32, got 16"),
        (["--output", "t", "runs", "--model", "m"], "give no --model with runs"),
        (["--output", "t", "runs", "--start", "s", "--beta", "2"], "that of the table to go on from"),
        (["--output", "t", "runs", "--beta", "0"], "beta must be above 0"),
        (["--output", "t", "--model", "m", "--task", "rules", "--rate", "1", "--steps", "2"], "not both"),
        (["--output", "t", "--model", "m", "--task", "rules", "--batch_size", "0"], "at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(SystemExit):
        parse("dlm orders learn", LEARN, words)
    assert message in capsys.readouterr().err


def test_an_output_or_a_reward_that_cannot_be_is_refused_before_the_model_is_read(place, capsys):
    assert learn(*ASK, "--output", "table.txt") == 2
    error = capsys.readouterr().err
    assert "a .json or .safetensors file, got 'table.txt'" in error
    assert "Loading" not in error
    assert learn(*ASK[:-1], "lenght=3", "--output", "mine") == 2
    error = capsys.readouterr().err
    assert "unknown reward" in error
    assert "Loading" not in error
    with pytest.raises(ConfigError, match="none has a name yet"):
        OrderTable.named("mine")


def test_a_question_that_is_too_long_is_left_out_and_a_kill_loses_nothing(place, capsys, caplog, monkeypatch):
    rows = json.loads((place / "rows.json").read_text())
    rows.insert(2, {"instruction": "Count. " * 400, "output": "One."})
    (place / "rows.json").write_text(json.dumps(rows))
    window = [word for word in ASK if word not in ("--max_tokens", "12")]
    assert (
        learn(*window, "--window", "60", "--steps", "6", "--batch_size", "2", "--output", "short.json") == 0
    )
    assert "4 of 4 answers with a reward" in capsys.readouterr().out
    assert "1 of 5 questions fill the window of 60 tokens" in caplog.text

    def killed(*words, **fields):
        yield from itertools.islice(learn_online(*words, **fields), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.orders.learn_online", killed)
    assert learn(*window, "--window", "60", "--steps", "6", "--batch_size", "2", "--output", "some.json") != 0
    assert 0 < OrderTable.load("some.json").tokens < OrderTable.load("short.json").tokens


def test_answers_without_any_reward_make_no_table(place, capsys):
    words = [word for word in ASK if word not in OWN]
    assert learn(*words, "--reward", "tests.eval.test_orders:none", "--output", "empty.json") == 2
    assert "none of the 4 answers has a reward 'tests.eval.test_orders:none'" in capsys.readouterr().err
    assert not (place / "empty.json").exists()


def test_decoders_that_write_tokens_again_have_no_trace(place, capsys):
    words = ["eval", "file", "--model", "model", "--data", "rows.json", "--window", "60", "--steps", "6",
             "--decoders", "remdm", "--trace", "true", "--reader", ""]  # fmt: skip
    assert main(words) == 2
    assert "a trace is of tokens that stay; decoder 'remdm' writes some again" in capsys.readouterr().err
