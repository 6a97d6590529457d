"""What is computed, and what is kept: exact where it says so."""

import pytest
import torch

from decoding import Decoder
from decoding.canvas import Canvas
from decoding.denoiser import CachedPositions, hidden_of_rows
from decoding.request import Reuse
from decoding.step import denoise
from decoding.window import MARGIN
from dlm.errors import ConfigError
from tests.decoding.rig import MASK, canvas_of, decode, plan_of, rows
from tests.dlm.test_attention import MASK as TINY_MASK
from tests.dlm.test_attention import tiny
from tests.fakes import FakeDenoiser


class Watched:
    """A model that records which positions its partial calls compute."""

    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device
        self.logits, self.hidden, self.new_memory = model.logits, model.hidden, model.new_memory
        self.capabilities, self.spec = model.capabilities, model.spec
        self.active = []

    def partial_hidden(self, input_ids, active, *rest):
        self.active.append(active[0].clone())
        return self.model.partial_hidden(input_ids, active, *rest)


def write(model, plan, batch=1, length=30, prompt=5):
    ids = torch.full((batch, length), TINY_MASK)
    for i in range(batch):
        ids[i, : prompt + i] = torch.arange(prompt + i) + 3
    return decode(model, ids, plan)


CONV = Decoder.named("conv", kernel_size=9, top_k=5)


def pace(decoder=CONV, rate=2.0, **more):
    return plan_of(decoder, rate=rate, grow=True, mask=TINY_MASK, **more)


