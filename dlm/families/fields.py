"""Fields of a public config.json: read, checked, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dlm.errors import CheckpointError

Public = Mapping[str, Any]
"""A public config.json."""

ROTATIONS = ("default", "linear", "yarn", "llama3")
"""Types of rotary positions that are computed; others (dynamic, longrope) depend on the length of the row."""

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "max_position_embeddings",
    "embedding_size", "d_model", "mlp_hidden_size", "n_layers", "n_heads", "n_kv_heads",
    "max_sequence_length",
    "hidden_dim", "n_blocks", "cond_dim", "model_length",
    "n_embd", "n_inner", "n_layer", "n_head", "n_positions",
    "num_experts", "num_experts_per_tok", "expert_intermediate_size", "dense_intermediate_size",
    "local_attention", "global_attn_every_n_layers", "block_size", "block_length", "bd_size",
)  # fmt: skip

_AMOUNTS = (
    "rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "mlp_ratio", "rope_theta",
    "global_rope_theta", "local_rope_theta",
)  # fmt: skip


def whole(public: Public, name: str, least: int = 1, default: int | None = None) -> int:
    """A field that is a whole number; `default` where it is missing or null.

    Raises:
        CheckpointError: when it is missing without a default, of another type, or less than `least`.
    """
    value = default if public.get(name) is None else public[name]
    if value is None:
        raise CheckpointError(f"config.json does not say {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"config.json says {name} = {value!r}; it is a whole number from {least}")
    return value


def check_numbers(public: Public) -> None:
    """Refuse sizes that are no whole numbers from 1, and amounts that are no positive numbers.

    Raises:
        CheckpointError: naming the field and its value.
    """
    for name in _SIZES:
        if public.get(name) is not None:
            whole(public, name)
    for name in _AMOUNTS:
        value = public.get(name)
        if value is not None and (type(value) not in (int, float) or not value > 0):
            raise CheckpointError(f"config.json says {name} = {value!r}; it is a positive number")


def require(public: Public, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a configuration that asks for what the backbone does not do.

    Args:
        public: the configuration; what it does not say is allowed.
        allowed: setting -> values that are known.

    Raises:
        CheckpointError: naming the setting, its value and the values that are known.
    """
    for name, values in allowed.items():
        if name in public and public[name] not in values:
            raise CheckpointError(
                f"config.json says {name} = {public[name]!r}; known: {', '.join(map(repr, values))}"
            )


def rotary(
    public: Public, rotations: tuple[str, ...] = ROTATIONS, theta: float | None = 10000.0
) -> dict[str, Any]:
    """Rotary positions as transformers' `rope_parameters`, from either spelling.

    Older files have `rope_scaling` and `rope_theta`, those of transformers 5 `rope_parameters` with both in
    it; `rope_scaling` counts where both are given, as in transformers, and a base within before `rope_theta`.

    Args:
        public: the configuration.
        rotations: types that the published model computes.
        theta: base where the configuration has none; None where it must have one.

    Raises:
        CheckpointError: for another type, for rotations of a part of a head, and without a base.
    """
    scaling = public.get("rope_scaling") or public.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json says rope_parameters = {scaling!r}; it is a dictionary")
    scaling = {
        name: value for name, value in scaling.get("full_attention", scaling).items() if value is not None
    }
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    require({"rope_type": kind}, {"rope_type": rotations})
    require({**public, **scaling}, {"partial_rotary_factor": (1, None)})
    base = scaling.get("rope_theta", public.get("rope_theta") or theta)
    if base is None:
        raise CheckpointError("config.json does not say rope_theta")
    check_numbers({"rope_theta": base})
    scaling.pop("partial_rotary_factor", None)
    return {**scaling, "rope_type": kind, "rope_theta": float(base)}


def layers_only(public: Public, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings under other names: public -> ours, those that are there."""
    return {ours: public[name] for name, ours in names.items() if public.get(name) is not None}


def stock_settings(public: Public) -> dict[str, Any]:
    """The settings of a configuration that is transformers' own, but for its name and what is of no layer."""
    dropped = ("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version")
    none = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return {name: x for name, x in public.items() if name not in (*dropped, *none) and x is not None}


def stock_decoder(public: Public, model_type: str) -> dict[str, Any]:
    """The settings of transformers' Llama, Qwen2 or Qwen3 in a public configuration of its own name."""
    spelled = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    settings = {name: x for name, x in stock_settings(public).items() if name not in spelled}
    return {
        "tie_word_embeddings": False,
        **settings,
        **key_value_heads(public),
        "rope_parameters": rotary(public),
        "model_type": model_type,
    }


def key_value_heads(public: Public) -> dict[str, int]:
    """`num_key_value_heads` where it is null, which means as many as heads; nothing where it is a number."""
    null = "num_key_value_heads" in public and public["num_key_value_heads"] is None
    return {"num_key_value_heads": whole(public, "num_attention_heads")} if null else {}


def is_named(public: Public, path: str, name: str) -> bool:
    """True where the place of a model, or the place that its configuration remembers, has the name in it."""
    return any(name in place for place in places(public, path))


def number_named(public: Public, path: str, pattern: str) -> int | None:
    """The number that a pattern's group gives in the places of a model; None where it is in none."""
    matches = (re.search(pattern, place) for place in places(public, path))
    return next((int(match.group(1)) for match in matches if match), None)


def places(public: Public, path: str) -> tuple[str, str]:
    """Name of a model's folder or repository, and the place that its configuration remembers; lower-case."""
    cached = re.search(r"models--(?:[^/]*--)?([^/]+)/snapshots/[^/]+$", path.rstrip("/"))
    name = cached.group(1) if cached else path.rstrip("/").split("/")[-1]
    return name.lower(), str(public.get("_name_or_path") or "").rstrip("/").lower()
