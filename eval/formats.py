"""Answers as the official tools read them: AlpacaEval's model outputs, MT-Bench's model answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm.atomic import write_whole
from eval.answers import ByTurn
from eval.tasks import Question


def model_outputs(questions: Sequence[Question], answers: ByTurn, generator: str) -> list[dict[str, Any]]:
    """AlpacaEval's `model_outputs.json`: the first turns that have an answer."""
    return [
        {
            "instruction": q.instruction,
            "output": answers[q.id, 0].text,
            "generator": generator,
            "dataset": q.category,
        }
        for q in questions
        if (q.id, 0) in answers
    ]


def reference_outputs(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The reference outputs of questions that have one, in the same format."""
    return [
        {
            "instruction": q.instruction,
            "output": q.reference[0],
            "generator": q.generator,
            "dataset": q.category,
        }
        for q in questions
        if q.reference
    ]


def model_answers(questions: Sequence[Question], answers: ByTurn, model_id: str) -> list[dict[str, Any]]:
    """MT-Bench's `model_answer/<model_id>.jsonl`: the questions all of whose turns have an answer."""
    rows = []
    for q in questions:
        if all((q.id, turn) in answers for turn in range(len(q.turns))):
            turns = [answers[q.id, turn].text for turn in range(len(q.turns))]
            key = hashlib.sha256(f"{model_id}\0{q.id}".encode()).hexdigest()[:22]
            number: int | str = int(q.id) if q.id.isdecimal() else q.id
            choice = {"index": 0, "turns": turns}
            rows.append(
                {
                    "question_id": number,
                    "answer_id": key,
                    "model_id": model_id,
                    "choices": [choice],
                    "tstamp": 0.0,  # equal answers give equal files
                }
            )
    return rows


def write_json(path: Path, value: Any) -> None:
    """A JSON file, replaced at once."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False))


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """A JSON Lines file, replaced at once."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def without_nan(value: Any) -> Any:
    """The same with null where a number is NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value
