"""The transformer of MDLM and BD3LM: a DiT (arXiv 2212.09748) over tokens, with rotary positions and no time.

Shifts, scales and gates of its layers (adaLN) are functions of the time. These models are always shown time
0, so they are constants; the weights that make them are kept, and trained.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from dlm.errors import ConfigError

FREQUENCIES = 256
"""Width of the embedding of a time."""


class DiTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a `DiT`.

    Attributes:
        cond_dim: width of what adaLN is a function of.
        adaln: whether layers have shifts, scales and gates.
    """

    model_type = "ddit"
    vocab_size: int = 50258
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    mlp_ratio: int = 4
    cond_dim: int = 128
    adaln: bool = True
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    keys_to_ignore_at_inference: ClassVar[list[str]] = []

    def __post_init__(self, **kwargs: Any) -> None:
        """Check that heads share the width, in pairs of dimensions for rotary positions."""
        width, heads = self.hidden_size, self.num_attention_heads
        if heads < 1 or width % (2 * heads):
            raise ConfigError(f"{heads} heads of an even size cannot share a width of {width}")
        super().__post_init__(**kwargs)


class TimeEmbedding(nn.Module):
    """Embedding of time 0: cosines of 0 and sines of 0, through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self) -> torch.Tensor:
        """[C]."""
        one = next(self.mlp.parameters()).new_ones(FREQUENCIES // 2)
        return self.mlp(torch.cat([one, torch.zeros_like(one)]))  # type: ignore[no-any-return]


def modulated(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    """X (1 + scale) + shift; x itself where there are none."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


class DiTAttention(nn.Module):
    """Attention of all positions to all, as one function of transformers' interface."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: DiTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads

    def forward(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, L, 3 D] -> [B, L, D]."""
        batch, length, width = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, L, D/H] each
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        scale = (width // 3 // self.heads) ** -0.5
        out, _ = attend(
            self,
            turned(q, *rotary),
            turned(k, *rotary),
            v,
            attention_mask,
            scaling=scale,
            dropout=0.0,
            **kwargs,
        )
        return out.reshape(batch, length, -1)  # type: ignore[no-any-return]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: [B, H, L, d] with [B, 1, L, d/2] cosines and sines, pairs (i, i + d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class DiTLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and feed-forward, each with adaLN."""

    def __init__(self, config: DiTConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention = DiTAttention(config, layer_idx)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * width) if config.adaln else None

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        parts: Any = (
            [None] * 6 if self.adaLN_modulation is None else self.adaLN_modulation(condition).chunk(6)
        )
        qkv = self.attn_qkv(modulated(self.norm1(x), parts[0], parts[1]))
        y = self.attn_out(self.attention(qkv, rotary, attention_mask, **kwargs))
        x = x + (y if parts[2] is None else parts[2] * y)
        y = self.mlp(modulated(self.norm2(x), parts[3], parts[4]))
        return x + (y if parts[5] is None else parts[5] * y)  # type: ignore[no-any-return]


class DiT(PreTrainedModel):  # type: ignore[misc]
    """The backbone, up to the states that the head reads."""

    config_class = DiTConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DiTLayer"]  # noqa: RUF012

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.sigma_map = TimeEmbedding(config.cond_dim) if config.adaln else None
        self.layers = nn.ModuleList(DiTLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * width) if config.adaln else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """States [B, L, D].

        Args:
            inputs_embeds: [B, L, D].
            attention_mask: [B, L] bool, False at padding; or a mask of four dimensions, as it is.
            position_ids: [B, L] or [1, L] int64; counted from 0 by default.
            use_cache: has no meaning here.
            **kwargs: for the attention function, such as `layout`.
        """
        del use_cache
        if "layout" not in kwargs:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
            )
        condition = None if self.sigma_map is None else F.silu(self.sigma_map())
        rotary = self._rotary(inputs_embeds, position_ids)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, condition, rotary, attention_mask, **kwargs)
        shift, scale = (
            (None, None) if self.adaLN_modulation is None else self.adaLN_modulation(condition).chunk(2)
        )
        return BaseModelOutput(last_hidden_state=modulated(self.norm(x), shift, scale))

    def _rotary(
        self, x: torch.Tensor, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [B, 1, L, d/2] each."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        speed = self.config.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = position_ids[:, None, :, None].float() * speed
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
AutoModel.register(DiTConfig, DiT, exist_ok=True)
