"""Hidden states of the rows of a canvas: computed when somebody asks, kept until the row changes.

`refresh` answers the questions of many canvases at once, with one model call over all rows that need one,
each as long as it is: rows of different lengths are packed end to end where the model can do that, and
padded where it cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from decoding.canvas import Canvas, resized
from dlm.device import sent
from dlm.errors import ConfigError, unknown_name


class Denoiser(Protocol):
    """What decoding needs of a model; `MaskedDiffusionModel` has it, and tests bring their own.

    Ids and masks come from the host, whatever device the model is on.

    A model may also have `packed_hidden` and `partial_hidden` (see `dlm.model`); without the second, keys and
    values cannot be reused.
    """

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V], the mask column -inf."""
        ...


@dataclass(frozen=True)
class Reuse:
    """Approximate: keys and values of positions whose token stays are kept for some calls.

    What was computed for a position when the rest of the row looked different goes on being attended to.
    A token that has just been written, or a mask that has just been added, is always computed. In a
    bidirectional model all states change with every token, so the texts are other ones.

    Attributes:
        scope: what is kept: "prompt", the given tokens on the left; "prefix", every token that is written
            (prefix cache of Fast-dLLM, arXiv 2505.22618, without its blocks); "dual", also the masks that
            cannot be written in this step.
        refresh: every so many calls of a row, all its positions are computed.
    """

    scope: Literal["prompt", "prefix", "dual"] = "dual"
    refresh: int = 8

    def __post_init__(self) -> None:
        """Check the name and the number."""
        if self.scope not in ("prompt", "prefix", "dual"):
            raise unknown_name("reuse", self.scope, ("prompt", "prefix", "dual"))
        if not isinstance(self.refresh, int) or self.refresh < 1:
            raise ConfigError(f"refresh must be a whole number of at least 1, got {self.refresh!r}")


