"""Order tables: the rewards that answers got, by when and where their tokens were written.

A cell is a phase of the process, a bin of the model's confidence and a bin of the relative position. It holds
the number n of tokens written in it, and E = Σ exp(βR) over the rewards R of their answers. (1/β) log(E/n)
estimates the Doob-h value of writing a token there: the free energy of the reward that follows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from dlm.atomic import replacing, write_whole
from dlm.errors import ConfigError, DataError, unknown_name
from dlm.json_files import read_object

SHAPE = (8, 16, 4)
"""Phases, bins of the confidence and bins of the relative position of a new table."""

LARGEST_REWARD = 20.0
"""Rewards are cut to ± this, so that one answer cannot rule a cell."""

TABLE_SUFFIXES = (".json", ".safetensors")
TABLE_FORMAT = "dlm order table"
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}")


@dataclass(frozen=True, eq=False)
class OrderTable:
    """Counts and summed exponential rewards by cell; never changed in place.

    Two tables are equal when their contents are.

    Attributes:
        counts: n, [P, C, A] int64.
        log_sums: log E, [P, C, A] float64; -inf where n is 0.
        beta: β, the inverse temperature of the rewards in E.
    """

    counts: torch.Tensor
    log_sums: torch.Tensor
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check shapes and ranges."""
        if not (isinstance(self.beta, int | float) and 0 < self.beta < math.inf):
            raise ConfigError(f"beta must be above 0, got {self.beta!r}")
        shape = tuple(self.counts.shape)
        if len(shape) != 3 or 0 in shape or shape != tuple(self.log_sums.shape):
            raise ConfigError(
                "an order table has counts and log_sums of one shape [phases, confidence, position], "
                f"got {shape} and {tuple(self.log_sums.shape)}"
            )
        if bool((self.counts < 0).any()):
            raise ConfigError(f"the counts of an order table are at least 0, got {int(self.counts.min())}")
        used = self.counts > 0
        if bool((self.log_sums[~used] != -math.inf).any()):
            raise ConfigError("an order table has a reward in a cell without a token")
        mean = self.log_sums[used] - self.counts[used].double().log()
        limit = LARGEST_REWARD * self.beta * (1 + 1e-9) + 1e-9
        if not bool((mean.abs() <= limit).all()):
            raise ConfigError(f"the rewards of an order table lie within ±{LARGEST_REWARD:g}")

    @classmethod
    def empty(cls, shape: Sequence[int] = SHAPE, beta: float = 1.0) -> OrderTable:
        """A table without a token.

        Raises:
            ConfigError: for a shape that is no three numbers of at least 1.
        """
        if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ConfigError(f"the shape of an order table is three numbers of at least 1, got {shape!r}")
        counts = torch.zeros(*shape, dtype=torch.int64)
        return cls(counts, torch.full(counts.shape, -math.inf, dtype=torch.float64), float(beta))

    def __eq__(self, other: object) -> bool:
        """True for a table of the same contents."""
        return isinstance(other, OrderTable) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash of the contents."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """Shape, tokens and digest."""
        return f"OrderTable({'×'.join(map(str, self.shape))}, {self.tokens} tokens, {self.digest})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Phases, bins of the confidence, bins of the position."""
        return tuple(self.counts.shape)

    @property
    def tokens(self) -> int:
        """Tokens in all cells."""
        return int(self.counts.sum())

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the contents, 16 hexadecimal digits."""
        parts = (self.counts.numpy().tobytes(), self.log_sums.numpy().tobytes())
        head = repr((self.shape, float(self.beta))).encode()
        return hashlib.blake2b(head + b"".join(parts), digest_size=8).hexdigest()

    @cached_property
    def values(self) -> torch.Tensor:
        """(1/β) log(E/n), [P, C, A] float64; 0 where n is 0."""
        mean = (self.log_sums - self.counts.clamp(min=1).double().log()) / self.beta
        return torch.where(self.counts > 0, mean, 0.0)

    @cached_property
    def overall(self) -> float:
        """(1/β) log(ΣE/Σn) over all cells; 0 in an empty table."""
        if not self.tokens:
            return 0.0
        return (float(self.log_sums.flatten().logsumexp(0)) - math.log(self.tokens)) / self.beta

    def cells(self, elapsed: torch.Tensor, confidence: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Numbers of cells, int64 in the broadcast shape of the arguments.

        Args:
            elapsed: share of the process that has passed, in [0, 1].
            confidence: the model's probability of the token, in [0, 1].
            place: relative position, in [0, 1].
        """
        number = torch.zeros((), dtype=torch.int64)
        for share, size in zip((elapsed, confidence, place), self.shape, strict=True):
            number = number * size + (share.double() * size).floor().long().clamp(0, size - 1)
        return number

    def credited(self, cells: torch.Tensor, rewards: torch.Tensor) -> OrderTable:
        """This table with more tokens.

        Args:
            cells: [N] int64, where each was written.
            rewards: [N], of their answers; cut to ±20.

        Raises:
            ConfigError: for rewards that are no numbers.
        """
        rewards = rewards.double()
        if bool(rewards.isnan().any()):
            raise ConfigError("a reward is NaN; leave its answer out, or give it a number")
        energy = self.beta * rewards.clamp(-LARGEST_REWARD, LARGEST_REWARD)
        size = self.counts.numel()
        top = torch.full((size,), -math.inf, dtype=torch.float64).scatter_reduce(0, cells, energy, "amax")
        sums = torch.zeros(size, dtype=torch.float64).index_add(0, cells, (energy - top[cells]).exp())
        added = torch.where(sums > 0, top + sums.log(), -math.inf).view(self.shape)
        counts = self.counts + torch.bincount(cells, minlength=size).view(self.shape)
        return replace(self, counts=counts, log_sums=torch.logaddexp(self.log_sums, added))

    def merged(self, other: OrderTable) -> OrderTable:
        """The tokens of both tables.

        Raises:
            ConfigError: for tables of different shapes or β.
        """
        if (self.shape, self.beta) != (other.shape, other.beta):
            raise ConfigError(
                f"tables of one shape and one beta can be merged, got {self.shape}, {self.beta:g} "
                f"and {other.shape}, {other.beta:g}"
            )
        sums = torch.logaddexp(self.log_sums, other.log_sums)
        return replace(self, counts=self.counts + other.counts, log_sums=sums)

    # ---- files -----------------------------------------------------------------------------------------

    def save(self, file: str | Path) -> Path:
        """Write a .json or .safetensors file, or one in `tables_folder` by its name, at once; returns it.

        Raises:
            ConfigError: for another kind of file.
        """
        path = target(file)
        if path.suffix == ".json":
            sums = [None if x == -math.inf else x for x in self.log_sums.flatten().tolist()]
            cells = {"counts": self.counts.flatten().tolist(), "log_sums": sums}
            body = {"format": TABLE_FORMAT, "beta": self.beta, "shape": list(self.shape), **cells}
            write_whole(path, json.dumps(body))
            return path
        from safetensors.torch import save_file

        metadata = {"format": TABLE_FORMAT, "beta": repr(float(self.beta))}
        with replacing(path) as part:
            save_file({"counts": self.counts, "log_sums": self.log_sums}, part, metadata)
        return path

    @classmethod
    def load(cls, file: str | Path) -> OrderTable:
        """Read a file that `save` has written.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        path = Path(file)
        if path.suffix not in TABLE_SUFFIXES:
            raise DataError(f"{path}: an order table is a {' or '.join(TABLE_SUFFIXES)} file")
        if not path.is_file():
            raise DataError(f"{path}: no such order table")
        try:
            return _of_json(path) if path.suffix == ".json" else _of_safetensors(path)
        except DataError:
            raise
        except (ConfigError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0]
            raise DataError(f"{path}: not an order table ({reason})") from error

    @classmethod
    def named(cls, source: OrderTable | str | Path) -> OrderTable:
        """The table itself, that of a file, or one of `tables_folder` by its name.

        Raises:
            ConfigError: for a name that is not there, listing the names.
            DataError: for a file that is no table.
        """
        if isinstance(source, OrderTable):
            return source
        if not isinstance(source, str | Path):
            raise ConfigError(f"an order table is given by its name or file, got {source!r}")
        path = table_file(source)
        try:
            state = path.stat()
        except OSError:
            return cls.load(path)  # which says that there is none
        try:
            return _read(path, state.st_mtime_ns, state.st_size)
        except DataError as error:
            if not is_name(source):
                raise
            raise ConfigError(f"order table {source!r} is damaged; see dlm orders {source}") from error


def is_name(source: Any) -> bool:
    """True for what can only be the name of a table in `tables_folder`, never a path."""
    return isinstance(source, str) and _NAME.fullmatch(source) is not None


def tables_folder() -> Path:
    """Folder of tables that are used by name: `orders` in $DLM_HOME, or in the user's data folder for dlm."""
    if home := os.environ.get("DLM_HOME"):
        return Path(home) / "orders"
    from platformdirs import user_data_path

    return Path(user_data_path("dlm")) / "orders"


