"""The questions: AlpacaEval, MT-Bench, Wiki, Arena-Hard, GSM8K, rule-made tasks, and files of one's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.data.records import RECORD_SUFFIXES, read_records
from dlm.data.rows import asked_and_answer, instruction_text
from dlm.errors import ConfigError, DataError, unknown_name

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from dlm.tokenizer import Message


@dataclass(frozen=True)
class Question:
    """One question, of one or several turns.

    Attributes:
        id: names it within its task.
        turns: what the user says, in order.
        history: messages before the first turn, as (role, content).
        reference: reference answers, one for each turn; empty if there are none.
        category: what the task files it under.
        generator: who wrote the reference.
    """

    id: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    category: str = ""
    generator: str = "reference"
    history: tuple[tuple[str, str], ...] = ()

    @property
    def opening(self) -> list[Message]:
        """The messages before the first answer."""
        earlier: list[Message] = [{"role": role, "content": content} for role, content in self.history]
        return [*earlier, {"role": "user", "content": self.turns[0]}]

    @property
    def instruction(self) -> str:
        """The first turn as a judge is shown it: behind the messages before it, where there are any."""
        if not self.history:
            return self.turns[0]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.opening)


@dataclass(frozen=True)
class Task:
    """Source of questions, and the reading of their rows.

    Attributes:
        summary: one line for people.
        read: a row of the source, and its number -> a question.
        fetch: the rows, from the hub or the web.
        checks: the name of the check in `eval.checks` that tells right answers from wrong ones, if there is
            one.
    """

    summary: str
    read: Callable[[dict[str, Any], int], Question]
    fetch: Callable[[], Iterable[dict[str, Any]]]
    checks: str = ""


def _hub(path: str, name: str | None, split: str) -> Callable[[], Iterable[dict[str, Any]]]:
    def fetch() -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        return load_dataset(path, name, split=split)  # type: ignore[no-any-return]

    return fetch


def _web(url: str) -> Callable[[], Iterable[dict[str, Any]]]:
    def fetch() -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        return load_dataset("json", data_files=url, split="train")  # type: ignore[no-any-return]

    return fetch


def _instruction(row: dict[str, Any], index: int) -> Question:
    """Alpaca's fields; the row may have a reference output."""
    text = instruction_text(row, "instruction", "the question")
    reference = (row["output"],) if row.get("output") else ()
    category = str(row.get("category") or row.get("dataset") or "")
    return Question(str(index), (text,), reference, category, str(row.get("generator") or "reference"))


def _gsm8k(row: dict[str, Any], index: int) -> Question:
    return Question(str(index), (row["question"],), (row["answer"],))


def _mt_bench(row: dict[str, Any], index: int) -> Question:
    del index
    given = row.get("reference") or ()
    reference = (given,) if isinstance(given, str) else tuple(given)
    return Question(str(row["question_id"]), tuple(row["turns"]), reference, row.get("category", ""))


def _arena(row: dict[str, Any], index: int) -> Question:
    """Both releases of Arena-Hard: a list of turns, or one prompt."""
    del index
    first = row["prompt"] if "prompt" in row else row["turns"][0]["content"]
    key = row.get("question_id") or row["uid"]
    return Question(str(key), (first,), (), str(row.get("category") or row.get("cluster") or ""))


def _any(row: Any, index: int) -> Question:
    """Questions from any file that `dlm generate --file` reads, read as it does; or turns as MT-Bench has."""
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("turns"), list):
        return _mt_bench({"question_id": index, **fields}, index)
    prompt, answer = asked_and_answer(row, "the question")
    *earlier, last = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Question(
        id=str(index),
        turns=(last["content"],),
        reference=(answer,) if answer else (),
        category=str(fields.get("category") or fields.get("dataset") or ""),
        generator=str(fields.get("generator") or "reference"),
        history=tuple((turn["role"], turn["content"]) for turn in earlier),
    )


def _rule_rows() -> Iterable[dict[str, Any]]:
    from dlm.data.rules import make_examples

    for example in make_examples(400, split="test"):
        yield {"instruction": example.instruction, "output": example.answer, "category": example.task}


def _parallel_rows() -> Iterable[dict[str, Any]]:
    from eval.parallel import examples

    for task, instruction, answer in examples(350):
        yield {"instruction": instruction, "output": answer, "category": task}


def _no_source() -> Iterable[dict[str, Any]]:
    raise ConfigError("the task 'file' needs --data: a .json or .jsonl file of questions")


FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data"
ARENA = "https://huggingface.co/datasets/lmarena-ai/arena-hard-auto/resolve/main/data"

