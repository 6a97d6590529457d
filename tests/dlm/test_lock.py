"""One process at a time in a folder."""

import signal
import subprocess
import sys

import pytest

from dlm.errors import ConfigError
from dlm.lock import alone_in, check_writable

HOLD = (
    "import sys, time; from dlm.lock import alone_in\n"
    "with alone_in(sys.argv[1]): print('in', flush=True); time.sleep(60)"
)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "runs" / "one"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(ConfigError, match="one: another process is writing there"), alone_in(folder):
        pass
    with alone_in(tmp_path / "runs" / "two"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with alone_in(folder):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/run: cannot be written to"),
        alone_in(tmp_path / "file" / "run"),
    ):
        pass


def test_a_folder_is_tried_without_being_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file.*cannot be written to .*file is no folder"):
            check_writable(wrong)


def test_rights_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="no right to write"):
        check_writable(tmp_path / "new")
