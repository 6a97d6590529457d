import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dlm.cli import main
from dlm.errors import DataError
from dlm.lock import alone_in
from eval.answers import Answer, AnswerFile
from eval.metrics import Instruments, summary
from eval.report import plots, tables
from eval.report.report import find_runs, write_report
from eval.run import Card, Results, Verdict, comparable, finish, open_run, representatives
from eval.tasks import Question
from tests.eval.endpoint import serving

QUESTIONS = [Question(str(i), (f"{i} + 1?",), (f"#### {i + 1}",)) for i in range(12)]


def run(folder, decoder, steps, kernel=0, right=6, count=12):
    settings = {"steps": steps, "window": 32, "seed": 0, **({"kernel_size": kernel} if kernel else {})}
    label = ",".join([decoder, *([f"K={kernel}"] if kernel else []), f"S={steps}"])
    card = Card("gsm8k", "q.json", "tiny", "runs/tiny", "abc", label, decoder, settings)
    place = card.folder(folder)
    open_run(place, card)
    said = {}
    for i, q in enumerate(QUESTIONS[:count]):
        text = f"It <is> {i + 1 if i < right else 99} | of course"
        said[q.id, 0] = Answer(q.id, 0, text, 4, "stop", steps - 1, steps, 0.25, [0, 1, 2, steps - 1])
    AnswerFile(place / "answers.jsonl").write(said.values())
    finish(place, card, QUESTIONS[:count], said, Instruments())
    return Results.load(place)


@pytest.fixture
def runs(tmp_path):
    return [
        run(tmp_path / "runs", name, steps, kernel, right)
        for name, steps, kernel, right in (
            ("conv", 8, 9, 6), ("conv", 16, 9, 9), ("conv", 16, 17, 8),
            ("top-k", 8, 0, 4), ("top-k", 16, 0, 5),
        )
    ]  # fmt: skip


def test_tables_say_what_was_measured(runs):
    table = tables.quality(runs)
    row = table.rows[0]
    assert row[0] == "tiny, conv,K=9,S=8"
    assert row[table.head.index("right")].startswith("50.0 ± ")
    assert row[table.head.index("model calls")] == "7.0 ± 0.0"
    assert tables.speed(runs).rows[0][2:] == [f"{4 / 7:.2f}", "0.25", "16.0"]
    rows = {(row[0], row[1]): row[3] for row in tables.paired(runs, "right").rows}
    assert rows == {
        ("tiny, conv,K=17,S=16", "tiny, conv,K=9,S=16"): "-8.3 %",
        ("tiny, top-k,S=8", "tiny, conv,K=9,S=8"): "-16.7 %",
        ("tiny, top-k,S=16", "tiny, conv,K=9,S=16"): "-33.3 %",
    }
    assert "| tiny, top-k,S=8 |" in table.markdown()


def test_everything_can_be_compared_with_named_decoders_and_systems(runs, tmp_path):
    base = replace(runs[0], card=replace(runs[0].card, system="base", label="autoregressive", decoder=""))
    few = run(tmp_path / "runs", "llada", 8, right=0, count=5)
    table = tables.paired([*runs, few, base], "right", ["top-k", "base"])
    rows = {(row[0], row[1]): row[2:4] for row in table.rows}
    assert rows[("tiny, conv,K=9,S=8", "tiny, top-k,S=8")] == ["12", "+16.7 %"]
    assert rows[("tiny, llada,S=8", "tiny, top-k,S=8")] == ["5", "-80.0 %"]  # on the five that both have
    assert rows[("tiny, top-k,S=16", "base, autoregressive")] == ["12", "-8.3 %"]
    assert {other for _, other in rows} == {"tiny, top-k,S=8", "tiny, top-k,S=16", "base, autoregressive"}
    assert len(rows) == 4 + 6


def test_a_name_that_is_no_run_is_refused(runs, tmp_path, capsys):
    words = ["eval", "report", str(tmp_path / "runs"), "--output", str(tmp_path / "o"), "--against", "convv"]
    assert main(words) == 2
    assert "'convv'. Did you mean 'conv'" in capsys.readouterr().err


