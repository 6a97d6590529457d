"""A second device without a GPU: tensors that refuse to meet tensors of the host, as those of CUDA do.

`Elsewhere` is a mode in which `device=AWAY` means that device. What CUDA forbids is an error; what makes the
host wait for the device is counted.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
_MOVES = ("aten.copy_", "aten._to_copy")
_INDEXING = ("aten.index.Tensor", "aten.index_put", "aten._index_put_impl_")
_LOOKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class Away(torch.Tensor):
    """A tensor on the other device; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here):
        out = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device=AWAY
        )
        out.here = here
        return out

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, Counter())


def _here(x):
    return x.here if isinstance(x, Away) else x


def _away(x):
    return Away(x) if isinstance(x, torch.Tensor) and not isinstance(x, Away) else x


def _check(name, args, kwargs, waits):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Away)]
    host = [x for x in tensors if not isinstance(x, Away) and x.dim() > 0]
    if away and host and not name.startswith(_MOVES):
        if not name.startswith(_INDEXING):
            raise RuntimeError(f"{name}: tensors of two devices")
        if not isinstance(args[0], Away):
            raise RuntimeError(f"{name}: a tensor of the host indexed from the device")
        waits["indices of the host"] += 1
    if away and name.startswith(_LOOKS):
        waits[name] += 1
    if away and name.startswith(_INDEXING):
        waits["a mask as an index"] += any(getattr(x, "dtype", None) == torch.bool for x in args[1])
    return bool(away)


def _run(function, args, kwargs, waits):
    name, device = str(function), kwargs.get("device")
    on_device = _check(name, args, kwargs, waits)
    goes, comes = (device is not None and torch.device(device).type == kind for kind in ("meta", "cpu"))
    if goes:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if on_device and comes:
        waits["a copy to the host"] += 1
    out = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    if function._schema.name.endswith("_") and not function._schema.name.endswith("__"):
        return args[0]  # an operation in place
    stays = (on_device and not comes) or goes
    return tree_map(_away, out) if stays else out


class Elsewhere(TorchDispatchMode):
    """While it lasts, `AWAY` is a device; `waits` counts what makes the host wait for it."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, self.waits)
