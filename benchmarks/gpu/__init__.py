"""`make gpu`: the toolkit proved and used on a GPU, with any Python that has torch (docs/air-gapped.md)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; before anything loads triton