def test_inlier_rates_go_by_the_band_of_the_longest_run(runs):
    def judged(run, count=12, **band):
        rows = {
            key: row | {"nll": math.log(1 + i), "inlier": 1.0}  # perplexities of 1 to 12
            for i, (key, row) in enumerate(list(run.measured.items())[:count])
        }
        return replace(run, measured=rows, means=summary(rows), whole=run.whole | band)

    same = [judged(run, usual_mean=9.0, usual_deviation=2.1) for run in runs[:2]]
    assert comparable(same) == same
    short = judged(runs[2], 6, usual_mean=2.0, usual_deviation=0.5)
    *_, found = comparable([*same, short])
    assert [row["inlier"] for row in found.measured.values()] == [0, 0, 0, 0, 1, 1]  # 4.8 to 13.2
    assert found.means["inlier"].mean == pytest.approx(1 / 3)
    assert found.whole["usual_mean"] == 9.0
    assert found.means["nll"] == short.means["nll"]
    unknown = [judged(runs[0]), judged(runs[1], 6)]
    for run in comparable(unknown):
        assert "inlier" not in run.means
        assert not any("inlier" in row for row in run.measured.values())
    assert comparable([*unknown, same[0]])[1].means["inlier"].mean == pytest.approx(1 / 3)


def test_the_runs_side_by_side_are_of_all_systems(runs):
    several = [replace(r, card=replace(r.card, system=name)) for name in ("a", "b") for r in runs]
    chosen = [(run.card.system, run.card.decoder) for run in representatives(several, 3)]
    assert chosen == [("a", "conv"), ("a", "top-k"), ("b", "conv")]
    assert len(representatives(several, 8)) == 4


def test_runs_of_different_length_say_how_many_answers_they_have(runs, tmp_path):
    assert "answers" not in tables.quality(runs).head
    table = tables.quality([*runs, run(tmp_path / "runs", "llada", 8, count=5)])
    assert table.title == "gsm8k: 5 to 12 answers, the first questions"
    assert [row[table.head.index("answers")] for row in table.rows] == ["12"] * 5 + ["5"]


def test_a_line_goes_over_calls_or_over_sizes(runs):
    figure = plots.quality_plot(runs)
    (panel,) = [p for p in figure.axes if p.get_title(loc="left").startswith("right")]
    drawn = {line.get_label(): line.lines[0].get_xydata() for line in panel.containers}
    assert set(drawn) == {"conv, K=9", "conv, K=17", "top-k"}
    assert drawn["conv, K=9"].tolist() == [[7.0, 50.0], [15.0, 75.0]]
    along = ("kernel_size", "block_size")
    assert [run.card.label for run in plots.swept(runs, plots.size, along)] == [
        "conv,K=9,S=16",
        "conv,K=17,S=16",
    ]
    assert (
        plots.quality_plot(plots.swept(runs[:2], plots.size, along), plots.size) is None
    )  # nothing was swept
    sizes = plots.quality_plot(runs, plots.size, "size", along)
    lines = {line.get_label(): line.lines[0].get_xydata() for line in sizes.axes[0].containers}
    assert lines["conv, S=16"][:, 0].tolist() == [9.0, 17.0]
    assert plots.quality_plot(runs[:1]) is None


def test_systems_have_rows_of_their_own_and_single_points_are_levels(runs, tmp_path):
    both = [*runs, *(replace(r, card=replace(r.card, system="other")) for r in runs)]
    alone = replace(runs[0], card=replace(runs[0].card, system="alone", label="ar"))
    figure = plots.quality_plot([*both, alone])
    assert [panel.get_ylabel() for panel in figure.axes] == ["tiny", "other"]
    assert all(len(panel.containers) == 3 for panel in figure.axes)
    assert [line.get_label() for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"][
        -1
    ] == "alone, ar"


def test_when_places_get_their_token(runs):
    shares = plots.reveal_shares(runs[0], 6)
    assert shares.shape == (6, 8)
    np.testing.assert_array_equal(shares[:4].argmax(1), [0, 1, 2, 7])
    np.testing.assert_array_equal(shares.sum(1), [1, 1, 1, 1, np.nan, np.nan])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href") and value and not value.startswith("#")
        ]

    def handle_data(self, data):
        self.text += data


def won(wins, count):
    """Verdicts of which so many are wins."""
    return {f"{i}/0": float(i < wins) for i in range(count)}