def names() -> list[str]:
    """Names of the tables in `tables_folder`."""
    files = (file for file in tables_folder().glob("*") if file.suffix in TABLE_SUFFIXES)
    return sorted({file.stem for file in files if is_name(file.stem)})


def target(file: str | Path) -> Path:
    """The file to which a table is written: a path as it is, for a name one in `tables_folder`.

    Raises:
        ConfigError: for another kind of file.
    """
    path = tables_folder() / f"{file}.json" if is_name(file) else Path(file)
    if path.suffix not in TABLE_SUFFIXES:
        raise ConfigError(f"an order table is a {' or '.join(TABLE_SUFFIXES)} file, got {path.name!r}")
    return path


def table_file(source: str | Path) -> Path:
    """The file of a table: a path as it is, a name in `tables_folder`.

    Raises:
        ConfigError: for a name that is not there, listing the names.
    """
    if not is_name(source):
        return Path(source)
    for suffix in TABLE_SUFFIXES:
        if (file := tables_folder() / f"{source}{suffix}").is_file():
            return file
    if not names():
        raise ConfigError(f"no order table {source!r}: none has a name yet; dlm orders learn makes one")
    raise unknown_name("order table", str(source), names())


@lru_cache(maxsize=32)
def _read(path: Path, time: int, size: int) -> OrderTable:
    """The table in a file of this time and size."""
    del time, size
    return OrderTable.load(path)


