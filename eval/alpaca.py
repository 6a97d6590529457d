"""AlpacaEval by its own package: pairwise verdicts, win rate, and the length-controlled win rate."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.errors import ConfigError, DataError, DLMError, how_to_install, unknown_name
from eval.judge import Judge, JudgeRequest, conclusion

logger = logging.getLogger(__name__)

Records = list[dict[str, Any]]

CHAT_SETTINGS = (
    *("max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "functions", "function_call"),
)
"""Settings of annotators that an endpoint understands; the rest is for the package's own client."""

NO_WIDTH = "\N{ZERO WIDTH SPACE}"

MIN_VERDICTS = 30
"""Verdicts that a length-controlled rate needs: with fewer, its two parameters mean nothing."""


@dataclass(frozen=True)
class WinRate:
    """Percentages of answers preferred to the reference, with standard errors.

    Attributes:
        win_rate: mean preference.
        standard_error: of it.
        lc_win_rate: what it would be at equal lengths.
        lc_standard_error: of it.
        lc_kind: "alpaca_eval", the package's own with its difficulties of instructions, "length only", or why
            there is none.
        count: instructions with a verdict.
        missing: instructions without one.
        mean_length: characters of the model's outputs.
    """

    win_rate: float
    standard_error: float
    lc_win_rate: float
    lc_standard_error: float
    lc_kind: str
    count: int
    missing: int
    mean_length: float


def win_rate(
    outputs: Records,
    references: Records,
    judge: Judge,
    annotator: str = "weighted_alpaca_eval_gpt4_turbo",
    name: str = "",
) -> tuple[WinRate, Records]:
    """Have the `alpaca_eval` package compare outputs with references, by this judge.

    Args:
        outputs: AlpacaEval's model outputs.
        references: reference outputs; those of other instructions are left out.
        judge: who is asked, in the place of the model that the annotator names.
        annotator: name of a config of the package, or a folder or file with one; its prompt, its parser and
            its parameters are used.
        name: what the model is called.

    Returns:
        The win rate, and the annotations: one row for each output that has a reference, its preference
        between 1 (the reference is better) and 2, and as `number` the place of the output. Of outputs of
        equal instructions the first goes with the first reference, and so on.

    Raises:
        ConfigError: when the package is missing, or there is no such annotator.
        DataError: for a reference without its texts.
        DLMError: when outputs and references have no instruction in common, and when no verdict can be read.
    """
    package = _package()
    for number, row in enumerate(references):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(n), str) for n in ("instruction", "output")
        ):
            raise DataError(
                f"reference {number}: needs the texts 'instruction' and 'output', got {row!r:.80}"
            )
    pairs = _pairs(outputs, references)
    if not pairs:
        raise DLMError("outputs and references have no instruction in common; give --references of this task")
    file = _config_file(package, annotator)
    _, annotations = package.evaluate(
        model_outputs=[row for _, row, _ in pairs], reference_outputs=[row for _, _, row in pairs],
        annotators_config=str(file), Annotator=_annotator(package, judge), name=name or None,
        output_path=None, is_return_instead_of_print=True, fn_metric=_later, sort_by="win_rate",
        precomputed_leaderboard=None, is_cache_leaderboard=False, caching_path=None,
    )  # fmt: skip
    numbers = {row["instruction"]: number for number, row, _ in pairs}
    rows: Records = []
    for row in annotations:
        number = numbers[row["instruction"]]
        rows.append({**row, "instruction": outputs[number]["instruction"], "number": number})
    return summarise(rows, package, len(pairs)), rows


def _pairs(outputs: Records, references: Records) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Place of each output that has a reference, with both as the package is given them.

    The package tells rows apart by their instructions, so that a repeated one gets characters without width.
    Marks of chats, which it would read as turns of its own prompt, are broken by one.
    """
    by_instruction: dict[str, Records] = {}
    for row in references:
        by_instruction.setdefault(row["instruction"], []).append(row)
    counts: Counter[str] = Counter()
    pairs = []
    for number, row in enumerate(outputs):
        instruction = row["instruction"]
        choices = by_instruction.get(instruction, [])
        if choices:
            reference = choices[min(counts[instruction], len(choices) - 1)]
            shown = _without_chat_marks(instruction) + NO_WIDTH * counts[instruction]
            counts[instruction] += 1
            ours, baseline = (
                {**row_of_pair, "instruction": shown, "output": _without_chat_marks(row_of_pair["output"])}
                for row_of_pair in (row, reference)
            )
            pairs.append((number, ours, baseline))
    return pairs


def _without_chat_marks(text: str) -> str:
    """A text whose `<|im_start|>` and `<|im_end|>` are marks no more."""
    return text.replace("<|im_", f"<|{NO_WIDTH}im_")


def _later(annotations: Any) -> dict[str, float]:
    """No metric yet: the package's fails where no verdict could be read (see `summarise`)."""
    del annotations
    return {"win_rate": math.nan, "standard_error": math.nan}


