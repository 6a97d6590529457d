"""Rows that come and go: nobody's text depends on who else is there."""

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Decoder
from decoding.canvas import Canvas
from decoding.engine import BrokenTicketError, Engine
from decoding.loop import Settings, denoise
from decoding.presets import PRESETS
from decoding.states import Reuse
from dlm.errors import ConfigError
from tests.decoding.test_loop import rows
from tests.dlm.test_attention import MASK as TINY_MASK
from tests.dlm.test_attention import tiny
from tests.fakes import FakeDenoiser

MASK, EOS = 22, 0


def request(number):
    """A canvas of one row, a decoder and settings; no two neighbours are alike."""
    name = list(PRESETS)[number % len(PRESETS)]
    small = {"semi-ar": {"block_size": 8}, "conv": {"kernel_size": 9}, "llada-conv": {"kernel_size": 7}}
    decoder = Decoder.named(name, **small.get(name, {}))
    free = number % 3 == 1 and not decoder.timed
    settings = Settings(
        None if free else 6 + number % 5,
        EOS,
        MASK,
        rate=1.5 + number % 2 if free else None,
        grow=free,
        fit=40,
    )
    ids = rows(FakeDenoiser(), [number % 6 + 1], 20 + number % 17)
    return Canvas.of(ids, MASK, torch.tensor([number]), ahead=settings.ahead(decoder)), decoder, settings


def alone(number, **model):
    canvas, decoder, settings = request(number)
    for _ in denoise(FakeDenoiser(**model), canvas, decoder, settings):
        pass
    return canvas


def same(one, two):
    for field in ("ids", "reveal_step", "model_calls", "step"):
        a, b = getattr(one, field)[0], getattr(two, field)[0]
        size = min(a.numel(), b.numel())
        assert a.flatten().tolist()[:size] == b.flatten().tolist()[:size], field
    shared = min(one.ids.shape[1], two.ids.shape[1])
    torch.testing.assert_close(
        one.confidence[0, :shared], two.confidence[0, :shared], rtol=0, atol=0, equal_nan=True
    )


@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(st.integers(0, 12), min_size=2, max_size=14),
    leaving=st.lists(st.integers(0, 12), max_size=3),
    bias=st.sampled_from([-50.0, 0.5]),
)
def test_rows_that_come_and_go_are_bit_identical_to_rows_alone(arrivals, leaving, bias):
    engine = Engine(FakeDenoiser(eos_bias=bias))
    due = sorted((turn, number) for number, turn in enumerate(arrivals))
    at_work, done, turn = {}, {}, 0
    while due or at_work:
        while due and due[0][0] <= turn:
            number = due.pop(0)[1]
            (ticket,) = engine.add(*request(number))
            at_work[ticket] = number
        over = engine.step()
        for ticket, canvas in zip(over, engine.remove(*over), strict=True):
            done[at_work.pop(ticket)] = canvas
        if turn in leaving and at_work:
            ticket = min(at_work)
            (left,) = engine.remove(ticket)
            assert int(left.step[0]) <= turn + 1
            at_work.pop(ticket)
        assert len(engine) == len(at_work)
        turn += 1
    assert not engine.lanes
    for number, canvas in done.items():
        same(canvas, alone(number, eos_bias=bias))


def test_a_row_among_31_others_is_the_row_alone():
    engine = Engine(FakeDenoiser(eos_bias=0.5))
    tickets = [engine.add(*request(number))[0] for number in range(32)]
    found = {}
    while len(engine):
        over = engine.step()
        found.update(zip(over, engine.remove(*over), strict=True))
    for number, ticket in enumerate(tickets):
        same(found[ticket], alone(number, eos_bias=0.5))


def test_all_rows_share_one_model_call_a_step():
    model = FakeDenoiser(eos_bias=-50.0)
    engine = Engine(model)
    for number in range(12):
        canvas, _, _ = request(number)
        engine.add(canvas, Decoder.named("llada", temperature=float(number % 2)), Settings(4, EOS, MASK))
    assert len(engine.lanes) > 1
    engine.step()
    assert (model.calls, model.rows) == (1, 12)


def test_what_does_not_fit_leaves_the_engine_as_it_was():
    engine = Engine(FakeDenoiser())
    canvas, _, _ = request(0)
    blocks = Decoder.named("semi-ar", block_size=2)
    with pytest.raises(ConfigError, match="too few"):
        engine.add(canvas, blocks, Settings(2, EOS, MASK))
    assert len(engine) == 0
    assert not engine.lanes
    (ticket,) = engine.add(canvas, blocks, Settings(30, EOS, MASK, fit=20))
    longer = Canvas.of(rows(FakeDenoiser(), [1], 90), MASK, torch.tensor([3]))
    with pytest.raises(ConfigError, match="too few"):
        engine.add(longer, blocks, Settings(30, EOS, MASK, fit=20))
    assert len(engine) == 1
    engine.remove(ticket)
    with pytest.raises(KeyError, match="ticket 0"):
        engine.row(ticket)


