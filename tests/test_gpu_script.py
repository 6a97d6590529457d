"""`benchmarks.gpu` and its bundle, in miniature: what a GPU is given to do, but for the size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import bundle
from benchmarks.gpu.__main__ import STAGES, timed
from benchmarks.gpu.__main__ import main as gpu_main
from benchmarks.gpu.baselines import Graphed, as_causal
from benchmarks.gpu.context import time_limit
from benchmarks.gpu.decode import CAUSAL, block_ways, first_ways, large_ways, other_ways, title
from benchmarks.gpu.material import MINIATURE, shaped
from benchmarks.gpu.pieces import cut, joined, packed
from benchmarks.gpu.report import Report
from benchmarks.objectives import keep, stored

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys
from importlib.machinery import PathFinder
MISSING = {"datasets", "jsonargparse", "docstring_parser", "platformdirs", "gguf"}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""A Python without our data libraries."""


def call(words, cwd, **environment):
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle without wheels and base, with rows of nobody, unpacked and run by its own script."""
    pytest.importorskip("triton")
    there = tmp_path_factory.mktemp("gpu")
    (there / "bare").mkdir()
    (there / "bare" / "sitecustomize.py").write_text(BARE)
    (there / "rows.npz").write_bytes(b"stage train makes its own in miniature")
    words = ["--output", str(there / "bundle"), "--rows", str(there / "rows.npz"), "--no-wheels", "--no-base"]
    assert bundle.main(words) == 0
    shown = call(
        ["bash", str(there / "bundle" / "run.sh"), "--tiny", "--device", "cpu", "--minutes", "1",
         "--deliver", str(there / "out")],
        there, DLM_HOME=str(there / "home"), PYTHON=sys.executable, PYTHONPATH=str(there / "bare"),
    )  # fmt: skip
    return there, shown


def test_every_stage_passes_on_a_bare_python_and_once(folder):
    """One test, so that processes that share the tests run the bundle once."""
    there, shown = folder
    results = [json.loads(line) for line in (there / "out" / "report.jsonl").read_text().splitlines()]
    assert [r["name"] for r in results if r["stage"] == "stages"] == list(STAGES)
    assert not [r for r in results if r["stage"] == "failures"]
    assert (
        "not installed, and done without: datasets" not in shown
    )  # it has its metadata, and is not imported
    names = {r["name"] for r in results}
    assert {"hardware", "ceilings", "recipe", "V=300, N=4", "tiny, batch 1: rate 4", "4 clients"} <= names
    found = {r["name"]: r for r in results if r["stage"] == "train"}["recipe"]
    assert found["nelbo_last"] < found["nelbo_first"]
    the_pieces_that_come_back_are_adapters(there)
    what_is_done_is_not_done_again(there)


def the_pieces_that_come_back_are_adapters(there):
    assert len(list((there / "out").iterdir())) <= 8
    call([sys.executable, "-m", "benchmarks.gpu.pieces", str(there / "out"), "sft.tar.gz", "--output",
          str(there / "sft")], ROOT)  # fmt: skip
    names = {path.name for path in (there / "sft").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json", "curve.png",
            "history.json", "token_counts.safetensors"} <= names  # fmt: skip


def what_is_done_is_not_done_again(there):
    report = there / "home" / "run" / "report.jsonl"
    before = [json.loads(line) for line in report.read_text().splitlines()]
    call([sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--minutes", "1", "--output",
          str(there / "home" / "run"), "--stage", "kernels", "train", "r2ft"], ROOT)  # fmt: skip
    after = [json.loads(line) for line in report.read_text().splitlines()][len(before) :]
    assert {r["stage"] for r in after} == {"machine", "stages"}


def test_pieces_are_checked(tmp_path):
    data = bytes(range(256)) * 10
    assert len(cut(data, tmp_path, "x", 1000)) == 3
    assert joined(tmp_path, "x") == data
    (tmp_path / "x.01").write_bytes(b"?" * 1000)
    with pytest.raises(ValueError, match="do not add up"):
        joined(tmp_path, "x")
    (tmp_path / "x.02").unlink()
    with pytest.raises(ValueError, match=r"x\.02 not there"):
        joined(tmp_path, "x")
    with pytest.raises(ValueError, match="knows no y, only x"):
        joined(tmp_path, "y")


def test_the_baseline_writes_what_generate_writes():
    causal = as_causal(shaped(torch.device("cpu"), torch.float32, **MINIATURE))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in causal.parameters():
            if weight.dim() == 2:  # larger weights, so that the next token depends on those before it
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    prompts = torch.randint(5, 290, (3, 10), generator=torch.Generator().manual_seed(0))
    expected = causal.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=9,
        min_new_tokens=9, pad_token_id=0, eos_token_id=None,
    )[:, 10:]  # fmt: skip
    assert len(set(expected.flatten().tolist())) > 9
    graphed = Graphed(causal, prompts, 9)
    for _ in range(2):  # the cache begins anew
        assert graphed.write() == 27
        assert torch.equal(graphed.text, expected)


def test_every_batch_has_its_baseline_first():
    for ways in ([*first_ways(), *other_ways()], [*large_ways()], [*block_ways()]):
        titles = [title("m", way) for way in ways]
        assert len(set(titles)) == len(titles)
        for place, way in enumerate(ways):
            assert titles.index(title("m", way).split(":")[0] + f": {CAUSAL}") <= place


def test_what_takes_too_long_is_stopped():
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="stopped after 0 s"), time_limit(0.1):
        time.sleep(5)
    assert time.monotonic() - begun < 4
    with time_limit(0.1):
        pass
    time.sleep(0.2)  # nothing is stopped later


def test_a_delivery_counts_when_it_is_whole(tmp_path):
    """Pieces of another delivery under the same names are not taken for it."""
    home, script = tmp_path / "home", Path(bundle.__file__).with_name("run.sh")

    def deliver(name, contents, pieces=True):
        place = tmp_path / name
        for path, text in contents.items():
            (tmp_path / f"{name}-repository" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}-repository" / path).write_text(text)
        root = tmp_path / f"{name}-repository"
        cut(
            packed([path for path in root.rglob("*") if path.is_file()], root), place, "repository.tar.gz", 60
        )
        if not pieces:
            for file in place.glob("*.gz.*"):
                file.unlink()
        (place / "run.sh").write_text(script.read_text())
        env = {**os.environ, "DLM_HOME": str(home)}
        line = ["bash", str(place / "run.sh")]
        return subprocess.run(line, env=env, capture_output=True, text=True, check=False)

    version = home / "repository" / "VERSION"
    assert deliver("first", {"VERSION": "old", "more": "x" * 999}).returncode == 0
    assert version.read_text() == "old"
    done = deliver("second", {"VERSION": "new"}, pieces=False)
    assert "damaged, or not all of one delivery" in done.stderr
    assert version.read_text() == "old"
    assert deliver("third", {"VERSION": "new"}).returncode == 0
    assert version.read_text() == "new"


def test_lists_of_packages_may_be_those_of_pip_freeze(tmp_path):
    have = tmp_path / "have.txt"
    have.write_text(
        "flash-attn @ file:///opt/torch/transformers/flash_attn-2.whl\n# gguf is not here\n"
        "-e git+https://x/y.git@1#egg=datasets\nnumpy==2.1 ; python_version > '3'  # platformdirs\n"
    )
    assert bundle.installed(have) == {"flash-attn", "datasets", "numpy"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "foo"], "--set takes NAME=VALUE, got 'foo'"),
        (["--device", "foo"], "--device must be auto, cpu, cuda or cuda:N, got 'foo'"),
        (["--stage", "kernels=nan"], "a stage has some minutes, got 'kernels=nan'"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message, capsys):
    assert gpu_main(["--tiny", "--device", "cpu", "--stage", "kernels", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_torn_result_of_the_objectives_is_passed_over(tmp_path):
    objective = SimpleNamespace(name="plain")
    keep(objective, {"nats": 3.0}, tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "bloc')
    keep(objective, {"relevance": 0.5}, tmp_path)
    assert stored(tmp_path) == {"plain": {"name": "plain", "nats": 3.0, "relevance": 0.5}}


def test_stages_have_minutes_of_their_own():
    assert timed(["train=4.5", "r2ft"], 2) == {"train": 4.5, "r2ft": 2.0}
    with pytest.raises(ValueError, match="no stage 'trian'"):
        timed(["trian"], 1)


def test_a_cut_line_of_the_report_is_passed_over(tmp_path):
    Report(tmp_path).add("a", "one", value=1.0)
    with (tmp_path / "report.jsonl").open("a") as file:
        file.write('{"stage": "a", "na')
    report = Report(tmp_path)
    report.add("a", "two", value=12345.6)
    assert [r["name"] for r in Report(tmp_path).results] == ["one", "two"]
    assert "| two | 12,346 |" in report.page.read_text()


def test_wheels_are_those_that_the_machine_lacks(tmp_path):
    have = tmp_path / "have.txt"
    have.write_text("torch==2.11.0\nTransformers>=5\nhuggingface_hub, tokenizers numpy\n")
    names = {requirement.name for requirement in bundle.wanted(have)}
    assert not names & {"torch", "transformers", "huggingface-hub", "tokenizers", "numpy"}
    assert {"gguf", "datasets", "platformdirs", "fastapi", "sse-starlette"} <= names


def test_a_wheel_says_what_it_needs(tmp_path):
    import zipfile

    lines = ("Name: x", "Requires-Dist: a>=1", 'Requires-Dist: b; sys_platform == "win32"',
             'Requires-Dist: c; extra == "more"', 'Requires-Dist: d; python_version >= "3.12"')  # fmt: skip
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as parts:
        parts.writestr("x-1.dist-info/METADATA", "\n".join(lines))
    assert [requirement.name for requirement in bundle.needs(tmp_path / "x.whl")] == ["a", "d"]


def test_stages_apart_fail_alone(tmp_path):
    words = ["--tiny", "--device", "cpu", "--output", str(tmp_path), "--minutes", "1", "--apart"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words, "--stage", "eval", "kernels=0.001"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "[left out] eval: why no model to ask" in done.stdout
    assert done.stdout.count("not installed, and done without") <= 1
    assert "[kernels] V=300, N=4: left out" in done.stdout
