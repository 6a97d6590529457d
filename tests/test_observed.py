"""What options and constructor arguments change, seen from outside: tables, so that a new one needs a row.

`tests/test_options.py` holds that every option is read; here a value of it changes what comes out.
"""

import dataclasses
import inspect
import json
import time

import pytest

from decoding import Sampler
from decoding.commands.generate import GenerateConfig
from decoding.commands.infill import InfillConfig
from decoding.engine import Engine
from decoding.presets import PRESETS
from decoding.request import Request
from dlm.cli import main
from dlm.errors import ConfigError, DLMError
from eval.config import JudgeConfig
from eval.judge import DryRunError, Judge
from eval.judge import JudgeRequest as Question
from eval.systems import Endpoint
from tests.dlm.test_attention_weights import pointed
from tests.eval.endpoint import serving
from tests.test_options import place  # noqa: F401 (a fixture)

# Commands on a tiny model: another value of an option gives other words on stdout, or is refused.

BASE = ["--model", "model", "--device", "cpu", "--dtype", "float32", "--max_tokens", "30"]
GENERATE = {
    "model": ["other"],
    "device": ["cuda:99"],
    "dtype": ["bfloat16"],
    "accelerate": ["graphs"],
    "block_size": ["3"],  # this model sees whole rows, and refuses it
    "decoder": ["llada-conv"],
    "options": ['{"temperature": 0.2}'],
    "max_tokens": ["3"],
    "rate": ["1"],
    "window": ["50"],
    "steps": ["3"],
    "stop": ['["a", "e", "t"]'],
    "eos_fill": ["false"],
    "canvas": ["full"],
    "margin": ["0"],
    "reuse": ["dual"],
    "refresh": ["3"],
    "drafts": ["2"],
    "begin": ["Anna"],
    "ending": [" over."],
    "forced": ['{"3": "cat"}'],
    "top_logprobs": ["2"],
    "prompts": [],
    "file": ["prompts.txt"],
    "prompt_file": ["prompts.txt"],
    "system": ["Be brief."],
    "limit": ["1"],
    "samples": ["2"],
    "seed": ["7"],
    "forbidden": ['[" cat", "a", "e"]'],
    "json": ["false"],
    "batch_size": ["1"],
    "list_decoders": ["true"],
    "reward": ["length=3"],
    "particles": ["3"],  # as those below: refused without a reward, with one see the options of `Tilt`
    "reward_beta": ["0.5"],
    "twist": ["none"],
    "select": ["best"],
}
"""By option of `dlm generate`, the word behind it."""

ONLY_FASTER = {"batch_size", "accelerate", "eos_fill", "drafts"}
"""These change how many rows share a call, the shapes of calls, and when a row is complete; no text here."""


def names_of(config):
    return {item.name for item in dataclasses.fields(config)}


def test_every_option_of_generate_and_infill_has_a_value_to_try():
    assert names_of(GenerateConfig) == set(GENERATE)
    assert names_of(InfillConfig) == set(INFILL)


def shown(words, capsys):
    """Exit status and stdout, of the answers alone where they are JSON."""
    status = main(words)
    return status, capsys.readouterr().out


def texts(out):
    """The texts of answers in JSON."""
    return [json.loads(line)["text"] for line in out.splitlines()]


@pytest.fixture
def models(place, model, tokenizer):  # noqa: F811
    """The folder with `model`, and `other` with other weights."""
    import torch

    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained("other")
    tokenizer.save_pretrained("other")
    (place / "prompts.txt").write_text("Add one.\nSay two.\n")
    return place


def test_an_option_of_generate_changes_what_is_written_or_is_refused(models, capsys):
    words = ["generate", *BASE, "--decoder", "conv", '--options={"kernel_size": 5}', "--json", "true"]
    two = ["Count to five.", "Spell it."]
    before = shown([*words, *two], capsys)
    assert before[0] == 0
    for name, values in GENERATE.items():
        for value in values:
            prompts = [] if name in ("file", "prompt_file") else two
            status, out = shown([*words, f"--{name}={value}", *prompts], capsys)
            if name in ONLY_FASTER:
                assert (status, texts(out)) == (before[0], texts(before[1])), name
            else:
                assert (status, out) != before, f"dlm generate accepts and ignores {name}"


