import json
import math

import pytest
import torch

from dlm.checkpoint import load_model
from dlm.cli import main
from dlm.errors import ConfigError, DataError
from eval import path
from eval.path import PathCost
from eval.paths import PathFolder, PathRun, differences, draw_paths, held_out, path_table
from tests.decoding.rig import order_table

original = path.path_costs


@pytest.fixture
def file(tmp_path, rows):
    """Rows as a file: the short ones first."""
    lines = [{"instruction": row["prompt"][0]["content"], "output": row["answer"]} for row in rows]
    lines.append({"instruction": "Say much.", "output": "word " * 300})
    place = tmp_path / "rows.jsonl"
    place.write_text("\n".join(map(json.dumps, lines)))
    return place


def test_the_rows_are_the_last_that_fit(file, tokenizer):
    every = held_out(str(file), 10**6, 0, tokenizer, 64, 64)
    last = held_out(str(file), 5, 0, tokenizer, 64, 64)
    assert last == every[-len(last) :]
    assert held_out(str(file), 5, 2, tokenizer, 64, 64) == last[:2]
    assert all(len(prompt) + len(answer) <= 64 for prompt, answer in every)
    short = held_out(str(file), 10**6, 0, tokenizer, 64, 8)
    assert short == [row for row in every if len(row[1]) <= 8]
    assert all(answer[-1] == tokenizer.eos_token_id for _, answer in every)
    with pytest.raises(ConfigError, match=r"none of the last \d+ rows has an answer of at most 1 tokens"):
        held_out(str(file), 1000, 0, tokenizer, 64, 1)
    with pytest.raises(ConfigError, match="none of the last 1 rows fits in 40 tokens"):
        held_out(str(file), 1, 0, tokenizer, 40, 40)


def test_means_go_over_tokens_and_intervals_over_answers():
    run = PathRun("m", "conv", "S=4", "", [PathCost([1, 2, 3], 4), PathCost([5], 2)])
    assert run.nats.mean == pytest.approx(11 / 4)
    assert run.nats.count == 2
    assert path_table([run]).rows == [["m, conv, S=4", "2", "3.0", "2.750"]]  # no interval of two answers
    several = PathRun("m", "conv", "S=4", "", [PathCost([1, 2, 3], 4), PathCost([5], 2)] * 5)
    residuals = [6 - 3 * 11 / 4, 5 - 11 / 4] * 5  # of the sums, from what their sizes let expect
    half = 2.2622 * (10 / 9 * sum(r**2 for r in residuals)) ** 0.5 / 20
    assert several.nats.high - several.nats.mean == pytest.approx(half, rel=1e-3)
    assert path_table([several]).rows == [["m, conv, S=4", "10", "3.0", f"2.750 ± {half:.3f}"]]


def test_runs_that_differ_in_one_thing_are_compared():
    def run(model, line, pace, extra, calls, count=12):
        return PathRun(model, line, pace, "", [PathCost([i + extra, 0.5], calls) for i in range(count)])

    runs = [run("a", "top-k", "S=4", 0, 4), run("a", "conv", "S=4", 1, 3), run("b", "conv", "S=4", -1, 3)]
    runs += [
        run("b", "conv", "S=8", 0, 6),
        run("a", "semi-ar", "S=8", 2, 4),
        run("a", "llada", "S=4", 0, 4, 5),
    ]
    assert differences(runs).rows == [
        ["a, conv, S=4", "a, top-k, S=4", "+0.500", "< 0.001"],
        ["b, conv, S=4", "a, conv, S=4", "-1.000", "< 0.001"],
        ["a, semi-ar, S=8", "a, top-k, S=4", "+1.000", "< 0.001"],  # as many calls
    ]


def test_a_panel_for_each_model_and_a_line_for_each_decoder():
    runs = [
        PathRun(model, name, f"S={steps}", "", [PathCost([1.0 + steps], steps)] * 2)
        for model in ("a", "b") for name in ("conv", "top-k") for steps in (8, 4)
    ]  # fmt: skip
    panels = draw_paths(runs).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["a", "b"]
    lines = {line.get_label(): line.lines[0].get_xydata().tolist() for line in panels[0].containers}
    assert lines == {"conv": [[4, 5], [8, 9]], "top-k": [[4, 5], [8, 9]]}


def test_the_command_measures_each_decoder(checkpoint, file, tmp_path, capsys):
    words = [str(checkpoint), "--data", str(file), "--limit", "3", "--window", "48", "--device", "cpu"]
    words += ["--decoders", "conv(kernel_size=9),llada", "--steps", "L/8,48", "--output", str(tmp_path / "o")]
    assert main(["eval", "path", *words]) == 0
    out = capsys.readouterr().out
    assert "conv,K=9, L=48,S=6" in out
    runs = json.loads((tmp_path / "o" / "paths.json").read_text())["runs"]
    assert [(run["line"], run["pace"]) for run in runs] == [
        (name, f"L=48,S={steps}") for name in ("conv,K=9", "llada") for steps in (6, 48)
    ]
    for run in runs:
        assert len(run["costs"]) == 3
        assert all(0 < nats < math.inf for cost in run["costs"] for nats in cost["nats"])
    assert (tmp_path / "o" / "paths.svg").exists()
    assert (tmp_path / "o" / "paths.md").read_text().count("conv,K=9, L=48,S=48") == 2


