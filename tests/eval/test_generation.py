"""Answers: turn after turn, kept at once, the same after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from decoding import Request, Sampler
from dlm import load_model
from dlm.cli import main
from dlm.errors import ConfigError, DataError, DLMError
from dlm.lock import alone_in
from dlm.origin import fingerprint
from dlm.pretrained.names import located
from eval.answers import AnswerFile
from eval.config import EvalConfig
from eval.evaluate import evaluate, evaluated
from eval.formats import model_answers, model_outputs
from eval.generation import generate
from eval.run import Results, answer_all
from eval.systems import Endpoint, Local, Reply
from eval.tasks import Question
from tests.eval.endpoint import serving

QUESTIONS = [
    Question("1", ("One?", "And two?")),
    Question("2", ("Three?",)),
    Question("3", ("Four?", "Five?")),
]


class Parrot:
    """Says how many messages it has seen, and the last one."""

    def __init__(self, most=99):
        self.seen, self.most = [], most

    def replies(self, conversations):
        for number, talk in enumerate(conversations):
            if len(self.seen) == self.most:
                raise KeyboardInterrupt
            self.seen.append(talk)
            yield number, Reply(f"{len(talk)}: {talk[-1]['content']}", tokens=2, model_calls=3, steps=4)


def test_later_turns_see_the_earlier_answers(tmp_path):
    parrot = Parrot()
    said = generate(QUESTIONS, parrot, AnswerFile(tmp_path / "a.jsonl"), quiet=True)
    assert said["1", 1].text == "3: And two?"
    assert parrot.seen[3] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1: One?"},
        {"role": "user", "content": "And two?"},
    ]
    assert len(said) == 5
    assert (said["2", 0].tokens, said["2", 0].model_calls, said["2", 0].steps) == (2, 3, 4)


def test_what_is_answered_is_not_asked_again(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        generate(QUESTIONS, Parrot(most=2), file, quiet=True)
    assert len(file.read()) == 2
    second = Parrot()
    said = generate(QUESTIONS, second, file, quiet=True)
    assert len(second.seen) == 3
    assert said == generate(QUESTIONS, Parrot(most=0), file, quiet=True)


def test_half_a_line_is_passed_over_and_mended(tmp_path):
    path = tmp_path / "a.jsonl"
    generate(QUESTIONS[1:2], Parrot(), AnswerFile(path), quiet=True)
    path.write_text(path.read_text() + '{"id": "3", "tu')
    assert set(AnswerFile(path).read()) == {("2", 0)}
    generate(QUESTIONS, Parrot(), AnswerFile(path), quiet=True)
    assert len(AnswerFile(path).read()) == 5
    path.write_text('{"id": 3\n' + path.read_text())
    with pytest.raises(DataError, match="line 1"):
        AnswerFile(path).read()


def test_formats_of_the_official_tools(tmp_path):
    said = generate(QUESTIONS, Parrot(), AnswerFile(tmp_path / "a.jsonl"), quiet=True)
    (first, *_) = model_outputs(QUESTIONS, said, "ours")
    assert first == {"instruction": "One?", "output": "1: One?", "generator": "ours", "dataset": ""}
    rows = model_answers(QUESTIONS, {k: v for k, v in said.items() if k != ("3", 1)}, "ours")
    assert [row["question_id"] for row in rows] == [1, 2]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["1: One?", "3: And two?"]}]
    assert {"answer_id", "model_id", "tstamp"} <= set(rows[0])


def test_an_endpoint_answers(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: f" heard {body['messages'][-1]['content']}", [429, 503]) as endpoint:
        system = Endpoint(endpoint.url, "m", 32, seed=7, concurrency=2)
        said = generate(QUESTIONS, system, AnswerFile(tmp_path / "a.jsonl"), quiet=True)
        assert said["1", 1].text == " heard And two?"
        assert said["1", 1].tokens == 3
        assert {body["seed"] for body in endpoint.seen} == {7}
        assert {body["max_tokens"] for body in endpoint.seen} == {32}


def test_texts_do_not_depend_on_the_batch(model, tokenizer, tmp_path):
    texts = []
    for size in (1, 4):
        system = Local(Sampler(model, tokenizer), size, Request(max_tokens=12), seed=3)
        file = AnswerFile(tmp_path / f"{size}.jsonl")
        texts.append([a.text for a in generate(QUESTIONS, system, file, quiet=True).values()])
    assert texts[0] == texts[1]


def config(checkpoint, questions_file, tmp_path, **more):
    return EvalConfig(
        task="alpaca_eval", model=str(checkpoint), data=str(questions_file), output=str(tmp_path / "runs"),
        device="cpu", dtype="float32", **{"window": 48, "steps": "6", **more},
    )  # fmt: skip


def test_an_evaluation_from_questions_to_measures(checkpoint, questions_file, tmp_path):
    settings = config(
        checkpoint, questions_file, tmp_path, decoders="conv(kernel_size=9),top-k", nelbo_draws=4
    )
    conv, top = evaluate(settings)
    assert conv.card.label == "conv,K=9,L=48,S=6"
    assert {"stutter", "empty", "model_calls", "tokens_per_call", "log_prior"} <= set(conv.means)
    assert len(conv.answers) == len(conv.measured) == 6
    assert conv.means["nelbo"] == top.means["nelbo"]
    assert conv.means["nelbo"].mean > 0
    answers = list(conv.answers.values())
    assert conv.means["model_calls"].mean == pytest.approx(sum(a.model_calls for a in answers) / 6)
    assert conv.whole["seconds"] == pytest.approx(sum(a.seconds for a in answers))
    assert all(len(a.reveal_step) == a.tokens for a in answers)
    outputs = json.loads((conv.folder / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == [f"Count from {i} to {i + 2}." for i in range(6)]
    again = evaluate(settings)
    assert [r.answers for r in again] == [conv.answers, top.answers]  # seconds too: nothing ran
    assert not list(conv.folder.glob("part-*"))


def test_a_run_notes_what_the_decoder_of_the_checkpoint_is(checkpoint, questions_file, tmp_path):
    file = checkpoint / "config.json"
    facts = json.loads(file.read_text())
    facts["generation"] = {"decoder": "llada-conv", "options": {"kernel_size": 9}, "window": 48}
    file.write_text(json.dumps(facts))
    for decoders, stands_for in (("", "llada-conv(kernel_size=9)"), ("conv", "")):
        (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=1, decoders=decoders))
        assert (run.card.decoder, run.card.stands_for) == (decoders, stands_for)


def test_other_settings_do_not_mix_with_what_is_there(checkpoint, questions_file, tmp_path):
    (first,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    with pytest.raises(ConfigError, match="settings was"):
        evaluate(config(checkpoint, questions_file, tmp_path, limit=2, seed=5))
    (longer,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=5))
    assert len(longer.answers) == 5
    assert longer.answers["0", 0] == first.answers["0", 0]
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match="fingerprint"):
        evaluate(config(checkpoint, questions_file, tmp_path, limit=2))


def test_an_endpoint_is_evaluated_graded_and_compared_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data, prompts = tmp_path / "q.jsonl", tmp_path / "p.jsonl"
    rows = [{"question_id": i, "category": "writing", "turns": ["Write.", "Again."]} for i in (81, 82)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = {"system_prompt": "s", "prompt_template": "{question} {answer}"}
    both = {"system_prompt": "s", "prompt_template": "{question_2} {answer_2}"}
    pair = {"system_prompt": "p", "prompt_template": "{question} {answer_a} {answer_b}"}
    pairs = {"system_prompt": "p", "prompt_template": "{question_1} {answer_a_2} {answer_b_2}"}
    named = {"single-v1": single, "single-v1-multi-turn": both, "pair-v2": pair, "pair-v2-multi-turn": pairs}
    prompts.write_text("".join(json.dumps({"name": k, **v}) + "\n" for k, v in named.items()))

    def reply(body):
        asks = {"s": "Rating: [[6]]", "p": "[[A]]"}
        return asks.get(body["messages"][0]["content"], f"I am {body['model']}")

    with serving(reply) as endpoint:
        for name in ("one", "two"):
            words = ["eval", "mt_bench", "--endpoint", endpoint.url, "--endpoint_model", name]
            assert main([*words, "--data", str(data), "--output", str(tmp_path / "runs")]) == 0
        folders = sorted(str(file.parent) for file in (tmp_path / "runs").rglob("run.json"))
        common = ["--data", str(data), "--prompts", str(prompts), "--judge.url", endpoint.url]
        common += ["--judge.model", "j", "--judge.cache", str(tmp_path / "cache")]
        assert main(["eval", "judge", *folders, "--method", "mt_bench", *common]) == 0
        assert main(["eval", "judge", *folders, "--method", "mt_bench_pairs", *common]) == 0
    assert "inconsistent 4" in capsys.readouterr().out
    first, second = (Results.load(Path(folder)) for folder in folders)
    assert first.means["grade"].mean == 6.0
    assert first.answers["82", 1].text == "I am one"
    assert second.means["win"].mean == 0.5
    assert [verdict.method for verdict in second.verdicts] == ["mt_bench", "mt_bench_pairs"]


def test_an_endpoints_text_is_kept_as_it_is(tmp_path):
    with serving(lambda body: "    return 1\n") as endpoint:
        ((_, reply),) = Endpoint(endpoint.url, "m", 8).replies([[{"role": "user", "content": "x"}]])
    assert reply.text == "    return 1\n"


def test_replies_of_an_endpoint_are_kept_as_they_come_and_a_refusal_costs_one_answer(tmp_path, caplog):
    """A slow first reply holds no other back; what is refused for good is an empty answer."""
    slow = threading.Event()

    def reply(body):
        text = body["messages"][0]["content"]
        if text == "0?":
            slow.wait(20)
        return (400, "filtered") if text == "2?" else text

    talks = [[{"role": "user", "content": f"{i}?"}] for i in (5, 0, 1, 2, 3)]  # the first one goes alone
    with serving(reply) as endpoint:
        replies, found = Endpoint(endpoint.url, "m", 8, concurrency=4).replies(talks), {}
        for number, one in replies:
            found[number] = one
            if len(found) == 3:
                assert sorted(found) == [0, 2, 4]
                slow.set()
    assert [found[i].text for i in range(5)] == ["5?", "0?", "1?", "", "3?"]
    assert found[3].finish_reason == "refused"
    assert "filtered" in caplog.text
    with serving(lambda body: (400, "filtered")) as endpoint, pytest.raises(DLMError, match="filtered"):
        list(Endpoint(endpoint.url, "m", 8).replies(talks))


def test_what_is_refused_in_the_end_ends_a_run_that_has_answers(tmp_path):
    """All that is still due may be what is refused; without any answer it is an error."""
    file = AnswerFile(tmp_path / "a.jsonl")
    with serving(lambda body: "Yes.") as endpoint:
        generate(QUESTIONS[:1], Endpoint(endpoint.url, "m", 8), file, quiet=True)
    with serving(lambda body: (400, "filtered")) as endpoint:
        found = generate(QUESTIONS[:2], Endpoint(endpoint.url, "m", 8), file, quiet=True)
        assert [answer.finish_reason for answer in found.values()] == ["stop", "stop", "refused"]
        other = AnswerFile(tmp_path / "b.jsonl")
        with pytest.raises(DLMError, match="filtered"):
            generate(QUESTIONS[:2], Endpoint(endpoint.url, "m", 8), other, quiet=True)


def test_a_failure_ends_the_replies_behind_those_under_way():
    def reply(body):
        text = body["messages"][0]["content"]
        return (401, "no entry") if text == "3?" else text

    found = []
    with serving(reply) as endpoint:
        talks = [[{"role": "user", "content": f"{i}?"}] for i in range(40)]
        replies = Endpoint(endpoint.url, "m", 8, concurrency=2).replies(talks)
        with pytest.raises(DLMError, match="no entry"):
            found.extend(replies)
        assert len(endpoint.seen) < 40


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "It"}, {"type": "text", "text": " is."}]}, "It is."),
        ({"content": None}, ""),
        (None, None),
    ],
)  # fmt: skip
def test_a_reply_is_a_text_with_a_number_of_tokens(message, text, tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    with serving(lambda body: {"message": message}) as endpoint:
        system = Endpoint(endpoint.url, "m", 8)
        if text is None:
            with pytest.raises(DLMError, match="holds no message"):
                generate(QUESTIONS[:1], system, file, quiet=True)
            return
        generate(QUESTIONS[:1], system, file, quiet=True)
    assert {answer.text for answer in file.read().values()} == {text}


def test_a_model_by_name_is_told_by_its_files():
    assert fingerprint("default") == fingerprint(located("default")) != fingerprint("default-sft")
    assert fingerprint("someone/something").startswith("name:")


def test_another_chat_template_is_another_model(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert fingerprint(str(copy)) == fingerprint(str(checkpoint))
    template = copy / "chat_template.jinja"
    template.write_text("Be rude. " + template.read_text())
    assert fingerprint(str(copy)) != fingerprint(str(checkpoint))


def test_answers_stay_with_their_questions(checkpoint, questions_file, tmp_path):
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    rows = json.loads(questions_file.read_text())
    questions_file.write_text(json.dumps([{**row, "instruction": "Something else."} for row in rows]))
    with pytest.raises(DataError, match="question 0 was another one"):
        evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    words = ["eval", "judge", str(run.folder), "--data", str(questions_file), "--judge.model", "j"]
    assert main([*words, "--method", "geval", "--judge.dry_run"]) == 1


def test_a_judge_finds_the_questions_that_a_run_was_given(checkpoint, questions_file, tmp_path, capsys):
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    words = ["eval", "judge", str(run.folder), "--judge.model", "j", "--method", "geval", "--judge.dry_run"]
    assert main(words) == 0
    assert "2 requests" in capsys.readouterr().out
    questions_file.unlink()
    assert main(words) == 2
    assert "its questions are no longer at" in capsys.readouterr().err


def test_a_shorter_run_tells_of_no_more_than_it_measured(checkpoint, questions_file, tmp_path):
    evaluate(config(checkpoint, questions_file, tmp_path))
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    assert len(run.answers) == len(run.measured) == 2
    assert run.whole["seconds"] == pytest.approx(sum(a.seconds for a in run.answers.values()))


def test_a_variant_that_cannot_be_does_not_take_the_others_with_it(
    checkpoint, questions_file, tmp_path, caplog
):
    decoders = "semi-ar(block_size=2),top-k"
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, decoders=decoders, limit=2))
    assert run.card.decoder == "top-k"
    assert "semi-ar" in caplog.text
    assert "too few" in caplog.text
    with pytest.raises(ConfigError, match="too few"):
        evaluate(config(checkpoint, questions_file, tmp_path, decoders="semi-ar(block_size=2)", limit=2))


def test_an_evaluation_that_lacks_something_says_so_and_ends_with_1(
    checkpoint, questions_file, tmp_path, capsys
):
    words = ["eval", "alpaca_eval", "--model", str(checkpoint), "--data", str(questions_file), "--limit", "2"]
    words += ["--window", "48", "--steps", "6", "--device", "cpu", "--output", str(tmp_path / "runs")]
    assert main([*words, "--decoders", "semi-ar(block_size=2),top-k"]) == 1
    out = capsys.readouterr()
    assert "missing: tiny, semi-ar,B=2,L=48,S=6" in out.err
    assert "top-k" in out.out
    assert main([*words, "--decoders", "top-k"]) == 0


def test_answers_that_do_not_come_are_counted(checkpoint, questions_file, tmp_path, monkeypatch):
    def lose(folder, card, questions, system, share):
        answer_all(folder, card, questions[:4], system, share)

    monkeypatch.setattr("eval.evaluate.answer_all", lose)
    results, lacks = evaluated(config(checkpoint, questions_file, tmp_path))
    assert results == []
    assert lacks == ["tiny, default,L=48,S=6: 2 of 6 answers"]


def test_two_processes_do_not_answer_in_one_folder(checkpoint, questions_file, tmp_path):
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    with alone_in(run.folder), pytest.raises(ConfigError, match="another process is writing there"):
        evaluate(config(checkpoint, questions_file, tmp_path, limit=4))
    assert len(Results.load(run.folder).answers) == 2
    (other,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=4))
    assert len(other.answers) == 4


def test_an_output_folder_is_tried_before_anything_is_loaded(questions_file, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("")
    monkeypatch.setattr("eval.evaluate.load_questions", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="runs: cannot be written to"):
        evaluate(config("no-model", questions_file, tmp_path))


def test_a_model_that_began_with_nothing_has_no_reader(
    checkpoint, questions_file, tmp_path, monkeypatch, caplog
):
    """Nor is the current folder taken for one."""
    (checkpoint / "run.json").write_text(json.dumps({"config": {"model": {"init": ""}}}))
    monkeypatch.chdir(tmp_path)
    (run,) = evaluate(config(checkpoint, questions_file, tmp_path, limit=2))
    assert "nll" not in run.means
    assert "no reader: the records of" in caplog.text
    caplog.clear()
    evaluate(config(checkpoint, questions_file, tmp_path, limit=2, reader=""))
    assert "no reader" not in caplog.text


def test_questions_that_fill_the_window_are_left_out_for_all(checkpoint, questions_file, tmp_path, caplog):
    rows = json.loads(questions_file.read_text())
    rows[2]["instruction"] = "Count on. " * 40
    questions_file.write_text(json.dumps(rows))
    runs = evaluate(config(checkpoint, questions_file, tmp_path, decoders="conv,top-k"))
    assert [sorted(run.answers) for run in runs] == [[(str(i), 0) for i in (0, 1, 3, 4, 5)]] * 2
    assert "1 of 6 questions fill the window of 48 tokens and are left out" in caplog.text
    with pytest.raises(ConfigError, match="none of the 6 questions fits in a window of 4 tokens"):
        evaluate(config(checkpoint, questions_file, tmp_path, window=4, steps="2"))


def test_instruments_are_found_missing_before_anything_is_answered(checkpoint, questions_file, tmp_path):
    with pytest.raises(DLMError, match="nothing-here"):
        evaluate(config(checkpoint, questions_file, tmp_path, reader=str(tmp_path / "nothing-here")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "\ud800", "\N{SNOWMAN}\n\x00"])
def test_whatever_an_endpoint_says_can_be_read_again(text, tmp_path):
    class Odd:
        def replies(self, conversations):
            yield from ((number, Reply(text)) for number in range(len(conversations)))

    file = AnswerFile(tmp_path / "a.jsonl")
    generate(QUESTIONS, Odd(), file, quiet=True)
    assert {answer.text for answer in file.read().values()} == {text}


def command_words(checkpoint, questions_file, output):
    return [
        "eval", "alpaca_eval", "--model", str(checkpoint),
        "--data", str(questions_file), "--output", str(output), "--max_tokens", "24", "--rate", "1",
        "--device", "cpu", "--dtype", "float32", "--batch_size", "1",
    ]  # fmt: skip


def command(checkpoint, questions_file, output, **env):
    words = [sys.executable, "-m", "dlm.cli", *command_words(checkpoint, questions_file, output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **pipes)


def test_after_a_kill_the_same_texts_come(checkpoint, questions_file, tmp_path):
    rows = json.loads(questions_file.read_text())
    many = [{**row, "instruction": f"{row['instruction']} {i}"} for i in range(8) for row in rows]
    questions_file.write_text(json.dumps(many))
    running = command(checkpoint, questions_file, tmp_path / "killed")
    parts = tmp_path / "killed" / "alpaca_eval"
    while not (found := list(parts.rglob("part-0.jsonl"))) or found[0].read_text().count("\n") < 3:
        assert running.poll() is None, running.stderr.read().decode()[-2000:]
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = AnswerFile(found[0]).read()
    assert 3 <= len(before) < 48
    for output in ("killed", "whole"):
        assert main(command_words(checkpoint, questions_file, tmp_path / output)) == 0
    folders = [next((tmp_path / output).rglob("run.json")).parent for output in ("killed", "whole")]
    killed, whole = (Results.load(folder) for folder in folders)
    assert {k: a.text for k, a in killed.answers.items()} == {k: a.text for k, a in whole.answers.items()}
    assert all(killed.answers[key] == answer for key, answer in before.items())  # not asked again
    assert list(killed.answers) == list(whole.answers)


def test_two_processes_share_the_questions(checkpoint, questions_file, tmp_path):
    from socket import socket

    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = {**where, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    both = [
        command(checkpoint, questions_file, tmp_path / "two", RANK=str(i), LOCAL_RANK=str(i), **common)
        for i in (0, 1)
    ]
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert main(command_words(checkpoint, questions_file, tmp_path / "one")) == 0
    two, one = (Results.load(next((tmp_path / x).rglob("run.json")).parent) for x in ("two", "one"))
    assert [(a.id, a.text) for a in two.answers.values()] == [(a.id, a.text) for a in one.answers.values()]
    assert len(two.answers) == 6


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("runs/step-1.5e-4", "step-1.5e-4"),
        ("models/a.Q4.gguf", "a.Q4"),
    ],
)
def test_systems_are_called_by_their_whole_name(path, name):
    assert EvalConfig(task="gsm8k", model=path).system == name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": ""}, "name a task"),
        ({"task": "alpaca"}, "Did you mean 'alpaca_eval'"),
        ({"model": ""}, "one of --model, --endpoint"),
        ({"model": "x", "endpoint": "http://x"}, "one of"),
        ({"model": "", "endpoint": "http://x", "steps": "4"}, "are for --model"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": -1}, "limit"),
        ({"dtype": "float3"}, "Did you mean 'float32'"),
        ({"endpoint_model": "x"}, "endpoint_model is for --endpoint"),
        ({"model": "", "endpoint": "http://x", "eos_fill": False}, "eos_fill is for --model"),
        ({"usual_rows": 10}, "usual_rows is for --usual"),
        ({"usual": "rows.json", "reader": ""}, "usual is for a --reader"),
    ],
)
def test_settings_that_cannot_work(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**{"task": "gsm8k", "model": "m", **wrong})


def test_each_endpoint_is_asked_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = tmp_path / "q.json"
    data.write_text(json.dumps([{"instruction": "Say it.", "output": "It."}]))
    with serving(lambda body: "one") as first, serving(lambda body: "two") as second:
        words = ["eval", "alpaca_eval", "--data", str(data), "--output", str(tmp_path / "runs"), "--reader="]
        assert main([*words, "--endpoint", first.url]) == 0
        assert main([*words, "--endpoint", second.url]) == 2
        assert main([*words, "--endpoint", second.url, "--name", "other"]) == 0
        assert (len(first.seen), len(second.seen)) == (1, 1)


def test_a_conversation_without_room_has_an_empty_answer(model, tokenizer):
    talks = [[{"role": "user", "content": text}] for text in ("Say it.", "word " * 60, "Say it again.")]
    request = Request(window=48, steps=4)
    replies = [reply for _, reply in Local(Sampler(model, tokenizer), 2, request, seed=3).replies(talks)]
    assert [(reply.text == "", reply.finish_reason) for reply in replies][1] == (True, "length")
    alone = Local(Sampler(model, tokenizer), 2, request, seed=3).replies(talks[::2])
    assert [reply.text for reply in replies[::2]] == [reply.text for _, reply in alone]


def test_references_longer_than_the_model_have_no_bound(checkpoint, tmp_path, caplog):
    data, longest = tmp_path / "q.json", load_model(checkpoint, device="cpu")[0].spec.positions
    rows = [("Say it.", "It."), ("Say much.", "word " * longest)]
    data.write_text(json.dumps([{"instruction": a, "output": b} for a, b in rows]))
    (run,) = evaluate(config(checkpoint, data, tmp_path, nelbo_draws=2))
    assert run.means["nelbo"].count == 1
    assert "1 of 2 references are longer" in caplog.text