def test_a_real_model_gives_the_same_texts_packed_or_alone(model, tokenizer):
    """In double precision the order of sums does not matter; in single it may, rarely (see benchmarks)."""
    exact = copy.deepcopy(model).double()
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    decoder, settings = Decoder.named("conv", kernel_size=9), Settings(8, eos, mask, fit=40)
    canvases = []
    for number in range(6):
        ids = torch.full((1, 24 + 5 * number), mask)
        generator = torch.Generator().manual_seed(number)
        ids[0, : 4 + number] = torch.randint(5, 90, (4 + number,), generator=generator)
        canvases.append(Canvas.of(ids, mask, torch.tensor([number])))
    engine = Engine(exact)
    tickets = engine.add(Canvas.join(canvases), decoder, settings)
    found = {}
    while len(engine):
        over = engine.step()
        found.update(zip(over, engine.remove(*over), strict=True))
    for ticket, canvas in zip(tickets, canvases, strict=True):
        with torch.no_grad():
            for _ in denoise(exact, canvas, decoder, settings):
                pass
        assert torch.equal(found[ticket].ids[0, : canvas.ids.shape[1]], canvas.ids[0])


def test_tickets_given_twice_and_tickets_that_are_not_there():
    engine = Engine(FakeDenoiser())
    one, two = engine.add(*request(0))[0], engine.add(*request(0))[0]
    with pytest.raises(KeyError, match="ticket 99"):
        engine.remove(one, 99)
    assert len(engine) == 2
    assert len(engine.remove(one, one)) == 2
    assert len(engine) == 1
    while not engine.step():
        pass
    assert engine.step() == [two]
    engine.remove(two)
    assert not engine.lanes


def test_a_broken_row_is_named_and_the_others_go_on():
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[(hidden[:, 0] == self.bad).nonzero()[:, 0]] = float("nan")
            return logits

    model = Broken(eos_bias=-50.0)
    engine = Engine(model)
    tickets = [engine.add(*request(number))[0] for number in range(5)]
    bad = tickets[3]
    row = request(3)[0]
    model.bad = model.hidden(row.ids[:, : int(row.valid.sum())])[0, int(row.start[0]), 0]
    with pytest.raises(BrokenTicketError, match=f"in step 0 of the row with the ticket {bad}") as caught:
        engine.step()
    engine.remove(caught.value.ticket)
    done = set()
    while len(engine):
        over = engine.step()
        done |= set(over)
        engine.remove(*over)
    assert done == set(tickets) - {bad}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_that_rows_carry_is_mixed_up(seed):
    """Kept states, keys and values, candidates and growing canvases, in a real model: as if alone."""
    model, draw = tiny(shift=True), random.Random(seed)

    def row(number):
        draw = random.Random(number)
        kernel, guidance, penalty = draw.choice([5, 9]), draw.choice([0, 0, 1.5]), draw.choice([1, 1.3])
        decoder = Decoder.named(
            draw.choice(["conv", "llada-conv", "conv"]), kernel_size=kernel, top_k=4, guidance=guidance,
            repetition_penalty=penalty,
        )  # fmt: skip
        free, reuse = draw.random() < 0.5, draw.choice([None, Reuse("dual", 3), Reuse("prefix", 4)])
        pace = {"steps": None, "rate": 2.0} if free else {"steps": 6}
        grow = free or draw.random() < 0.5
        how = Settings(eos_id=0, mask_id=TINY_MASK, grow=grow, reuse=reuse, fit=30, **pace)
        ids = torch.full((1, draw.randint(12, 30)), TINY_MASK)
        ids[0, : draw.randint(1, 6)] = number % 50 + 3
        return Canvas.of(ids, TINY_MASK, torch.tensor([number]), ahead=how.ahead(decoder)), decoder, how

    engine, numbers, found = Engine(model), iter(range(seed, seed + 9)), {}
    at_work = {}
    while len(found) < 9:
        for number in itertools.islice(numbers, draw.randint(0, 3) if at_work else 2):
            at_work[engine.add(*row(number))[0]] = number
        over = engine.step()
        for ticket, canvas in zip(over, engine.remove(*over), strict=True):
            found[at_work.pop(ticket)] = canvas
    for number, canvas in found.items():
        alone_, decoder, how = row(number)
        with torch.no_grad():
            for _ in denoise(model, alone_, decoder, how):
                pass
        size = min(alone_.ids.shape[1], canvas.ids.shape[1])
        assert torch.equal(canvas.ids[0, :size], alone_.ids[0, :size])
        assert int(canvas.model_calls[0]) == int(alone_.model_calls[0])
