"""Counter-based random numbers: the n-th number of a stream is a pure function of (key, n).

Training and decoding draw all their noise here. The numbers do not depend on the device, on the batch
that a row shares, or on what was drawn before, so a resumed run repeats the interrupted one and a row
gives the same text alone or in any batch. The mixer is the finaliser of SplitMix64 (Steele et al., 2014,
variant 13 of Stafford), applied once per counter.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

Integers = TypeVar("Integers", torch.Tensor, np.ndarray[Any, Any])
"""int64 numbers; NumPy needs a fraction of the time for the few numbers of a denoising step."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Integers, bits: int) -> Integers:
    """Logical (unsigned) right shift of int64 values."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Integers) -> Integers:
    """Bijective 64-bit mixer; int64 in, int64 out, arithmetic modulo 2^64."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)  # type: ignore[no-any-return]


def fold(key: torch.Tensor, counter: torch.Tensor | int) -> torch.Tensor:
    """A new key from a key and a counter (int64, broadcast against each other)."""
    mixed = _mixed_number(counter) if isinstance(counter, int) else _mix(counter.to(torch.int64))
    return _mix(_mix(key) ^ mixed)


@lru_cache(maxsize=1024)
def _mixed_number(counter: int) -> int:
    """A counter after the mixer, as a number: no tensor has to be made for it on the device of the key."""
    return int(_mix(torch.tensor(counter, dtype=torch.int64)))


def key_of(*parts: int | str | bytes, device: torch.device | str = "cpu") -> torch.Tensor:
    """A scalar int64 key from integers and strings, the same in every process and on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return torch.tensor(int.from_bytes(digest.digest(), "little", signed=True), device=device)


def uniform(key: torch.Tensor, counter: torch.Tensor | int) -> torch.Tensor:
    """Numbers of the open interval (0, 1), float32, one for each broadcast pair (key, counter).

    The grid is 2^-23 wide and centred, so neither 0 nor 1 comes out and `log` is safe.
    """
    bits = _shift_right(fold(key, counter), 41)  # 23 bits
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def cell_noise(key: torch.Tensor, count: torch.Tensor, width: int, stream: int) -> torch.Tensor:
    """[b, width] uniform numbers, a function of (key [b], count [b], stream, position) alone, on the host.

    They are `uniform(fold(_mix(_mix(key) ^ _mix(count)), stream), position)`.
    """
    mixed = _mix(np.stack([key.numpy(), count.numpy()]))
    keys = _mix(_mix(_mix(mixed[0] ^ mixed[1])) ^ _mixed_number(stream))
    bits = _shift_right(_mix(_mix(keys)[:, None] ^ _mixed_positions(width)), 41)
    return torch.from_numpy((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23))


@lru_cache(maxsize=1024)
def _mixed_positions(width: int) -> np.ndarray[Any, Any]:
    """[width] the positions after the mixer."""
    return _mix(np.arange(width, dtype=np.int64))
