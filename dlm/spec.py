"""Properties of a masked diffusion model for decoding and evaluation: token ids, positions, visibility."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

from dlm.errors import ConfigError, check_whole, unknown_name
from dlm.schedule import LogLinear, NoiseSchedule, schedule_named

_UNLIMITED = 2**31


@dataclass(frozen=True)
class DecodingDefaults:
    """Fields of a `Request` as a checkpoint has them, for those that ask for nothing else.

    A field that is None, or empty, is left to the decoder or to `Request`.
    """

    decoder: str = "conv"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that decoder."""
    window: int | None = None
    steps: int | None = None
    rate: float | None = None
    max_tokens: int | None = None
    canvas: str | None = None
    eos_fill: bool | None = None
    stop: tuple[str, ...] | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> DecodingDefaults:
        """The defaults that a configuration holds by name.

        Raises:
            ConfigError: for a default of another name or type.
        """
        names = [each.name for each in fields(cls)]
        for name in stored:
            if name not in names:
                raise unknown_name("default of decoding:", name, names)
        values = {name: value for name, value in stored.items() if value is not None}
        for name, value in values.items():
            if type(value) not in _TYPES[name]:
                wish = " or ".join(kind.__name__ for kind in _TYPES[name])
                raise ConfigError(f"default of decoding {name} must be of type {wish}, got {value!r}")
        if "stop" in values:
            values["stop"] = (values["stop"],) if isinstance(values["stop"], str) else tuple(values["stop"])
        return cls(**values)


_TYPES: dict[str, tuple[type, ...]] = {
    "decoder": (str,), "options": (dict,), "window": (int,), "steps": (int,), "rate": (float, int),
    "max_tokens": (int,), "canvas": (str,), "eos_fill": (bool,), "stop": (str, list, tuple),
}  # fmt: skip
"""Types of the defaults, as JSON has them."""


def _given(config: Any, name: str, default: Any) -> Any:
    """A field of a configuration; `default` where it has none, or None."""
    value = getattr(config, name, None)
    return default if value is None else value


@dataclass(frozen=True)
class Visibility:
    """Attention between positions.

    Attributes:
        block_size: None for all of the row ("full"); else a position attends to its own block of so many
            positions and to all earlier ones ("block", as BD3LM and SDAR).
        lead: in a block-causal model with a shift, whether the first position of a block, which the block
            before it predicts, is written first and alone (Fast-dLLM v2).
        causal_context: in a block-causal model, whether a position of a block without a mask attends to
            itself and to what stands before it alone, as in the autoregressive model that it came from; a
            block that is being written sees itself whole all the same.
    """

    block_size: int | None = None
    lead: bool = True
    causal_context: bool = False

    def __post_init__(self) -> None:
        """Check that they go together."""
        if self.block_size is not None and self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {self.block_size}")
        if self.causal_context and self.block_size is None:
            raise ConfigError("causal_context is for block-causal models: it needs a block_size")

    @classmethod
    def of_config(cls, config: Any) -> Visibility:
        """Read a model's configuration; what it does not say has the defaults above."""
        return cls(
            getattr(config, "block_size", None),
            bool(_given(config, "block_lead", True)),
            bool(_given(config, "causal_context", False)),
        )

    @property
    def name(self) -> str:
        """Either "full" or "block"."""
        return "full" if self.block_size is None else "block"

    @property
    def verifiable(self) -> bool:
        """True where a written token can be looked at by the model with all that stands behind it in view.

        A finished block with a causal context does not see what stands behind a token in it.
        """
        return not self.causal_context

    def __str__(self) -> str:
        """All of it in words, such as "block, blocks of 16, finished ones causal"."""
        size = "" if self.block_size is None else f", blocks of {self.block_size}"
        lead = "" if self.lead else ", first positions not written first"
        return self.name + size + lead + (", finished ones causal" if self.causal_context else "")


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model that decoding, training and evaluation rely on.

    Attributes:
        mask_token_id: id of the mask token.
        eos_token_id: the end token that is written behind an answer.
        end_token_ids: all tokens that end an answer, `eos_token_id` among them.
        pad_token_id: id of the padding, if there is one.
        positions: longest row, in tokens.
        shift: True when the state at i-1 predicts token i, so that a row cannot begin with a mask.
        visibility: which positions a position attends to.
        schedule: noise schedule that the model was trained with.
        defaults: the checkpoint's defaults of decoding.
    """

    mask_token_id: int
    eos_token_id: int
    end_token_ids: frozenset[int] = frozenset()
    pad_token_id: int | None = None
    positions: int = _UNLIMITED
    shift: bool = False
    visibility: Visibility = Visibility()
    schedule: NoiseSchedule = field(default_factory=LogLinear)
    defaults: DecodingDefaults = field(default_factory=DecodingDefaults)

    def __post_init__(self) -> None:
        """Count the end token among those that end an answer."""
        object.__setattr__(self, "end_token_ids", frozenset({*self.end_token_ids, self.eos_token_id}))

    def in_blocks_of(self, size: int | None) -> ModelSpec:
        """This model in smaller blocks than its own; itself for None.

        A block that has begun is a row whose masks stand at its end; so a model that was trained in blocks
        knows smaller ones too.

        Raises:
            ConfigError: for a model without blocks, and for more positions than its blocks have.
        """
        if size is None:
            return self
        check_whole("block_size", size)
        largest = self.visibility.block_size
        if largest is None:
            raise ConfigError("block_size is for models in blocks; in this one a position sees its whole row")
        if size > largest:
            raise ConfigError(f"block_size must be at most the model's own {largest}, got {size}")
        return replace(self, visibility=replace(self.visibility, block_size=int(size)))

    @property
    def leads(self) -> bool:
        """True when the first position of each block is written before the others of its block."""
        return self.shift and self.visibility.block_size is not None and self.visibility.lead

    @classmethod
    def of_config(cls, config: Any) -> ModelSpec:
        """Read a model's configuration; what it does not say has the defaults above."""
        return cls(
            mask_token_id=int(config.mask_token_id),
            eos_token_id=int(config.eos_token_id),
            end_token_ids=frozenset(_given(config, "end_token_ids", ())),
            pad_token_id=getattr(config, "pad_token_id", None),
            positions=int(_given(config, "max_positions", _UNLIMITED)),
            shift=bool(_given(config, "shift", False)),
            visibility=Visibility.of_config(config),
            schedule=schedule_named(**_given(config, "schedule", {})),
            defaults=DecodingDefaults.of(_given(config, "generation", {})),
        )

    @classmethod
    def of(cls, model: Any) -> ModelSpec:
        """The spec that a model carries, or else what its configuration says; a spec is its own.

        Raises:
            ConfigError: for what is no model.
        """
        if isinstance(model, ModelSpec):
            return model
        if not isinstance(model, Specified) and not hasattr(model, "config"):
            raise ConfigError(f"a model has a spec or a config, as that of load_model has; got {model!r:.80}")
        return model.spec if isinstance(model, Specified) else cls.of_config(model.config)


@runtime_checkable
class Specified(Protocol):
    """A model that carries its spec."""

    @property
    def spec(self) -> ModelSpec:
        """See `ModelSpec`."""
        ...
