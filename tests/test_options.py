"""No option is accepted and ignored: each is read by the work, changes a plan or an output, or is refused.

All of them are found by looking at dataclasses and signatures, so that a new one without an effect fails.
"""

import dataclasses
import inspect
import io
import json
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.engine import Engine
from decoding.request import Request
from decoding.reveal.order_table import OrderTable
from decoding.sampler import Sampler
from decoding.tilted.tilt import Tilt
from dlm.cli import Command, commands, parse
from dlm.errors import ConfigError, DataError, DLMError
from tests.eval.endpoint import serving

# Requests: whatever else is given, one more field changes the plan or is refused.

CONTEXTS = [
    {},
    {"max_tokens": 20},
    {"rate": 3.0},
    {"window": 48},
    {"steps": 6},
    {"window": 48, "steps": 6},
    {"window": 48, "rate": 3.0},
    {"window": 48, "steps": 6, "canvas": "growing"},
    {"decoder": "llada"},
    {"decoder": "llada", "window": 48},
    {"decoder": "threshold"},
    {"decoder": "threshold", "window": 48},
    {"decoder": "sliding", "window": 48, "steps": 6},
    {"decoder": "semi-ar", "max_tokens": 20},
    {"reuse": "dual"},
    {"ending": " end."},
]
VALUES = {
    "decoder": ["margin"],
    "options": [{"temperature": 0.37}],
    "max_tokens": [19],
    "rate": [4.5],
    "window": [56],
    "steps": [7],
    "stop": ["x"],
    "eos_fill": [False, True],
    "canvas": ["growing", "full"],
    "margin": [5],
    "reuse": ["prefix"],
    "refresh": [3],
    "drafts": [2],
    "begin": ["A"],
    "ending": [" over."],
    "forced": [{3: "a"}],
    "top_logprobs": [2],
}
"""Values to try; where there are two, one of them may be what holds anyway."""


def test_every_field_of_a_request_has_a_value_to_try():
    assert set(VALUES) == {item.name for item in dataclasses.fields(Request)}


def has_effect(sampler, context, name, value):
    """Whether a value of a field is refused beside others, or changes their plan."""
    try:
        return sampler.plan(**context, **{name: value}) != sampler.plan(**context)
    except ConfigError:
        return True


@pytest.mark.parametrize("name", VALUES)
def test_a_field_changes_the_plan_or_is_refused_whatever_else_is_given(name, model, tokenizer):
    sampler = Sampler(model, tokenizer)
    contexts = [context for context in CONTEXTS if name not in context]
    ignored = [
        context
        for context in contexts
        if not any(has_effect(sampler, context, name, value) for value in VALUES[name])
    ]
    assert not ignored, f"{name} is accepted and ignored beside {ignored}"


# Tilts: every field changes what comes out, or is refused.

TILTED = {
    "reward": [("length=9", {})],
    "particles": [(5, {})],
    "beta": [(0.01, {})],
    "twist": [("written", {}), ("none", {})],
    "predictions": [(7, {}), (7, {"twist": "written"}), (7, {"twist": "none"})],
    "threshold": [(1.0, {}), (1.0, {"twist": "written"}), (1.0, {"twist": "none"})],
    "select": [("best", {}), ("best", {"twist": "none"})],
}
"""Values to try, each beside other fields."""


def test_every_field_of_a_tilt_has_a_value_to_try():
    assert set(TILTED) == {item.name for item in dataclasses.fields(Tilt)}


@pytest.mark.parametrize(("name", "value", "context"), [(n, *pair) for n in TILTED for pair in TILTED[n]])
def test_a_field_of_a_tilt_changes_the_outputs_or_is_refused(name, value, context, model, tokenizer):
    sampler, prompts = Sampler(model, tokenizer), ["a", "b", "c"]

    def letters(prompts, completions):
        return [-float(len(text)) for text in completions]

    def outputs(**given):
        fields = {"reward": letters, "beta": 3.0, **context, **given}
        return sampler.generate(prompts, decoder="conv", max_tokens=12, **fields)

    before = outputs()
    with suppress(ConfigError):
        assert outputs(**{name: value}) != before, f"{name} is accepted and ignored beside {context}"


