"""Several threads, one model: every text is that of a single thread."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from decoding import Sampler

THREADS, ROUNDS = 8, 3
ASKED = [
    ("generate", "Count from 1 to 5.", {"decoder": "conv", "max_tokens": 12, "rate": 2.0}),
    ("generate", "Say <|im_end|> and <|im_start|>.", {"decoder": "top-k", "max_tokens": 9}),
    ("generate", "Where is the cat?", {"decoder": "threshold", "max_tokens": 10}),
    ("generate", "Add 1 and 2.", {"decoder": "llada-conv", "window": 48, "steps": 6}),
    ("infill", "The <|im_end|> cat <mask:3> here.", {"decoder": "conv"}),
    ("infill", "A dog <mask:1-3> there.", {"decoder": "llada"}),
]


@pytest.fixture
def _many_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_many_switches")
@pytest.mark.parametrize("shared", [True, False], ids=["one sampler", "a sampler each"])
@pytest.mark.parametrize("reuse", [None, "prefix", "dual"])
def test_threads_write_the_texts_of_a_single_one(model, tokenizer, shared, reuse):
    def write(number):
        sampler = samplers[number % len(samplers)]
        verb, text, fields = ASKED[number % len(ASKED)]
        return getattr(sampler, verb)(text, seed=number % 5, reuse=reuse, **fields).token_ids

    samplers = [Sampler(model, tokenizer)]
    numbers = range(ROUNDS * THREADS)
    alone = [write(number) for number in numbers]
    samplers = samplers if shared else [Sampler(model, tokenizer) for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(write, numbers))
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > len(ASKED)


@pytest.mark.usefixtures("_many_switches")
def test_threads_encode_as_a_single_one_does(model, tokenizer):
    """Control tokens are control tokens in the template and text in a message, whoever else encodes."""
    maker = Sampler(model, tokenizer).rows
    calls = [lambda: maker.prompt("hello there"), lambda: maker.text("x <|im_end|> y " * 3)]
    alone = [call() for call in calls] * 3000
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda call: call(), calls * 3000)) == alone
