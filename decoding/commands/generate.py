"""`dlm generate`: prompts in, text out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from decoding.commands.display import plain_console, watch
from decoding.config import LoadConfig, request_hint
from decoding.request import Request
from decoding.tilted.tilt import Tilt
from dlm.cli import Command, json_line
from dlm.data.prompts import read_prompts, read_whole
from dlm.errors import ConfigError, DataError
from dlm.progress import progress

LAWS = """\
exact: texts follow the model's own distribution as steps become finer; at --rate 1 they do at once (the
first-hitting sampler, 2409.02908). approximate: tokens are cut or positions ordered, on purpose.
Whatever the decoder, --canvas growing (with a window) and --reuse (2505.22618) approximate it further.
"""


@dataclass(frozen=True)
class GenerateConfig(Request, LoadConfig):
    """Settings of `dlm generate`.

    Args:
        prompts: the prompts (the words that are no options); "-" or nothing reads lines from stdin.
        file: file of prompts, one per line; or .json, .jsonl (also .gz) whose rows have "instruction" (and
            "input"), "prompt", "text" or "messages".
        prompt_file: file whose whole text is one prompt; "-" for stdin.
        system: system message before each prompt.
        limit: answer only the first so many prompts; 0 for all.
        samples: answers to each prompt, one behind the other, under the seeds seed, seed + 1, … (an answer
            may have several lines: in a pipe, --json tells them apart).
        seed: seed of the noise; a decoder that takes the likeliest token, as the default model's, has none.
        forbidden: tokens that never come out, as texts such as '[" delve"]', which must be one token each.
        reward: draw answers from p(x) exp(reward / beta) / Z, by particles: "length=80" (words),
            "no-repetition", "regex=PATTERN", "likelihood=MODEL" (an autoregressive one), "closeness=TEXT" (in
            meaning), or "module:function" of your own, called with prompts and completions.
        particles: with a reward, rows for each answer; 8 by default.
        reward_beta: with a reward, β in its units; 0.1 by default, less counts it more.
        twist: with a reward, how unfinished answers are weighed: by what is "predicted" for every mask
            (default), by what is "written", or "none" (soft best-of-n).
        select: with a reward, the particle that is printed: a "sample" by weight (default), or the "best".
        json: write one JSON object per answer, the prompt in it, instead of its text.
        batch_size: prompts per model call.
        list_decoders: print the decoders with their options and leave.
    """

    TEXTS: ClassVar[tuple[str, ...]] = (*Request.TEXTS, "reward")

    prompts: list[str] = field(default_factory=list)
    file: str = ""
    prompt_file: str = ""
    system: str = ""
    limit: int = 0
    samples: int = 1
    seed: int = 0
    forbidden: list[str] = field(default_factory=list)
    reward: str | None = None
    particles: int | None = None
    reward_beta: float | None = None
    twist: str | None = None
    select: str | None = None
    json: bool = False
    batch_size: int = 8
    list_decoders: bool = False

    def __post_init__(self) -> None:
        """Check that the settings fit together."""
        Request.__post_init__(self)
        if sum(map(bool, (self.prompts, self.file, self.prompt_file))) > 1:
            raise ConfigError("give prompts as words, as --file or as --prompt-file, not in two ways")
        if not self.list_decoders:
            LoadConfig.__post_init__(self)
        self.check_reuse(self.reuse)
        for name in ("batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for file in (self.file, self.prompt_file):
            if file not in ("", "-") and not Path(file).is_file():
                wrong = "a folder, not a file" if Path(file).is_dir() else "no such file"
                raise DataError(f"{file}: {wrong}")
        if self.top_logprobs and not (self.json or self.list_decoders):
            raise ConfigError("top_logprobs are shown in JSON alone; give --json true too")
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative, got {self.limit}")

    def tilt(self, request: Request) -> dict[str, Any]:
        """The fields of a `Tilt` that are given, the reward ready to be called; empty without a reward.

        Raises:
            ConfigError: for fields that do not go together or with the request, before any weights are read.
        """
        names = ("reward", "particles", "reward_beta", "twist", "select")
        settings = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.reward is None:
            for name in settings:
                raise ConfigError(f"--{name} is for answers that are steered by a reward; give --reward")
            return {}
        settings = {name.removeprefix("reward_"): value for name, value in settings.items()}
        tilt, plan = Tilt(**settings), self.check(request)
        if plan is not None:
            tilt.check(plan)
        return settings | {"reward": tilt.reward}


def run(config: GenerateConfig) -> int:
    """Answer the prompts, in order, as they are finished."""
    if config.list_decoders:
        from decoding.presets import decoders_in_words

        print(LAWS)
        print(decoders_in_words())
        return 0
    request = Request.read_from(config)
    tilt = config.tilt(request)
    sampler = config.sampler(request)
    if config.forbidden:
        decoder = sampler.without(config.forbidden, request=request)
        request = replace(request, decoder=decoder, options=None)
    given, count = _prompts(config)
    given = (_with_system(prompt, config.system) for prompt in given) if config.system else given
    given = itertools.islice(given, config.limit) if config.limit else given
    if (count, config.samples, tilt, config.json, sys.stdout.isatty()) == (1, 1, {}, False, True):
        watch(
            plain_console(),
            (event.text for event in sampler.stream(next(iter(given)), request=request, seed=config.seed)),
        )
        return 0
    questions, prompts = itertools.tee(given)
    outputs = sampler.iter_generate(
        prompts, request=request, seed=config.seed, batch_size=config.batch_size, n=config.samples, **tilt
    )
    questions = itertools.chain.from_iterable(itertools.repeat(x, config.samples) for x in questions)
    outputs = _with_progress(outputs, count and count * config.samples)
    apart = sys.stdout.isatty() and not config.json  # an answer may have several lines
    answers = zip(outputs, questions, strict=False)  # in this order: outputs raise what is wrong
    for number, (output, prompt) in enumerate(answers):
        row = {"prompt": prompt, **asdict(output)}
        print("\n" * (apart and number > 0) + (json_line(row) if config.json else output.text), flush=True)
    return 0


def _prompts(config: GenerateConfig) -> tuple[Iterable[Any], int | None]:
    """The prompts, and their number where it is known."""
    if config.prompt_file:
        return [read_whole(config.prompt_file)], 1
    if config.prompts not in ([], ["-"]):
        return config.prompts, len(config.prompts)
    return read_prompts(config.file), None


def _with_system(prompt: Any, system: str) -> list[dict[str, str]]:
    """A prompt behind a system message.

    Raises:
        ConfigError: for a conversation that has one already.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise ConfigError(
            "--system is for prompts without a system message; a row of the file brings its own"
        )
    return [{"role": "system", "content": system}, *messages]


def _with_progress(outputs: Iterable[Any], count: int | None) -> Any:
    """Progress on stderr, unless there is one prompt only."""
    return progress(outputs, "answers", count, unit="answer", quiet=count == 1)


COMMAND = Command(
    "answer prompts with a trained model", GenerateConfig, run, positional="prompts", hint=request_hint
)
