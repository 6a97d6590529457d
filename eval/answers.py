"""Answers of systems: one JSON line for each, on disk at once, so that a kill loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dlm.atomic import write_whole
from dlm.errors import DataError


@dataclass(frozen=True)
class Answer:
    """An answer to one turn of a question.

    Attributes:
        id: of the question.
        turn: which turn it answers, from 0.
        text: the answer.
        tokens: its length.
        finish_reason: "stop" or "length".
        model_calls: calls of the model that ran it; 0 where that is not known.
        steps: denoising steps; 0 where that is not known.
        seconds: wall time since the answer before it, so that the sum is the time that a process took.
        reveal_step: for each token, the step at which it appeared.
        asked: a hash of what the user had said, by which answers are known to belong to questions.
        trace: when, how surely and where each token was written (`decoding.course.Trace`); None unless it
            was asked for.
    """

    id: str
    turn: int
    text: str
    tokens: int = 0
    finish_reason: str = "stop"
    model_calls: int = 0
    steps: int = 0
    seconds: float = 0.0
    reveal_step: list[int] = field(default_factory=list)
    asked: str = ""
    trace: dict[str, list[float]] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Id of the question, and the turn."""
        return self.id, self.turn


_KINDS: dict[str, type | tuple[type, ...]] = {
    "id": str, "turn": int, "text": str, "tokens": int, "finish_reason": str, "model_calls": int,
    "steps": int, "seconds": (int, float), "reveal_step": list, "asked": str,
}  # fmt: skip
"""Types of the fields of an answer."""

ByTurn = Mapping[tuple[str, int], Answer]
"""Answers by the question's id and the turn."""


class AnswerFile:
    """A JSON Lines file of answers that grows.

    Args:
        path: where it is; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[tuple[str, int], Answer]:
        """The answers by question and turn, in the order in which they were written.

        A last line without its end is what a kill in the middle of writing leaves, and is passed over.

        Raises:
            DataError: for any other line that is no answer.
        """
        if not self.path.exists():
            return {}
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from error
        answers: dict[tuple[str, int], Answer] = {}
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            answer = self._parse(line, number)
            answers[answer.key] = answer
        return answers

    def _parse(self, line: str, number: int) -> Answer:
        try:
            row: dict[str, Any] = json.loads(line)
            answer = Answer(**{name: row[name] for name in (f.name for f in fields(Answer)) if name in row})
            for name, kind in _KINDS.items():
                if not isinstance(getattr(answer, name), kind):
                    raise TypeError(f"its {name} is {getattr(answer, name)!r:.80}")
            if not all(isinstance(step, int) for step in answer.reveal_step):
                raise TypeError(f"its reveal_step is {answer.reveal_step!r:.80}")
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path}, line {number}: not an answer ({error})") from error
        return answer

    def append(self, answers: Iterable[Answer]) -> Iterable[Answer]:
        """Write answers as they come, each safe on disk before it is passed on."""
        self._mend()
        with self.path.open("a", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                os.fsync(file.fileno())
                yield answer

    def _mend(self) -> None:
        """Take away a last line that has no end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            data = self.path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)

    def write(self, answers: Iterable[Answer]) -> None:
        """Replace the file, at once."""
        write_whole(self.path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