# Commands: every setting is read by what the command does, after it has been checked.


@pytest.fixture
def reading():
    """Records the settings that are read while commands run, not those that are checked or copied."""
    read = set()

    def trace(config, prefix=""):
        kind = type(config)
        names = {item.name for item in dataclasses.fields(kind)}

        class Traced(kind):
            def __getattribute__(self, name):
                if name in names and sys._getframe(1).f_globals["__name__"] not in ("dataclasses", "copy"):
                    read.add(prefix + name)
                return super().__getattribute__(name)

        Traced.__name__, Traced.__qualname__ = kind.__name__, kind.__qualname__
        for item in dataclasses.fields(kind):
            value = object.__getattribute__(config, item.name)
            if dataclasses.is_dataclass(value):
                trace(value, f"{prefix}{item.name}.")
        object.__setattr__(config, "__class__", Traced)
        return config

    def run(name, *words):
        command = commands()[name].load()
        config = trace(parse(f"dlm {name}", command, [str(word) for word in words]))
        return command.run(config)

    run.read = read
    return run


def leaves(config, prefix=""):
    """All dotted names of settings that are no groups."""
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


TINY = (
    "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 1 "
    "--model.intermediate_size 16 --model.vocab_size 300"
)
RUN = (
    "--data.source rules --data.limit 24 --data.validation_rows 2 --data.window 48 --max_steps 1 "
    "--eval_steps 1 --save_steps 1 --warmup_steps 0 --sample_steps 1 --report_to none "
    "--per_device_train_batch_size 2"
)


