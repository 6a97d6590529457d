"""The diagnosis against a brute-force sum over the vocabulary, and its command."""

import json
import math

import pytest
import torch

from dlm import load_model
from dlm.cli import main
from dlm.errors import ConfigError
from dlm.prior import TokenPrior
from eval.commands.ldw import counts, ldw_summary
from eval.ldw import candidates, decoding_window, draw_decoding_windows
from eval.report import plots
from tests.fakes import FakeDenoiser, FakeTokenizer

PRIOR = TokenPrior(torch.tensor([50, *range(22, 0, -1)]), special=(0, 22))
"""Of the fake vocabulary: ids 1, 2, 3 … in falling frequency."""


def brute(model, tokenizer, prompt, window):
    """Probabilities of all tokens at each distance."""
    ids = tokenizer(prompt)["input_ids"]
    row = ids + [model.mask_id] * (window - len(ids))
    logits = model.logits(model.hidden(torch.tensor([row]))[0])
    weights = [[float(x) for x in logits[place].double().exp()] for place in range(len(ids), window)]
    return [[w / sum(row) for w in row] for row in weights]


def test_masses_are_sums_of_probabilities_at_each_distance():
    model, tokenizer = FakeDenoiser(), FakeTokenizer()
    prompts = ["abc", "defgh"]
    got = decoding_window(model, tokenizer, prompts, PRIOR, window=12, top=4)
    assert got.rows.tolist() == [2] * 7 + [1] * 2
    for field, of in (
        ("frequent", lambda p: [1, 2, 3, 4]),
        ("prompt", lambda p: sorted(set(tokenizer(p)["input_ids"]))),
        ("end", lambda p: [0]),
    ):
        sums = [[sum(row[t] for t in of(p)) for row in brute(model, tokenizer, p, 12)] for p in prompts]
        for distance in range(9):
            values = [s[distance] for s in sums if distance < len(s)]
            expected = sum(values) / len(values)
            assert float(getattr(got, field)[distance]) == pytest.approx(expected, rel=1e-5)
    one = decoding_window(model, tokenizer, ["abc"], PRIOR, window=12)
    entropies = [-sum(p * math.log(p) for p in row if p) for row in brute(model, tokenizer, "abc", 12)]
    assert one.entropy.tolist() == pytest.approx(entropies, rel=1e-5)


def test_candidates_are_the_likeliest_tokens_and_know_what_they_are():
    model, tokenizer = FakeDenoiser(), FakeTokenizer()
    zone = candidates(model, tokenizer, "abc", PRIOR, window=12, top=4, positions=5, k=6)
    assert len(zone) == 5
    said = set(tokenizer("abc")["input_ids"])
    for distance, row in enumerate(zone):
        chances = [c.probability for c in row]
        assert chances == sorted(chances, reverse=True)
        for c in row:
            token = 0 if c.kind == "end" else ord(c.text) - 97
            expected = brute(model, tokenizer, "abc", 12)[distance][token]
            assert c.probability == pytest.approx(expected, rel=1e-5)
            kind = (
                "end" if token == 0 else "prompt" if token in said else "frequent" if token <= 4 else "other"
            )
            assert c.kind == kind


def test_a_prompt_that_fills_the_window_is_an_error():
    with pytest.raises(ConfigError, match="the window must be at least 4"):
        decoding_window(FakeDenoiser(), FakeTokenizer(), ["abc"], PRIOR, window=3)
    with pytest.raises(ConfigError, match="no prompt was given"):
        decoding_window(FakeDenoiser(), FakeTokenizer(), [], PRIOR, window=3)


def test_the_plot_has_a_line_for_each_model_in_each_panel():
    got = decoding_window(FakeDenoiser(), FakeTokenizer(), ["abc"], PRIOR, window=12)
    figure = draw_decoding_windows({"before": got, "after": got})
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2, 2]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(got.frequent.tolist())


