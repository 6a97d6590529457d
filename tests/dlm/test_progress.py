"""Progress: a bar on a terminal, lines elsewhere, nothing for short work."""

import io
import logging
import sys
import time

import pytest

from dlm import progress as module
from dlm.progress import progress


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged; as under the program, bars of libraries are off where there is no terminal."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_short_work_says_nothing(said, capsys):
    assert list(progress(range(100), "counting", unit="row")) == list(range(100))
    with progress(None, "counting", 3) as bar:
        bar.update(3)
    assert (said(), capsys.readouterr().err) == ([], "")


def test_long_work_says_now_and_then_how_far_it_is(said, monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.05)
    for _ in progress(range(20), "counting", unit="row", leave=False):
        time.sleep(0.02)
    lines = said()
    assert 2 <= len(lines) < 20
    assert all(line.startswith("counting: ") and " of 20 rows, " in line for line in lines)
    assert lines[-1].startswith("counting: 20 of 20 rows")
    assert len(lines) == len(set(lines))
    assert capsys.readouterr().err == ""


def test_quiet_work_says_nothing(said, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress(range(3), "counting", quiet=True))
    assert said() == []


def test_a_terminal_has_a_bar(said, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(3), "counting", unit="row"))
    assert "counting: 100%" in terminal.getvalue()
    assert said() == []


def test_without_a_total_nothing_is_said_of_what_is_to_come(said, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.01)
    for _ in progress(iter(range(4)), "counting", unit="batch"):
        time.sleep(0.02)
    assert said()[-1].startswith("counting: 4 batches, ")
    assert not any(" of " in line or "to go" in line for line in said())


def test_where_nobody_listens_to_the_log_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module.logger, "level", logging.ERROR)
    module.logger.manager._clear_cache()
    list(progress(range(3), "counting"))
    assert "counting: 100%" in capsys.readouterr().err
