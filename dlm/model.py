"""The denoiser: a Hugging Face decoder with all-to-all attention and a head that never predicts the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

import dlm.families  # noqa: F401 (registers the backbones that transformers does not have)
from dlm.attention import (
    ALL,
    CAUSAL,
    BesideClean,
    KeyValues,
    Layout,
    Packed,
    Partial,
    Sight,
    Whole,
    finished_blocks,
    with_layouts,
)
from dlm.attention_weights import AttentionWeights, Recorded, RowLayout
from dlm.config import MaskedDiffusionConfig
from dlm.device import to_device
from dlm.errors import ConfigError
from dlm.modes import share
from dlm.objective import token_log_probabilities
from dlm.prepacking import ONLY_COMPUTES, prepacked_layers
from dlm.quantization import is_quantized
from dlm.shadows import Shadowed, Shadows
from dlm.spec import ModelSpec, Visibility

IGNORE = -100
"""Target value of cells that are not predicted (the convention of PyTorch's cross entropy)."""


_ALIGNED = 64
"""Multiple of the vocabulary for which CUDA's matrix products are fast."""

_MANY_CELLS = 256
"""Cells from which on the product is assumed to cost more than a copy of the weights."""


def aligned_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [..., V], as `F.linear` with [V, D] and [V], computed with a vocabulary that is aligned.

    A mask token behind 49,152 tokens makes rows of logits that begin at odd addresses, for which CUDA falls
    back on kernels of older cards; so rows of zeros are put behind the weights, and left out of the result.
    """
    rest = -len(weight) % _ALIGNED
    if not rest:
        return F.linear(hidden, weight, bias)
    padded = F.linear(hidden, F.pad(weight, (0, 0, 0, rest)), F.pad(bias, (0, rest)))
    return padded[..., : len(weight)]


@dataclass
class MaskedDiffusionOutput(ModelOutput):  # type: ignore[misc]
    """Output of one forward pass; exactly one of the fields is set."""

    logits: torch.Tensor | None = None
    """[B, L, V], mask column -inf: when no targets were given."""
    token_logp: torch.Tensor | None = None
    """[N] or [N, K] float32 log-probabilities of the targets, by cells that have one in row-major order."""


class DenoisingHead(nn.Linear):
    """LM head whose logits are -inf for the mask, rows that the tokenizer does not know, and closed tokens.

    This is the zero-masking half of SUBS (MDLM, section 3.2): the clean row never holds a mask.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        mask_token_id: int,
        num_tokens: int,
        bias: bool = False,
        closed: Sequence[int] = (),
    ) -> None:
        super().__init__(width, vocab_size, bias=bias)
        self.mask_token_id, self.closed = mask_token_id, tuple(closed)
        self.num_tokens = num_tokens

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V]."""
        offsets = self.offsets(hidden)
        many = hidden.numel() >= _MANY_CELLS * hidden.shape[-1]
        if hidden.is_cuda and many and type(self.weight) is nn.Parameter:
            return aligned_linear(hidden, self.weight, offsets)
        return F.linear(hidden, self.weight, offsets)

    def offsets(self, like: torch.Tensor) -> torch.Tensor:
        """[V] what is added to the products, in the type and on the device of a tensor."""
        closed = torch.zeros(self.out_features, dtype=like.dtype, device=like.device)
        closed[self.num_tokens :] = float("-inf")
        for token in (self.mask_token_id, *self.closed):
            # A slice is filled; a single element would be copied, which waits.
            closed[token : token + 1] = float("-inf")
        return closed if self.bias is None else closed + self.bias


class MaskedDiffusionModel(PreTrainedModel):  # type: ignore[misc]
    """p_theta(x_0 | x_t) for every position at once; no time input.

    The wrapped decoder attends from every real token to every real token. Padding stands on the right
    and is excluded by `attention_mask`. The backbone is a stock transformers model, so its kernels
    (SDPA, flash-attn), gradient checkpointing and sharding plans apply unchanged.
    """

    config_class = MaskedDiffusionConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = [  # noqa: RUF012
        "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GPT2Block",
        "DiTLayer", "ModernBertEncoderLayer",
    ]  # fmt: skip

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        inner = config.backbone_config()
        inner._attn_implementation = with_layouts(self.config._attn_implementation)
        self.backbone = AutoModel.from_config(inner)
        self._tied_weights_keys = {"lm_head.weight": f"backbone.{_name_of_embedding(self.backbone)}.weight"}
        self.lm_head = DenoisingHead(
            config.hidden_size,
            config.vocab_size,
            int(config.mask_token_id or 0),
            config.num_tokens,
            config.head_bias,
            config.closed_token_ids or (),
        )
        self.mask_shift: nn.Module | None = None
        """[B, L] bool -> [B, L, D]: added to the embeddings of masks, while an adapter is trained."""
        self._ignore_tied_head()
        self.post_init()

    def _ignore_tied_head(self) -> None:
        """Leave a tied head out of what is saved: it is the embedding."""
        self._keys_to_ignore_on_save = ["lm_head.weight"] if self.config.tie_word_embeddings else None

    @property
    def spec(self) -> ModelSpec:
        """Properties of the model, for decoding and evaluation."""
        return ModelSpec.of_config(self.config)

    @property
    def sight(self) -> Sight:
        """The part of its row that a position attends to."""
        return Sight(block_size=self.config.block_size)

    @property
    def capabilities(self) -> frozenset[str]:
        """Beyond `hidden` and `logits`: packed rows, rows in part, recorded attention, shadows.

        A shadow asks for a token's probability given what stands behind it (`Visibility.verifiable`).
        """
        shadows = {"shadows"} if Visibility.of_config(self.config).verifiable else set()
        return frozenset({"packed", "partial", "attention", *shadows})

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """Choose the attention kernel of plain calls (transformers' name); decoding has its own layouts."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.backbone.config._attn_implementation = with_layouts(self.config._attn_implementation)

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers, in order."""
        layers: nn.ModuleList = getattr(self.backbone, "h" if hasattr(self.backbone, "h") else "layers")
        return layers

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write configuration and weights, readable by whoever the umask allows.

        Raises:
            ConfigError: for weights in 8 or 4 bits, and for prepacked ones.
        """
        if prepacked_layers(self):
            raise ConfigError(ONLY_COMPUTES)
        if is_quantized(self):
            raise ConfigError("weights in 8 or 4 bits are not written: load the model in float32 or bfloat16")
        self._ignore_tied_head()  # an adapter may have untied it
        super().save_pretrained(save_directory, *args, **kwargs)
        if Path(save_directory).is_dir():  # processes of a group that do not write may be here first
            share(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.backbone.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head

    def hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attention: Sequence[AttentionWeights] = (),
    ) -> torch.Tensor:
        """States that predict each position, the shift already applied.

        Args:
            input_ids: [B, L] int64, mask tokens where the row is unknown.
            attention_mask: [B, L] bool, False at padding; None when there is none.
            attention: records of attention weights, which the call fills.

        Returns:
            [B, L, D]; state i predicts token i.
        """
        if self.sight != ALL or attention:
            valid = None if attention_mask is None else to_device(attention_mask, self.device).bool()
            finished = self._finished(input_ids, attention_mask)
            layout = Whole(self.sight, valid, None if finished is None else to_device(finished, self.device))
            return self._hidden_in_layout(input_ids, self._recorded(layout, attention))
        states = self.backbone(
            inputs_embeds=self._embed(input_ids),
            attention_mask=None if attention_mask is None else to_device(attention_mask, self.device),
            is_causal=False,
            use_cache=False,
        ).last_hidden_state
        return _shifted(states) if self.config.shift else states

    def _finished(self, ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
        """[B, L] bool, positions of finished blocks in rows [B, L], where these have a causal context."""
        if not self.config.causal_context:
            return None
        rows, length = ids.shape
        masked = ids == self.config.mask_token_id
        masked = masked if valid is None else masked & valid.to(masked.device).bool()
        owner, place = (torch.arange(size, device=ids.device) for size in ids.shape)
        owner, place = owner.repeat_interleave(length), place.repeat(rows)
        blocks = finished_blocks(masked.flatten(), owner, place, self._block_size(), rows, length)
        return blocks.view(rows, length)

    def _finished_packed(
        self, ids: torch.Tensor, lengths: Sequence[int], place: torch.Tensor
    ) -> torch.Tensor | None:
        """[N] bool on the device, likewise of rows end to end; `place` [N] is a position's in its row."""
        if not self.config.causal_context:
            return None
        masked, owner = (ids == self.config.mask_token_id).cpu(), torch.arange(len(lengths))
        owner = owner.repeat_interleave(torch.tensor(lengths))
        size, longest = self._block_size(), max(lengths)
        return to_device(finished_blocks(masked, owner, place, size, len(lengths), longest), self.device)

    def _recorded(self, layout: RowLayout, attention: Sequence[AttentionWeights]) -> Layout:
        """The layout, with what it records."""
        return Recorded(layout, attention, len(self.layers), self.config.shift) if attention else layout

    def _hidden_in_layout(self, input_ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """See `hidden`."""
        states = self.backbone(
            inputs_embeds=self._embed(input_ids), use_cache=False, layout=layout
        ).last_hidden_state
        return _shifted(states) if self.config.shift else states

    def hidden_beside(
        self, noisy_ids: torch.Tensor, clean_ids: torch.Tensor, attention_mask: torch.Tensor, first: int = 0
    ) -> torch.Tensor:
        """States of a block-causal model for noise in all blocks at once, each behind its clean past.

        One pass over the noisy blocks and the clean row (BD3LM, arXiv 2503.09573, section 3.1): a state is
        that of `hidden` for the row whose earlier blocks are clean and whose own block is noisy. With a
        shift, the first position of a block is predicted by the clean block before it.

        Args:
            noisy_ids: [B, L] int64.
            clean_ids: [B, L] int64.
            attention_mask: [B, L] bool, False at padding.
            first: positions before this one need no states.

        Returns:
            [B, L, D]; zeros before the block that holds `first`.
        """
        size, length = self._block_size(), noisy_ids.shape[1]
        begin, past = first // size * size, (length - 1) // size * size
        ids = torch.cat([noisy_ids[:, begin:], clean_ids[:, :past]], dim=1)
        place = torch.arange(length, device=self.device)
        positions = torch.cat([place[begin:], place[:past]])
        valid = attention_mask.bool().to(self.device)
        valid = torch.cat([valid[:, begin:], valid[:, :past]], dim=1)
        states = self.backbone(
            inputs_embeds=self._embed(ids),
            position_ids=positions.expand(len(ids), -1),
            use_cache=False,
            layout=BesideClean.of(self.sight, positions, length - begin, valid, self.config.causal_context),
        ).last_hidden_state
        noisy, clean = states.split([length - begin, past], dim=1)
        noisy = F.pad(noisy, (0, 0, begin, 0))
        if not self.config.shift:
            return noisy
        ahead = F.pad(clean[:, size - 1 :: size], (0, 0, 1, 0))  # of the last position of each block
        leads = ahead.repeat_interleave(size, dim=1)[:, :length]
        return torch.where((place % size == 0)[:, None] & (place > 0)[:, None], leads, _shifted(noisy))

    def _block_size(self) -> int:
        """Positions per block, of a block-causal model."""
        if self.config.block_size is None:
            raise ConfigError("every position of this model sees its whole row: there are no clean blocks")
        return int(self.config.block_size)

    def packed_hidden(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        attention: Sequence[AttentionWeights] = (),
        shadows: Sequence[Shadows] = (),
    ) -> torch.Tensor:
        """`hidden` of rows of different lengths, packed end to end so that nothing is spent on padding.

        Args:
            input_ids: [N] int64, the rows one after the other, best on the host.
            lengths: of the rows; their sum is N.
            attention: see `hidden`.
            shadows: of positions of these rows; the call gives them their states.

        Returns:
            [N, D], equal to `hidden` of each row alone up to the order of floating-point sums.
        """
        if shadows:
            return self._shadowed_hidden(input_ids, lengths, attention, shadows)
        position, size = torch.arange(len(input_ids)), torch.tensor(lengths)
        place = position - (size.cumsum(0) - size).repeat_interleave(size)
        finished = self._finished_packed(input_ids, lengths, place)
        states = self.backbone(
            inputs_embeds=self._embed(input_ids[None]),
            position_ids=to_device(place[None], self.device),
            use_cache=False,
            layout=self._recorded(Packed(lengths, self.sight, finished=finished), attention),
        ).last_hidden_state[0]
        if self.config.shift:
            states = states[to_device(torch.where(place > 0, position - 1, position), states.device)]
        return states  # type: ignore[no-any-return]

    def _shadowed_hidden(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        attention: Sequence[AttentionWeights],
        shadows: Sequence[Shadows],
    ) -> torch.Tensor:
        """See `packed_hidden`."""
        shift = bool(self.config.shift)
        rows = Shadowed.of(input_ids, lengths, shadows, self.config.mask_token_id, shift, self.device)
        layout = Packed(rows.lengths, self.sight, rows.layouts)
        states = self.backbone(
            inputs_embeds=self._embed(rows.ids[None]),
            position_ids=to_device(rows.place[None], self.device),
            use_cache=False,
            layout=self._recorded(layout, attention),
        ).last_hidden_state[0]
        for shadow, read in zip(shadows, rows.read, strict=True):
            shadow.states = states[to_device(read, states.device)]
        real = rows.real
        if shift:
            real = torch.where(rows.place[real] > 0, real - 1, real)
        return states[to_device(real, states.device)]  # type: ignore[no-any-return]

    def new_memory(self) -> KeyValues:
        """Room for the keys and values of `partial_hidden`."""
        return KeyValues()

    def partial_hidden(
        self,
        input_ids: torch.Tensor,
        active: torch.Tensor,
        valid: torch.Tensor,
        memory: KeyValues,
        rows: torch.Tensor,
        attention: Sequence[AttentionWeights] = (),
        guests: int = 0,
    ) -> torch.Tensor:
        """States of some positions, which attend to kept keys and values at all others.

        Args:
            input_ids: [B, L] int64; like the others best on the host, where it is decided what to compute.
            active: [B, L] bool, the positions to compute; in a row's first call all of them.
            valid: [B, L] bool, False at padding.
            memory: keys and values of earlier calls, written to.
            rows: [B] int64, the rows' numbers in the memory.
            attention: see `hidden`; the chosen positions are active ones.
            guests: how many rows, the last ones, are other versions of a row of the memory: they attend to
                what is kept of it, this call's included, but for their own active positions, and nothing of
                theirs is kept.

        Returns:
            [N, D] of the active positions in row-major order. With all positions active, `hidden`; otherwise
            an approximation: the kept keys and values were computed when the rows looked different. It is
            none where those of a block-causal model are of finished blocks.
        """
        computed = active.clone()
        if self.config.shift:
            computed[:, :-1] |= active[:, 1:]
        count = computed.sum(1, keepdim=True)
        order = computed.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        last = order.gather(1, count - 1)
        place = torch.arange(order.shape[1], device=order.device)
        positions = torch.where(place < count, order, last)
        finished = self._finished(input_ids, valid)
        layout = Partial.of(memory, rows, positions, valid, self.device, self.sight, finished, guests)
        computed = self.backbone(
            inputs_embeds=self._embed(input_ids.gather(1, positions)),
            position_ids=layout.positions,
            use_cache=False,
            layout=self._recorded(layout, attention),
        ).last_hidden_state
        states = computed.new_zeros(*input_ids.shape, computed.shape[-1])
        place = layout.positions.to(states.device)
        states[torch.arange(len(positions), device=states.device)[:, None], place] = computed
        row, position = (to_device(x, states.device) for x in active.nonzero().unbind(1))
        return (_shifted(states) if self.config.shift else states)[row, position]

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        input_ids = to_device(input_ids, self.device)
        embeds = self.get_input_embeddings()(input_ids)
        if self.mask_shift is not None:
            embeds = embeds + self.mask_shift(input_ids == self.config.mask_token_id)
        return embeds  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V]; -inf at the mask token and at ids that the tokenizer does not know."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        clean_ids: torch.Tensor | None = None,
        causal: bool = False,
    ) -> MaskedDiffusionOutput:
        """Logits everywhere, or the log-probabilities of given targets.

        Args:
            input_ids: [B, L] int64, noisy rows x_t.
            attention_mask: [B, L] bool, False at padding.
            targets: [B, L] int64 clean tokens at the cells to predict, -100 elsewhere; or [B, L, K], K
                candidates for every cell. Only cells with a target pass through the LM head, and once.
            clean_ids: [B, L] int64, for block-causal models: the rows without noise, of which each block sees
                the earlier ones (see `hidden_beside`).
            causal: attend to earlier positions alone, as an autoregressive model.
        """
        if targets is None:
            hidden = self._hidden_for(input_ids, attention_mask, clean_ids, None, causal)
            return MaskedDiffusionOutput(logits=self.logits(hidden))
        cells = targets != IGNORE if targets.dim() == 2 else (targets != IGNORE).any(-1)
        place = cells.flatten().nonzero()[:, 0]  # before the layers, for which the host would wait here
        hidden = self._hidden_for(input_ids, attention_mask, clean_ids, cells, causal)
        states, wanted = hidden.flatten(0, 1)[place], targets.flatten(0, 1)[place]
        return MaskedDiffusionOutput(token_logp=token_log_probabilities(states, self.lm_head, wanted))

    def _hidden_for(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        clean_ids: torch.Tensor | None,
        cells: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """The states that `forward` needs at `cells` [B, L] (None for all)."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        if causal:
            return self._hidden_in_layout(input_ids, Whole(CAUSAL, valid.bool().to(self.device)))
        if clean_ids is None:
            return self.hidden(input_ids, attention_mask)
        first = 0 if cells is None else int(cells.any(0).int().argmax())
        return self.hidden_beside(input_ids, clean_ids, valid, first)


def _name_of_embedding(backbone: nn.Module) -> str:
    """Name of the token embedding among the modules of a backbone: the first of its tables."""
    names: list[str] = [name for name, module in backbone.named_modules() if isinstance(module, nn.Embedding)]
    return names[0]


def _shifted(states: torch.Tensor) -> torch.Tensor:
    """[B, L, D], state i becoming that of i-1; the first has none before it and stays."""
    return torch.cat([states[:, :1], states[:, :-1]], dim=1)


AutoConfig.register(MaskedDiffusionConfig.model_type, MaskedDiffusionConfig, exist_ok=True)
AutoModel.register(MaskedDiffusionConfig, MaskedDiffusionModel, exist_ok=True)
