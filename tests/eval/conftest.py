"""A small model on disk, and questions on disk."""

import json

import pytest


@pytest.fixture
def checkpoint(model, tokenizer, rows, tmp_path):
    from dlm.data.encode import encode_rows
    from dlm.prior import TokenPrior

    folder = tmp_path / "tiny"
    model.config.generation = {"window": 48, "decoder": "conv"}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoded, _ = encode_rows(rows, tokenizer, 128)
    TokenPrior.of(encoded, len(tokenizer)).save(folder)
    return folder


@pytest.fixture
def questions_file(tmp_path):
    rows = [
        {"instruction": f"Count from {i} to {i + 2}.", "output": f"{i} {i + 1} {i + 2}", "dataset": "count"}
        for i in range(6)
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(rows))
    return file