class States:
    """The hidden states of one canvas, seen with or without its prompts.

    Args:
        canvas: the rows.
        mask_id: id of the mask token.
        blind: whether the model is shown the rows with their prompts masked.
        reuse: whether keys and values are reused, and which.
    """

    def __init__(self, canvas: Canvas, mask_id: int, blind: bool = False, reuse: Reuse | None = None) -> None:
        self.canvas, self.mask_id, self.blind, self.reuse = canvas, mask_id, blind, reuse
        self.hidden: torch.Tensor | None = None  # [B, ≤ L, D]
        self.current = torch.zeros_like(canvas.masked)  # [B, L] where `hidden` still holds
        self.kept = torch.full_like(canvas.ids, -1)  # [B, L] the ids whose keys and values are kept
        self.calls = torch.zeros_like(canvas.start)  # [B] since everything was computed
        self.memory: Any = None

    def of(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[N, D] at the positions [N] of the rows [N], which were asked for."""
        assert self.hidden is not None
        return self.hidden[sent(rows, self.hidden.device), sent(positions, self.hidden.device)]

    def forget(self, rows: torch.Tensor, same: torch.Tensor) -> None:
        """The rows [b] have been written to, all but those that are the `same` [b]."""
        self.current[rows] &= same[:, None]

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """The canvas has become another: `rows` of the old one, or the old one with more rows behind it.

        The rows stay in order.
        """
        self.canvas = canvas
        if rows is not None:
            self.current, self.kept, self.calls = self.current[rows], self.kept[rows], self.calls[rows]
            self.hidden = None if self.hidden is None else self.hidden[sent(rows, self.hidden.device)]
            self.memory = None if self.memory is None else self.memory.take(rows)
        size, width = canvas.ids.shape
        self.current = resized(self.current, size, width)
        self.kept = resized(self.kept, size, width, -1)
        self.calls = resized(self.calls[:, None], size, 1)[:, 0]
        if self.hidden is not None:
            self.hidden = resized(self.hidden, size, self.hidden.shape[1])

    def shown(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, L] the ids that the model is shown."""
        ids = self.canvas.ids[rows]
        if not self.blind:
            return ids
        position = torch.arange(ids.shape[1])
        prompt = (position < self.canvas.answer[rows, None]) & self.canvas.valid[rows]
        return torch.where(prompt, self.mask_id, ids)

    def stale(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[b] bool, the rows [b] in which a state at `where` [b, W] is asked for and does not hold."""
        return (where & ~self.current[rows, : where.shape[1]]).any(1)

    def put(self, rows: torch.Tensor, where: torch.Tensor, states: torch.Tensor) -> None:
        """Keep the states [N, D] of the positions `where` [b, L] of the rows [b]."""
        row, position = where.nonzero().unbind(1)
        width = -(-(int(position.max()) + 1) // 64) * 64  # in steps, so that a growing canvas seldom copies
        size = len(self.canvas.ids)
        if self.hidden is None:
            self.hidden = states.new_zeros(size, width, states.shape[-1])
        self.hidden = resized(self.hidden, size, max(width, self.hidden.shape[1]))
        self.hidden[sent(rows[row], states.device), sent(position, states.device)] = states
        self.current[rows] |= where
        self.canvas.model_calls[rows] += 1

    def renew(self, model: Any, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Compute the rows [b] again, except what is kept by `reuse`; `where` [b, W] is asked for."""
        assert self.reuse is not None
        if not hasattr(model, "partial_hidden"):
            raise ConfigError("this model cannot reuse keys and values: it has no partial_hidden")
        canvas, ids = self.canvas, self.shown(rows)
        masked, valid = canvas.masked[rows], canvas.valid[rows]
        due = (self.calls[rows] % self.reuse.refresh == 0)[:, None]
        fresh = ids != self.kept[rows]
        if self.reuse.scope == "prompt":
            position = torch.arange(ids.shape[1])
            fresh |= position >= canvas.start[rows, None]
        else:
            wanted = torch.zeros_like(masked)
            wanted[:, : where.shape[1]] = where
            fresh |= masked if self.reuse.scope == "prefix" else wanted
        active = (fresh | due) & valid
        width = int(valid.any(0).nonzero()[-1]) + 1
        if self.memory is None:
            self.memory = model.new_memory()
        states = model.partial_hidden(ids[:, :width], active[:, :width], valid[:, :width], self.memory, rows)
        self.kept[rows] = torch.where(active, ids, self.kept[rows])
        self.calls[rows] += 1
        self.put(rows, active, states)


@dataclass(frozen=True)
class Ask:
    """A request for the states of the rows [b] of a canvas, at the positions `where` [b, W]."""

    states: States
    rows: torch.Tensor
    where: torch.Tensor


def refresh(model: Denoiser, asks: Sequence[Ask]) -> None:
    """See to it that all states asked for hold; rows that hold already cost nothing.

    One model call for all, except for canvases that reuse keys and values, which have one each.
    """
    due = []
    for ask in asks:
        stale = ask.states.stale(ask.rows, ask.where)
        if bool(stale.any()):
            rows = ask.rows[stale]
            if ask.states.reuse is not None:
                ask.states.renew(model, rows, ask.where[stale])
            else:
                due.append((ask.states, rows, ask.states.canvas.valid[rows]))
    if not due:
        return
    ids = torch.cat([states.shown(rows)[valid] for states, rows, valid in due])
    lengths = torch.cat([valid.sum(1) for _, _, valid in due]).tolist()
    each = iter(lengths)
    sizes = [sum(itertools.islice(each, len(rows))) for _, rows, _ in due]
    found = run_rows(model, ids, lengths).split(sizes)
    for (states, rows, valid), part in zip(due, found, strict=True):
        states.put(rows, valid, part)


def run_rows(model: Any, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """One model call over rows of these lengths.

    Args:
        model: see `Denoiser`.
        ids: [N] int64, the rows end to end.
        lengths: of each row; their sum is N.

    Returns:
        [N, D].
    """
    if len(set(lengths)) == 1:
        return model.hidden(ids.view(len(lengths), -1)).flatten(0, 1)  # type: ignore[no-any-return]
    if hasattr(model, "packed_hidden"):
        return model.packed_hidden(ids, lengths)  # type: ignore[no-any-return]
    size = torch.tensor(lengths)
    valid = torch.arange(int(max(lengths))) < size[:, None]
    padded = ids.new_zeros(valid.shape)
    padded[valid] = ids
    states = model.hidden(padded, valid)
    row, position = (sent(x, states.device) for x in valid.nonzero().unbind(1))
    return states[row, position]  # type: ignore[no-any-return]