def test_a_run_that_was_killed_goes_on(checkpoint, file, tmp_path, monkeypatch):
    words = ["eval", "path", str(checkpoint), "--data", str(file), "--limit", "3", "--window", "48"]
    words += ["--output", str(tmp_path / "o"), "--device", "cpu", "--steps", "6"]
    assert main([*words, "--decoders", "llada"]) == 0
    counted = []
    monkeypatch.setattr(path, "path_costs", lambda *a, **k: counted.append(a) or original(*a, **k))
    assert main([*words, "--decoders", "llada,conv"]) == 0
    assert len(counted) == 1  # conv alone
    assert main([*words, "--decoders", "top-k"]) == 0
    kept = json.loads((tmp_path / "o" / "paths.json").read_text())
    assert [run["line"] for run in kept["runs"]] == ["llada", "conv", "top-k"]  # all that was measured
    told = (tmp_path / "o" / "paths.md").read_text()
    assert all(f", {name}, L=48,S=6 | 3 |" in told for name in ("llada", "conv", "top-k"))
    weights = checkpoint / "config.json"
    weights.write_text(weights.read_text() + "\n")
    assert main([*words, "--decoders", "conv"]) == 0
    assert len(counted) == 3  # another model under the same name
    assert main([*words, "--decoders", "llada,conv", "--seed", "1"]) == 2
    assert len(counted) == 3  # other settings go into another folder


def test_what_cannot_be_measured_is_refused(capsys):
    assert main(["eval", "path"]) == 2
    assert "name one or more checkpoints" in capsys.readouterr().err
    assert main(["eval", "path", "default", "--last", "0"]) == 2
    assert "last must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {"a": 1}}', '{"settings": {"a": 1}, "runs": [1]}'])
def test_figures_that_are_none_are_named(tmp_path, text):
    (tmp_path / "paths.json").write_text(text)
    with pytest.raises(DataError, match=r"paths\.json: not what"):
        PathFolder(tmp_path, {"a": 1})


def test_other_answers_under_the_same_name_are_measured_again(checkpoint, file, tmp_path):
    words = [str(checkpoint), "--data", str(file), "--limit", "2", "--window", "48", "--device", "cpu"]
    words += ["--decoders", "llada", "--steps", "48", "--output", str(tmp_path / "o")]
    costs = []
    for count in (2, 5):
        line = {"instruction": "Say it.", "output": " ".join(["word"] * count)}
        file.write_text("\n".join([json.dumps(line)] * 4))
        assert main(["eval", "path", *words]) == 0
        (run,) = json.loads((tmp_path / "o" / "paths.json").read_text())["runs"]
        costs.append(len(run["costs"][0]["nats"]))
    assert costs[1] > costs[0]


def test_an_order_table_that_has_changed_is_measured_again(checkpoint, file, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "home"))
    words = [str(checkpoint), "--data", str(file), "--limit", "2", "--window", "48", "--device", "cpu"]
    words += ["--decoders", "dprm(table=mine)", "--steps", "12", "--output", str(tmp_path / "o")]
    marks = []
    for seed in (0, 0, 1):
        order_table(seed=seed).save("mine")
        assert main(["eval", "path", *words]) == 0
        (run,) = json.loads((tmp_path / "o" / "paths.json").read_text())["runs"]
        marks.append(run["fingerprint"])
    assert marks[0] == marks[1] != marks[2]


def test_figures_of_other_weights_or_settings_are_not_mixed(checkpoint, file, tmp_path, caplog, capsys):
    words = [str(checkpoint), "--data", str(file), "--window", "48", "--device", "cpu", "--steps", "48"]
    words = ["eval", "path", *words, "--output", str(tmp_path / "o")]
    assert main([*words, "--limit", "3", "--decoders", "llada,conv(kernel_size=9)"]) == 0
    model, tokenizer = load_model(checkpoint, device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    assert main([*words, "--limit", "3", "--decoders", "llada"]) == 0
    assert [run["line"] for run in json.loads((tmp_path / "o" / "paths.json").read_text())["runs"]] == [
        "llada"
    ]
    assert "2 runs of other weights or rows are dropped" in caplog.text
    capsys.readouterr()
    assert main([*words, "--limit", "2", "--decoders", "llada"]) == 2
    assert "holds paths whose limit was 3, not 2" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "o" / "paths.json").read_text())["runs"][0]["costs"]) == 3
