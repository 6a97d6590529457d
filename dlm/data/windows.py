"""Windows: encoded rows to padded batches, and the order in which batches come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from dlm.noise import fold, key_of, uniform

TensorBatch = dict[str, torch.Tensor]


@dataclass
class WindowCollator:
    """Turns rows into a batch.

    Every position after the prompt is maskable: the answer, its EOS and the EOS padding. `fixed` windows
    are all `window` long. A `grouped` row ends in a random EOS tail of 0 … `eos_tail` tokens, drawn from
    (seed, epoch, row), and shorter rows of a batch are padded with positions nobody attends to. A share of
    the grouped rows ends inside its answer instead.

    Attributes:
        eos_token_id: fills what stands behind the answer.
        window: longest window in tokens.
        grouped: whether windows follow the length of their rows.
        eos_tail: longest tail of a grouped row.
        cut_share: share of grouped rows that end inside their answer, at a uniform place.
        eos_loss_all: whether EOS padding carries loss too.
        seed: seeds the tails.
        epoch: set by the trainer; a row's tail changes from epoch to epoch.
    """

    eos_token_id: int
    window: int
    grouped: bool = False
    eos_tail: int = 0
    cut_share: float = 0.0
    eos_loss_all: bool = False
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> TensorBatch:
        """Collate.

        Args:
            rows: `input_ids`, `prompt_length`, and `row` (the row's number, for its noise).

        Returns:
            `input_ids` [B, L] int64 clean tokens; `attention_mask` [B, L] bool, False at padding;
            `maskable` [B, L] bool; `loss_mask` [B, L] bool, the maskable cells that carry loss;
            `row` [B] int64; `prompt_length` [B] int64; `length` [B] int64, tokens up to the first EOS, or up
            to the window's end where it comes first.
        """
        number = torch.tensor([row.get("row", i) for i, row in enumerate(rows)])
        length = torch.tensor([len(row["input_ids"]) for row in rows])
        start = torch.tensor([row["prompt_length"] for row in rows])
        end = self._ends(start, length, number)
        width = self.window if not self.grouped else min(self.window, -8 * (-int(end.max()) // 8))
        ids = torch.full((len(rows), width), self.eos_token_id)
        for i, row in enumerate(rows):
            size = min(int(length[i]), width)
            ids[i, :size] = torch.as_tensor(row["input_ids"][:size])
        position = torch.arange(width)
        real = position < end[:, None]
        maskable = real & (position >= start[:, None])
        loss = maskable if self.eos_loss_all else maskable & (position < length[:, None])
        return {
            "input_ids": ids,
            "attention_mask": real,
            "maskable": maskable,
            "loss_mask": loss,
            "row": number,
            "prompt_length": start,
            "length": torch.minimum(length, end),
        }

    def _ends(self, start: torch.Tensor, length: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """[B] where each row's real tokens end: behind its EOS tail, or inside its answer where it is cut."""
        if not self.grouped:
            return torch.full_like(length, self.window)
        key = fold(key_of(self.seed, "eos tail", self.epoch), number)
        tail, chance, place = (uniform(key, i) for i in range(3))
        full = torch.clamp(length + (tail * (self.eos_tail + 1)).long(), max=self.window)
        cut = start + 1 + (place * (length - start - 1)).long()  # at least one token of the answer is left
        return torch.where((chance < self.cut_share) & (start > 0), cut, full)


class EpochSampler(Sampler[int]):
    """Row order that depends on (seed, epoch) alone, so that a resumed run sees the rows it would have seen.

    Args:
        lengths: [n] length of each row; rows of similar length come together when `group` is above 1.
        group: rows of one global batch when batches are grouped by length, else 1.
        seed: seed of the order.
        multiple: rows of an epoch are a multiple of it, if there are as many; the last ones are left out. For
            several processes, which would fill their last batches with rows of the first ones.
    """

    def __init__(self, lengths: list[int], group: int = 1, seed: int = 0, multiple: int = 1) -> None:
        self.lengths = lengths
        self.count = len(lengths) // multiple * multiple or len(lengths)
        self.group = group
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self._order()[: self.count])

    def _order(self) -> list[int]:
        """All rows, in the order of the epoch."""
        generator = torch.Generator().manual_seed(int(key_of(self.seed, "order", self.epoch)) % 2**63)
        if self.group <= 1:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        order = torch.tensor(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        batches = list(order.split(self.group))
        groups, last_batches = batches[: len(order) // self.group], batches[len(order) // self.group :]
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return torch.cat(shuffled + last_batches).tolist()
