"""Attention for decoding: rows packed end to end, and rows of which only some positions are computed.

Both go through one attention function of transformers' interface (`attend`), which a model carries from the
start; training and plain forward passes have no layout and take the implementation that was chosen.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial, reduce
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from dlm.device import Movable, to_device
from dlm.shadows import RowShadows

PREFIX = "dlm_"


class Layout(Protocol):
    """The attention pattern of one forward pass."""

    @property
    def sight(self) -> Sight:
        """Of the model, apart from what single layers add to it."""
        ...

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """Queries [B, H, A, D] and this pass's keys and values [B, G, A, D] -> [B, A, H, D].

        `sight` is that of the layer; by default that of the layout.
        """
        ...


@dataclass(frozen=True)
class Sight:
    """Positions of its row that a position attends to; by default all.

    Attributes:
        reach: positions to either side (layers with local attention).
        block_size: none beyond its own block of so many positions (block-causal models).
    """

    reach: int | None = None
    block_size: int | None = None

    def mask(
        self, queries: torch.Tensor, keys: torch.Tensor, finished: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """[..., A] and [W] positions -> [..., A, W] bool, True where one sees the other; None for all.

        Queries that are `finished` [..., A] bool see nothing behind themselves either.
        """
        masks = []
        if self.reach is not None:
            masks.append((queries[..., None] - keys).abs() <= self.reach)
        if self.block_size is not None:
            masks.append(keys // self.block_size <= queries[..., None] // self.block_size)
        if finished is not None:
            masks.append(~finished[..., None] | (keys <= queries[..., None]))
        return reduce(torch.logical_and, masks) if masks else None


ALL = Sight()
CAUSAL = Sight(block_size=1)
"""A block of one: everything before it and itself."""


@dataclass(frozen=True)
class RowKeys:
    """Queries and keys of a layer, row by row."""

    query: torch.Tensor
    """[B, H, A, D]."""
    key: torch.Tensor
    """[B, G, W, D]."""
    place: torch.Tensor
    """[B, A] int64, position of each query in its row; -1 for padding and repetitions."""
    valid: torch.Tensor
    """[B, W] bool, False at padding."""
    finished: torch.Tensor | None = None
    """[B, A] bool, queries that see nothing behind themselves; None for none."""


def finished_blocks(
    masked: torch.Tensor, owner: torch.Tensor, place: torch.Tensor, block_size: int, rows: int, longest: int
) -> torch.Tensor:
    """Mark the positions whose block holds no mask.

    Args:
        masked: [N] bool, True at masks.
        owner: [N] int64, number of the row of each.
        place: [N] int64, position in its row.
        block_size: positions per block.
        rows: how many rows there are.
        longest: positions of the longest.

    Returns:
        [N] bool.
    """
    blocks = -(-longest // block_size)
    block = owner * blocks + place // block_size
    masks = torch.zeros(rows * blocks, dtype=torch.int64, device=masked.device)
    return (masks.index_add_(0, block, masked.long()) == 0)[block]


def with_layouts(implementation: str | None) -> str:
    """Name under which transformers finds an attention implementation that also takes a `layout`.

    A call with a layout attends as it says; a call without one is the implementation itself. Which of the two
    is decided per call, so that several threads may share a model.
    """
    implementation_name = (implementation or "sdpa").removeprefix(PREFIX)
    name = PREFIX + implementation_name
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, partial(attend, usual=implementation_name))
        if implementation_name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation_name])
    return name


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    usual: str,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention in a layout, or without one as usual; see `transformers.AttentionInterface`."""
    if layout is not None:
        sliding = kwargs.get("sliding_window")  # as flash-attn counts: the position itself among them
        sight = replace(layout.sight, reach=None if sliding is None else sliding - 1)
        return layout.attend(module.layer_idx, query, key, value, scaling, sight), None
    if usual.startswith("flash"):
        return _flash(module, query, key, value, attention_mask, scaling, usual, **kwargs), None
    eager = sys.modules[type(module).__module__].eager_attention_forward  # every family has its own
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(usual, eager)
    return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]


def _flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    usual: str,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """flash-attn through transformers, which would look for its name in the module's configuration."""
    del kwargs
    heads_last = [x.transpose(1, 2) for x in (query, key, value)]
    causal = module.is_causal if is_causal is None else is_causal
    return _flash_attention_forward(  # type: ignore[no-any-return]
        *heads_last, attention_mask, query_length=query.shape[2], is_causal=causal, dropout=dropout,
        softmax_scale=scaling, attn_implementation=usual,
    )  # fmt: skip