def test_judges_figures_have_intervals_not_standard_errors(runs):
    rate = {"win_rate": 40.0, "standard_error": 5.0, "count": 90, "lc_kind": "length only"}
    rate |= {"lc_win_rate": 41.0, "lc_standard_error": 6.0}
    grade = {"by_turn": [7.0], "overall": {"mean": 7.0, "low": 6.5, "high": 7.25, "count": 9}}
    verdicts = [
        Verdict("alpaca_eval", "j", "refs", "win", won(36, 90), rate),
        Verdict("alpaca_eval", "k", "refs", "win", won(4, 4), {**rate, "count": 4, "lc_win_rate": None}),
        Verdict("mt_bench_pairs", "j", "other", "win", won(10, 10), {"win_rate": 1.0}),
        Verdict("mt_bench", "j", "", "grade", {}, grade),
        Verdict("geval", "j", "fluency", "score", {}, {"mean": {"mean": 3.5, "low": None, "high": None}}),
    ]
    table = tables.judged([replace(runs[0], verdicts=verdicts)])
    assert [row[-1] for row in table.rows] == [
        "40.0 ± 10.3 % of 90", "41.0 ± 11.8 %",  # 36 of 90 by Wilson (1927): 30.5 to 50.3 %
        "100.0 % of 4",  # four say nothing of an interval
        "100.0 (72.2–100.0) %",  # 10 of 10: 72.2 to 100 %
        "7.00", "7.00 ± 0.50", "3.50",
    ]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 12])
def test_empty_answers_make_a_report_without_warnings(tmp_path, count):
    card = Card("gsm8k", "q.json", "tiny", "runs/tiny", "abc", "conv,S=8", "conv", {"steps": 8})
    place = card.folder(tmp_path / "runs")
    open_run(place, card)
    said = {(q.id, 0): Answer(q.id, 0, "", 0, "stop", 8, 8) for q in QUESTIONS[:count]}
    AnswerFile(place / "answers.jsonl").write(said.values())
    finish(place, card, QUESTIONS[:count], said, Instruments())
    write_report(find_runs([str(tmp_path / "runs")]), tmp_path / "report", "t", 4, "", [])
    assert "100.0" in (tmp_path / "report" / "report.md").read_text()


def test_a_report_says_what_default_stands_for_and_where_that_differs(runs, tmp_path):
    def report(*decoders):
        marked = [
            replace(each, card=replace(each.card, system=f"m{i}", stands_for=decoder))
            for i, (each, decoder) in enumerate(zip(runs, decoders, strict=False))
        ]
        write_report(marked, tmp_path / "report", "t", 0)
        return (tmp_path / "report" / "report.md").read_text()

    assert "checkpoint's own" not in report("", "")
    same = report("conv", "conv")
    assert '"default" is the checkpoint\'s own decoder: conv (m0, m1).' in same
    assert "They differ" not in same
    differing = report("conv", "llada(block_size=32)")
    assert "conv (m0); llada(block_size=32) (m1). They differ" in differing


@pytest.mark.parametrize("system", ["..", ".", "../../x", ".hidden", "a/b", ""])
def test_a_name_never_leaves_its_folder(tmp_path, system):
    for label in ("", "conv"):
        card = Card("gsm8k", "", system, "m", "", label, "", {})
        assert card.folder(tmp_path).resolve().parent == (tmp_path / "gsm8k").resolve()


def test_decoders_at_several_paces_have_an_area_under_parallelism(runs):
    table = tables.under_parallelism(runs)
    assert [row[:2] for row in table.rows] == [
        ["tiny, conv,K=9,S=16", f"{75 * 4 / 15:.1f}"],  # half as many calls lose 25 points: they do not count
        ["tiny, top-k,S=16", f"{100 * 5 / 12 * 4 / 15:.1f}"],
    ]
    assert table.rows[0][2] == "75.0 % at 0.27, 50.0 % at 0.57"
    assert tables.under_parallelism(runs[:1]) is None