def summarise(rows: Records, package: Any, count: int) -> WinRate:
    """Win rates of annotations; rows without a preference are left out and counted."""
    judged = [row for row in rows if row.get("preference") is not None and not math.isnan(row["preference"])]
    if not judged:
        raise DLMError("the judge gave no verdict that the annotator's parser can read")
    plain = package.metrics.get_winrate(judged)
    control, error, kind = length_controlled(judged, package)
    return WinRate(
        float(plain["win_rate"]), float(plain["standard_error"]), control, error, kind, len(judged),
        count - len(judged), float(np.mean([len(row["output_2"]) for row in judged])),
    )  # fmt: skip


def length_controlled(rows: Records, package: Any) -> tuple[float, float, str]:
    """The length-controlled win rate (arXiv 2404.04475), its standard error, and how it was found.

    The package's own needs the difficulties of AlpacaEval's 805 instructions, a file on the hub. Where it
    cannot be had, or these are other instructions, the model has its length term alone.
    """
    if len(rows) == 805:
        try:
            figures = package.metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
            rate, error = (float(figures[x]) for x in ("length_controlled_winrate", "lc_standard_error"))
            return rate, error, "alpaca_eval"
        except (OSError, ValueError, KeyError) as error:
            logger.warning("AlpacaEval's difficulties could not be fetched (%s): length only", error)
    if len(rows) < MIN_VERDICTS:
        return float("nan"), float("nan"), f"none below {MIN_VERDICTS} verdicts"
    won = np.array([row["preference"] - 1 for row in rows], dtype=float)
    extra = np.array([len(row["output_2"]) - len(row["output_1"]) for row in rows], dtype=float)
    rate, deviation = length_only(won, extra)
    return 100 * rate, 100 * deviation, "length only"


def length_only(won: np.ndarray, extra: np.ndarray, draws: int = 200) -> tuple[float, float]:
    """Logit P(win) = θ + φ tanh(Δ / sd Δ): the win rate at Δ = 0, σ(θ), and its bootstrap standard error.

    Args:
        won: [N] preference for the model, in [0, 1].
        extra: [N] Δ, characters that the model's output is longer.
        draws: resamples.
    """
    generator = np.random.default_rng(0)
    sample = [generator.integers(0, len(won), len(won)) for _ in range(draws)]
    rates = [_at_equal_length(won[i], extra[i]) for i in sample]
    return _at_equal_length(won, extra), float(np.std(rates))


def _at_equal_length(won: np.ndarray, extra: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    spread = extra.std()
    if spread == 0:
        return float(won.mean())
    x = np.tanh(extra / spread)[:, None]
    weights = np.concatenate([won, 1 - won])
    if min(weights[: len(won)].sum(), weights[len(won) :].sum()) < 1e-9:
        return float(won.mean())
    labels = np.repeat([1, 0], len(won))
    model = LogisticRegression(C=100.0).fit(np.concatenate([x, x]), labels, sample_weight=weights)
    return float(1 / (1 + np.exp(-model.intercept_[0])))


def _package() -> Any:
    try:
        with warnings.catch_warnings():  # it imports pkg_resources, which says that it will be gone
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")
            import alpaca_eval
            import alpaca_eval.metrics
    except ImportError as error:
        raise ConfigError(
            f"AlpacaEval needs its package: {how_to_install('eval')}, with setuptools<81 ({error})"
        ) from error
    return alpaca_eval


def _config_file(package: Any, annotator: str) -> Path:
    """The file of an annotator's config: one of the package's, or the caller's own."""
    base, named = Path(package.constants.EVALUATORS_CONFIG_DIR), Path(annotator)
    places = (base / annotator / "configs.yaml", named / "configs.yaml", named)
    file = next((place.resolve() for place in places if place.is_file()), None)
    if file is None:
        raise unknown_name("annotator", annotator, [f.parent.name for f in base.glob("*/configs.yaml")])
    return file


def _annotator(package: Any, judge: Judge) -> type:
    """The package's annotator, with our judge in the place of its own client."""

    class Annotator(package.annotators.PairwiseAnnotator):  # type: ignore[misc]
        def _initialize_annotators(self, **given: Any) -> Any:
            annotators = super()._initialize_annotators(**given)
            for judge_of_name in annotators.values():
                judge_of_name.fn_completions = _Completions(judge, package)
                options = judge_of_name.completions_kwargs
                judge_of_name.completions_kwargs = {
                    name: options[name] for name in CHAT_SETTINGS if name in options
                }
            return annotators

    return Annotator


class _Completions:
    """Our judge in the form in which the package asks."""

    def __init__(self, judge: Judge, package: Any) -> None:
        self.judge, self.package = judge, package

    def __call__(self, prompts: Sequence[str], **options: Any) -> dict[str, Any]:
        requests = [JudgeRequest(self.package.utils.prompt_to_chatml(p.strip()), options) for p in prompts]
        choices = self.judge.ask(requests, "AlpacaEval")
        full = [
            {**(choice or {"message": {"content": ""}}), "text": _choice_text(choice)} for choice in choices
        ]
        return {
            "completions": [choice["text"] for choice in full],
            "completions_all": full,
            "price_per_example": [0.0] * len(full),
            "time_per_example": [0.0] * len(full),
        }


def _choice_text(choice: dict[str, Any] | None) -> str:
    return "" if choice is None else conclusion(str(choice["message"]["content"]))
