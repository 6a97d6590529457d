"""Reward-tilted decoding: particles over rows of the engine (twisted sequential Monte Carlo).

The aim is the law p(x) exp(r(x) / β) / Z, where p is the law of the decoder's texts, r a reward and
Z = E_p[exp(r / β)]. Nothing is trained. K rows of one prompt, the particles, take their steps side by side.
After every step t each has a twist ψ_t, an estimate of h_t = E[exp(r / β) | the row so far], Doob's h;
ψ_0 = 1, and of a finished text ψ_T = exp(r(x) / β). The weight of a particle is the product of all
ψ_t / ψ_{t-1}. Where the weights are so unequal that the effective number of particles (Σ w)² / Σ w² falls
below a share of K, the particles are drawn anew: each as often as its weight says (systematic resampling),
and all have the mean weight then. A particle that comes out several times is copied in the engine: one goes
on with its noise, the others get new keys, so that they part. In the end one particle is drawn by weight.
(Feynman-Kac steering, arXiv 2501.06848; twisted SMC of language models, 2404.17546.)

Exact for every K and every ψ > 0: the mean weight Ẑ has expectation Z, since all ratios of ψ cancel but for
the last, and resampling keeps expectations. As K grows the law of the text tends to the tilted one, whatever
ψ is; ψ and the spread of exp(r / β) under p decide how fast.

Approximate: the law of the text for a finite K, by O(1 / K).

The simple ends: with ψ = 1 until the end the particles are independent, and are not resampled. Drawn by
weight that is soft best-of-n, and `select="best"` is best-of-n. The best of a population has not the tilted
law.

A population depends on its own prompt and seed alone. Particle 0 has the noise of the plain answer under
that seed, so one particle is the plain answer.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from decoding.answer import Output
from decoding.canvas import Row, make_canvas
from decoding.engine import Engine, Update
from decoding.request import Plan
from decoding.tilted.tilt import Tilt
from dlm.noise import fold, uniform

_PARTICLES, _RESAMPLING, _SELECTION = -1, -2, -3
"""Streams of a population's key; those of a row count its steps and are not negative."""


@dataclass(frozen=True, kw_only=True)
class TiltedOutput(Output):
    """An answer that was steered by a reward; `model_calls` is the sum over all rows of its population."""

    reward: float
    """r of the text."""
    log_z: float
    """Estimate of log Z; exp of it has expectation Z."""
    ess: list[float]
    """Effective number of particles after each step, before any resampling."""
    resampled: list[int]
    """Steps after which particles were resampled, the first being 0."""
    texts: list[str]
    """The final particles, those that are equal included."""
    rewards: list[float]
    """Their rewards."""
    weights: list[float]
    """Their weights; the sum is 1."""


@dataclass
class Particle:
    """One row of a population, at work or finished.

    Attributes:
        ticket: of the row in the engine.
        twist: log ψ of the row as it is.
        revision: how often the row had changed when ψ was found.
        output: the answer, when the row is finished.
        reward: r of the answer.
    """

    ticket: int
    twist: float = 0.0
    revision: int = 0
    output: Output | None = None
    reward: float = math.nan


@dataclass
class Population:
    """The particles of one prompt.

    Attributes:
        name: for errors.
        prompt: told to the reward.
        key: [] of its noise, which is particle 0's too.
        keys: keys that no particle has had, particle 0's first.
        particles: K of them.
        log_weights: of the particles, not normalised; their mean weight estimates Z in the end.
        ess: see `TiltedOutput`.
        resampled: see `TiltedOutput`.
        model_calls: of rows that are gone.
    """

    name: str
    prompt: Any
    key: torch.Tensor
    keys: Iterator[torch.Tensor]
    particles: list[Particle] = field(default_factory=list)
    log_weights: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    resampled: list[int] = field(default_factory=list)
    model_calls: int = 0

    @property
    def finished(self) -> bool:
        """True when all particles are."""
        return all(particle.output is not None for particle in self.particles)

    def noise(self, stream: int, count: int) -> float:
        """A uniform number of (0, 1) that no row draws."""
        return float(uniform(fold(self.key, stream), count))


