"""Order tables, learnt: while answers are written, and from the traces of answers that are there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from decoding.presets import Decoder
from decoding.request import Request
from decoding.reveal.order_table import LARGEST_REWARD, OrderTable
from dlm.errors import DataError
from eval.answers import Answer
from eval.run import Results
from eval.task_rewards import TaskReward
from eval.tasks import Question


@dataclass(frozen=True)
class Progress:
    """A table, and the answers that it has learnt from since the one before.

    Attributes:
        table: so far.
        rewards: of the answers; NaN for one that had none, and was left out.
    """

    table: OrderTable
    rewards: list[float]


def credit(table: OrderTable, trace: Mapping[str, Sequence[float]], reward: float) -> OrderTable:
    """A table with the tokens of one answer, each in its cell; as it is for a reward of NaN.

    Raises:
        KeyError: for a trace that is none (see `decoding.course.Trace`).
    """
    names = ("elapsed", "confidence", "place")
    columns = [torch.tensor(trace[name], dtype=torch.float64) for name in names]
    if math.isnan(reward) or not len(columns[0]):
        return table
    return table.credited(table.cells(*columns), torch.full((len(columns[0]),), float(reward)))


def relative(rewards: Sequence[float], groups: Sequence[object], beta: float) -> list[float]:
    """Rewards from the free energy of their group on: R - (1/β) log mean exp(βR).

    What is left is the log of the h-transform given the prompt, where a group is the answers to one prompt:
    hard prompts do not count against the cells in which they are written.

    Args:
        rewards: of answers, cut to ±20; NaN for one that has none.
        groups: what each belongs to.
        beta: β.
    """
    cut = torch.tensor(rewards, dtype=torch.float64).clamp(-LARGEST_REWARD, LARGEST_REWARD)
    counted = cut.tolist()
    energies: dict[object, list[float]] = {}
    for reward, group in zip(counted, groups, strict=True):
        energies.setdefault(group, []).extend([] if math.isnan(reward) else [beta * reward])
    levels = {
        group: (float(torch.tensor(energy, dtype=torch.float64).logsumexp(0)) - math.log(max(len(energy), 1)))
        / beta
        for group, energy in energies.items()
    }
    return [reward - levels[group] for reward, group in zip(counted, groups, strict=True)]


def learn_online(
    sampler: Any,
    questions: Sequence[Question],
    reward: TaskReward,
    table: OrderTable,
    request: Request,
    *,
    options: Mapping[str, Any] | None = None,
    rounds: int = 1,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[Progress]:
    """Answer questions in the order of the table so far, and let it learn from every batch of answers.

    Args:
        sampler: a `decoding.Sampler`.
        questions: of which the first turn is answered.
        reward: of an answer.
        table: to go on from.
        request: everything of the decoding but the decoder, which is `dprm`.
        options: of that decoder.
        rounds: times that the questions are answered.
        samples: answers to a question in each round; above 1, rewards are `relative` to those of the same
            question.
        seed: of the noise; every answer to a question has another one, counted from this.
        batch_size: answers between two updates of the table, at least `samples`.

    Yields:
        The table after each batch.
    """
    decoder_options = {name: value for name, value in (options or {}).items() if name != "table"}
    for number in range(rounds):
        waiting = iter(questions)
        while part := list(itertools.islice(waiting, max(1, batch_size // samples))):
            decoder = Decoder.named("dprm", table=table, **decoder_options)
            round_request = replace(request, decoder=decoder, options=None)
            batch = [question for question in part for _ in range(samples)]
            seeds = [seed + number * samples + i for _ in part for i in range(samples)]
            settings = {"request": round_request, "seed": seeds, "batch_size": batch_size}
            written = list(sampler.iter_traced([question.opening for question in batch], **settings))
            rewards = [
                reward(question, output.text) for question, (output, _) in zip(batch, written, strict=True)
            ]
            counted = rewards if samples == 1 else relative(rewards, [q.id for q in batch], table.beta)
            for value, (_, trace) in zip(counted, written, strict=True):
                table = credit(table, vars(trace), value)
            yield Progress(table, rewards)


def learn_offline(
    answers: Sequence[tuple[Question, Answer]],
    reward: TaskReward,
    table: OrderTable,
    *,
    within_prompts: bool = False,
) -> Progress:
    """Let a table learn from answers with traces.

    Args:
        answers: with their questions.
        reward: of an answer.
        table: to go on from.
        within_prompts: whether rewards are `relative` to those of other answers to the same conversation.

    Returns:
        The table, and the rewards.

    Raises:
        DataError: for an answer without a trace.
    """
    for _, answer in answers:
        if answer.trace is None:
            raise DataError(f"the answer to question {answer.id} has no trace: run dlm eval with --trace")
    rewards = [reward(question, answer.text) for question, answer in answers]
    groups = [(question.history, question.turns) for question, _ in answers]
    counted = relative(rewards, groups, table.beta) if within_prompts else rewards
    for value, (_, answer) in zip(counted, answers, strict=True):
        try:
            table = credit(table, answer.trace or {}, value)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"the trace of the answer to question {answer.id} is none ({error!r})") from error
    return Progress(table, rewards)


def recorded(run: Results, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
    """The answers of a run with their questions; of a later turn, with the conversation before it.

    Raises:
        DataError: for an answer to a question that is not there.
    """
    from eval.generation import check, conversation

    check(questions, run.answers, str(run.folder))
    by_id = {question.id: question for question in questions}
    for (identity, turn), answer in run.answers.items():
        if identity not in by_id:
            raise DataError(f"{run.folder}: question {identity} is not among those of {run.card.task}")
        question = by_id[identity]
        *earlier, last = conversation(question, turn, run.answers)
        history = tuple((message["role"], message["content"]) for message in earlier)
        reference = question.reference[turn : turn + 1]
        yield replace(question, turns=(last["content"],), history=history, reference=reference), answer


def run_folders(places: Sequence[str]) -> list[Path]:
    """Folders of runs in and below some folders.

    Raises:
        DataError: for a folder without any.
    """
    folders = []
    for place in places:
        files = Path(place).rglob("run.json")
        below = sorted(file.parent for file in files if (file.parent / "answers.jsonl").exists())
        if not below:
            raise DataError(f"{place}: no run of `dlm eval` there")
        folders += below
    return list(dict.fromkeys(folders))
