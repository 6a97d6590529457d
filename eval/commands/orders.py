"""`dlm orders`, `dlm orders learn`: tables by which the decoder dprm orders its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dlm.cli import Command
from dlm.device import PlaceConfig
from dlm.errors import ConfigError
from dlm.progress import progress

if TYPE_CHECKING:
    from decoding.reveal.order_table import OrderTable
    from eval.orders import Progress
    from eval.report.tables import Table


@dataclass(frozen=True)
class ShowConfig:
    """Settings of `dlm orders`.

    Args:
        tables: names or files of order tables (the words that are no options); by default all that have a
            name.
    """

    tables: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LearnConfig(PlaceConfig):
    """Settings of `dlm orders learn`.

    Without words, a model answers the questions of a task in the order of the table so far, and the table
    learns from every batch. With words, it learns from answers that are there.

    Args:
        runs: folders of `dlm eval --trace` (the words that are no options) whose answers it learns from.
        output: name of the table, or a .json or .safetensors file; one that is there is not overwritten.
        start: name or file of a table to go on from.
        reward: "check" (a program says what is right), "relevance" (closeness to the reference), or a reward
            of a text as for `dlm generate`: likelihood=MODEL, length=WORDS, no-repetition, regex=PATTERN,
            closeness=TEXT, or module:function of prompts and completions.
        beta: inverse temperature of the rewards.
        positions: bins of the relative position.
        model: folder or hub id of a masked diffusion model, or "default".
        task: whose questions are answered, as for `dlm eval`.
        data: local copy of the questions.
        limit: only the first so many questions; 0 for all.
        rounds: times that they are answered, under other seeds.
        samples: answers to a question in each round; above 1, a reward counts from those of the other
            answers to the same question, so that easy questions do not make good cells.
        within_prompts: the same for runs, where several have answered the same questions.
        max_tokens: longest answer on a canvas that grows; 256 by default.
        window: tokens of prompt and answer together, on a fixed canvas; by default it grows.
        steps: denoising steps, on a fixed canvas; by default the checkpoint's.
        rate: tokens per model call; by default the checkpoint's.
        kernel_size: width of the convolution; 0 for none.
        draws: candidates of soft best-of-N, which tries more orders than the decoder's shortlist; 0 for that.
        seed: of the noise.
        batch_size: answers between two updates of the table.
    """

    runs: list[str] = field(default_factory=list)
    output: str = ""
    start: str = ""
    reward: str = "check"
    beta: float = 1.0
    positions: int = 4
    model: str = ""
    task: str = ""
    data: str = ""
    limit: int = 0
    rounds: int = 1
    samples: int = 1
    within_prompts: bool = False
    max_tokens: int | None = None
    window: int | None = None
    steps: int | None = None
    rate: float | None = None
    kernel_size: int = 0
    draws: int = 4
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        from eval.task_rewards import check_task_reward
        from eval.tasks import TASKS

        if not self.output:
            raise ConfigError("give --output, a name for the table or a .json or .safetensors file")
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be above 0, got {self.beta}")
        least = {
            "positions": 1,
            "rounds": 1,
            "samples": 1,
            "batch_size": self.samples,
            "limit": 0,
            "kernel_size": 0,
            "draws": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        self.check_place()
        self._refuse_what_has_no_use()
        if self.runs:
            return
        if not (self.model and self.task in TASKS):
            raise ConfigError(f"give folders of runs, or --model and --task: {', '.join(TASKS)}")
        check_task_reward(self.reward, [self.task])
        self.request()

    def _refuse_what_has_no_use(self) -> None:
        """Refuse options that would be ignored."""
        for name in ("positions", "beta"):
            if self.start and getattr(self, name) != getattr(LearnConfig, name):
                raise ConfigError(f"{name} is that of the table to go on from; give no --{name}")
        online = ("task", "data", "limit", "rounds", "samples", "max_tokens", "window", "steps", "rate",
                  "kernel_size", "draws", "seed", "batch_size", "model", "device", "dtype")  # fmt: skip
        if self.within_prompts and not self.runs:
            raise ConfigError("within_prompts is for runs; give --samples")
        for name in online if self.runs else ():
            if getattr(self, name) != getattr(LearnConfig, name):
                raise ConfigError(f"{name} is for answers that are written now; give no --{name} with runs")

    def request(self) -> Any:
        """The request of answers that are written now."""
        from decoding.request import Request

        return Request(max_tokens=self.max_tokens, window=self.window, steps=self.steps, rate=self.rate)


def show_tables(config: ShowConfig) -> int:
    """Print a line for each table, and below it how its reward depends on each of the three."""
    from decoding.reveal.order_table import OrderTable, names, table_file, tables_folder

    for source in config.tables or names():
        table = OrderTable.load(table_file(source))
        print(f"{source}: {table.tokens} tokens, {_used(table)} cells, beta {table.beta:g}, {table.digest}")
        _print(_margins(table))
    if not config.tables and not names():
        print(f"no order tables in {tables_folder()}")
    return 0


def learn(config: LearnConfig) -> int:
    """Learn a table, and write it."""
    from decoding.reveal.order_table import SHAPE, OrderTable, target
    from dlm.lock import check_writable

    output = target(config.output)
    empty = OrderTable.empty((*SHAPE[:2], config.positions), config.beta)
    table = OrderTable.named(config.start) if config.start else empty
    if output.exists():
        raise ConfigError(f"{output} is there already; remove it, or give another --output")
    check_writable(output.parent)
    rewards: list[float] = []
    counted: list[float] = []
    for learnt in _offline(config, table) if config.runs else _online(config, table):
        table = learnt.table
        rewards += learnt.rewards
        counted += [reward for reward in learnt.rewards if not math.isnan(reward)]
        if counted:
            table.save(output)  # after each batch: what was learnt so far is there, whatever comes
    if not counted:
        raise ConfigError(
            f"none of the {len(rewards)} answers has a reward {config.reward!r}: there is nothing to learn"
        )
    mean = sum(counted) / len(counted)
    print(f"{len(counted)} of {len(rewards)} answers with a reward, mean {mean:.4g}; {_used(table)} cells")
    print(output)
    return 0


def _online(config: LearnConfig, table: OrderTable) -> Iterator[Progress]:
    from decoding.sampler import Sampler
    from dlm.checkpoint import load_model
    from eval.orders import learn_online
    from eval.task_rewards import task_reward
    from eval.tasks import fitting, load_questions

    questions = load_questions(config.task, config.data, config.limit)
    reward = task_reward(config.reward, config.task)
    sampler = Sampler(*load_model(config.model, config.device, config.dtype, prepacked=True))
    plan = sampler.plan(config.request())
    questions = fitting(questions, sampler.fits, plan.positions)
    going = learn_online(
        sampler, questions, reward, table, config.request(),
        options={"kernel_size": config.kernel_size, "draws": config.draws},
        rounds=config.rounds, samples=config.samples, seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    batches = config.rounds * -(-len(questions) // (config.batch_size // config.samples))
    yield from progress(going, "learning", batches, unit="batch")


def _offline(config: LearnConfig, table: OrderTable) -> Iterator[Progress]:
    from eval.orders import learn_offline, recorded, run_folders
    from eval.run import Results
    from eval.task_rewards import check_task_reward, task_reward
    from eval.tasks import load_questions

    runs = [Results.load(folder) for folder in run_folders(config.runs)]
    tasks = sorted({run.card.task for run in runs})
    check_task_reward(config.reward, tasks)
    for task in tasks:
        reward = task_reward(config.reward, task)
        answers = [
            pair
            for run in runs
            if run.card.task == task
            for pair in recorded(run, load_questions(task, run.card.source))
        ]
        learnt = learn_offline(answers, reward, table, within_prompts=config.within_prompts)
        table = learnt.table
        yield learnt


def _used(table: OrderTable) -> str:
    return f"{int((table.counts > 0).sum())} of {table.counts.numel()}"


def _margins(table: OrderTable) -> Table:
    """Tokens and mean reward, (1/β) log(E/n), by bin of the phase, the confidence and the position."""
    from eval.report.tables import Table

    rows = []
    for axis, name in enumerate(("phase", "confidence", "position")):
        axes = [i for i in range(3) if i != axis]
        counts, sums = table.counts.sum(axes), table.log_sums.logsumexp(axes)
        for i, (n, log_sum) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True)):
            value = f"{round((log_sum - math.log(n)) / table.beta, 3) + 0.0:+.3f}" if n else ""
            rows.append([name, f"{i / len(counts):.3g}", str(n), value])
    return Table("Rewards", ["", "from", "tokens", "reward"], rows)


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if Console().is_terminal else 120, markup=False, emoji=False).print(table.rich())


COMMAND = Command(
    "order tables: which there are, what they hold", ShowConfig, show_tables, positional="tables"
)
LEARN = Command("learn in which order tokens are best written", LearnConfig, learn, positional="runs")