def particle_keys(key: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys [] of the particles of a population: its key, which is that of a row alone, and new ones."""
    yield key
    stem = fold(key, _PARTICLES)
    for number in itertools.count(1):
        yield fold(stem, number)


def log_mean_exp(values: Sequence[float]) -> float:
    """Logarithm of the mean of exp(values)."""
    return float(torch.tensor(values, dtype=torch.float64).logsumexp(0)) - math.log(len(values))


def shares(log_weights: Sequence[float]) -> list[float]:
    """Weights of sum 1 from the logarithms of weights."""
    return list(map(float, torch.tensor(log_weights, dtype=torch.float64).softmax(0)))


def effective_number(weights: Sequence[float]) -> float:
    """(Σ w)² / Σ w², between 1 and the number of weights."""
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def systematic(weights: Sequence[float], point: float) -> list[int]:
    """Copies of each of K particles, K in all: ⌊K w⌋ or ⌈K w⌉, and K w on average.

    Particle i gets the points (n + `point`) / K, n = 0, …, K - 1, that lie within its share of [0, 1].

    Args:
        weights: K of them, of sum 1.
        point: a uniform number of (0, 1).
    """
    size = len(weights)
    ends = [min(math.ceil(size * total - point), size) for total in itertools.accumulate(weights)]
    ends[-1] = size  # whatever the rounding of the sum
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def drawn(weights: Sequence[float], point: float) -> int:
    """The index of the weight in which a uniform number falls, by the inverse of the cumulative sum."""
    sums = list(itertools.accumulate(weights))
    return next(i for i, total in enumerate(sums) if point * sums[-1] < total)


class Steering:
    """Decodes populations of particles, several side by side.

    Args:
        engine: holds their rows, and no others.
        plan: how they are decoded.
        tilt: the law that they tend to.

    Raises:
        ConfigError: for a plan that cannot be steered, see `Tilt.check`.
    """

    def __init__(self, engine: Engine, plan: Plan, tilt: Tilt) -> None:
        tilt.check(plan)
        self.engine, self.plan, self.tilt = engine, plan, tilt
        self._owners: dict[int, tuple[Population, int]] = {}  # of the rows, by ticket

    @property
    def populations(self) -> list[Population]:
        """Particles that have a row at work, in order."""
        return list({id(population): population for population, _ in self._owners.values()}.values())

    def begin(self, row: Row, prompt: Any, seed: int) -> Population:
        """Take up a population for a row.

        Args:
            row: the prompt, and masks for its answer.
            prompt: told to the reward.
            seed: of the noise; particle 0 is the row that this seed gives alone.
        """
        canvas = make_canvas([row], [seed], self.plan)
        population = Population(row.name, prompt, canvas.key[0], particle_keys(canvas.key[0]))
        for number, key in enumerate(itertools.islice(population.keys, self.tilt.particles)):
            ticket = self.engine.add(replace(canvas, key=key[None]), self.plan)
            population.particles.append(Particle(ticket))
            population.log_weights.append(0.0)
            self._owners[ticket] = population, number
        return population

    def step(self) -> None:
        """Let every row take a step, weigh all particles, and resample where it is due.

        Raises:
            DLMError: when the model fails, naming the prompt; and for a reward that is no number.
        """
        populations = self.populations
        self._weigh(self.engine.step(self.engine.lengths()))  # all rows at once
        for population in populations:
            weights = shares(population.log_weights)
            population.ess.append(effective_number(weights))
            if population.ess[-1] < self.tilt.share * len(weights) and not population.finished:
                self._resample(population, weights)

    def _weigh(self, updates: Sequence[Update]) -> None:
        """Multiply the weights of rows that have changed by the ratio of ψ now and before."""
        weighed = self._texts(updates)
        prompts = [population.prompt for population, _, texts in weighed for _ in texts]
        rewards = iter(self.tilt.rewards(prompts, [text for *_, texts in weighed for text in texts]))
        for population, number, texts in weighed:
            particle, row_rewards = population.particles[number], list(itertools.islice(rewards, len(texts)))
            twist = log_mean_exp([reward / self.tilt.beta for reward in row_rewards])
            population.log_weights[number] += twist - particle.twist
            particle.twist = twist
            if particle.output is not None:
                particle.reward = row_rewards[0]

    def _texts(self, updates: Sequence[Update]) -> list[tuple[Population, int, list[str]]]:
        """The rows that have changed, as particles of their populations, with the texts that ψ looks at."""
        weighed, changed = [], []
        for update in updates:
            population, number = self._owners[update.ticket]
            particle = population.particles[number]
            update.raise_error(f"{population.name}, particle {number}")
            if (output := update.output) is not None:
                particle.output = output
                population.model_calls += output.model_calls
                del self._owners[update.ticket]
                weighed.append((population, number, [output.text]))
            elif self.tilt.twist != "none" and particle.revision != (
                revision := int(update.canvas.revision[0])
            ):
                particle.revision = revision
                changed.append(update)
        if self.tilt.twist == "written":
            texts = {update.ticket: [update.confirmed] for update in changed}
        else:
            texts = self.engine.predictions([update.ticket for update in changed], self.tilt.draws)
        return weighed + [(*self._owners[ticket], row_texts) for ticket, row_texts in texts.items()]

    def _resample(self, population: Population, weights: Sequence[float]) -> None:
        """Draw the particles anew by weight; each has the mean weight then."""
        particles, point = population.particles, population.noise(_RESAMPLING, len(population.resampled))
        counts = systematic(weights, point)
        parents = [particles[i] for i, count in enumerate(counts) for _ in range(count - 1)]
        places = [i for i, count in enumerate(counts) if count == 0]
        self._forget(population, [particles[place].ticket for place in places])
        going = [parent.ticket for parent in parents if parent.output is None]
        keys = list(itertools.islice(population.keys, len(going)))
        copies = iter(self.engine.fork(going, torch.stack(keys)) if going else [])
        for place, parent in zip(places, parents, strict=True):
            particles[place] = copy = replace(parent)
            if copy.output is None:
                copy.ticket = next(copies)
                self._owners[copy.ticket] = population, place
        population.log_weights = [log_mean_exp(population.log_weights)] * len(particles)
        population.resampled.append(len(population.ess) - 1)

    def _forget(self, population: Population, tickets: Sequence[int]) -> None:
        """Let the rows go that are at work among some that no draw has fallen on."""
        going = [ticket for ticket in tickets if ticket in self._owners]
        population.model_calls += sum(int(self.engine.canvas(ticket).model_calls[0]) for ticket in going)
        self.engine.cancel(*going)
        for ticket in going:
            del self._owners[ticket]

    def output(self, population: Population) -> TiltedOutput:
        """The text of a finished population, drawn by weight or the best, with its record."""
        weights = shares(population.log_weights)
        rewards = [particle.reward for particle in population.particles]
        outputs = [particle.output for particle in population.particles if particle.output is not None]
        if self.tilt.select == "best":
            selected = rewards.index(max(rewards))
        else:
            selected = drawn(weights, population.noise(_SELECTION, 0))
        answer = {item.name: getattr(outputs[selected], item.name) for item in fields(Output)}
        return TiltedOutput(
            **answer | {"model_calls": population.model_calls},
            reward=rewards[selected],
            log_z=log_mean_exp(population.log_weights),
            ess=population.ess,
            resampled=population.resampled,
            texts=[output.text for output in outputs],
            rewards=rewards,
            weights=weights,
        )


def steer(
    engine: Engine, plan: Plan, tilt: Tilt, rows: Iterator[tuple[Row, Any, int]], batch_size: int
) -> Iterator[TiltedOutput]:
    """Decode rows, given with their prompts and seeds, each by a population; yields the answers in order.

    Args:
        engine: an empty one.
        plan: how they are decoded.
        tilt: the law that they tend to.
        rows: read as there is room; what they raise is raised after the answers to those before.
        batch_size: rows at work at a time; at least one population is.
    """
    steering, waiting, failure = Steering(engine, plan, tilt), deque[Population](), None
    while True:
        room = max((batch_size - len(engine)) // tilt.particles, int(not len(engine)))
        try:
            for row, prompt, seed in itertools.islice(rows, room):
                waiting.append(steering.begin(row, prompt, seed))
        except Exception as error:  # first let what is at work be finished
            failure, rows = error, iter(())
        if not len(engine) and not waiting:
            break
        steering.step()
        while waiting and waiting[0].finished:
            yield steering.output(waiting.popleft())
    if failure is not None:
        raise failure