def test_over_several_seeds_the_area_is_a_mean(tmp_path, runs):
    one = runs[3:]  # top-k: 33.3 % in half the calls, 41.7 %
    other = [
        replace(
            run(tmp_path / "again", "top-k", steps, right=right),
            card=replace(old.card, settings=old.card.settings | {"seed": 1}),
        )
        for steps, right, old in ((8, 12, one[0]), (16, 10, one[1]))
    ]
    ((name, area, shown),) = tables.under_parallelism([*one, *other]).rows
    slow, fast = 4 / 15, 4 / 7  # tokens per call
    first = 100 * 5 / 12 * slow  # the faster one is more than five points below
    weight = math.exp(-3 * (1 - 10 / 12))
    second = 100 * (10 / 12 * slow + (fast - slow) * (1 + 10 / 12 * weight) / 2)
    assert name == "tiny, top-k,S=16"
    mean, deviation = (first + second) / 2, abs(second - first) / math.sqrt(2)
    assert area == f"{mean:.1f} ± {deviation:.1f}"
    assert shown == f"{75 / 1.2:.1f} % at 0.27, {100 * 8 / 12:.1f} % at 0.57"


def test_a_report_is_one_page_and_markdown(runs, tmp_path, capsys):
    verdict = Verdict("geval", "j", "fluency", "score", {"0/0": 3.0, "1/0": 4.0}, {"mean": {"mean": 3.5}})
    verdict.save(runs[0].folder)
    curve = {"tiny": {name: [0.1, 0.2, 0.3] for name in ("frequent", "prompt", "end")}}
    (tmp_path / "ldw.json").write_text(json.dumps(curve))
    out = tmp_path / "report"
    words = [
        "eval",
        "report",
        str(tmp_path / "runs"),
        "--output",
        str(out),
        "--ldw",
        str(tmp_path / "ldw.json"),
    ]
    assert main(words) == 0
    names = {"report.md", "report.html", "gsm8k-calls.svg", "gsm8k-size.svg", "gsm8k-steps.svg", "ldw.svg"}
    assert {file.name for file in out.iterdir()} == {*names, ".lock"}
    assert {line.rsplit("/")[-1] for line in capsys.readouterr().out.split()} == names
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.tags.count("svg") == 4
    assert page.links == []
    assert "It <is> 1 | of course" in page.text
    assert "3.50" in page.text
    text = (out / "report.md").read_text()
    assert "![" in text
    assert "(gsm8k-calls.svg)" in text
    assert [f"**{i} + 1?**" in text for i in range(9)] == [True] * 8 + [False]
    before = (out / "gsm8k-calls.svg").read_bytes()
    assert main(words) == 0
    assert (out / "gsm8k-calls.svg").read_bytes() == before


def test_two_processes_do_not_write_one_report(runs, tmp_path, capsys):
    words = ["eval", "report", str(tmp_path / "runs"), "--output", str(tmp_path / "report")]
    with alone_in(tmp_path / "report"):
        assert main(words) == 2
        assert "report: another process is writing there" in capsys.readouterr().err
        assert not (tmp_path / "report" / "report.md").exists()
    assert main(words) == 0


def test_order_is_natural_and_nothing_is_an_error(runs, tmp_path):
    assert [r.card.settings["steps"] for r in find_runs([str(tmp_path)])] == [8, 16, 16, 8, 16]
    assert len(find_runs([str(tmp_path), str(tmp_path / "runs" / ".." / "runs")])) == 5
    with pytest.raises(DataError, match="no finished runs"):
        find_runs([str(tmp_path / "nothing")])


def test_judging_a_run_by_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = tmp_path / "q.jsonl"
    data.write_text(
        "".join(json.dumps({"question": q.turns[0], "answer": q.reference[0]}) + "\n" for q in QUESTIONS)
    )
    with serving(lambda body: "4") as endpoint:
        words = [
            "eval", "judge", str(runs[0].folder), "--method", "geval", "--aspect", "fluency",
            "--data", str(data),
            "--judge.url", endpoint.url, "--judge.model", "j", "--judge.cache", str(tmp_path / "cache"),
        ]  # fmt: skip
        assert main([*words, "--judge.dry_run", "--judge.price_in", "2"]) == 0
        said = capsys.readouterr().out
        assert "12 requests to make" in said
        assert "nothing was asked" in said
        assert endpoint.seen == []
        with alone_in(runs[0].folder):
            assert main([*words, "--judge.dry_run"]) == 0  # which writes nothing
            assert main(words) == 2
        assert "another process is writing there" in capsys.readouterr().err
        assert endpoint.seen == []
        assert not (runs[0].folder / "verdicts").exists()
        assert main(words) == 0
        assert len(endpoint.seen) == 12
    run = Results.load(runs[0].folder)
    assert run.means["score"].mean == 4.0
    assert (run.verdicts[0].judge, run.verdicts[0].against) == ("j", "fluency")
    assert "malformed 0" in capsys.readouterr().out
    (run.folder / "verdicts" / "x.json").write_text("{")
    with pytest.raises(DataError, match="x.json"):
        Results.load(run.folder)


