"""Rewards by name, and what they give."""

import importlib.metadata
import math
import sys

import pytest

from decoding.tilted.rewards import REWARDS, reward_named, values
from dlm.errors import ConfigError, DLMError


def of(spec, *texts):
    return values(reward_named(spec), ["a prompt"] * len(texts), texts)


def test_length_is_the_distance_in_words_by_the_target():
    assert of("length=4", "a b c d", "a b", "", "a b c d e f") == [0, -0.5, -1, -0.5]


def test_no_repetition_is_the_share_of_repeated_ngrams():
    text = "a b c d a b c d"  # five 4-grams, the last is the first; four 2-grams of seven are new
    assert of("no-repetition", text, "a b", "a b c d") == [-1 / 5, 0, 0]
    assert of("no-repetition=2", text) == [-3 / 7]


def test_regex_is_one_where_the_pattern_is_found():
    assert of(r"regex=^\d+: \w=", "12: a=", "x 12: a=", "12:", "") == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "length needs a whole number, as in length=100, got ''"),
        ("length=1.5", "length needs a whole number"),
        ("length=0", "length must be at least 1 word, got 0"),
        ("no-repetition=x", "no-repetition needs a whole number"),
        ("no-repetition=0", "n-grams of at least 1 word"),
        ("regex", "regex needs a pattern"),
        ("regex=(", r"regex '\(' cannot be read: missing \)"),
        ("norepetition", "unknown reward 'norepetition'. Did you mean 'no-repetition'"),
        ("", "unknown reward ''"),
        ("nowhere:f", r"reward 'nowhere:f' cannot be imported \(ModuleNotFoundError"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "must be a function of prompts and completions"),
    ],
)
def test_what_names_no_reward_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        reward_named(spec)


def test_a_function_of_the_current_folder_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_reward_module.py").write_text(
        "def shouting(prompts, completions, **others):\n"
        "    return [sum(c.isupper() for c in text) + len(p) / 10 for p, text in zip(prompts, completions)]\n"
    )
    assert of("my_reward_module:shouting", "aB", "ABC") == [1.8, 3.8]


def test_rewards_of_packages_are_found_by_their_entry_points(monkeypatch):
    from eval import rewards

    points = [importlib.metadata.EntryPoint("close", "eval.rewards:Closeness", "dlm.rewards")]
    monkeypatch.setattr("decoding.tilted.rewards.entry_points", lambda group: points)
    monkeypatch.setattr(rewards.Closeness, "__init__", lambda self, text: setattr(self, "text", text))
    assert reward_named("close=a text").text == "a text"
    with pytest.raises(ConfigError, match="Choices: close, length, module:function, no-repetition, regex"):
        reward_named("far=a text")


def test_what_is_no_list_of_finite_numbers_is_an_error():
    with pytest.raises(DLMError, match="must give a number for each of 2 texts, gave 1"):
        values(lambda prompts, completions: [1], ["p", "p"], ["a", "b"])
    with pytest.raises(DLMError, match="must be a finite number, got nan for 'b'"):
        values(lambda prompts, completions: [1, math.nan], ["p", "p"], ["a", "b"])
    with pytest.raises(DLMError, match=r"^the reward failed \(KeyError: 'x'\)$"):
        values(lambda prompts, completions: [{}["x"]], ["p"], ["a"])


def test_names_are_what_the_page_lists():
    from pathlib import Path

    page = (Path(__file__).parents[3] / "docs/tilted.md").read_text("utf-8")
    for name in [*REWARDS, "likelihood", "closeness"]:
        assert f"| `{name}" in page