@pytest.mark.parametrize("scope", ["prompt", "prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_reuse_is_exact_when_everything_is_refreshed_in_every_call(scope, shift):
    model = tiny(shift=shift)
    exact = write(model, pace(), batch=3)
    kept = write(model, pace(reuse=Reuse(scope, refresh=1)), batch=3)
    assert torch.equal(exact.ids, kept.ids)
    assert torch.equal(exact.model_calls, kept.model_calls)


@pytest.mark.parametrize("scope", ["prompt", "prefix", "dual"])
@pytest.mark.parametrize("name", ["conv", "llada", "categorical", "semi-ar"])
def test_reuse_is_exact_in_a_model_of_one_layer(scope, name):
    """Keys and values of the only layer depend on nothing but their own token."""
    model = tiny(layers=1, shift=True)
    decoder = Decoder.named(name, **({"block_size": 6} if name == "semi-ar" else {}))
    exact = write(model, pace(decoder), batch=3)
    kept = write(model, pace(decoder, reuse=Reuse(scope, refresh=100)), batch=3)
    assert torch.equal(exact.ids, kept.ids)
    assert torch.equal(exact.reveal_step, kept.reveal_step)


def test_reuse_is_approximate_in_deeper_models():
    model = tiny()
    exact = write(model, pace(), length=60)
    kept = write(model, pace(reuse=Reuse("dual", refresh=50)), length=60)
    assert not torch.equal(exact.ids, kept.ids)


def test_each_scope_computes_what_it_says():
    counts = {}
    for scope in ("prompt", "prefix", "dual"):
        model = Watched(tiny())
        write(model, pace(rate=1.0, reuse=Reuse(scope, refresh=10)))
        assert model.active[0].sum() == 5 + 4 + MARGIN  # everything: the prompt, the reach and the margin
        assert model.active[10][: len(model.active[10])].sum() > model.active[9].sum()  # again everything
        counts[scope] = [int(a.sum()) for a in model.active[1:6]]
        if scope == "prompt":
            assert not any(a[:5].any() for a in model.active[1:10])
            assert counts[scope] == [MARGIN + 5 + i for i in range(5)]  # one token more in each call
        if scope == "prefix":
            assert counts[scope] == [MARGIN + 5] * 5  # all masks and the token that was just written
    assert all(dual <= prefix for dual, prefix in zip(counts["dual"], counts["prefix"], strict=True))
    assert sum(counts["dual"]) < sum(counts["prefix"])


def test_a_model_without_partial_calls_says_so():
    ids = rows(FakeDenoiser(), [3], 20)
    plan = plan_of("conv", 4, reuse=Reuse())
    with pytest.raises(ConfigError, match="partial_hidden"):
        next(denoise(FakeDenoiser(), canvas_of(ids, plan), plan))
    for bad in ({"refresh": 0}, {"scope": "duel"}):
        with pytest.raises(ConfigError, match=r"refresh must be|dual"):
            Reuse(**bad)


def test_rows_of_different_lengths_are_packed_or_padded_to_the_same_states():
    model = tiny()
    lengths = [4, 9, 2]
    ids = torch.randint(0, 59, (sum(lengths),))

    class Padded:
        hidden = staticmethod(model.hidden)

    with torch.no_grad():
        torch.testing.assert_close(
            hidden_of_rows(model, ids, lengths), hidden_of_rows(Padded(), ids, lengths)
        )


# ---- a window that is shown no further than it can open -----------------------------------------------


@pytest.mark.parametrize("name", ["conv", "llada-conv"])
@pytest.mark.parametrize("eos_bias", [-50.0, 1.0])
def test_a_growing_canvas_has_the_same_law_where_the_model_looks_at_nothing_else(name, eos_bias):
    """With logits of the position alone the approximation is none: same noise, same texts.

    (A quota that is larger than what is open would reach for masks that are not there yet.)
    """
    model = FakeDenoiser(context=False, eos_bias=eos_bias)
    decoder = Decoder.named(name, kernel_size=9)
    ids = rows(model, [3, 6, 1], 60)
    texts = []
    for grow in (False, True):
        plan = plan_of(decoder, 20, grow=grow, fit=60)
        canvas = canvas_of(ids, plan)
        assert bool(canvas.valid.all()) is not grow
        for _ in denoise(model, canvas, plan):
            pass
        assert not canvas.masked.any()
        texts.append(canvas)
    for i in range(3):
        answer = texts[0].ids[i].tolist()
        end = answer.index(0) + 1 if 0 in answer else 60
        assert torch.equal(texts[0].ids[i, :end], texts[1].ids[i, :end])
        assert torch.equal(texts[0].reveal_step[i, :end], texts[1].reveal_step[i, :end])


def test_a_growing_canvas_shows_the_model_less_and_fills_the_window_all_the_same():
    seen = []

    class Wide(FakeDenoiser):
        def hidden(self, input_ids, attention_mask=None):
            seen.append(input_ids.shape[1])
            return super().hidden(input_ids, attention_mask)

    model = Wide(eos_bias=-50.0)
    decoder = Decoder.named("conv", kernel_size=9)
    plan = plan_of(decoder, 30, grow=True, margin=3, fit=80)
    canvas = decode(model, rows(model, [4], 80), plan)
    assert seen[0] == 4 + 4 + 3
    assert sorted(seen) == seen
    assert seen[len(seen) // 2] < 80
    assert not canvas.masked.any()
    assert canvas.valid.all()


def test_known_tokens_far_ahead_are_on_a_growing_canvas_from_the_start():
    ids = rows(FakeDenoiser(), [2], 50)
    ids[0, 30] = 9
    canvas = canvas_of(ids, plan_of(Decoder.named("conv", kernel_size=9), 4, grow=True, margin=2))
    assert int(canvas.valid.sum()) == 31 + 6


def test_an_answer_that_is_complete_costs_nothing_more_on_a_growing_canvas():
    """Without EOS-fill too: nobody reads what would be written behind the end."""
    decoder = Decoder.named("conv", kernel_size=9)
    calls = {}
    for fill in (True, False):
        for grow in (True, False):
            model = FakeDenoiser(eos_bias=3.0)
            canvas = decode(
                model, rows(model, [3], 120), plan_of(decoder, 60, grow=grow, eos_fill=fill, fit=120)
            )
            calls[fill, grow] = int(canvas.model_calls[0])
    assert calls[False, True] <= calls[False, False] + 3


def test_an_entry_is_of_one_version_of_its_row():
    canvas = canvas_of(torch.tensor([[1, MASK, MASK], [1, MASK, MASK]]), plan_of("conv", steps=2))
    entries, both = CachedPositions(canvas), torch.tensor([0, 1])
    entries.add(both, torch.tensor([[False, True, False]] * 2))
    assert entries.at(both, 3).tolist() == [[False, True, False]] * 2
    canvas.version[0] += 1
    assert entries.at(both, 3).tolist() == [[False] * 3, [False, True, False]]
    entries.add(both, torch.tensor([[False, False, True]] * 2))
    assert entries.at(both, 3).tolist() == [[False, False, True], [False, True, True]], "older ones are gone"
    entries.follow(canvas.take(torch.tensor([1])), torch.tensor([1]))
    assert entries.at(torch.tensor([0]), 3).tolist() == [[False, True, True]]
    joined = Canvas.join([entries.canvas, canvas])
    entries.follow(joined, None)
    assert entries.at(torch.arange(3), 3).tolist() == [[False, True, True], [False] * 3, [False] * 3]
    entries.copy(torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert entries.at(torch.arange(3), 3).tolist() == [[False, True, True], [False, True, True], [False] * 3]
