"""Settings of reward-tilted decoding, importable without torch; `decoding.tilted.particles` does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from decoding.request import is_whole
from decoding.tilted.rewards import Reward, reward_named, values
from dlm.errors import MOST_NUMBER, ConfigError, DLMError, unknown_name

if TYPE_CHECKING:
    from decoding.request import Plan

TWISTS = ("none", "written", "predicted")
SELECTIONS = ("sample", "best")
DRAWS, SHARE = 4, 0.5


@dataclass(frozen=True)
class Tilt:
    """A tilted law p(x) exp(r(x) / β) / Z, and how it is approached; p is the law of the decoder's texts.

    Args:
        reward: r, a callable (`decoding.tilted.rewards.Reward`) or the name of one (`reward_named`).
        particles: K, rows for each answer.
        beta: β, in units of the reward; the smaller, the more the reward counts against the model.
        twist: ψ, an estimate of E[exp(r / β)] for an unfinished text: "predicted" (the mean of exp(r / β)
            over texts in which every mask is filled at once), "written" (exp(r / β) of the text that can no
            longer change), or "none" (1 until the end).
        predictions: texts in that mean; 4 by default.
        threshold: particles are resampled where their effective number is below this share of K, 0.5 by
            default; 1 for always, 0 for never. Without a twist they never are.
        select: "sample" draws one of the particles by weight, "best" takes the one of greatest reward.
    """

    reward: Reward | str
    particles: int = 8
    beta: float = 0.1
    twist: str = "predicted"
    predictions: int | None = None
    threshold: float | None = None
    select: str = "sample"

    def __post_init__(self) -> None:
        """Check the ranges, and find a reward that is named."""
        for name, choices in (("twist", TWISTS), ("select", SELECTIONS)):
            if getattr(self, name) not in choices:
                raise unknown_name(name, str(getattr(self, name)), choices)
        for name, number in (("particles", self.particles), ("predictions", self.draws)):
            if not is_whole(number) or number < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {number!r}")
        if not (isinstance(self.beta, int | float) and 0 < self.beta <= MOST_NUMBER):
            raise ConfigError(f"beta must be above 0, got {str(self.beta)[:40]}")
        if not (isinstance(self.share, int | float) and 0 <= self.share <= 1):
            raise ConfigError(f"threshold must lie in [0, 1], got {self.threshold!r}")
        if self.predictions is not None and self.twist != "predicted":
            raise ConfigError(f'predictions are for twist="predicted", got twist={self.twist!r}')
        if self.threshold is not None and self.twist == "none":
            raise ConfigError("threshold says when particles are resampled, which needs a twist")
        if isinstance(self.reward, str):
            object.__setattr__(self, "reward", reward_named(self.reward))
        if not callable(self.reward):
            raise ConfigError(f"reward must be a name or a callable, got {self.reward!r}")

    @property
    def draws(self) -> int:
        """Texts that are predicted from each particle."""
        return DRAWS if self.predictions is None else self.predictions

    @property
    def share(self) -> float:
        """Share of K below which the effective number of particles brings a resampling; 0 without a twist."""
        if self.twist == "none":
            return 0.0
        return SHARE if self.threshold is None else self.threshold

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> tuple[Tilt | None, dict[str, Any]]:
        """The tilt among keyword arguments, None without a reward, and the other arguments.

        Raises:
            ConfigError: for a field of a tilt without a reward.
        """
        tilt_fields = {name: value for name, value in arguments.items() if name in TILT_FIELDS}
        request_fields = {name: value for name, value in arguments.items() if name not in TILT_FIELDS}
        if tilt_fields.get("reward") is not None:
            return cls(**tilt_fields), request_fields
        for name in tilt_fields.keys() - {"reward"}:
            raise ConfigError(f"{name} is for texts that are steered by a reward; give reward")
        return None, request_fields

    def rewards(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """Rewards of texts, see `decoding.tilted.rewards.values`."""
        assert not isinstance(self.reward, str)
        numbers = values(self.reward, prompts, completions)
        for value in numbers:
            if abs(value) > MOST_NUMBER * self.beta:
                raise DLMError(f"the reward {value} over beta {self.beta} is no weight; give a larger beta")
        return numbers

    def check(self, plan: Plan) -> None:
        """Refuse a plan whose rows cannot be steered.

        Raises:
            ConfigError: saying what to change.
        """
        name = plan.decoder.name
        if self.particles > 1 and not plan.decoder.random:
            raise ConfigError(
                f"decoder {name!r} draws nothing at random, so {self.particles} particles would be equal; "
                'give it a temperature (options), or take a decoder that draws, such as "conv"'
            )
        if plan.reuse is not None:
            raise ConfigError("reuse keeps keys and values that a copy of a row lacks: give no reuse")
        if self.twist == "written" and not plan.keeps_tokens:
            raise ConfigError(
                f'decoder {name!r} revises what it has written: give twist="predicted" or "none"'
            )


TILT_FIELDS = frozenset(item.name for item in fields(Tilt))
"""Names of the settings of a `Tilt`."""
