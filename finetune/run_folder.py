"""The folder of a run: whose it is, where to go on, whether it is finished.

`run.json` holds the settings that the run began with. A folder that holds another model, or a run with other
settings, is never touched.
"""

from __future__ import annotations

import json
import logging
from dataclasses import MISSING, asdict, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dlm.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from dlm.atomic import write_whole
from dlm.checkpointing import DROP_CHECKPOINT, discard_incomplete, last_checkpoint, log_state
from dlm.config import flat
from dlm.data.encode import EncodingReport
from dlm.errors import ConfigError, DLMError, plain
from dlm.json_files import damaged, read_object
from dlm.weights import INDEX, SINGLE
from finetune.config import EPOCHS, RunConfig

logger = logging.getLogger(__name__)


WRITTEN = (
    "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "config.json", "adapter_*",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "base.json",
)  # fmt: skip
"""Names of files that a run writes and a model of somebody else's may have."""

SAMPLES = "samples.md"
"""The file of answers that a run writes at its validations."""


class RunFolder:
    """Contents of `config.output_dir`.

    Args:
        config: settings of the run that is about to begin or to continue.

    Raises:
        ConfigError: when the folder holds a run with other settings, or a model that is not of a run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir)
        self._file = self.path / "run.json"
        self._stored = self._read()
        if not self._stored and (foreign := self._others()):
            shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise ConfigError(f"{self.path} holds {shown} but no run.json; choose another output_dir")
        began = self._others() or (self.path / SAMPLES).exists()
        if self._stored and began:  # otherwise it left nothing that other settings could spoil
            self._compare(_as_json(asdict(config)), self._stored["config"])
        self.resume_from = last_checkpoint(self.path)
        if self.resume_from:
            trainer_state(self.resume_from)
            log_state(self.resume_from)
        if self.resume_from and not config.resume:
            raise ConfigError(f"{self.path} holds a run already; resume it or choose another output_dir")

    def _others(self) -> list[str]:
        """Names in the folder of what a run writes too: a model, an adapter, a tokenizer, checkpoints."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in WRITTEN))

    def _read(self) -> dict[str, Any]:
        """Contents of run.json; empty if there is none."""
        if not self._file.is_file():
            return {}
        hint = "choose another output_dir"
        stored = read_object(self._file, ConfigError, hint)
        try:
            if not isinstance(stored["config"], dict):
                raise TypeError("its config is no object")
            stored["seconds"] = float(stored.get("seconds", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self._file, error, ConfigError, hint) from error
        return stored

    def _compare(self, new: dict[str, Any], old: dict[str, Any]) -> None:
        """Refuse to go on with other settings; those that an older version did not write had their defaults.

        Raises:
            ConfigError: naming the first that differs.
        """
        defaults = flat(_as_json(_defaults(type(self.config))))
        new, old = flat(new), {**defaults, **flat(old)}
        if old["num_train_epochs"] == EPOCHS and not new["num_train_epochs"]:
            old["num_train_epochs"] = 0.0  # as it was written where none were given
        for name, written in (("model.block_lead", True), ("model.causal_context", False)):
            if new.get(name) is None and old.get(name) is written:
                old[name] = None  # likewise
        for name in {**old, **new}:
            group = name.split(".")[0]
            if group in self.config.FREE or (name not in new and group != "trainer"):
                continue  # or it is no setting any more
            if old.get(name) != new.get(name):
                whole = (self.path / "config.json").is_file()
                start = " (--model.init can start from this one)" if whole else ""
                raise ConfigError(
                    f"{self.path} holds a run with {name} = {old.get(name)!r}, not {new.get(name)!r}; "
                    f"choose another output_dir{start}"
                )

    @property
    def finished(self) -> bool:
        """True when the run came to its end and its model is there."""
        weights = (SINGLE, INDEX, ADAPTER_WEIGHTS)
        return bool(self._stored.get("finished")) and any((self.path / name).is_file() for name in weights)

    @property
    def trained(self) -> bool:
        """True when the newest checkpoint is that of the last step."""
        state = self._state
        return state is not None and (
            self._stored.get("stopped", False) or state.global_step >= state.max_steps
        )

    @property
    def best(self) -> Path | None:
        """The checkpoint that validation found best, if the run chooses one."""
        best = self._state.best_model_checkpoint if self._state else None
        return self.path / Path(best).name if best else None

    @property
    def _state(self) -> TrainerState | None:
        """The trainer's state in the newest whole checkpoint."""
        newest = last_checkpoint(self.path)
        return trainer_state(newest) if newest else None

    @property
    def seconds(self) -> float:
        """Training time up to the newest checkpoint, where it was kept."""
        return float(self._stored.get("seconds", 0.0)) if self.resume_from else 0.0

    def keep_time(self, seconds: float) -> None:
        """Write down how long the run has trained."""
        self._stored["seconds"] = round(seconds, 3)
        self._write()

    def stop(self) -> None:
        """Write down that the run ended before its last step, on purpose."""
        self._stored["stopped"] = True
        self._write()

    def begin(self, report: EncodingReport) -> None:
        """Write down the settings and remove what a kill left half written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in discard_incomplete(self.path) if self._stored else []:
            logger.warning("%s was only half written and has been removed", self.path / name)
        settings = {"config": _as_json(asdict(self.config)), "rows": report.as_dict(), "finished": False}
        anew = {} if self.resume_from else {"stopped": False}
        self._stored = self._stored | settings | anew
        self._write()

    def finish(self) -> None:
        """Write down that the model in the folder is the final one."""
        self._stored["finished"] = True
        self._write()

    def _write(self) -> None:
        write_whole(self._file, json.dumps(self._stored, indent=2))


def trainer_state(checkpoint: Path) -> TrainerState:
    """The trainer's state in a checkpoint.

    Raises:
        CheckpointError: naming the file that is damaged.
    """
    file = checkpoint / TRAINER_STATE_NAME
    try:
        stored = read_object(file, hint=DROP_CHECKPOINT)
        for name in ("global_step", "max_steps"):
            if not isinstance(stored[name], int):
                raise TypeError(f"{name} is {stored[name]!r:.40}")
        state = TrainerState(**stored)
        if not isinstance(state.log_history, list) or not all(isinstance(x, dict) for x in state.log_history):
            raise TypeError("log_history is no list of objects")
        if not isinstance(state.best_model_checkpoint, str | None):
            raise TypeError("best_model_checkpoint is no path")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, DLMError):
            raise
        raise damaged(file, error, hint=DROP_CHECKPOINT) from error
    return state


def _defaults(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass of settings, those of its groups included."""
    defaults = {
        item.name: item.default_factory() for item in fields(kind) if item.default_factory is not MISSING
    }
    plain = {item.name: item.default for item in fields(kind) if item.default is not MISSING}
    groups = {name: _defaults(type(value)) for name, value in defaults.items() if is_dataclass(value)}
    return plain | defaults | groups


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON would give them back."""
    return dict(json.loads(json.dumps(settings, default=plain)))
