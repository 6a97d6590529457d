"""From questions to answers: turn after turn, skipping what is there, every answer on disk at once."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from dlm.errors import DataError
from dlm.progress import progress
from dlm.tokenizer import Message
from eval.answers import Answer, AnswerFile
from eval.systems import REFUSED_REPLY, RefusedError, Reply, System
from eval.tasks import Question

logger = logging.getLogger(__name__)


def conversation(question: Question, turn: int, answers: dict[tuple[str, int], Answer]) -> list[Message]:
    """Messages before the answer to `turn`: the user's turns, and the system's answers between them."""
    talk = question.opening
    for i in range(turn):
        talk.append({"role": "assistant", "content": answers[question.id, i].text})
        talk.append({"role": "user", "content": question.turns[i + 1]})
    return talk


def mark(question: Question, turn: int) -> str:
    """A hash of what the user has said up to `turn`, and of what was said before."""
    texts = [text for message in question.history for text in message]
    return hashlib.sha256("\0".join([*texts, *question.turns[: turn + 1]]).encode()).hexdigest()[:12]


def check(questions: Sequence[Question], answers: Mapping[tuple[str, int], Answer], where: str) -> None:
    """Refuse answers that do not belong to these questions.

    Raises:
        DataError: when a question of the same id was another one when it was answered.
    """
    for question in questions:
        for turn in range(len(question.turns)):
            answer = answers.get((question.id, turn))
            if answer is not None and answer.asked not in ("", mark(question, turn)):
                raise DataError(
                    f"{where}: question {question.id} was another one when it was answered; "
                    "give the --data of that run, or another --output"
                )


def generate(
    questions: Sequence[Question],
    system: System,
    file: AnswerFile,
    earlier: Mapping[tuple[str, int], Answer] | None = None,
    label: str = "",
    quiet: bool = False,
) -> dict[tuple[str, int], Answer]:
    """Have all turns of the questions answered that are not answered yet.

    Args:
        questions: of a task.
        system: who answers.
        file: where answers go, and some may be.
        earlier: answers that need not be asked for again.
        label: for the progress shown.
        quiet: show none.

    Returns:
        All answers, by question and turn.
    """
    answers = {**(earlier or {}), **file.read()}
    total = sum(len(question.turns) for question in questions)
    keys = {(question.id, turn) for question in questions for turn in range(len(question.turns))}
    initial = len(keys & set(answers))
    with progress(None, label, total, initial=initial, unit="answer", quiet=quiet) as bar:
        for turn in range(max((len(question.turns) for question in questions), default=0)):
            due = [q for q in questions if turn < len(q.turns) and (q.id, turn) not in answers]
            for answer in file.append(_timed_answers(due, turn, system, answers)):
                answers[answer.key] = answer
                bar.update()
    return {key: answers[key] for key in answers if key in keys}


def _timed_answers(
    due: Sequence[Question], turn: int, system: System, answers: dict[tuple[str, int], Answer]
) -> Iterator[Answer]:
    begun = time.perf_counter()
    replies = system.replies([conversation(question, turn, answers) for question in due]) if due else iter(())
    for number, reply in _with_refusals(replies, bool(answers)):
        question = due[number]
        time_now = time.perf_counter()
        yield Answer(
            question.id, turn, reply.text, reply.tokens, reply.finish_reason, reply.model_calls, reply.steps,
            round(time_now - begun, 4), list(reply.reveal_step), mark(question, turn), reply.trace,
        )  # fmt: skip
        begun = time_now


def _with_refusals(replies: Iterator[tuple[int, Reply]], answered: bool) -> Iterator[tuple[int, Reply]]:
    """The replies; empty ones where all that was still due is refused, and others were answered before."""
    try:
        yield from replies
    except RefusedError as error:
        if not (answered and error.numbers):
            raise
        logger.warning("%d conversations have an empty answer: %s", len(error.numbers), error)
        yield from ((number, REFUSED_REPLY) for number in error.numbers)
