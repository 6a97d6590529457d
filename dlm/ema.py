"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dlm.errors import CheckpointError, ConfigError
from dlm.modes import share

AVERAGE_FILE = "ema.safetensors"


class EMA:
    """A second set of weights, averaged after every optimiser step: e ← d·e + (1-d)·w, in float32.

    The decay is warmed up as d_n = min(decay, (1+n)/(10+n)), so that the random first weights are
    forgotten quickly.

    Args:
        model: the model that is trained; only parameters with `requires_grad` are averaged.
        decay: d, in (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"ema_decay must lie in (0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.average = {n: p.detach().float().clone() for n, p in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Take in the weights after one optimiser step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        trained = _trained(model)
        current = [trained[name].float() for name in self.average]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, None)

    @contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """Let `model` hold the averaged weights for a while."""
        parameters = _trained(model)
        originals = {name: p.detach().clone() for name, p in parameters.items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(originals[name])

    @torch.no_grad()
    def copy_to(self, model: torch.nn.Module) -> None:
        """Overwrite the weights of `model` with the average."""
        for name, p in _trained(model).items():
            p.copy_(self.average[name])

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint folder."""
        save_file(
            self.average,
            Path(folder) / AVERAGE_FILE,
            metadata={"steps": str(self.steps), "decay": str(self.decay)},
        )
        share(folder)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint folder.

        Raises:
            CheckpointError: when the checkpoint was written without an average.
        """
        file = Path(folder) / AVERAGE_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {AVERAGE_FILE}; it was written without ema_decay, resume it without"
            )
        loaded = load_file(file)
        self.average = {name: loaded[name].to(value.device) for name, value in self.average.items()}
        from safetensors import safe_open

        with safe_open(file, framework="pt") as handle:
            self.steps = int(handle.metadata()["steps"])


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
