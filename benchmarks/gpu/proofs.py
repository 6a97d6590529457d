"""Stage `tests`: the tests that need a GPU, each as a result; on a CPU, in miniature."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.context import Context, MaterialError

ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/test_cuda.py", "tests/test_step_kernel.py")
LEAST_SECONDS = 10.0
"""Time below which a file of tests is not begun."""


def run(context: Context) -> None:
    """Run them in a process of their own; files whose tests all passed in this run are not run again.

    Raises:
        MaterialError: without pytest.
        RuntimeError: when one failed; the others are in the report all the same.
    """
    if importlib.util.find_spec("pytest") is None:
        raise MaterialError("pytest is not installed, so that no test can run")
    failed = 0
    for file in FILES if context.cuda else FILES[:1]:
        before = context.report.find("test files", file)
        if before and not before["failed"]:
            continue
        if context.left < LEAST_SECONDS:
            print(f"[tests] {file}: left out, {context.left:.0f} s are left", flush=True)
            failed += before["failed"] if before else 0
        else:
            failed += _run(context, file)
    if failed:
        raise RuntimeError(f"{failed} tests failed")


def _run(context: Context, file: str) -> int:
    """Run the tests of a file; gives how many failed."""
    log = (context.output / "tests.xml").resolve()
    log.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        file,
        "-p",
        "no:cacheprovider",
        f"--junitxml={log}",
        "--tb=short",
    ]
    if context.tiny:
        command += ["-k", "not kernel"]  # the interpreter is slow, and stage kernels tries it
    environment = {**os.environ, "DLM_GPU_TESTS": "" if context.cuda else "cpu"}
    try:
        subprocess.run(command, cwd=ROOT, env=environment, timeout=max(context.left, 10), check=False)
    except subprocess.TimeoutExpired:
        context.report.add("failures", file, error="its tests did not end in time")
    return record(context, file, log) if log.exists() else 1


def record(context: Context, file: str, log: Path) -> int:
    """Write down every test that did not pass, now or before, every figure, and the counts.

    Returns:
        The number that failed.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(log).getroot().iter("testcase"):
        fate, why = outcome(case)
        counts[fate] += 1
        figures = ", ".join(f"{p.attrib['name']} {short(p.attrib['value'])}" for p in case.iter("property"))
        if fate != "passed" or figures or context.done("tests", case.attrib["name"]):
            found = "; ".join(text for text in (figures, why[:500]) if text)
            context.report.add("tests", case.attrib["name"], fate=fate, found=found)
    context.report.add("test files", file, **counts)
    return counts["failed"]


def short(value: str) -> str:
    """A figure in a few digits, if it is one."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """Passed, failed or skipped, and why."""
    for fate, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        for tag in tags:
            found = case.find(tag)
            if found is not None:
                return fate, found.attrib.get("message", "")
    return "passed", ""