@cache
def torch_varlen() -> frozenset[str] | None:
    """Arguments of torch's kernel for rows of different lengths, which changed; None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return frozenset(inspect.signature(varlen_attn).parameters)


@dataclass
class Packed(Movable):
    """Rows end to end, [1, N]; every token attends to all tokens of its row.

    Three backends, one choice: flash-attn's kernel for rows of different lengths where it is installed, else
    that of torch where it has one (both CUDA, half precision), else one call of SDPA per row, which wastes
    nothing either.

    Attributes:
        lengths: of the rows, shadows included.
        sight: of the model.
        shadows: by number of the row, for rows with shadows behind them; these are masked, in calls of SDPA.
        finished: [N] bool, positions that see nothing behind themselves; None for none.
    """

    lengths: Sequence[int]
    sight: Sight = ALL
    shadows: Mapping[int, RowShadows] = field(default_factory=dict)
    finished: torch.Tensor | None = None
    _copied: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def bounds(self) -> list[int]:
        """Beginnings of the rows, and the end of the last."""
        return [0, *itertools.accumulate(self.lengths)]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """See `Layout`; here B = 1 and A = N."""
        del layer
        query, key, value = _as_autocast(query, key, value)
        sight = sight or self.sight
        half = query.dtype in (torch.float16, torch.bfloat16) and sight == ALL and not self.shadows
        if query.is_cuda and half and (is_flash_attn_2_available() or torch_varlen()):
            flat = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, H, D]
            return self._varlen(flat[0], flat[1], flat[2], scale)[None]
        rows = []
        for row, (a, b) in enumerate(itertools.pairwise(self.bounds)):
            shadows = self.shadows.get(row)
            place = torch.arange(b - a, device=query.device) if shadows is None else shadows.place
            mask = sight.mask(place, place, None if self.finished is None else self.finished[a:b])
            if shadows is not None:
                mask = shadows.visible if mask is None else mask & shadows.visible
            rows.append(_sdpa(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], mask, scale))
        return torch.cat(rows, dim=2).transpose(1, 2)

    def row_keys(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> RowKeys:
        """Queries and keys of each row, padded on the right, without its shadows."""
        del layer
        size = torch.tensor(
            [self.shadows[i].length if i in self.shadows else n for i, n in enumerate(self.lengths)]
        )[:, None]
        place = torch.arange(int(size.max())).expand(len(size), -1)
        index = to_device(
            torch.tensor(self.bounds[:-1])[:, None] + torch.minimum(place, size - 1), query.device
        )
        place = to_device(torch.where(place < size, place, -1), query.device)
        query, key = (x[0][:, index].transpose(0, 1) for x in (query, key))
        return RowKeys(query, key, place, place >= 0, None if self.finished is None else self.finished[index])

    def on_device(self, device: torch.device) -> torch.Tensor:
        """The bounds as kernels want them, int32; copied once for all layers of a device."""
        if device not in self._copied:
            self._copied[device] = to_device(torch.tensor(self.bounds, dtype=torch.int32), device)
        return self._copied[device]

    def _varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """[N, H, D], with [N, G, D] keys and values, in one kernel."""
        bounds = self.on_device(query.device)
        longest = max(self.lengths)
        if is_flash_attn_2_available():
            from flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func(  # type: ignore[no-any-return]
                query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=False
            )
        from torch.nn.attention.varlen import varlen_attn

        settings: dict[str, Any] = {"enable_gqa": True, "scale": scale}
        supported = torch_varlen() or frozenset()
        if "enable_gqa" not in supported:  # an older one: every head needs keys and values of its own
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if "scale" not in supported and scale is not None:  # it divides by the root of the width
            query = query * (scale * query.shape[-1] ** 0.5)
        settings = {name: value for name, value in settings.items() if name in supported}
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, **settings)  # type: ignore[return-value]


@dataclass(frozen=True)
class Whole(Movable):
    """Rows [B, L] side by side, for models whose positions do not see all of their row.

    Attributes:
        sight: of the model.
        valid: [B, L] bool, False at padding; None where there is none.
        finished: [B, L] bool, positions that see nothing behind themselves; None for none.
    """

    sight: Sight
    valid: torch.Tensor | None = None
    finished: torch.Tensor | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """See `Layout`; here A = L."""
        del layer
        place = torch.arange(query.shape[2], device=query.device)
        mask = (sight or self.sight).mask(place, place, self.finished)
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        if self.valid is not None:  # padding sees itself, so that no sum is empty
            visible = self.valid[:, None, None, :] | torch.eye(
                len(place), dtype=torch.bool, device=query.device
            )
            mask = visible if mask is None else mask & visible
        return _sdpa(query, key, value, mask, scale).transpose(1, 2)

    def row_keys(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> RowKeys:
        """Queries and keys of each row, as they are."""
        del layer
        place = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
        valid = torch.ones_like(place, dtype=torch.bool) if self.valid is None else self.valid
        return RowKeys(query, key, torch.where(valid, place, -1), valid, self.finished)


@dataclass(frozen=True)
class BesideClean(Movable):
    """Noisy rows and the same rows clean, [B, N + C]: block-causal training (BD3LM, arXiv 2503.09573).

    A noisy position attends to the noisy ones of its own block and to the clean ones of earlier blocks, as a
    block that is being written sees itself and what is finished. A clean position attends to the clean ones
    of its own and earlier blocks, or with `causal` to those up to itself.

    Attributes:
        sight: of the model, with a block size.
        positions: [N + C] int64, each one's place in its row.
        mask: [B, 1, N + C, N + C] bool, True where one attends to the other; the same for all layers.
    """

    sight: Sight
    positions: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(
        cls, sight: Sight, positions: torch.Tensor, noisy: int, valid: torch.Tensor, causal: bool = False
    ) -> BesideClean:
        """The layout of rows whose first positions are noisy.

        Args:
            sight: of the model, with a block size.
            positions: [N + C] int64, each one's place in its row.
            noisy: how many of them are noisy, N.
            valid: [B, N + C] bool, False at padding.
            causal: True where finished blocks see nothing behind themselves.
        """
        assert sight.block_size is not None
        block = positions // sight.block_size
        clean = torch.arange(len(block), device=block.device) >= noisy
        query, key = block[:, None], block[None, :]
        place = positions if causal else block
        past = place[None, :] <= place[:, None]
        visible = torch.where(clean, torch.where(clean[:, None], past, key < query), key == query)
        visible &= clean | ~clean[:, None]  # nothing clean attends to anything noisy
        alone = torch.eye(len(block), dtype=torch.bool, device=block.device)  # so that no sum is empty
        return cls(sight, positions, (visible & valid[:, None, :] | alone)[:, None])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """See `Layout`; here A = N + C."""
        del layer
        mask = self.mask
        if sight is not None and sight.reach is not None:
            mask = mask & ((self.positions[:, None] - self.positions).abs() <= sight.reach)
        return _sdpa(query, key, value, mask, scale).transpose(1, 2)


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the type of autocast, as SDPA would take them; other kernels are not known to it."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """[B, H, A, D] with keys and values [B, G, W, D]; the mask is True where one attends to the other."""
    grouped = mask is None or query.device.type == "cpu"
    if not grouped:  # on CUDA, masked attention has fast kernels only without groups
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


@dataclass
class KeyValues:
    """Keys and values of all layers, for rows that are computed piece by piece.

    Attributes:
        keys: for each layer [B, W, G, D]; they grow as they are written to.
        values: likewise.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, rows: torch.Tensor) -> KeyValues:
        """Keys and values of some rows [b]; rows that were never written are left out."""
        indices = {i: to_device(rows[rows < len(x)], x.device) for i, x in self.keys.items()}
        return KeyValues(
            {i: x[indices[i]] for i, x in self.keys.items()},
            {i: x[indices[i]] for i, x in self.values.items()},
        )

    def update(
        self,
        layer: int,
        rows: torch.Tensor,
        positions: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        room: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [b, A, G, D] at `positions` [b, A] of `rows` [b]; gives all [B, W, G, D].

        `room` is how many rows and positions there must be.
        """
        for buffers, new in ((self.keys, key), (self.values, value)):
            buffers[layer] = _roomy(buffers.get(layer), *room, new)
            buffers[layer][rows[:, None], positions] = new
        return self.keys[layer], self.values[layer]


def _roomy(buffer: torch.Tensor | None, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The buffer [B, W, G, D], with room for so many rows and positions."""
    if buffer is not None and buffer.shape[0] >= rows and buffer.shape[1] >= width:
        return buffer
    old = (0, 0) if buffer is None else buffer.shape[:2]
    size = max(rows, old[0]), max(-(-width // 64) * 64, old[1])
    out = like.new_zeros(*size, *like.shape[2:])
    if buffer is not None:
        out[: old[0], : old[1]] = buffer
    return out


@dataclass
class Partial(Movable):
    """Some positions of each row, which attend to the kept keys and values of all of it.

    Attributes:
        memory: keys and values; those of this pass are written to it first.
        rows: [b] int64, the rows' numbers in the memory.
        positions: [b, A] int64; a position may stand there twice, with the same token.
        mask: [b, 1, 1, W] bool, positions that a row has; None where every row has all.
        room: rows and positions that the memory needs.
        sight: of the model.
        finished: [b, A] bool, positions that see nothing behind themselves; None for none.
        guests: how many rows, the last ones, are guests: they see what their row of the memory has kept, but
            for their own positions, and leave nothing there.
    """

    memory: KeyValues
    rows: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    room: tuple[int, int]
    sight: Sight = ALL
    finished: torch.Tensor | None = None
    guests: int = 0
    _masks: dict[Sight, tuple[torch.Tensor | None, list[tuple[int, int]] | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(
        cls,
        memory: KeyValues,
        rows: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        device: torch.device,
        sight: Sight = ALL,
        finished: torch.Tensor | None = None,
        guests: int = 0,
    ) -> Partial:
        """The layout on a device, from tensors that are best on the host.

        `valid` is [b, W] bool, and so is `finished`: for all positions, not only those of this pass.
        """
        mask = None if bool(valid.all()) else to_device(valid[:, None, None], device)
        room = int(rows.max()) + 1, valid.shape[1]
        finished_here = None if finished is None else to_device(finished.gather(1, positions), device)
        rows, positions = (to_device(x, device) for x in (rows, positions))
        return cls(memory, rows, positions, mask, room, sight, finished_here, guests)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sight: Sight | None = None,
    ) -> torch.Tensor:
        """See `Layout`."""
        keys, values = self._kept(layer, key.transpose(1, 2), value.transpose(1, 2))
        mask, sizes = self._visible(sight or self.sight)
        if mask is None or sizes is None:
            return _sdpa(query, keys, values, mask, scale).transpose(1, 2)
        mixed = torch.empty_like(query)
        for i, (a, n) in enumerate(sizes):
            row = slice(i, i + 1)
            own = query[row, :, :a], keys[row, :, :n], values[row, :, :n], mask[row, :, :a, :n]
            mixed[row, :, :a] = _sdpa(*own, scale)
            mixed[row, :, a:] = mixed[row, :, a - 1 : a]  # the last one again
        return mixed.transpose(1, 2)

    def _visible(self, sight: Sight) -> tuple[torch.Tensor | None, list[tuple[int, int]] | None]:
        """The mask of this sight, made once for all layers.

        Returns:
            [b, 1, A, W] bool, True where one attends to the other; None for all. And how many queries and
            keys each row has by itself, where every row is a call of its own: a CPU rounds sums differently
            in larger calls, also where nothing is added, and a row must not depend on those beside it.
        """
        if sight not in self._masks:
            place = torch.arange(self.room[1], device=self.positions.device)
            mask = sight.mask(self.positions, place, self.finished)
            if mask is None or self.mask is None:
                mask = self.mask if mask is None else mask[:, None]
            else:
                mask = mask[:, None] & self.mask
            sizes = None
            if mask is not None and mask.device.type == "cpu":
                mask = mask.expand(*self.positions.shape[:1], -1, self.positions.shape[1], -1)
                queries = 1 + (self.positions[:, 1:] != self.positions[:, :-1]).sum(1)
                seen = (mask.any(2)[:, 0] * (place + 1)).amax(1)
                sizes = list(zip(queries.tolist(), seen.tolist(), strict=True))
            whole = (self.positions.shape[1], self.room[1])
            self._masks[sight] = mask, None if sizes is None or set(sizes) == {whole} else sizes
        return self._masks[sight]

    def _kept(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write those [b, A, G, D] of this pass; gives all that the rows see, [b, G, W, D].

        Guests see what their row has kept, with their own at their positions.
        """
        own, width = len(self.rows) - self.guests, self.room[1]
        buffers = self.memory.update(
            layer, self.rows[:own], self.positions[:own], key[:own], value[:own], self.room
        )
        everything = own == len(buffers[0]) and not self.guests
        kept = [x[:, :width] if everything else x[self.rows, :width] for x in buffers]
        if self.guests:
            guest = torch.arange(own, len(self.rows), device=key.device)[:, None]
            for x, new in zip(kept, (key, value), strict=True):
                x[guest, self.positions[own:]] = new[own:]
        return kept[0].transpose(1, 2), kept[1].transpose(1, 2)

    def row_keys(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> RowKeys:
        """Queries of this pass, and all keys that are kept."""
        del key
        width, repeated = self.room[1], torch.zeros_like(self.positions[:, :1], dtype=torch.bool)
        keys = self.memory.keys[layer][self.rows, :width].transpose(1, 2)
        repeated = torch.cat([repeated, self.positions[:, 1:] == self.positions[:, :-1]], dim=1)
        valid = torch.ones(len(keys), width, dtype=torch.bool, device=keys.device)
        valid = valid if self.mask is None else self.mask[:, 0, 0]
        return RowKeys(query, keys, torch.where(repeated, -1, self.positions), valid, self.finished)