def test_answers_without_a_verdict_are_left_out_of_its_mean(runs):
    for run in runs[:2]:
        verdict = {"0/0": 1.0, "1/0": float("nan"), "2/0": 0.0}
        Verdict("alpaca_eval", "j", "refs", "win", verdict, {"win_rate": 50.0}).save(run.folder)
    loaded = [Results.load(run.folder) for run in runs[:2]]
    assert (loaded[0].means["win"].mean, loaded[0].means["win"].count) == (0.5, 2)
    first = replace(loaded[1], card=replace(loaded[1].card, label=loaded[0].card.label, system="other"))
    assert tables.paired([loaded[0], first], "win").rows[0][2:4] == ["2", "+0.0 %"]


def test_two_judges_do_not_overwrite_each_other(runs):
    for judge in ("a", "b"):
        Verdict("alpaca_eval", judge, "refs", "win", {"0/0": 1.0}, {"win_rate": 50.0}).save(runs[0].folder)
    assert [v.judge for v in Results.load(runs[0].folder).verdicts] == ["a", "b"]


def test_verdicts_of_several_kinds_are_not_mixed(runs):
    """Judge a saw all answers of both runs; b, and an annotator, only some of one."""
    keys = list(Results.load(runs[0].folder).measured)
    for run, worth in zip(runs[:2], (0.0, 0.0), strict=True):
        Verdict("alpaca_eval", "a", "refs", "win", dict.fromkeys(keys, worth), {}).save(run.folder)
    Verdict("alpaca_eval", "b", "refs", "win", dict.fromkeys(keys[:2], 1.0), {}).save(runs[0].folder)
    Verdict("mt_bench_pairs", "a", "x", "win", {keys[0]: 1.0}, {}).save(runs[0].folder)
    first, second = comparable([Results.load(run.folder) for run in runs[:2]])
    assert first.means["win"].mean == second.means["win"].mean == 0.0
    assert first.means["win"].count == len(keys)
    Verdict("geval", "a", "coherence", "score", dict.fromkeys(keys, 5.0), {}).save(runs[0].folder)
    Verdict("geval", "a", "fluency", "score", dict.fromkeys(keys, 1.0), {}).save(runs[0].folder)
    Verdict("geval", "a", "coherence", "score", dict.fromkeys(keys, 4.0), {}).save(runs[1].folder)
    first, second = comparable([Results.load(run.folder) for run in runs[:2]])
    assert (first.means["score"].mean, second.means["score"].mean) == (5.0, 4.0)


def test_two_models_of_one_name_and_two_files_under_one_id_are_told_apart(tmp_path):
    first, second = (run(tmp_path / name, "conv", 8) for name in ("a", "b"))
    other = replace(second, card=replace(second.card, fingerprint="another"))
    with pytest.raises(DataError, match="of different models, and both are called 'tiny'"):
        write_report([first, other], tmp_path / "report", "title")
    marked = [
        replace(each, answers={key: replace(answer, asked=mark) for key, answer in each.answers.items()})
        for each, mark in ((first, "one"), (second, "two"))
    ]
    with pytest.raises(DataError, match="answered different questions under one id"):
        write_report(marked, tmp_path / "report", "title")
    write_report([first, marked[0]], tmp_path / "report", "title")  # one of them does not know


def test_verdicts_on_two_opponents_are_two_files(tmp_path):
    long = "x" * 300
    for against in (f"{long} [1]", f"{long} [2]"):
        Verdict("mt_bench_pairs", "judge", against, "win", {"0/0": 1.0}, {}).save(tmp_path)
    assert len(list((tmp_path / "verdicts").iterdir())) == 2


