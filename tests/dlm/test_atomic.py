import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from dlm.atomic import replacing, write_whole


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    write_whole(file, "öne")
    assert file.read_text(encoding="utf-8") == "öne"
    with replacing(file) as part:
        part.write_bytes(b"two")
        assert file.read_text(encoding="utf-8") == "öne", "until the end"
    assert file.read_bytes() == b"two"
    assert os.listdir(file.parent) == ["a.txt"]


def test_after_an_error_the_old_file_stays_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    write_whole(file, "one")
    with suppress(KeyError), replacing(file) as part:
        part.write_text("half")
        raise KeyError
    assert file.read_text() == "one"
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]
    write_whole(file, "\ud800", errors="replace")
    assert file.read_text() == "?"


def test_a_folder_is_filled_or_left_as_it_was_also_after_sigterm(tmp_path):
    program = (
        "import os, signal, sys\nfrom dlm.atomic import filling\n"
        "with filling(sys.argv[1]) as folder:\n"
        "    (folder / 'half').touch()\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "new")], check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "new").exists()
