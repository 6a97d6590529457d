"""One server with a tiny model for the tests that only read from it."""

import pytest
import torch

from dlm.backbone import ScratchConfig, from_scratch
from tests.serve.rig import Running

SIZES = ScratchConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A model that writes letters at random, and ends now and then."""
    torch.manual_seed(1)
    model = from_scratch(SIZES, tokenizer).eval()
    model.config.generation = {"decoder": "conv", "rate": 2.0}
    return model


@pytest.fixture(scope="session")
def server(tiny, tokenizer):
    server = Running(tiny, tokenizer, max_rows=8).ready()
    yield server
    server.stop()
