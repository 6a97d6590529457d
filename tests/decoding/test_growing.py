"""First-hitting on a canvas that grows: its law by enumeration, and its distance from the whole canvas's."""

from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from decoding import Decoder, Sampler
from decoding.reveal import Ancestral
from decoding.tokens import TokenRule
from decoding.window import Convolution
from tests.decoding.rig import decode, plan_of
from tests.fakes import FakeDenoiser, FakeTokenizer

MASK, EOS, LENGTH, REACH = 2, 3, 7, 2
"""Two tokens, 0 and 1; seven of them behind a prompt of one."""


CHANCES = {7: 0.97, 6: 0.9, 5: 0.8, 4: 0.6, 3: 0.3, 2: 0.1, 1: 0.05}
"""p(1) by the number of masks that the model sees."""


class Counting:
    """A model that looks at the number of masks: the hardest kind for a canvas that does not show all."""

    config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, generation=None)
    device = torch.device("cpu")

    @staticmethod
    def chance(row, i):
        """p(1) at position i of a row."""
        masks = row.count(MASK)
        left = next(token for token in reversed(row[:i]) if token != MASK)
        return CHANCES[masks] * (0.9 if left else 1.0)

    def hidden(self, input_ids, attention_mask=None):
        seen = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        out = torch.zeros(*input_ids.shape, 1)
        for b, (ids, valid) in enumerate(zip(input_ids, seen, strict=True)):
            out[b, : int(valid.sum()), 0] = self.chances(tuple(ids[valid].tolist()))
        return out

    @staticmethod
    @cache
    def chances(row):
        """`chance` at every position, 0.5 at the first."""
        return torch.tensor([0.5, *(Counting.chance(row, i) for i in range(1, len(row)))])

    def logits(self, hidden):
        none = torch.full_like(hidden, -torch.inf)
        return torch.cat([(1 - hidden).log(), hidden.log(), none, none], -1)


def law(ahead):
    """Probability of each text when the canvas always has `ahead` masks, as far as there are so many left.

    In each event position i is next with probability ∝ w_i = tanh(tokens within reach), its token from p_i.
    """
    model, states, texts = Counting(), {(1,): 1.0}, defaultdict(float)
    while states:
        following = defaultdict(float)
        for written, chance in states.items():
            row = list(written)
            while row.count(MASK) < ahead and len(row) < LENGTH + 1:
                row.append(MASK)
            if MASK not in row:
                texts[tuple(row[1:])] += chance
                continue
            near = {
                i: sum(row[j] != MASK for j in range(max(0, i - REACH), min(len(row), i + REACH + 1)))
                for i in range(len(row))
                if row[i] == MASK
            }
            weights = {i: float(torch.tensor(float(n)).tanh()) for i, n in near.items()}
            for i, weight in weights.items():
                p = model.chance(row, i)
                for token, share in ((0, 1 - p), (1, p)):
                    new = (*row[:i], token, *row[i + 1 :])
                    following[new] += chance * weight / sum(weights.values()) * share
        states = following
    assert sum(texts.values()) == pytest.approx(1)
    return texts


def distance(one, two):
    """Total variation."""
    return sum(abs(one.get(text, 0) - two.get(text, 0)) for text in {*one, *two}) / 2


def sampled(margin, count):
    """Frequencies of texts that the decoder writes at rate 1; `margin` None for the whole canvas."""
    decoder = Decoder(Convolution(2 * REACH + 1), Ancestral(), TokenRule())
    how = {"rate": 1.0, "eos": EOS, "mask": MASK, "eos_fill": False, "early_exit": False}
    plan = plan_of(decoder, **how, **({} if margin is None else {"grow": True, "margin": margin}))
    ids = decode(Counting(), torch.tensor([[1] + [MASK] * LENGTH]).repeat(count, 1), plan).ids[:, 1:]
    out = defaultdict(float)
    for text in ids.tolist():
        out[tuple(text)] += 1 / count
    return out


WHOLE = law(LENGTH)
FAR = {0: 0.895, 1: 0.678, 3: 0.131, 5: 0.0}
"""Margins, and the distance of their law from that of the whole canvas."""


def test_the_law_nears_that_of_the_whole_canvas_with_the_margin_and_reaches_it():
    for margin, expected in FAR.items():
        assert distance(law(REACH + margin), WHOLE) == pytest.approx(expected, abs=0.001)
    assert law(REACH + 5) == WHOLE


@pytest.mark.parametrize("margin", [None, 0, 1, 3])
def test_decoding_at_rate_one_has_the_law_of_the_canvas_that_it_sees(margin):
    count = 1500
    found, expected = sampled(margin, count), WHOLE if margin is None else law(REACH + margin)
    for text in {*found, *expected}:
        p = expected.get(text, 0.0)
        assert abs(found.get(text, 0) - p) <= 4.5 * (p * (1 - p) / count) ** 0.5 + 2 / count, text
    if margin in (0, 1):  # the comparison can tell
        assert distance(found, WHOLE) > distance(expected, WHOLE) / 2 > 2 * distance(found, expected)


@pytest.mark.parametrize("name", ["conv", "llada-conv", "threshold"])
def test_no_mask_comes_out_where_nothing_lies_beyond_what_is_written(name):
    sampler = Sampler(FakeDenoiser(eos_bias=-50.0), FakeTokenizer())
    given = {"decoder": name, "options": {"kernel_size": 1}, "margin": 0}
    out = sampler.generate("abc", max_tokens=4, **given)
    assert len(out.token_ids) == out.model_calls == 4
    assert sampler.model.mask_id not in out.token_ids