INFILL = {
    "model": ["other"],
    "device": ["cuda:99"],
    "dtype": ["bfloat16"],
    "accelerate": ["graphs"],
    "block_size": ["3"],  # this model sees whole rows, and refuses it
    "texts": [],
    "prompt": ["Count to five."],
    "edit": ["cat"],
    "length": ["3"],
    "decoder": ["llada"],
    "options": ['{"temperature": 3.0}'],
    "steps": ["1"],
    "rate": ["4"],
    "reuse": ["dual"],
    "refresh": ["3"],
    "drafts": ["2"],
    "seed": ["7"],
    "batch_size": ["1"],
    "json": ["false"],
}


def test_an_option_of_infill_changes_what_is_written_or_is_refused(models, capsys):
    words = ["infill", "--model", "model", "--device", "cpu", "--dtype", "float32", "--json", "true"]
    text = "The cat <mask:4> and a dog <mask:2-3> here."
    before = shown([*words, text], capsys)
    assert before[0] == 0
    for name, values in INFILL.items():
        for value in values:
            status, out = shown([*words, f"--{name}={value}", text], capsys)
            if name in ONLY_FASTER:
                assert (status, texts(out)) == (before[0], texts(before[1])), name
            else:
                assert (status, out) != before, f"dlm infill accepts and ignores {name}"


COMMON = {
    "temperature": {"temperature": 0.2},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.3},
    "min_p": {"min_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "logit_bias": {"logit_bias": {5: 50.0}},
    "guidance": {"guidance": 3.0},
    "gap": {"gap": 4},
    "conflict": {"conflict": 0.06},
    "conflict_layers": {"conflict": 0.06, "conflict_layers": 1},
    "verify": {"verify": 0.5},
    "verify_all": {"verify": 0.5, "verify_all": True},
}
"""By option of every decoder, itself and what it goes with."""


def test_an_option_of_every_decoder_changes_what_is_written(model, tokenizer):
    sampler = Sampler(pointed(model), tokenizer)

    def written(options):
        request = Request(decoder="conv", options={"kernel_size": 17, **options}, max_tokens=40, rate=4.0)
        outputs = sampler.generate(["Count to five.", "Spell it."], request=request)
        return [(out.token_ids, out.reveal_step) for out in outputs]

    assert set(PRESETS["conv"].options) - {"kernel_size", "scale"} == set(COMMON)
    for name, options in COMMON.items():
        before = {other: value for other, value in options.items() if other != name}
        assert written(options) != written(before), f"decoders accept and ignore {name}"


# Constructors.


def parameters(kind):
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def test_every_argument_of_the_engine_has_an_effect(model, tokenizer):
    assert parameters(Engine) == {"model", "tokenizer", "max_rows", "max_positions"}
    plan = Request(decoder="conv", max_tokens=8).resolve(model)

    def running(**limits):
        engine = Engine(model, tokenizer, **limits)
        for prompt in ("a", "b", "c"):
            engine.submit(prompt, plan)
        engine.step()
        return engine.running

    size = len(Engine(model, tokenizer).rows.answer_row("a", plan).ids)
    assert running() == 3
    assert running(max_rows=2) == 2
    assert running(max_positions=2 * size) == 2
    with pytest.raises(ConfigError, match="longer than the engine's limit"):
        running(max_positions=size - 1)
    assert Engine(model, tokenizer).rows.tokenizer is tokenizer


ENDPOINT = {
    "url": None,  # tried apart
    "model": "b",
    "max_tokens": 5,
    "seed": 3,
    "concurrency": 1,
    "extra": {"window": 64},
}