def _of_json(path: Path) -> OrderTable:
    """See `OrderTable.load`."""
    body = read_object(path, DataError)
    _check_format(body.get("format"))
    shape = tuple(body["shape"])
    counts, sums = body["counts"], [-math.inf if x is None else x for x in body["log_sums"]]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in (*shape, *counts)):
        raise TypeError("its shape and counts must be whole numbers")
    if len(shape) != 3 or not len(counts) == len(sums) == math.prod(shape):
        raise TypeError(f"its shape {shape} does not fit {len(counts)} counts and {len(sums)} sums")
    values = torch.tensor(sums, dtype=torch.float64).view(shape)
    return OrderTable(torch.tensor(counts, dtype=torch.int64).view(shape), values, body["beta"])


def _of_safetensors(path: Path) -> OrderTable:
    """See `OrderTable.load`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata.get("format"))
            counts, sums = file.get_tensor("counts"), file.get_tensor("log_sums")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if (counts.dtype, sums.dtype) != (torch.int64, torch.float64):
        raise TypeError(f"its counts are int64 and its log_sums float64, got {counts.dtype} and {sums.dtype}")
    return OrderTable(counts, sums, float(metadata["beta"]))


def _check_format(name: Any) -> None:
    if name != TABLE_FORMAT:
        raise TypeError(f"its format is {name!r}, not {TABLE_FORMAT!r}")