def test_each_task_has_a_yardstick_of_its_own(tmp_path, runs):
    """A band and a judge of one task say nothing about another."""
    other = [replace(each, card=replace(each.card, task="wiki")) for each in runs[3:]]

    def judged(each, mean):
        rows = {key: row | {"nll": math.log(2 + i)} for i, (key, row) in enumerate(each.measured.items())}
        band = {"usual_mean": mean, "usual_deviation": 1.0}
        return replace(each, measured=rows, means=summary(rows), whole=each.whole | band)

    first = [judged(each, 5.0) for each in runs[:1]]
    second = [judged(each, 50.0) for each in other[:1]]
    inlier = {key: row | {"inlier": 1.0} for key, row in second[0].measured.items()}
    second = [replace(second[0], measured=inlier, means=summary(inlier))]
    inlier = {key: row | {"inlier": 0.0} for key, row in first[0].measured.items()}
    first = [replace(first[0], measured=inlier, means=summary(inlier))]
    write_report([*first, *second], tmp_path / "report", "title")
    text = (tmp_path / "report" / "report.md").read_text()
    wiki = text[text.index("## wiki: quality") :]
    assert "50.0" in wiki[: wiki.index("##", 5)]
    assert "100.0" in wiki[: wiki.index("##", 5)]


def test_figures_of_two_readers_are_not_compared(runs, caplog):
    def read(each, mark):
        rows = {key: row | {"nll": 1.0, "relevance": 0.5} for key, row in each.measured.items()}
        marks = {"nll": mark, "relevance": "encoder"}
        return replace(each, measured=rows, means=summary(rows), marks=marks)

    found = comparable([read(runs[0], "a"), read(runs[1], "a"), read(runs[2], "b")])
    assert ["nll" in each.means for each in found] == [True, True, False]
    assert not any("nll" in row for row in found[2].measured.values())
    assert all("relevance" in each.means for each in found)
    assert "nll left out" in caplog.text


def test_a_seed_at_one_pace_hides_no_other(runs, tmp_path):
    """Its decoder keeps the area of the seed that has one; its accuracy counts for the best of all."""
    one = run(tmp_path / "again", "conv", 8, 9, right=12)
    one = replace(one, card=replace(one.card, settings=one.card.settings | {"seed": 1}))
    table = tables.under_parallelism([*runs, one])
    assert [row[0] for row in table.rows] == [row[0] for row in tables.under_parallelism(runs).rows]


def test_judges_at_two_places_are_two(runs):
    for setting in ("a", "b"):
        Verdict("geval", "j", "x", "score", {"0/0": 1.0}, {}, setting).save(runs[0].folder)
    assert [v.setting for v in Results.load(runs[0].folder).verdicts] == ["a", "b"]


def test_a_long_name_is_cut_and_keeps_apart(tmp_path):
    card = Card("alpaca_eval", "q.json", "tiny", "m", "abc", f"conv,stop={'x' * 400}", "conv", {})
    other = replace(card, label=f"conv,stop={'x' * 401}")
    for each in (card, other):
        open_run(each.folder(tmp_path), each)
        said = {("0", 0): Answer("0", 0, "It is.", 4, "stop", 4, 4)}
        finish(each.folder(tmp_path), each, QUESTIONS[:1], said, Instruments())
    assert len(list((tmp_path / "alpaca_eval").iterdir())) == 2


def test_a_turn_without_a_readable_grade_is_a_dash(runs):
    figures = {"by_turn": [None, 7.0], "overall": {"mean": 7.0, "low": None, "high": None, "count": 1}}
    one = replace(runs[0], verdicts=[Verdict("mt_bench", "m", "", "grade", {"0/1": 7.0}, figures)])
    rows = {row[4]: row[5] for row in tables.judged([one]).rows}
    assert rows["grade, turn 1"] == "–"
    assert rows["grade, turn 2"] == "7.00"


def test_differences_are_of_the_runs_that_have_a_measure(runs):
    for measured in runs[2].measured.values():
        measured["win"] = 1.0
    for measured in runs[4].measured.values():
        measured["win"] = 0.25
    assert tables.paired(runs, "win", ["conv"]).rows == [
        ["tiny, top-k,S=16", "tiny, conv,K=17,S=16", "12", "-75.0 %", "< 0.001"]
    ]
    assert tables.paired(runs, "grade").rows == []
