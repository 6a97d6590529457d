"""CUDA graphs and compilation for decoding: few shapes, so that what was made for a shape is used again.

A graph repeats a recorded call on the same memory, without launching its kernels one by one; so its shape is
fixed, and compiled code is best for the shapes that it was compiled for. Calls are therefore padded to a few
shapes (`bucket`). On an H200 graphs make a small model four times as fast at batch 1 (docs/results/gpu.md).
Without them the call is simply made again in the padded shape, which is how the padding is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dlm.spec import ModelSpec

STEP = 64
"""Lengths are padded to a multiple of this."""


def bucket(rows: int, length: int, positions: int) -> tuple[int, int]:
    """The shape that a call [rows, length] is padded to: a power of two, and a multiple of `STEP`.

    Never longer than the `positions` of the model, of which some (GPT-2) have no more.
    """
    return 1 << (rows - 1).bit_length(), min(-(-length // STEP) * STEP, max(length, positions))


@dataclass
class RecordedCall:
    """A call of one shape [b, l]: its inputs and its output lie where they lay when it was recorded."""

    ids: torch.Tensor
    """[b, l] int64."""
    mask: torch.Tensor
    """[b, 1, 1, l] bool."""
    states: torch.Tensor
    """[b, l, D]."""
    replay: Callable[[], None]
    """Computes the states from the inputs."""


class BucketedModel:
    """A masked diffusion model whose forward passes have few shapes; everything else is the model's own.

    Packed rows and reused keys and values have shapes of their own in every call: with this model rows of
    different lengths are padded, and `reuse` runs as usual.

    Args:
        model: in evaluation mode, on its device; its weights must stay where they are.
        graphs: whether each shape becomes a CUDA graph; else the call is made as it is, compiled or not.
    """

    def __init__(self, model: Any, graphs: bool = True) -> None:
        self.model, self.graphs, self.positions = model, graphs, ModelSpec.of(model).positions
        self.recorded: dict[tuple[int, int], RecordedCall] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """Capabilities of the model, except for packed rows and what a recorded call does not tell."""
        return frozenset(self.model.capabilities) - {"packed", "attention", "shadows"}

    def __getattr__(self, name: str) -> Any:
        """Pass on what the model has, except for packing."""
        if name in ("model", "packed_hidden"):
            raise AttributeError(name)
        return getattr(self.model, name)

    @torch.inference_mode()
    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]; see `MaskedDiffusionModel.hidden`."""
        rows, length = input_ids.shape
        shape = bucket(rows, length, self.positions)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(*shape)
        call = self.recorded[shape]
        call.ids.zero_()
        call.ids[:rows, :length].copy_(input_ids, non_blocking=True)
        call.mask.zero_()
        call.mask[rows:, 0, 0, 0] = True  # rows that are not there still attend to something
        if attention_mask is None:
            call.mask[:rows, 0, 0, :length] = True
        else:
            call.mask[:rows, 0, 0, :length].copy_(attention_mask, non_blocking=True)
        call.replay()
        return call.states[:rows, :length].clone()

    def _record(self, rows: int, length: int) -> RecordedCall:
        """Make the call once to warm up, and record it."""
        device = self.model.device
        ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
        mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
        if not self.graphs or device.type != "cuda":
            states = self.model.hidden(ids, mask)
            return RecordedCall(ids, mask, states, lambda: _again(self.model, ids, mask, states))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.model.hidden(ids, mask)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            states = self.model.hidden(ids, mask)
        return RecordedCall(ids, mask, states, graph.replay)


def _again(model: Any, ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> None:
    """The call itself, into the memory of its output."""
    states.copy_(model.hidden(ids, mask))
