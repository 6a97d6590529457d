"""Public checkpoints that can be read: one file for each family, and the list of them.

A file says how the family is recognised, what its config.json means, where its tensors go, and how its
authors decode. Nothing else in the toolkit knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from dlm.errors import unknown_name
from dlm.families.a2d import A2D, A2DBlocks
from dlm.families.base import Family
from dlm.families.bd3lm import BD3LM
from dlm.families.block import SDAR, FastDLLM
from dlm.families.diffullama import DiffuGPT, DiffuLLaMA
from dlm.families.dream import DiffuCoder, Dream, DreamOn
from dlm.families.llada import LLaDA
from dlm.families.llada_moe import LLaDAMoE
from dlm.families.mdlm import MDLM
from dlm.families.modernbert import BertChat

PUBLIC: tuple[Family, ...] = (
    LLaDAMoE(), LLaDA(), DreamOn(), DiffuCoder(), Dream(), MDLM(), A2DBlocks(), A2D(), BertChat(), DiffuGPT(),
    DiffuLLaMA(), SDAR(), FastDLLM(), BD3LM(),
)  # fmt: skip
"""The families, in the order in which they are tried."""


def family_of(public: Mapping[str, Any], path: str, names: Callable[[], Collection[str]]) -> Family | None:
    """The family of a public checkpoint; None for none of them. Arguments as `Family.detect` has."""
    return next((family for family in PUBLIC if family.detect(public, path, names)), None)


def family_named(name: str) -> Family:
    """The family with this name.

    Raises:
        ConfigError: when there is none, naming those that there are.
    """
    named = {family.name: family for family in PUBLIC}
    if name not in named:
        raise unknown_name("family of public checkpoints", name, named)
    return named[name]