@pytest.fixture
def place(tmp_path, model, tokenizer, monkeypatch):
    """A folder with a model, questions and prompts, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model.config.generation = {"decoder": "conv", "window": 64, "steps": 4}
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained("causal")
    tokenizer.save_pretrained("causal")
    rows = [{"instruction": f"Count to {i}.", "output": "One, two."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "prompts.txt").write_text("Count to ten.\n")
    return tmp_path


def generate(run, place):
    run("generate", "--list-decoders")
    run("generate", "--model", "model", "--max-tokens", 4, "--forbidden", '["a"]', "a")
    run("generate", "--model", "model", "--max-tokens", 4, "--file", "prompts.txt")
    steered = [
        "--reward",
        "length=3",
        "--particles",
        2,
        "--reward-beta",
        1,
        "--twist",
        "none",
        "--select",
        "best",
    ]
    run("generate", "--model", "model", "--max-tokens", 4, *steered, "a")


def chat(run, place):
    sys.stdin = io.StringIO("hello\n/quit\n")
    run("chat", "--model", "model", "--max-tokens", 4)


def infill(run, place):
    run("infill", "--model", "model", "a <mask:1>")
    run("infill", "--model", "model", "a b", "--edit", "b")


def bench(run, place):
    run("bench", "--model", "model", "--window", 64, "--steps", 2, "--max_tokens", 4, "--rounds", 1)


def inspect_(run, place):
    run("inspect", "model")


def inspect_ldw(run, place):
    words = ["--window", 64, "--limit", 1, "--positions", 3, "--counts", "rules"]
    run("inspect.ldw", "model", "--prompt", "a", "--file", "prompts.txt", *words)


def inspect_negatives(run, place):
    run(
        "inspect.negatives",
        "model",
        "--data.source",
        "rules",
        "--data.limit",
        30,
        "--data.validation_rows",
        2,
    )
    run("inspect.negatives", "model", "--data.source", "rows.json", "--data.validation_rows", 1, "--rows", 1)
    grouped = ["--data.windows", "grouped", "--data.validation_rows", 1, "--rows", 1]
    run("inspect.negatives", "model", "--data.source", "rows.json", *grouped)


def export(run, place):
    run("export", "--model", "model", "--output", "exported")


def convert(run, place):
    with pytest.raises(DLMError, match="public"):
        run("convert", "--model", "model", "--output", "converted")


def encode(run, place):
    run("encode", "--model", "causal", "--template", "plain", "--source", "rows.json", "--limit", 2)
    with pytest.raises(ConfigError, match="template of its own"):
        run("encode", "--model", "model", "--template", "plain", "--source", "rows.json")


EVAL = ["alpaca_eval", "--data", "rows.json", "--limit", 2]


def eval_(run, place, name="eval"):
    common = [*EVAL, "--max_tokens", 4, "--output", f"runs-{name}"]
    run(name, *common, "--model", "model", "--nelbo_draws", 1, "--reader", "")
    run(name, *common, "--model", "model", "--name", "b", "--reader", "causal", "--usual", "rows.json")
    with serving(lambda body: "An answer.") as endpoint:
        run(name, *common, "--endpoint", endpoint.url)
    with pytest.raises(OSError, match="nowhere"):
        run(name, *common, "--autoregressive", "nowhere")


def eval_sweep(run, place):
    eval_(run, place, "eval.sweep")


def eval_path(run, place):
    run("eval.path", "model", "--data", "rows.json", "--last", 2, "--max_tokens", 64, "--output", "paths")


def eval_dependence(run, place):
    run("eval.dependence", "model", "--data", "rows.json", "--last", 2, "--output", "dependence")


def eval_frontier(run, place):
    asked = ["--task", "file", "--data", "rows.json", "--limit", 2, "--max_tokens", 4, "--resamples", 100]
    asked += ["--temperatures", "0.5,1", "--reader", "causal", "--output", "frontier"]
    run("eval.frontier", "model", *asked, "--decoders", "conv")
    run("eval.frontier", "model", *asked, "--decoders", "conv", "--entropy", "span", "--span", 3)


def orders(run, place):
    OrderTable.empty().save("table.json")
    run("orders", "table.json")


def orders_learn(run, place):
    asked = ["--task", "file", "--data", "rows.json", "--limit", 2, "--model", "model", "--max_tokens", 4]
    asked += ["--batch_size", 2, "--reward", "tests.test_options:length"]
    run("orders.learn", *asked, "--output", "a.json")
    run("orders.learn", *asked, "--output", "b.json", "--start", "a.json")
    run("eval", *EVAL, "--max_tokens", 4, "--output", "traced", "--model", "model", "--trace=true")
    run("orders.learn", "traced", "--output", "c.json", "--reward", "length=3")


def length(prompts, completions):
    """A reward."""
    return [len(text) for text in completions]


def eval_report(run, place):
    run("eval", *EVAL, "--max_tokens", 4, "--output", "runs", "--model", "model")
    run("eval.report", "runs", "--output", "report")


def eval_judge(run, place):
    run("eval", *EVAL, "--max_tokens", 4, "--output", "runs", "--model", "model")
    (folder,) = (path.parent for path in place.glob("runs/**/run.json"))
    with serving(lambda body: "5") as endpoint:
        judge = ["--judge.url", endpoint.url, "--judge.model", "j", "--judge.cache", "cache"]
        run("eval.judge", folder, "--method", "geval", *judge)
        run("eval.judge", folder, "--method", "alpaca_eval", *judge, "--judge.dry_run", "true")
        with suppress(DLMError):  # its prompts cannot be fetched
            run("eval.judge", folder, "--method", "mt_bench", *judge)


def train(run, place):
    for _ in range(2):
        run("train", "--output_dir", "train", *RUN.split(), *TINY.split())
    run("train", "--output_dir", "b", *RUN.split(), "--model.init", "causal", "--model.lora.r", 2)
    path = ["--masks.path", 0.5, "--masks.kernel_size", 5]
    run("train", "--output_dir", "d", *RUN.split(), *TINY.split(), *path)
    blocks = ["--model.visibility", "block", "--model.block_size", 8, "--sample_steps", 12]
    run("train", "--output_dir", "e", *RUN.split(), *TINY.split(), *blocks)
    with suppress(DataError):  # there is no hub here
        run("train", "--output_dir", "c", "--data.source", "some/rows", *TINY.split())


def r2ft(run, place):
    run("train", "--output_dir", "start", *RUN.split(), *TINY.split())
    common = [*RUN.split(), "--model.init", "start"]
    run("r2ft", "--output_dir", "a", *common, "--watch", 1)
    run("r2ft", "--output_dir", "b", *common, "--model.lora.r", 2, "--data.windows", "grouped")
    run("r2ft", "--output_dir", "b", *common, "--model.lora.r", 2, "--data.windows", "grouped")
    run("r2ft", "--output_dir", "d", *common, "--objective.name", "ddro", "--objective.draws", 2)
    run("r2ft", "--output_dir", "e", *common, "--objective.name", "dpo")
    with suppress(DataError):  # there is no hub here
        run("r2ft", "--output_dir", "c", "--model.init", "start", "--data.source", "some/rows")


RUNS = {
    "generate": generate,
    "convert": convert,
    "encode": encode,
    "chat": chat,
    "infill": infill,
    "bench": bench,
    "inspect": inspect_,
    "inspect.ldw": inspect_ldw,
    "inspect.negatives": inspect_negatives,
    "export": export,
    "eval": eval_,
    "eval.sweep": eval_sweep,
    "eval.path": eval_path,
    "eval.dependence": eval_dependence,
    "eval.frontier": eval_frontier,
    "eval.report": eval_report,
    "orders": orders,
    "orders.learn": orders_learn,
    "eval.judge": eval_judge,
    "train": train,
    "r2ft": r2ft,
}
ELSEWHERE = {"serve"}
"""Commands whose options are tried with a server that runs (`tests/serve`)."""


def test_every_command_is_run():
    assert set(RUNS) | ELSEWHERE == set(commands())


@pytest.mark.parametrize("name", RUNS)
def test_every_option_of_a_command_is_read_by_its_work(name, reading, place, capsys):
    stdin = sys.stdin
    try:
        RUNS[name](reading, place)
    finally:
        sys.stdin = stdin
    unread = set(leaves(commands()[name].load().config)) - reading.read
    assert not unread, f"dlm {name} accepts and ignores {sorted(unread)}"


@dataclasses.dataclass(frozen=True)
class Careless:
    """Settings of which one is read by nobody.

    Args:
        used: is read.
        unused: is checked, and then forgotten.
    """

    used: int = 1
    unused: int = 2

    def __post_init__(self):
        """Check a range."""
        assert self.unused > 0


def test_a_setting_that_nobody_reads_is_found(reading, monkeypatch):
    command = Command(
        "careless", Careless, lambda config: dataclasses.asdict(config)["unused"] * 0 + config.used - 1
    )
    monkeypatch.setattr("tests.test_options.commands", lambda: {"x": SimpleNamespace(load=lambda: command)})
    assert reading("x", "--unused", "5") == 0
    assert set(leaves(Careless)) - reading.read == {"unused"}


# Classes: every parameter of a method changes what comes out, or is refused.

ANSWER = {"max_tokens": 8, "decoder": "conv"}
OTHER = Request(decoder="llada")
METHODS = {
    "generate": (
        {"prompts": ["a", "b"]},
        {"prompts": ["c"], "request": Request(stop="x"), "seed": 1, "n": 2},
    ),
    "iter_generate": ({"prompts": ["a", "b"]}, {"prompts": ["c"], "request": Request(), "seed": 1, "n": 2}),
    "iter_traced": ({"prompts": ["a", "b"]}, {"prompts": ["c"], "request": Request(), "seed": 1}),
    "stream": ({"prompts": "a"}, {"prompts": "c", "request": Request(stop="x"), "seed": 1}),
    "infill": (
        {"texts": ["a <mask:4> b", "<mask:3>"]},
        {"texts": ["a <mask:5>"], "prompt": "c", "request": Request(rate=4.0), "seed": 1},
    ),
    "iter_infill": (
        {"texts": ["a <mask:4> b", "<mask:3>"]},
        {"texts": ["a <mask:5>"], "prompt": "c", "request": Request(rate=4.0), "seed": 1},
    ),
    "edit": (
        {"texts": "a word here", "span": "word"},
        {"texts": "one word", "span": "here", "length": 4, "prompt": "c", "request": OTHER, "seed": 1},
    ),
    "iter_edit": (
        {"texts": ["a word here"], "span": "word"},
        {"texts": ["one word"], "span": "here", "length": 4, "prompt": "c", "request": OTHER, "seed": 1},
    ),
    "without": (
        {"texts": ["a"], "decoder": "conv"},
        {"texts": ["b"], "decoder": "llada", "request": Request(stop="x")},
    ),
    "fits": ({"prompt": "a", "window": 64}, {"prompt": "a " * 64, "window": 3}),
    "plan": ({}, {"request": Request(stop="x")}),
}
"""Of each method, arguments, and of each of its parameters another value."""

ONLY_FASTER = {"batch_size"}
"""Parameters that change how many rows share a call, and no text."""


def test_every_method_of_the_sampler_is_tried_with_every_parameter():
    public = {
        name for name, value in inspect.getmembers(Sampler, inspect.isfunction) if not name.startswith("_")
    }
    assert public - set(METHODS) == {"prompt_length", "text_length", "show"}, "which have one parameter each"
    for name, (given, changed) in METHODS.items():
        parameters = inspect.signature(getattr(Sampler, name)).parameters.values()
        names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"} - ONLY_FASTER
        assert names == set(changed), name
        assert set(given) <= names


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_of_the_sampler_changes_the_result_or_is_refused(name, model, tokenizer):
    sampler = Sampler(model, tokenizer)
    given, changed = METHODS[name]
    fields = (
        {} if name in ("without", "plan", "fits") else {"decoder": "conv"} if "text" in str(given) else ANSWER
    )

    def result(**arguments):
        fixed = fields if "request" not in arguments else {}
        found = getattr(sampler, name)(**{**given, **arguments}, **fixed)
        found = list(found) if inspect.isgenerator(found) else found
        return (
            [getattr(each, "text", each) for each in found]
            if isinstance(found, list)
            else getattr(found, "text", found)
        )

    before = result()
    for parameter, value in changed.items():
        try:
            after = result(**{parameter: value})
        except ConfigError:
            continue
        assert after != before, f"{name} accepts and ignores {parameter}"


def test_batch_size_is_the_number_of_rows_that_share_a_call(model, tokenizer, monkeypatch):
    sampler, rows = Sampler(model, tokenizer), []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda engine, *a, **k: (submit(engine, *a, **k), rows.append(len(engine)))[0]
    )
    for size in (1, 3):
        del rows[:]
        sampler.generate(["a", "b", "c", "d"], batch_size=size, **ANSWER)
        assert max(rows) == size
        del rows[:]
        sampler.infill(["a <mask:2>"] * 4, batch_size=size)
        assert max(rows) == size


HARNESS = {
    "pretrained": "other",
    "decoder": "llada",
    "max_tokens": 9,
    "window": 48,
    "steps": 5,
    "rate": 3,
    "likelihood": "path",
    "draws": 7,
    "seed": 5,
    "batch_size": 3,
    "device": "cuda:99",
    "dtype": "bfloat16",
}


def test_a_parameter_of_the_harness_changes_what_it_does_or_is_refused(place, model, monkeypatch):
    lm_harness = pytest.importorskip("eval.lm_harness")
    names = set(inspect.signature(lm_harness.DLM.__init__).parameters) - {"self", "unknown"}
    assert names == set(HARNESS)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.save_pretrained("other")
    for file in [*place.glob("model/tokenizer*"), place / "model/chat_template.jinja"]:
        (place / "other" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # so that a device is not turned into the CPU

    def work(**given):
        """Answers, likelihoods and what they cost, seen from outside."""
        given = {"pretrained": "model", "device": "cpu", "dtype": "float32", **given}
        lm = lm_harness.DLM(**given)
        asked = []
        generate = lm.sampler.iter_generate
        lm.sampler.iter_generate = lambda *a, **k: asked.append(k) or generate(*a, **k)
        ask = lambda kind, arguments: Instance(kind, {}, arguments, 0)  # noqa: E731
        texts = lm.generate_until([ask("generate_until", ("Count.", {"until": []}))], disable_tqdm=True)
        likely = lm.loglikelihood([ask("loglikelihood", ("Count.", " one two three four five six"))])
        return texts, likely, asked

    from lm_eval.api.instance import Instance

    with pytest.raises(ConfigError, match="draws are for likelihood=nelbo"):
        work(likelihood="path", draws=32)  # the default, given by name
    before = work()
    for name, value in HARNESS.items():
        try:
            after = work(**{name: value})
        except (DLMError, RuntimeError, AssertionError):
            continue
        assert after != before, f"DLM accepts and ignores {name}"