TASKS = {
    "alpaca_eval": Task(
        "AlpacaEval (2305.14387): 805 instructions, with outputs of text-davinci-003",
        _instruction, _hub("tatsu-lab/alpaca_eval", "alpaca_eval", "eval"),
    ),
    "wiki": Task("'explain <entity>' prompts (2509.15188); give --data", _instruction, _no_source),
    "gsm8k": Task(
        "GSM8K (2110.14168): problems whose answer is a number", _gsm8k,
        _hub("openai/gsm8k", "main", "test"), "gsm8k",
    ),
    "mt_bench": Task(
        "MT-Bench (2306.05685): 80 questions of two turns", _mt_bench,
        _web(f"{FASTCHAT}/mt_bench/question.jsonl"),
    ),
    "arena_hard": Task(
        "Arena-Hard (2406.11939): 500 prompts", _arena, _web(f"{ARENA}/arena-hard-v0.1/question.jsonl"),
    ),
    "rules": Task("the rule-made instructions of `make demo`", _instruction, _rule_rows, "rules"),
    "parallel": Task(
        "tasks whose tokens depend on each other (as ParallelBench, 2510.04767), made by rule",
        _instruction, _parallel_rows, "parallel",
    ),
    "file": Task("questions of your own; give --data", _any, _no_source),
}  # fmt: skip


def load_questions(task: str, data: str = "", limit: int = 0) -> list[Question]:
    """The questions of a task.

    Args:
        task: its name.
        data: a local copy (.json or .jsonl with the fields of the original); empty to fetch the original.
        limit: only the first so many; 0 for all.

    Raises:
        ConfigError: for an unknown task.
        DataError: for a file that cannot be read, naming the row; when the original cannot be fetched, and
            for questions that share an id.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    rows = itertools.islice(_rows(TASKS[task], task, data), limit or None)
    questions = [_question(TASKS[task], row, i, data or task) for i, row in enumerate(rows)]
    if not questions:
        raise DataError(f"{data or task}: no questions")
    if len({question.id for question in questions}) < len(questions):
        raise DataError(f"{data or task}: several questions have the same id")
    return questions


def _question(task: Task, row: Any, index: int, where: str) -> Question:
    try:
        question = task.read(row, index)
    except DataError as error:
        raise DataError(f"{where}, row {index}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{where}, row {index}: not a question of this task ({error!r})") from error
    if not question.turns or not all(isinstance(turn, str) and turn.strip() for turn in question.turns):
        raise DataError(f"{where}, row {index}: a question must be a text that is not empty")
    if not all(isinstance(text, str) for text in question.reference):
        raise DataError(f"{where}, row {index}: the references must be texts, got {question.reference!r:.80}")
    if task.checks and not question.reference:
        raise DataError(f"{where}, row {index}: needs an answer to check against")
    return question


def _rows(task: Task, name: str, data: str) -> Iterator[Any]:
    if data:
        if not data.endswith(RECORD_SUFFIXES):
            raise ConfigError(f"--data must be a {' or '.join(RECORD_SUFFIXES)} file, got {data}")
        if not Path(data).is_file():
            raise DataError(f"{data}: no such file")
        yield from read_records(Path(data))
        return
    try:
        yield from task.fetch()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"the questions of {name!r} could not be fetched ({error}); give --data") from error


def fitting(questions: Sequence[Question], fits: Callable[[Any, int], bool], window: int) -> list[Question]:
    """The questions that leave room for an answer in a window, with a warning where others are left out.

    Args:
        questions: of a task.
        fits: True for a prompt that leaves room (`Sampler.fits`).
        window: tokens of prompt and answer together.

    Raises:
        ConfigError: where none does.
    """
    kept = [question for question in questions if fits(question.opening, window)]
    if not kept:
        raise ConfigError(f"none of the {len(questions)} questions fits in a window of {window} tokens")
    if len(kept) < len(questions):
        logger.warning(
            "%d of %d questions fill the window of %d tokens and are left out",
            len(questions) - len(kept), len(questions), window,
        )  # fmt: skip
    return kept


def with_references(
    questions: Iterable[Question], rows: Iterable[Any], where: str, *, needed: bool = False
) -> list[Question]:
    """The questions, with the reference answers of rows in MT-Bench's format where there are any.

    Raises:
        DataError: for a row without answers; where they are `needed`, for rows about none of the questions.
    """
    answers: dict[str, tuple[str, ...]] = {}
    for index, row in enumerate(rows):
        try:
            answers[str(row["question_id"])] = tuple(row["choices"][0]["turns"])
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{where}, row {index}: no answers in MT-Bench's format") from error
    questions = list(questions)
    if needed and not answers.keys() & {question.id for question in questions}:
        raise DataError(f"{where}: none of its question_id belongs to one of the questions")
    return [
        replace(question, reference=answers.get(question.id, question.reference)) for question in questions
    ]
