"""The bound on likelihood that a masked diffusion model gives: the NELBO of given answers, with its error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlm.noise import fold, key_of, uniform
from dlm.noising import Blocks
from dlm.spec import ModelSpec

PromptAndAnswer = tuple[Sequence[int], Sequence[int]]
"""Prompt and answer as ids."""

_HEAD_CELLS = 1024
"""Masked cells that pass through the LM head at a time; bounds the logits that live at once."""


@dataclass(frozen=True)
class Bound:
    """A bound on -log p(answer | prompt)."""

    nats: float
    """All tokens of the answer together."""
    error: float
    """Standard error of `nats` over the draws; 0 where every masking was looked at."""
    greedy: bool
    """True if, all of the answer (or of each block) being masked, the likeliest token everywhere is its."""


@dataclass(frozen=True)
class _Job:
    """One noisy row, and the rows of which it is a masking."""

    owners: list[int]
    """Rows whose noisy row this is; several where nothing of their answers is visible."""
    cells: list[int]
    """Places in the answer that are masked."""
    weight: float
    """Weight of the summed -log p of the cells in the bound."""


def nelbo(
    model: Any, rows: Sequence[PromptAndAnswer], draws: int = 32, batch_size: int = 16, seed: int = 0
) -> list[float]:
    """Nats of each answer; see `bounds`."""
    return [bound.nats for bound in bounds(model, rows, draws, batch_size, seed)]


def bounds(
    model: Any,
    rows: Sequence[PromptAndAnswer],
    draws: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    *,
    questions: Sequence[str] | None = None,
) -> list[Bound]:
    """-log p(answer | prompt), bounded from above (MDLM, arXiv 2406.07524).

    With n tokens in the answer and M a set of l of them, all such sets being equally likely,

        NELBO = 1/n Σ_{l=1…n} n/l · E_M[Σ_{i∈M} -log p(x_i | the others, prompt)]

    which is the integral over t of Σ_{i masked} -log p(x_i | x_t) / t with masks of probability t. All sets
    are looked at where there are no more of them than draws, so that one token is exact in one call.
    Otherwise l = n is looked at once, and the other l are drawn from strata of equal size.

    The noise depends on the seed and the question alone: answers to one question share it, so that what sets
    them apart is not noise, and a row's result does not depend on its neighbours.

    A block-causal model writes block after block, so its bound is the sum of those of the blocks, each with
    the text before it as its prompt; it has `draws` for each.

    Args:
        model: a masked diffusion model.
        rows: prompts and answers; answers that end hold their end token.
        draws: model calls for each row, two at least where not all sets are looked at.
        batch_size: noisy rows in a model call.
        seed: of the noise.
        questions: what rows that share their noise have in common; by default, their prompts.

    Returns:
        One bound for each row; of an answer without tokens, zero.
    """
    blocks = Blocks.of(ModelSpec.of(model))
    if blocks is None:
        return _bounds(
            model, rows, questions or [repr(tuple(prompt)) for prompt, _ in rows], draws, batch_size, seed
        )
    pieces = [_nelbo_pieces(prompt, answer, blocks) for prompt, answer in rows]
    flat = list(itertools.chain(*pieces))
    names = [repr(tuple(prompt)) for prompt, _ in flat]
    if questions is not None:
        names = [
            f"{name} {i}" for name, each in zip(questions, pieces, strict=True) for i in range(len(each))
        ]
    each = iter(_bounds(model, flat, names, draws, batch_size, seed))
    return [_joined(list(itertools.islice(each, len(piece)))) for piece in pieces]


def _nelbo_pieces(prompt: Sequence[int], answer: Sequence[int], blocks: Blocks) -> list[PromptAndAnswer]:
    """The parts of an answer that are written one after the other, each behind the text before it."""
    ids, start = [*prompt, *answer], len(prompt)
    maskable = (torch.arange(len(ids)) >= start)[None]
    cuts = {start, *range(-(-start // blocks.size) * blocks.size, len(ids), blocks.size), len(ids)}
    cuts |= {int(i) + 1 for i in blocks.leads(maskable)[0].nonzero()}
    return [(ids[:a], ids[a:b]) for a, b in itertools.pairwise(sorted(cuts))]


def _joined(parts: Sequence[Bound]) -> Bound:
    """The bound of an answer from those of its parts."""
    error = math.sqrt(sum(part.error**2 for part in parts))
    return Bound(sum(part.nats for part in parts), error, all(part.greedy for part in parts))


@torch.inference_mode()
def _bounds(
    model: Any,
    rows: Sequence[PromptAndAnswer],
    questions: Sequence[str],
    draws: int,
    batch_size: int,
    seed: int,
) -> list[Bound]:
    """See `bounds`; of answers whose tokens are written in any order."""
    jobs = list(_jobs(rows, questions, draws, seed))
    jobs.sort(key=lambda job: sum(map(len, rows[job.owners[0]])))  # little padding
    parts: list[list[float]] = [[] for _ in rows]
    greedy = [True] * len(rows)
    for i in range(0, len(jobs), batch_size):
        chunk = jobs[i : i + batch_size]
        for job, compared in zip(chunk, _looked_at(model, rows, chunk), strict=True):
            for row, (nats, right) in zip(job.owners, compared, strict=True):
                if len(job.cells) == len(rows[row][1]):
                    greedy[row] = right
                    parts[row].insert(0, job.weight * nats)
                else:
                    parts[row].append(job.weight * nats)
    return [
        Bound(sum(values), 0.0 if _few(len(answer), draws) else _error(values[1:]), right)
        for (_, answer), values, right in zip(rows, parts, greedy, strict=True)
    ]


def _few(n: int, draws: int) -> bool:
    """True when there are no more sets of n cells than draws."""
    return n <= draws.bit_length() and 2**n - 1 <= max(draws, 1)


def _jobs(rows: Sequence[PromptAndAnswer], questions: Sequence[str], draws: int, seed: int) -> Iterator[_Job]:
    """The maskings to look at; rows that look alike when all of the answer is masked share that one."""
    blank: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for row, (prompt, answer) in enumerate(rows):
        if answer:
            blank.setdefault((tuple(prompt), len(answer)), []).append(row)
    for (_, n), owners in blank.items():
        yield _Job(owners, list(range(n)), 1 / n)
        for question, group in itertools.groupby(owners, questions.__getitem__):
            key, alike = key_of("nelbo", seed, question), list(group)
            for cells, weight in _all_sets(n) if _few(n, draws) else _drawn_sets(n, draws, key):
                yield from (_Job([row], cells, weight) for row in alike)


def _all_sets(n: int) -> Iterator[tuple[list[int], float]]:
    """Sets of fewer than n cells with their weights."""
    for size in range(1, n):
        for cells in itertools.combinations(range(n), size):
            yield list(cells), 1 / (size * math.comb(n, size))


def _drawn_sets(n: int, draws: int, key: torch.Tensor) -> Iterator[tuple[list[int], float]]:
    """Drawn sets of fewer than n cells with their weights; one size from each stratum of 1 … n-1."""
    count = max(1, draws - 1)  # one draw is for l = n
    offset = float(uniform(key, -1))
    for draw in range(count):
        size = 1 + int((draw + offset) / count * (n - 1))
        order = uniform(fold(key, draw), torch.arange(n)).argsort()
        yield sorted(order[:size].tolist()), (n - 1) / (size * count)


def _error(values: Sequence[float]) -> float:
    """Standard error of a sum over strata, from the differences of neighbours; NaN for a single one."""
    if len(values) < 2:
        return math.nan
    squares = sum((b - a) ** 2 for a, b in itertools.pairwise(values))
    return math.sqrt(squares * len(values) / (2 * (len(values) - 1)))


def _looked_at(
    model: Any, rows: Sequence[PromptAndAnswer], jobs: Sequence[_Job]
) -> list[list[tuple[float, bool]]]:
    """For each job and each of its rows: nats of the masked cells, and whether all are the likeliest."""
    shown = [rows[job.owners[0]] for job in jobs]
    width = max(len(prompt) + len(answer) for prompt, answer in shown)
    ids, places = torch.zeros(len(jobs), width, dtype=torch.long), torch.arange(width)
    for row, (job, (prompt, answer)) in enumerate(zip(jobs, shown, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        ids[row, len(prompt) + torch.tensor(job.cells)] = ModelSpec.of(model).mask_token_id
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in shown])
    hidden = model.hidden(ids, places < lengths[:, None])
    compared = []
    for row, (job, (prompt, _)) in enumerate(zip(jobs, shown, strict=True)):
        cells = torch.tensor(job.cells)
        truth = torch.tensor([[rows[owner][1][i] for owner in job.owners] for i in job.cells])
        compared.append(_compared(model, hidden[row, len(prompt) + cells], truth))
    return compared


def _compared(model: Any, hidden: torch.Tensor, truth: torch.Tensor) -> list[tuple[float, bool]]:
    """States [l, D] against candidates [l, K]: nats of each, and whether it is the likeliest everywhere."""
    nats = torch.zeros(truth.shape[1], dtype=torch.float64)
    right = torch.ones(truth.shape[1], dtype=torch.bool)
    for states, tokens in zip(hidden.split(_HEAD_CELLS), truth.split(_HEAD_CELLS), strict=True):
        logp = model.logits(states).float().log_softmax(-1).cpu()
        nats -= logp.gather(1, tokens).double().sum(0)
        right &= (logp.argmax(-1)[:, None] == tokens).all(0)
    return list(zip(nats.tolist(), right.tolist(), strict=True))
