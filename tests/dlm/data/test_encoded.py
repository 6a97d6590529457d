"""Encoded rows are what `encode_rows` gives, without `datasets`."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dlm.cli import main
from dlm.data.encode import encode_rows
from dlm.data.encoded import EncodedRows
from dlm.data.rows import load_rows
from dlm.errors import DataError
from dlm.prior import TokenPrior
from dlm.tokenizer import train_tokenizer

WINDOW = 40


@pytest.fixture
def both(rows, tokenizer):
    plain, report = encode_rows(rows, tokenizer, WINDOW)
    return plain, EncodedRows.of(plain, tokenizer, WINDOW), report


def test_rows_come_back_from_a_file(both, tmp_path):
    plain, encoded, _ = both
    encoded.save(tmp_path / "rows.npz")
    found = EncodedRows.load(tmp_path / "rows.npz")
    assert found.ids.dtype == np.uint16
    assert len(found) == len(plain)
    for i in (0, 7, len(plain) - 1):
        assert found[i]["input_ids"].tolist() == plain[i]["input_ids"]
        assert found[i]["input_ids"].dtype == torch.int64
        assert {name: found[i][name] for name in ("prompt_length", "length", "row")} == {
            "prompt_length": plain[i]["prompt_length"], "length": plain[i]["length"], "row": i,
        }  # fmt: skip
    assert found["length"] == plain["length"]


def test_the_command_writes_what_a_run_from_the_same_model_would_encode(
    model, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"Count to {i}.", "output": "one two " * 20} for i in range(5)]
    Path("rows.json").write_text(json.dumps(records))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    words = ["encode", "--model", "model", "--source", "rows.json", "--limit", "4", "--window", str(WINDOW)]
    assert main([*words, "--output", "some.npz"]) == 0
    written, rows = EncodedRows.load("some.npz"), load_rows("rows.json").select(range(4))
    plain, report = encode_rows(rows, tokenizer, WINDOW)
    assert [written[i]["input_ids"].tolist() for i in range(len(written))] == plain["input_ids"]
    assert capsys.readouterr().out == f"some.npz: {report}\n"
    written.check(tokenizer, WINDOW)
    assert main([*words, "--output", "some.json"]) == 2
    assert "output must end in .npz, got 'some.json'" in capsys.readouterr().err


def test_counts_and_the_report_are_those_of_the_text(both, tokenizer):
    plain, encoded, report = both
    assert torch.equal(TokenPrior.of(encoded, 400).counts, TokenPrior.of(plain, 400).counts)
    again, found = encode_rows(encoded, tokenizer, WINDOW)
    assert again is encoded
    assert (found.kept, found.truncated) == (report.kept, report.truncated)
    assert report.truncated > 0


def test_some_rows_are_numbered_anew(both):
    plain, encoded, _ = both
    last = encoded.select(range(len(plain) - 3, len(plain)))
    assert [last[i]["input_ids"].tolist() for i in range(3)] == plain["input_ids"][-3:]
    assert [last[i]["row"] for i in range(3)] == [0, 1, 2]
    assert last.answers().tolist() == [
        token for ids, n in zip(plain["input_ids"], plain["prompt_length"], strict=True) for token in ids[n:]
    ][-len(last.answers()) :]  # fmt: skip


def test_another_tokenizer_or_window_is_refused(both, tokenizer):
    _, encoded, _ = both
    with pytest.raises(DataError, match="with a window of 40 tokens, not 64"):
        encode_rows(encoded, tokenizer, 64)
    with pytest.raises(DataError, match="another tokenizer"):
        encode_rows(encoded, train_tokenizer(["quite other words"], 300), WINDOW)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"not a file of encoded rows \(no archive of NumPy\)"):
        EncodedRows.load(tmp_path / "rows.npz")


@pytest.mark.parametrize("junk", [b"", b"PK", None])
def test_damaged_files_are_refused(both, tmp_path, junk):
    _, rows, _ = both
    file = tmp_path / "rows.npz"
    rows.save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if junk is None else junk)
    with pytest.raises(DataError, match="not a file of encoded rows"):
        EncodedRows.load(file)


def test_rows_that_cannot_be_written_leave_the_old_ones(both, tmp_path, monkeypatch):
    _, rows, _ = both
    file = tmp_path / "rows.npz"
    rows.save(file)
    before = file.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        rows.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
    assert file.read_bytes() == before


def test_where_the_command_writes_is_checked_before_anything_is_read(
    model, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("folder.npz").mkdir()
    Path("file").write_text("")
    words = ["encode", "--model", "model", "--source", "rules", "--limit", "3", "--window", "64", "--output"]
    with patch("dlm.data.encode.encode_rows", lambda *_: pytest.fail("rows were encoded")):
        for place in ("folder.npz", "file/rows.npz"):
            assert main([*words, place]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([*words, "new/rows.npz"]) == 0
    assert len(EncodedRows.load("new/rows.npz")) == 3


def test_rows_of_another_vocabulary_are_refused_though_it_encodes_the_probe_alike(rows):
    words = [
        " ".join("".join(map(chr, word)) for word in np.random.default_rng(i).integers(1072, 1104, (60, 6)))
        for i in range(2)
    ]
    one, other = (train_tokenizer([text] * 3, 300) for text in words)
    encoded = EncodedRows.packed([[1, 2, 3]], [1], one, WINDOW)
    assert encoded.probe == EncodedRows.packed([[1, 2, 3]], [1], other, WINDOW).probe
    encoded.check(one, WINDOW)
    with pytest.raises(DataError, match="another tokenizer"):
        encoded.check(other, WINDOW)
    replace(encoded, vocabulary="").check(other, WINDOW)  # of an older file, which does not know