def test_every_argument_of_an_endpoint_changes_what_is_sent():
    assert parameters(Endpoint) == set(ENDPOINT)
    talks = [[{"role": "user", "content": f"{i}?"}] for i in range(6)]

    def sent(**changes):
        with serving(lambda body: "Yes.") as endpoint:
            endpoint.pause = 0.05
            given = {"url": endpoint.url, "model": "a", "max_tokens": 9, "concurrency": 6, **changes}
            list(Endpoint(**given).replies(talks))
            bodies = [{k: v for k, v in body.items() if k != "messages"} for body in endpoint.seen]
            return bodies, endpoint.most_busy > 1

    before = sent()
    assert before[1]
    assert len(before[0]) == 6
    for name, value in ENDPOINT.items():
        if value is not None:
            assert sent(**{name: value}) != before, f"Endpoint accepts and ignores {name}"
    with pytest.raises(DLMError, match="127"):
        sent(url="http://127.0.0.1:9/v1")


def judging(tmp_path, faults=(), pause=0.05, **changes):
    """What six requests to a judge come to: verdicts, bodies, busyness, estimate, files in the cache."""
    asked = [
        Question([{"role": "user", "content": f"{i}? {'x' * 400}"}], {"max_tokens": 100}) for i in range(6)
    ]
    with serving(lambda body: "[[5]]", faults) as endpoint:
        endpoint.pause = pause
        given = {"url": endpoint.url, "model": "a", "cache": str(tmp_path / "cache"), **changes}
        judge = Judge(JudgeConfig(**given))
        dollars = judge.estimate(asked).dollars
        begun = time.monotonic()
        try:
            verdicts = [choice and choice["message"]["content"] for choice in judge.ask(asked)]
        except DryRunError:
            verdicts = "dry"
        except DLMError as error:
            verdicts = type(error).__name__
        late = time.monotonic() - begun > 0.9
        models = [body["model"] for body in endpoint.seen]
        return verdicts, models, endpoint.most_busy > 1, dollars, late, (tmp_path / "cache").exists()


JUDGE = {
    "url": {"url": "http://127.0.0.1:9/v1"},
    "model": {"model": "b"},
    "concurrency": {"concurrency": 1},
    "cache": {"cache": "elsewhere"},
    "price_in": {"price_in": 5.0},
    "price_out": {"price_out": 5.0},
    "dry_run": {"dry_run": True},
}


def test_every_setting_of_a_judge_has_an_effect(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.judge.PAUSES", ())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    assert names_of(JudgeConfig) == set(JUDGE) | {"timeout", "retries"}
    assert parameters(Judge) == {"config"}
    before = judging(tmp_path / "before")
    assert before == (["[[5]]"] * 6, ["a"] * 6, True, 0.0, False, True)
    for name, change in JUDGE.items():
        assert judging(tmp_path / name, **change) != before, f"Judge accepts and ignores {name}"
    # a first request that fails is sent twice, and then as often as is said
    failing = [503] * 3
    lost, found = (judging(tmp_path / f"r{n}", failing, retries=n, concurrency=1)[0] for n in (0, 1))
    assert (lost[0], found[0]) == (None, "[[5]]")
    slow = judging(tmp_path / "t1", ["slow"], timeout=0.3, retries=2)
    assert len(slow[1]) > 6  # given up, and asked again
    assert len(judging(tmp_path / "t2", ["slow"], timeout=20.0)[1]) == 6


def test_a_table_of_options_notices_one_that_does_nothing(models, capsys, monkeypatch):
    """The comparison can fail: an option whose value is dropped gives the same words."""
    words = ["generate", *BASE, "--decoder", "conv", "--json", "true", "a"]
    before = shown(words, capsys)
    original = GenerateConfig.__post_init__

    def careless(config):
        original(config)
        object.__setattr__(config, "seed", 0)

    monkeypatch.setattr(GenerateConfig, "__post_init__", careless)
    assert shown([*words, "--seed", "7"], capsys) == before
    monkeypatch.undo()
    assert json.loads(before[1])["text"]