def test_lines_and_tables_end_where_the_first_prompt_leaves_the_mean():
    got = decoding_window(FakeDenoiser(), FakeTokenizer(), ["abc", "abcde", "abcdef"], PRIOR, window=30)
    assert got.rows.tolist() == [3] * 24 + [2, 1, 1]
    assert got.shared == 24
    line = draw_decoding_windows({"model": got}).axes[0].lines[0]
    assert list(line.get_ydata()) == got.frequent[:24].tolist()
    assert line.get_label() == "model (n = 3)"
    curve = {"model": got.as_dict()}
    assert len(plots.ldw(curve).axes[0].lines[0].get_ydata()) == 24
    del curve["model"]["rows"]  # as older versions wrote it
    assert len(plots.ldw(curve).axes[0].lines[0].get_ydata()) == 27
    table = ldw_summary({"model": got})
    assert list(table.columns[1].cells) == ["0", "5 to 10", "11 to 23"]
    assert list(table.columns[2].cells) == ["3"] * 3
    assert list(table.columns[3].cells)[2] == f"{got.frequent[11:24].mean():.3f}"
    told = "prompts by distance: 3 up to 23, 2 up to 24, 1 up to 26; table and curves end at 23"
    assert counts(got.rows) == told


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model.config.generation = {"window": 40}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_compares_models_and_writes_picture_and_figures(checkpoint, tmp_path, capsys):
    words = ["inspect", "ldw", str(checkpoint), "--prompt", "Spell bread and cloud."]
    assert main([*words, "--output", str(tmp_path / "ldw.png")]) == 2
    assert "token_counts.safetensors; name the training rows with --counts" in capsys.readouterr().err
    TokenPrior(torch.arange(400), (0, 1, 2)).save(checkpoint)
    assert main([*words, "--output", str(tmp_path / "ldw.png"), "--positions", "3"]) == 0
    assert "frequent in all answers" in capsys.readouterr().out
    assert (tmp_path / "ldw.png").stat().st_size > 10_000
    assert "distance" in (tmp_path / "ldw.svg").read_text()
    facts = json.loads((tmp_path / "ldw.json").read_text())
    assert set(facts[str(checkpoint)]) == {"frequent", "prompt", "end", "entropy", "rows"}


def test_tokens_are_counted_in_given_rows_where_no_model_has_its_counts(checkpoint, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Go.", "output": "Anna counts: 1 2 3"}\n' * 3)
    words = ["inspect", "ldw", str(checkpoint), "--prompt", "Spell bread and cloud.", "--output", ""]
    assert main([*words, "--counts", str(file)]) == 0
    assert main([*words, "--counts", "rules", "--candidates", "9999"]) == 0


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(checkpoint, tmp_path, capsys, tokenizer):
    words = ["inspect", "ldw", str(checkpoint)]

    def fails(*more):
        assert main([*words, *more]) in (1, 2)
        return capsys.readouterr().err

    assert "give --prompt or --file" in fails()
    assert "must end in .png or .pdf" in fails("--prompt", "x", "--output", "x.json")
    assert "no such folder" in fails("--prompt", "x", "--output", str(tmp_path / "none" / "x.png"))
    assert "limit must not be negative" in fails("--prompt", "x", "--limit", "-1")
    assert "/nowhere.txt" in fails("--file", "/nowhere.txt")
    TokenPrior(torch.arange(400), (0, 1, 2)).save(checkpoint)
    assert "longer than the model's" in fails("--prompt", "x", "--window", "9999", "--output", "")
    other = tmp_path / "other"
    load_model(checkpoint, device="cpu")[0].save_pretrained(other)
    from dlm.tokenizer import train_tokenizer

    train_tokenizer(["some other words " * 50, "ab cd ef"], 400).save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    second = train_tokenizer(["some other words " * 50, "ab cd ef"], 400)
    (other / "config.json").write_text(
        json.dumps({**config, "num_tokens": len(second), "mask_token_id": second.mask_token_id})
    )
    assert "different tokenizers" in fails(str(other), "--prompt", "x", "--output", "")
    assert main(["inspect", "lwd", "--prompt", "x"]) == 2
    assert "Did you mean 'inspect ldw'?" in capsys.readouterr().err


def test_every_token_that_ends_an_answer_counts_as_an_end():
    model, tokenizer = FakeDenoiser(), FakeTokenizer()
    one = decoding_window(model, tokenizer, ["abc"], PRIOR, window=9)
    model.config.end_token_ids = [0, 5]
    both = decoding_window(model, tokenizer, ["abc"], PRIOR, window=9)
    expected = [row[0] + row[5] for row in brute(model, tokenizer, "abc", 9)]
    assert both.end.tolist() == pytest.approx(expected, rel=1e-5)
    assert (both.end > one.end).all()
    zone = candidates(model, tokenizer, "abc", PRIOR, window=9, positions=2, k=22)
    assert {c.kind for row in zone for c in row if c.text == tokenizer.decode([5])} == {"end"}
