"""The names of the models that come along, whose folders `dlm.pretrained.names` finds."""

from __future__ import annotations

BASE_NAME = "smollm2-135m-instruct"
"""The base of the default model, fetched at first use."""

ADAPTERS = {"default": "r2ft", "default-sft": "sft", "full": "full_r2ft", "full-sft": "full_sft"}
"""Adapters that come with the package, and their folders in it: in blocks after R2FT, and before; then those
whose positions see the whole row."""

NAMES = (*ADAPTERS, BASE_NAME)
