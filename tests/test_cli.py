import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlm.cli import commands, main, parse


def dlm(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "dlm.cli", *words], capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    from dlm.backbone import from_scratch
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("model")
    model = from_scratch(TINY, tokenizer)
    model.config.generation = {"decoder": "conv", "window": 48, "steps": 6}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_row_that_the_template_refuses_is_named(checkpoint, tmp_path, capsys):
    import shutil

    from tests.dlm.data.test_encode import STRICT

    strict = shutil.copytree(checkpoint, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text(STRICT)
    file = tmp_path / "chat.jsonl"
    talk = [{"role": "system", "content": "x"}, {"role": "user", "content": "Go."}]
    file.write_text("".join(json.dumps({"messages": talk[i:]}) + "\n" for i in (1, 1, 0)))
    words = ["generate", "--model", str(strict), "--device", "cpu", "--file", str(file)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2  # those before it are answered
    assert "error: prompt 2: the chat template refuses the conversation: System role not supported" in err


def test_help_names_every_command_and_every_option_with_its_default(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in commands():
        assert name.replace(".", " ") in overview
        assert main([*name.split("."), "--help"]) == 0
        text = capsys.readouterr().out
        assert "--config" in text
        assert "default" in text
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--data.window", "--model.init", "--learning_rate", "--ema_decay"):
        assert option in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["train"], "output_dir"),
        (
            ["train", "--output_dir", "x", "--data.windw", "3"],
            "unknown option data.windw. Did you mean data.window?",
        ),
        (
            ["train", "--output_dir", "x", "--data.windows", "groupd"],
            "data.windows must be one of 'fixed', 'grouped', got 'groupd'",
        ),
        (["train", "--output_dir", "x", "--max_steps", "-3"], "max_steps must not be negative, got -3"),
        (["generate", "--modle", "x"], "Did you mean model?"),
        (
            ["eval", "rules", "--model", "x", "--eos_fil", "false"],
            "unknown option eos_fil. Did you mean eos_fill?",
        ),
        (["train", "--output_d", "x"], "unknown option output_d. Did you mean output_dir?"),
        (["train", "--output_dir", "x", "--data.win", "9"], "unknown option data.win."),
        (["generate", "--model", "", "hi"], "--model must name"),
        (["generate", "--model", "x", "--decoder", "cnov", "hi"], "Did you mean 'conv'?"),
        (["generate", "--model", "x", "--decoder", "conv", "--options.kernel_size", "8", "hi"], "use 7 or 9"),
        (["inspect"], "name the folder"),
        (
            ["generate", "--temprature", "0.3", "hi"],
            "unknown option temprature. Did you mean options.temperature?",
        ),
        (["generate", "--n", "2", "hi"], "unknown option n. Did you mean samples?"),
        (["infill", "--max_new_tokens", "2", "hi"], "unknown option max_new_tokens. See --help."),
        (
            ["generate", "--prompt", "hi"],
            'unknown option prompt. Did you mean prompts, or the words alone: dlm generate "…"?',
        ),
        (
            ["serve", "--decoder", "conv"],
            'unknown option decoder. Requests bring their own: "decoder" in the body.',
        ),
        (
            ["eval", "rules", "--model", "x", "--gamma", "3"],
            'Options of a decoder stand behind its name: --decoders "entropy-bound(gamma=',
        ),
        (["generate", "--stream"], "unknown option stream. See --help."),
        (["chat", "hello"], "takes no words that are no options, got hello. See --help."),
        (["serve", "-p", "8000"], "unknown option -p: options begin with "),
        (["serve", "--temprature", "1"], 'Requests bring their own: "temperature" in the body.'),
        (["eval", "rules", "--model", "x", "--order", "2"], '--decoders "llada(order=…)"'),
        (["train", "--output_dir", "x", "--model.lora", "it's"], 'settings, and "it\'s" is no file'),
        (["generate", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (
            ["train", "--output_dir", "x", "--data", "rows.json"],
            "--data takes a YAML file of settings, and 'rows.json' is no file; its options one by one are",
        ),
        (
            ["train", "--output_dir", "x", "--model.lora", "32"],
            "--model.lora takes a YAML file of settings, and '32' is no file",
        ),
    ],
)
def test_usage_errors_take_one_line_and_exit_status_2(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err


def test_failures_take_one_line_and_exit_status_1_and_debug_shows_the_traceback(capsys):
    assert main(["generate", "--model", "/nowhere", "hi"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(OSError, match="/nowhere"):
        main(["generate", "--model", "/nowhere", "hi", "--debug"])


def test_a_slip_in_the_name_of_a_model_needs_no_hub(monkeypatch, capsys):
    monkeypatch.setattr("dlm.formats.cached_file", lambda *_: pytest.fail("asked the hub"))
    assert main(["generate", "--model", "defualt", "hi"]) == 1
    assert "defualt: no such folder, and none of default, " in (said := capsys.readouterr().err)
    assert "Did you mean 'default'?" in said


@pytest.mark.parametrize("name", ["llada-8b-instruct", "fulltext", "my-sft", "gpt2"])
def test_a_name_that_is_only_like_one_of_ours_is_looked_up(name, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("dlm.formats.cached_file", lambda path, file: asked.append(path) or 1 / 0)
    assert main(["generate", "--model", name, "hi"]) == 1
    assert asked
    assert f"{name}: no such folder, not a model that the hub could give" in capsys.readouterr().err


def test_a_file_that_holds_no_settings_is_quoted_in_part(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("word " * 1000)
    assert main(["serve", "--config", str(file)]) == 2
    assert "holds lines such as `seed: 3`, got 'word word " in (said := capsys.readouterr().err)
    assert len(said.replace(str(file), "")) < 200
    file.write_text("w" * 1000)
    assert main(["serve", "--config", str(file)]) == 2
    assert "`seed: 3`, got 'wwww" in capsys.readouterr().err
    file.write_text("port:\n")
    assert main(["serve", "--config", str(file)]) == 2
    assert "port has no value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data: 3\n", "data is a group of settings (source, split, limit, "),
        (b"data: [x]\n", "validation_rows, …), one a line, got ['x']"),
        (b"model:\n  lora: yes\n", "model.lora is a group of settings (r, alpha, dropout, targets, …), "),
        (b"seed: \xff\n", "run.yaml: not a file of text in UTF-8"),
        (b"seed: 3\ndata: [1,\n", "run.yaml, line 3: not YAML ("),
        (b"data:\n", "data has no value: give it one, or leave the line out"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_is_wrong_says_where(tmp_path, capsys, content, said):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    for words in (["--config", str(file)], [f"--config={file}"]):
        assert main(["train", "--output_dir", str(tmp_path / "run"), *words]) == 2
        assert said in capsys.readouterr().err


def test_names_below_a_setting_that_is_names_with_values_keep_their_types_and_their_company():
    export, generate = (commands()[name].load() for name in ("export", "generate"))
    words = ["--generation.options.kernel_size", "5", "--generation.options.gap=3"]
    config = parse(
        "dlm export", export, ["--model", "x", "--output", "y", *words, "--generation.decoder", "conv"]
    )
    assert config.generation == {"decoder": "conv", "options": {"kernel_size": 5, "gap": 3}}

    def options(*words):
        return parse("dlm generate", generate, ["a", *words]).options

    assert options("--options.logit_bias.5", "1e2", "--options.logit_bias.7", "-3", "--options.gap", "2") == {
        "gap": 2, "logit_bias": {"5": 100.0, "7": -3},
    }  # fmt: skip
    assert options("--options.logit_bias.7", "3", "--options", '{"logit_bias": {"5": 2}, "gap": 3}') == {
        "gap": 3, "logit_bias": {"5": 2, "7": 3},
    }  # fmt: skip
    for text in ("", "2024-01-01", "1:30", "# tips"):
        assert options("--options.logit_bias.5", text) == {"logit_bias": {"5": text}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--options.logit_bias.5"], "--options.logit_bias.5 expects a value"),
        (["--options.logit_bias.5", "--seed", "3"], "--options.logit_bias.5 expects a value"),
        (["--options.logit_bias", "4", "--options.logit_bias.x", "3"], "is 4 already, and holds no x"),
        (["--config", ""], "--config"),
    ],
)
def test_a_value_within_others_that_is_wrong_is_refused(words, said, capsys):
    assert main(["generate", "a", *words]) == 2
    assert said in capsys.readouterr().err


def test_settings_from_a_pipe_with_references_and_in_files_of_their_own_are_read(tmp_path):
    train = commands()["train"].load()

    def config(text):
        (tmp_path / "run.yaml").write_text(text)
        return parse("dlm train", train, ["--output_dir", "o", "--config", str(tmp_path / "run.yaml")])

    assert config("trainer:\n  a: &x {p: 1}\n  b: {<<: *x, q: 2}\n").trainer["b"] == {"p": 1, "q": 2}
    (tmp_path / "data.yaml").write_text("limit: 3\n")
    assert config(f"data: {tmp_path / 'data.yaml'}\n").data.limit == 3
    read, write = os.pipe()
    os.write(write, b"seed: 8\n")
    os.close(write)
    assert parse("dlm train", train, ["--output_dir", "o", "--config", f"/dev/fd/{read}"]).seed == 8


def test_a_setting_that_is_there_twice_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("seed: 2\nseed: 3\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml: seed is there twice" in capsys.readouterr().err


def test_a_folder_holds_no_settings(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path)]) == 2
    assert f"--config {tmp_path} cannot be read: Is a directory" in capsys.readouterr().err


def test_unknown_keys_in_a_config_file_are_named(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: x\ndata: {wndow: 3}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "unknown option data.wndow. Did you mean data.window?" in capsys.readouterr().err
    file.write_text("outputdir: x\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "Did you mean output_dir?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "near"),
    [("modle: {}\n", "modle", "model"), ("model:\n  lorra: {}\n", "model.lorra", "model.lora")],
)
def test_a_wrong_name_with_nothing_in_it_is_refused_too(tmp_path, capsys, text, name, near):
    (tmp_path / "run.yaml").write_text("output_dir: x\n" + text)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"unknown option {name}. Did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "name"),
    [
        ("train", "learning_rate:", "learning_rate"),
        ("train", "model: {lora: {r: }}", "model.lora.r"),
        ("train", "model: {lora: }", "model.lora"),
        ("generate", "samples:", "samples"),
        ("serve", "port:", "port"),
    ],
)
def test_an_option_without_a_value_in_a_file_is_named(tmp_path, capsys, command, text, name):
    more = "output_dir: x\n" if command == "train" else "model: default\n"
    (tmp_path / "run.yaml").write_text(more + text + "\n")
    assert main([command, "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"{name} has no value: give it one, or leave the line out" in capsys.readouterr().err


def test_generate_steers_by_a_reward(checkpoint, tmp_path, capsys, monkeypatch):
    def generate(*words):
        status = main(["generate", "--model", checkpoint, "--max-tokens", "12", *words, "hello"])
        return status, capsys.readouterr()

    steered = ["--reward", "no-repetition=1", "--reward-beta", "0.5"]
    status, streams = generate("--particles", "3", *steered, "--json")
    row = json.loads(streams.out)
    assert status == 0
    assert len(row["texts"]) == len(row["weights"]) == 3
    assert row["text"] in row["texts"]
    assert row["rewards"][row["texts"].index(row["text"])] == row["reward"]
    two = [
        json.loads(line)
        for line in generate(*steered, "--particles", "3", "--samples", "2", "--json")[1].out.splitlines()
    ]
    assert two[0] == row
    assert two[1] != row
    best = json.loads(generate(*steered, "--twist", "none", "--select", "best", "--json")[1].out)
    assert best["reward"] == max(best["rewards"])
    assert len(best["rewards"]) == 8
    plain = generate("--json")[1].out
    assert (
        json.loads(generate(*steered, "--particles", "1", "--json")[1].out)["text"]
        == json.loads(plain)["text"]
    )
    (tmp_path / "rewards_of_a_user.py").write_text(
        "def short(prompts, completions, **others):\n    return [-len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    status, streams = generate("--reward", "rewards_of_a_user:short", "--json")
    assert json.loads(streams.out)["reward"] == -len(json.loads(streams.out)["text"])
    monkeypatch.setattr("dlm.checkpoint.load_model", None)  # what follows is refused before weights are read
    for words, message in (
        (["--particles", "4"], "--particles is for answers that are steered by a reward; give --reward"),
        (["--reward-beta", "1"], "--reward_beta is for answers that are steered by a reward"),
        (["--reward", "lenght=3"], "Did you mean 'length'"),
        ([*steered, "--twist", "writen"], "Did you mean 'written'"),
        ([*steered, "--decoder", "llada"], "draws nothing at random, so 8 particles would be equal"),
        ([*steered, "--reuse", "dual"], "give no reuse"),
    ):
        status, streams = generate(*words)
        assert (status, message in streams.err) == (2, True), streams.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "x"], "seed must be a whole number, got 'x'"),
        (["--rate", "x"], "rate must be a number, got 'x'"),
        (["--max_tokens", "2.5"], "max_tokens must be a whole number, got '2.5'"),
        (["--options", "3"], "options must be names with values, got '3'"),
        (
            ["--config", "empty.yaml"],
            "--config empty.yaml: a file of settings holds lines such as `seed: 3`, got ''",
        ),
        (
            ["--config", "number.yaml"],
            "--config number.yaml: a file of settings holds lines such as `seed: 3`, got '5'",
        ),
        (["--file", "."], ".: a folder, not a file"),
    ],
)
def test_values_of_the_wrong_type_are_refused_in_plain_words(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "number.yaml").write_text("5\n")
    assert main(["generate", *words]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_choice_that_is_none_is_refused_with_the_choices(capsys):
    assert main(["export", "--dtype", "float", "--model", "x", "--output", "y"]) == 2
    assert "error: dtype must be one of 'float32', " in capsys.readouterr().err


def test_likely_tokens_are_for_json_alone(checkpoint, capsys):
    assert main(["generate", "--model", checkpoint, "--top_logprobs", "2", "x"]) == 2
    assert "top_logprobs are shown in JSON alone; give --json true too" in capsys.readouterr().err


def test_generate_reads_words_files_and_stdin_and_writes_text_or_json(checkpoint, tmp_path, capsys):
    def generate(*words):
        assert main(["generate", "--model", checkpoint, *words]) == 0
        return capsys.readouterr().out.splitlines()

    rows = [json.loads(line) for line in generate("Count from 2 to 5.", "Spell the word stone.", "--json")]
    assert len(rows) == 2
    assert {"text", "token_ids", "finish_reason", "model_calls", "reveal_step"} <= set(rows[0])
    lines = tmp_path / "prompts.txt"
    lines.write_text("Count from 2 to 5.\n\nSpell the word stone.\n")
    assert [json.loads(line) for line in generate("--file", str(lines), "--json")] == rows
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"instruction": "Count from 2 to 5."}\n"Spell the word stone."\n')
    again = [json.loads(line) for line in generate("--file", str(table), "--json", "--batch-size", "1")]
    assert [row["token_ids"] for row in again] == [row["token_ids"] for row in rows]
    generate("--decoder", "semi-ar", "--window", "40", "--steps", "8", "hello")
    generate("--options.temperature", "0.5", "--forbidden", '["a"]', "hello")  # of the checkpoint's decoder
    assert main(["generate", "--model", checkpoint, "--window", "10", "a prompt that does not fit"]) == 2
    assert "the window must be at least" in capsys.readouterr().err
    for row, prompt in zip(rows, ("Count from 2 to 5.", "Spell the word stone."), strict=True):
        assert row["prompt"] == prompt
    whole = tmp_path / "whole.txt"
    whole.write_text("Count from 2 to 5.\n\nSpell the word stone.\n\n", "utf-8-sig")
    (row,) = map(json.loads, generate("--prompt-file", str(whole), "--json", "--system", "Be short."))
    assert row["prompt"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Count from 2 to 5.\n\nSpell the word stone."},
    ]
    several = generate("--samples", "2", "--decoder", "conv", "--seed", "3", "--json", "hello", "there")
    assert [json.loads(line)["prompt"] for line in several] == ["hello", "hello", "there", "there"]
    (alone,) = generate("--decoder", "conv", "--seed", "4", "--json", "hello")
    assert json.loads(several[1])["token_ids"] == json.loads(alone)["token_ids"]
    assert main(["generate", "--samples", "2", "--decoder", "llada", "--model", checkpoint, "hi"]) == 2
    assert "draws nothing at random" in capsys.readouterr().err
    piped = dlm("generate", "--model", checkpoint, "--dtype", "float32", input="Count from 2 to 5.\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.strip() == rows[0]["text"].strip()
    assert "Traceback" not in piped.stderr


def test_answers_on_a_terminal_have_an_empty_line_between_them(checkpoint, monkeypatch, capsys):
    words = ["generate", "--model", checkpoint, "--max_tokens", "6", "hello", "there", "again"]
    answers = []
    for prompt in words[-3:]:
        assert main([*words[:-3], prompt]) == 0
        answers.append(capsys.readouterr().out)
    assert main(words) == 0
    assert capsys.readouterr().out == "".join(answers)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(words) == 0
    assert capsys.readouterr().out == "\n".join(answers)


def test_what_stands_behind_two_dashes_is_a_prompt_to_the_letter():
    from decoding.commands.generate import COMMAND
    from dlm.cli import parse

    words = ["--say well-known", "--seed", "-5", "--help", "--debug", "--eos-fill", "--", "a-b"]
    config = parse("dlm generate", COMMAND, ["--max-tokens", "7", "first", "--", *words])
    assert config.prompts == ["first", *words]
    assert (config.max_tokens, config.seed, config.eos_fill) == (7, 0, None)
    assert parse("dlm generate", COMMAND, ["--say well-known", "-5 + 3"]).prompts == [
        "--say well-known",
        "-5 + 3",
    ]
    given = parse("dlm generate", COMMAND, ["--begin=--a-b_c", "--stop", "a-b", "--eos-fill", "x-y"])
    assert (given.begin, given.stop, given.prompts) == ("--a-b_c", "a-b", ["x-y"])


def test_a_terminal_sees_an_answer_while_it_is_written(checkpoint, capsys, monkeypatch):
    import rich.console

    words = ["generate", "--model", checkpoint, "--max-tokens", "24", "--begin", "[/a] :bug:", "hello"]
    words += ["--ending", " end."]
    assert main(words) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert text.startswith("[/a] :bug:")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda console: True))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\N{LIGHT SHADE}" in shown, "the canvas, before it is full"
    assert "".join(letter for letter in text if letter.isprintable()) in shown, "control characters left out"


def test_flags_behind_two_dashes_are_not_read(checkpoint, capsys):
    words = ["generate", "--model", checkpoint, "--max-tokens", "4", "--json", "--"]
    assert main([*words, "--help", "--debug"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["train", "--output_dir", "x", "--", "a"]) == 2
    assert "takes no words that are no options, got a" in capsys.readouterr().err
    assert main(["generate", "a", "--seed", "1", "b"]) == 2
    assert "'b': words that are no options stand together" in capsys.readouterr().err


def test_chat_talks_from_a_pipe(checkpoint):
    done = dlm(
        "chat",
        "--model",
        checkpoint,
        input="hello\n/new\nhello again\n/quit\n",
        env={**os.environ, "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == 2


def test_an_answer_that_is_interrupted_does_not_end_the_chat(checkpoint, capsys, monkeypatch):
    from decoding.sampler import Sampler

    seen, stream = [], Sampler.stream

    def first_one_interrupted(sampler, messages, **arguments):
        seen.append([message["content"] for message in messages])
        for event in stream(sampler, messages, **arguments):
            yield event
            if len(seen) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "stream", first_one_interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/help\ntwo\n/quit\n"))
    assert main(["chat", "--model", checkpoint]) == 0
    assert seen == [["one"], ["two"]], "neither the stopped question nor a wrong command goes to the model"
    said = capsys.readouterr().out
    assert "stopped" in said
    assert "/retry" in said
    assert said.count("tokens/s") == 1


def test_an_option_of_the_decoder_is_pointed_to_where_it_belongs(capsys):
    assert main(["generate", "--temperature", "0.7", "hi"]) == 2
    assert "unknown option temperature. Did you mean options.temperature?" in capsys.readouterr().err
    assert main(["infill", "--kernel-size", "9", "hi"]) == 2
    assert "Did you mean options.kernel_size?" in capsys.readouterr().err
    assert main(["generate", "--qqqq", "9", "hi"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_inspect_says_what_a_checkpoint_is(checkpoint, capsys, tmp_path):
    assert main(["inspect", checkpoint]) == 0
    text = capsys.readouterr().out
    assert "llama, 2 layers, width 32" in text
    assert "<|mask|>" in text
    assert main(["inspect", "--json", checkpoint]) == 0
    assert json.loads(capsys.readouterr().out)["generation"]["window"] == 48
    broken = tmp_path / "broken"
    broken.mkdir()
    assert main(["inspect", str(broken)]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_nested_commands_are_found_and_helped(checkpoint, capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert "inspect negatives" in overview
    assert "inspect ldw" in overview
    assert main(["inspect", "negatives", "--help"]) == 0
    assert "--negatives.left" in capsys.readouterr().out
    assert main(["inspect", "negatives"]) == 2
    assert "model" in capsys.readouterr().err
    assert main(["inspect", "negatives", "a", "b"]) == 2
    assert "one model at a time, got 2: a b" in capsys.readouterr().err
    assert main(["inspect", "something-else"]) == 1  # the name of a checkpoint


def test_inspect_negatives_shows_true_and_wrong_tokens(checkpoint, capsys):
    words = ["inspect", "negatives", "--data.source", "rules", "--data.window", "64", checkpoint]
    rules = [f"--negatives.{name}=0" for name in ("right", "prior", "mixed", "run")]
    assert main([*words, *rules, "--negatives.eos_p=1", "--rows", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("rule: left") == 3
    assert text.count("negative  ") >= 3
    assert "⏎" in text
    assert main([*words[:-1], "/nowhere"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_inspect_negatives_goes_on_until_there_are_rows_enough(checkpoint, tmp_path, capsys):
    """Four times the rows are looked at first; here one row in forty is short enough."""
    rows = [{"instruction": "Say.", "output": "One. " * (2 if i % 40 == 7 else 60)} for i in range(120)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["inspect", "negatives", checkpoint, "--data.source", str(tmp_path / "rows.json")]
    words += ["--data.validation_rows", "0", "--rows", "2", "--data.window"]
    assert main([*words, "40"]) == 0
    assert capsys.readouterr().out.count("rule: ") == 2
    assert main([*words, "8"]) == 1
    assert "none of the 120 rows can be used with a window of 8 tokens" in capsys.readouterr().err


def test_given_tokens_stop_texts_and_edits_on_the_command_line(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["generate", "--model", str(tmp_path), "--max-tokens", "24", "Count from 2 to 5."]
    assert main([*words, "--begin", "One", "--ending", " end.", "--forced.9", "nine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("One")
    assert out.rstrip().endswith("end.")
    assert "nine" in out
    assert main([*words, "--forced.x", "nine"]) == 2
    assert "forced must name places by number, got {'x': 'nine'}" in capsys.readouterr().err
    for stop in ("nine", '["never", "nine"]'):
        assert main([*words, "--forced.9", "nine", "--stop", stop]) == 0
        assert "nine" not in capsys.readouterr().out
    assert main([*words, "--reuse", "dual", "--refresh", "3", "--margin", "2"]) == 0
    assert main([*words, "--accelerate", "graphs"]) == 0
    assert main([*words, "--reuse", "dual", "--accelerate", "compile"]) == 2
    assert "give one of them" in capsys.readouterr().err
    edit = ["infill", "--model", str(tmp_path), "--json", "Count from 2 to 5.", "--edit", "from"]
    assert main([*edit, "--length", "1-3"]) == 0
    assert '"text": "Count' in capsys.readouterr().out.splitlines()[-1]
    assert main([*edit, "--length", "x"]) == 2
    assert "length must be a number of tokens or two such as 2-6" in capsys.readouterr().err
    assert main(["generate", "--list-decoders"]) == 0
    listed = capsys.readouterr().out
    assert "MDLM, 2406.07524; exact" in listed
    assert "2509.15188; approximate" in listed


@pytest.mark.parametrize("layout", ["decoding/__init__.py", "eval.py", "eval/notes.txt"])
def test_a_project_with_packages_of_the_same_names_does_not_break_the_program(tmp_path, layout):
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    (tmp_path / layout).write_text("raise RuntimeError('not mine')" if layout.endswith(".py") else "")
    home = str(Path(__file__).parents[1])
    done = dlm(
        "generate" if layout.startswith("decoding") else "eval", "--help",
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), home])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, hides = layout.split("/")[0], layout.endswith(".py")
    lines = done.stderr.splitlines()
    assert len(lines) == hides
    if hides:
        package = name.removesuffix(".py")
        hidden = f"{tmp_path / name} hides the package {package!r} of this program"
        assert lines[0] == f"dlm: note: {hidden}; {home}/{package} is used"


def program_dtype(checkpoint):
    """Type of the weights that a command loads without being told one."""
    code = "import sys; from decoding.config import LoadConfig as C; print(C(sys.argv[1]).load()[0].dtype)"
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_the_program_and_python_give_the_same_text(checkpoint):
    """Neither is told a type of the weights; both run in processes of their own, as users run them."""
    prompt = "Count from 2 to 5."
    script = f"""
from decoding import Sampler
from dlm import load_model
model, tokenizer = load_model({checkpoint!r})
print(model.dtype, Sampler(model, tokenizer).generate([{prompt!r}])[0].token_ids)
"""
    python = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    program = dlm("generate", "--model", checkpoint, "--json", prompt)
    dtype, ids = python.stdout.split(" ", 1)
    assert json.loads(ids) == json.loads(program.stdout)["token_ids"]
    assert dtype == program_dtype(checkpoint)


LONG = ["--window", "100000"]
ROWS = ["--data", "{q}", "--output", "{o}/x"]
RUN = ["--model.init", "{m}", "--data.source", "{q}", "--data.window", "5000", "--output_dir", "{o}/run"]
BEYOND = "the model's 2048 positions"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--model", "{m}", *LONG, "a"], f"window must lie between 1 and {BEYOND}, got 100000"),
        (["chat", "--model", "{m}", *LONG], f"window must lie between 1 and {BEYOND}, got 100000"),
        (["infill", "--model", "{m}", "a <mask:5000> b"], "gaps of 5000 tokens, and the model has 2048"),
        (["bench", "--model", "{m}", *LONG], "window 100000 is longer than the model's 2048 positions"),
        (
            ["bench", "--model", "{m}", "--max_tokens", "5000"],
            "max_tokens 5000 is longer than the model's 2048 positions",
        ),
        (
            ["inspect", "ldw", "{m}", "--prompt", "a", *LONG],
            "{m}: a window of 100000 is longer than the model's 2048 positions",
        ),
        (["eval", "file", "--model", "{m}", *ROWS, *LONG], f"{BEYOND}, got 100000"),
        (["eval", "path", "{m}", *ROWS, *LONG], f"{BEYOND}, got 100000"),
        (["train", *RUN], "window 5000 is longer than the 2048 positions of the model"),
        (["r2ft", *RUN], "window 5000 is longer than the 2048 positions of the model"),
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else "",
)
def test_numbers_beyond_the_models_are_refused_before_weights_are_read(
    checkpoint, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setattr("dlm.formats._read_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("dlm.data.rows.read_records", lambda *_: pytest.fail("rows were read"))
    (tmp_path / "q.jsonl").write_text(json.dumps({"instruction": "Go.", "output": "Gone."}))
    places = {"m": checkpoint, "q": tmp_path / "q.jsonl", "o": tmp_path}
    assert main([word.format(**places) for word in words]) == 2
    assert message.format(**places) in capsys.readouterr().err.splitlines()[-1]


def test_a_spec_is_known_without_weights(checkpoint, tmp_path, monkeypatch):
    from transformers import GPT2Config, LlamaConfig

    from dlm.adapter import add_adapter
    from dlm.checkpoint import load_model, stored_positions, stored_spec

    model, tokenizer = load_model(checkpoint, device="cpu")
    assert stored_spec(checkpoint) == model.spec
    add_adapter(model, checkpoint, r=2, alpha=2).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert stored_spec(tmp_path / "adapter") == load_model(tmp_path / "adapter", device="cpu")[0].spec
    for name, config in (
        ("llama", LlamaConfig(max_position_embeddings=99)),
        ("gpt2", GPT2Config(n_positions=99)),
    ):
        config.save_pretrained(tmp_path / name)
        assert stored_spec(tmp_path / name) is None
        assert stored_positions(tmp_path / name) == 99


LEAVE = """
import atexit, sys, threading, time
from dlm.cli import leave

class Slow:
    def __del__(self):
        print("freed")

kept = [Slow()]
kept.append(kept)
atexit.register(lambda: print("registered", file=sys.stderr))
{more}
sys.stdout.write("last words ")
leave({status})
"""


def left(status, more="", **kwargs):
    return subprocess.run(
        [sys.executable, "-c", LEAVE.format(status=status, more=more)],
        check=False, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""},
        **({"capture_output": True} | kwargs),
    )  # fmt: skip


def test_leaving_runs_what_was_registered_and_frees_nothing():
    done = left(3)
    assert (done.returncode, done.stdout, done.stderr) == (3, "last words ", "registered\n")


def test_leaving_waits_for_threads_that_must_finish():
    work = "threading.Thread(target=lambda: (time.sleep(0.3), print('worked'))).start()"
    done = left(0, work)
    assert done.returncode == 0
    assert "worked" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_leaving_says_when_the_last_output_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = left(0, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr == "registered\ndlm: error: the output cannot be written: No space left on device\n"


ROWS = {
    "no JSON": (b'{"prompt": "a"}\n{"prompt": "b"}\nnonsense\n{"prompt": "c"}\n', "p.jsonl", 1),
    "another type": (b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 5}\n', "p.jsonl", 1),
    "a role": (
        b'{"prompt": "a"}\n{"messages": [{"role": "<|im_end|>", "content": "x"}]}\n{"prompt": "c"}\n',
        "p.jsonl", 1,
    ),
    "system twice": (
        b'{"prompt": "a"}\n'
        b'{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}\n',
        "p.jsonl", 2,
    ),
    "encoding": (b"a\nb\ncaf\xe9\nd\n", "p.txt", 1),
}  # fmt: skip
"""Files whose later row is wrong, and the exit status."""


@pytest.mark.parametrize("kind", ROWS)
def test_a_wrong_row_of_a_file_is_told_after_the_answers_before_it(checkpoint, tmp_path, capsys, kind):
    content, name, expected = ROWS[kind]
    (tmp_path / name).write_bytes(content)
    words = ["generate", "--model", checkpoint, "--device", "cpu", "--file", str(tmp_path / name)]
    status = main([*words, "--system", "Hi."] if kind == "system twice" else words)
    out, err = capsys.readouterr()
    assert status == expected
    assert "error: " in err
    assert out or kind == "encoding"


@pytest.mark.parametrize(
    "text", ["# Tips", "~", "null", "[/INST]", "- a", "a: b", "é😀\x85", "1", "{", "x", "verbatim-text-x", ""]
)
def test_a_text_on_the_command_line_is_that_text(text, tmp_path):
    """The parser reads values as YAML, in which most of these are something else."""
    from decoding.commands.generate import COMMAND

    def parsed(*words):
        return parse("dlm generate", COMMAND, [*words, "hi"])

    for option in ("begin", "ending", *(["stop", "reward"] if text else [])):
        for words in ([f"--{option}", text], [f"--{option}={text}"]):
            assert getattr(parsed(*words), option) == text
    for words in (
        ["--stop", "a", "--stop", text],
        ["--stop=a", f"--stop={text}"],
        ["--stop", '["a"]', "--stop", text],
    ):
        assert not text or parsed(*words).stop == ["a", text]
    config = parsed("--forced.3", text, f"--forced.-7={text}", "--stop", '["a", "- b"]')
    assert (config.forced, config.stop, config.prompts) == ({"3": text, "-7": text}, ["a", "- b"], ["hi"])
    file = tmp_path / "settings.yaml"
    file.write_text("begin: of the file\n")
    assert parsed("--config", str(file), "--begin", text).begin == text
    assert parsed("--begin", text, "--config", str(file)).begin == "of the file"


def test_names_can_be_reset_and_texts_collected():
    from decoding.commands.generate import COMMAND

    config = parse("dlm generate", COMMAND, ["--decoder", "null", "--stop", "a", "--stop+", "# b", "hi"])
    assert config.decoder is None
    assert config.stop == ["a", "# b"]
