"""A run that has minutes, not steps: the learning rate comes to rest when the time is up."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from dlm.errors import ConfigError
from finetune.config import RunConfig
from finetune.run_folder import RunFolder


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends a run after `config.max_minutes`, and saves it every `config.save_minutes`.

    The time that a run has trained is kept in its folder at each checkpoint, so a continued run has only the
    rest. A model at the deadline is annealed, however many steps the machine managed.

    Args:
        run: the folder of the run.
        config: its settings.
        steps: after which it ends if its time is not up before.
    """

    def __init__(self, run: RunFolder, config: RunConfig, steps: float = math.inf) -> None:
        self.run, self.total, self.warmup = run, 60 * config.max_minutes, config.warmup_steps
        self.between = 60 * config.save_minutes
        self.before, self.since = run.seconds, time.monotonic()
        self.steps = steps
        self.saved = self.before

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts of the run included."""
        return self.before + time.monotonic() - self.since

    def pace(self, step: int) -> float:
        """Factor of the learning rate: a linear warm-up over steps, a cosine to 0 at the end of the run."""
        share = min(1.0, max(self.seconds / self.total, step / self.steps))
        return min(1.0, (step + 1) / (self.warmup + 1)) * 0.5 * (1 + math.cos(math.pi * share))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock.

        Raises:
            ConfigError: with several processes, whose clocks would differ.
        """
        if args.world_size > 1:
            raise ConfigError("max_minutes is for a run of one process; give max_steps or num_train_epochs")
        self.since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run, or save it, when it is time."""
        if self.seconds >= self.total:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        elif self.between and self.seconds - self.saved >= self.between:
            control.should_save, self.saved = True, self.seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the time, and whether it is up."""
        self.run.keep_time(self.seconds)
        if self.seconds >= self.total:
            self.run.stop()
