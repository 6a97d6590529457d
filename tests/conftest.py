"""Shared fixtures: everything runs offline, on one CPU thread, with data made here."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start, and of several workers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; set before triton loads

import pytest

import dlm.checkpoint
from dlm.backbone import ScratchConfig, from_scratch
from dlm.data.rules import make_examples, rule_rows
from dlm.tokenizer import train_tokenizer

with contextlib.suppress(ImportError):  # a bare machine with a GPU
    from hypothesis import settings

    settings.register_profile("dlm", deadline=None)  # a busy machine is no failure
    settings.load_profile("dlm")


@pytest.fixture(scope="session", autouse=True)
def _quiet(tmp_path_factory):
    torch.set_num_threads(1)
    dlm.checkpoint.computes_bfloat16 = lambda: False  # numbers are compared: float32 on every machine
    try:
        import datasets
    except ImportError:  # a bare machine with a GPU: tests that read no text run there
        return
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def rows():
    return rule_rows(200, seed=5)


@pytest.fixture(scope="session")
def tokenizer():
    texts = [text for example in make_examples(200, seed=5) for text in (example.instruction, example.answer)]
    return train_tokenizer(texts, 400)


TINY = ScratchConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture
def model(tokenizer):
    return from_scratch(TINY, tokenizer).eval()


@pytest.fixture(scope="session")
def base(rows):
    """A byte-level tokenizer without any special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([str(row) for row in rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)
