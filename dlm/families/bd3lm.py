"""BD3LM (arXiv 2503.09573): MDLM's transformer, block-causal."""

from __future__ import annotations

from typing import Any, ClassVar

from dlm.families.fields import Public, require, whole
from dlm.families.mdlm import MDLM


class BD3LM(MDLM):
    """BD3LM trained on OpenWebText in blocks of 4, 8 or 16."""

    name = "bd3lm"
    ids: ClassVar[tuple[str, ...]] = tuple(
        f"kuleshov-group/bd3lm-owt-block_size{size}" for size in (4, 8, 16)
    )
    model_types = ("bd3lm",)
    derived = r"rotary_emb\.inv_freq$|^sampling_eps_(min|max)$"
    generation = {  # noqa: RUF012
        "decoder": "categorical",
        "options": {"top_p": 0.9},
        "rate": 1,
        "max_tokens": 1024,
        "eos_fill": False,
    }

    def backbone(self, public: Public) -> dict[str, Any]:
        """A DiT."""
        require(public, {"causal": (False,)})
        return super().backbone(public)

    def extra(self, public: Public, path: str) -> dict[str, Any]:
        """A head with a bias, and blocks; see `Family`."""
        size = whole(public, "block_size")
        blocks = public.get("cross_attn", True) and size < whole(public, "model_length")
        return {**super().extra(public, path), "block_size": size if blocks else None}
