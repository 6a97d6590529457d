"""Rows that come and go: nobody's text depends on who else is there."""

import copy
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Decoder, Request, Sampler
from decoding.canvas import Row
from decoding.engine import Engine
from decoding.presets import PRESETS
from decoding.request import Reuse
from decoding.reveal import RevealRule
from decoding.reveal.threshold import Threshold
from dlm.errors import ConfigError, DLMError
from tests.decoding.rig import LEARNT, MASK, canvas_of, decode, plan_of, rows
from tests.dlm.test_attention import MASK as TINY_MASK
from tests.dlm.test_attention import tiny
from tests.fakes import FakeDenoiser, FakeTokenizer

SMALL = {
    "semi-ar": {"block_size": 8},
    "dilated": {"block_size": 8},
    "conv": {"kernel_size": 9},
    "llada-conv": {"kernel_size": 7},
    "dprm": {"kernel_size": 7, **LEARNT},
}


def request(number):
    """A row and its plan; no two neighbours are alike."""
    name = list(PRESETS)[number % len(PRESETS)]
    decoder = Decoder.named(name, **SMALL.get(name, {}))
    free = number % 3 == 1 and not decoder.timed
    pace = {"rate": 1.5 + number % 2, "grow": True} if free else {"steps": 6 + number % 5}
    plan = plan_of(decoder, fit=40, **pace)
    ids = rows(FakeDenoiser(), [number % 6 + 1], 20 + number % 17)[0].tolist()
    return Row(ids, number % 6 + 1), plan, number


def alone(number, **model):
    row, plan, seed = request(number)
    return decode(FakeDenoiser(**model), torch.tensor([row.ids]), plan, [seed])


def engine_of(model, **limits):
    return Engine(model, FakeTokenizer(), **limits)


def run(engine):
    """All rows until they are finished."""
    found = {}
    while len(engine):
        found.update({u.ticket: u.canvas for u in engine.step() if u.finished})
    return found


def some(engine, draw):
    """Tickets of a few rows at work, or of all."""
    tickets = list(engine.lengths())
    return draw.sample(tickets, draw.randint(1, len(tickets))) if tickets and draw.random() < 0.7 else None


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
    arrivals=st.lists(st.integers(0, 12), min_size=2, max_size=16),
    leaving=st.lists(st.integers(0, 12), max_size=3),
    bias=st.sampled_from([-50.0, 0.5]),
    limit=st.sampled_from([None, 1, 3]),
    apart=st.none() | st.randoms(use_true_random=False),
)
def test_rows_that_come_and_go_are_bit_identical_to_rows_alone(arrivals, leaving, bias, limit, apart):
    """Whoever joins and leaves, and whichever of the rows step together."""
    engine = engine_of(FakeDenoiser(eos_bias=bias), max_rows=limit)
    due = sorted((turn, number) for number, turn in enumerate(arrivals))
    at_work, done, turn = {}, {}, 0
    while due or at_work:
        while due and due[0][0] <= turn:
            number = due.pop(0)[1]
            at_work[engine.submit(*request(number))] = number
        for update in engine.step(some(engine, apart) if apart else None):
            if update.finished:
                done[at_work.pop(update.ticket)] = update.canvas
        if turn in leaving and at_work:
            ticket = min(at_work)
            left = engine.remove(ticket)
            assert int(left.step[0]) <= turn + 1
            at_work.pop(ticket)
        assert len(engine) == len(at_work)
        assert limit is None or engine.running <= limit
        turn += 1
    for number, canvas in done.items():
        same(canvas, alone(number, eos_bias=bias))


@pytest.mark.parametrize("bias", [-50.0, 0.5])
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_row_may_move_to_a_fresh_engine_after_every_step(name, bias):
    """A row is its canvas: what an engine has computed is a cache, and may be dropped."""
    decoder = Decoder.named(name, **SMALL.get(name, {}))
    paces = [{"steps": 9}] if decoder.timed else [{"steps": 9}, {"rate": 1.6, "grow": True}]
    if not decoder.reveal.paced:
        paces = [{}, {"grow": True}]
    model = FakeDenoiser(eos_bias=bias)
    for pace, seed in itertools.product(paces, range(4)):
        plan = plan_of(decoder, fit=40, **pace)
        ids = rows(model, [2 + seed], 34)
        stays = decode(model, ids, plan, [seed])
        moves, canvas = canvas_of(ids, plan, [seed]), None
        while canvas is None:
            engine = engine_of(model)
            engine.add(moves, plan)
            (update,) = engine.step()
            canvas = update.canvas if update.finished else None
            moves = moves if update.finished else engine.remove(update.ticket)
        assert torch.equal(canvas.ids, stays.ids)
        assert torch.equal(canvas.reveal_step, stays.reveal_step)
        torch.testing.assert_close(canvas.confidence, stays.confidence, rtol=0, atol=0, equal_nan=True)


def test_a_row_among_31_others_is_the_row_alone():
    engine = engine_of(FakeDenoiser(eos_bias=0.5))
    tickets = [engine.submit(*request(number)) for number in range(32)]
    found = run(engine)
    for number, ticket in enumerate(tickets):
        same(found[ticket], alone(number, eos_bias=0.5))


def test_all_rows_share_one_model_call_a_step():
    model = FakeDenoiser(eos_bias=-50.0)
    engine = engine_of(model)
    for number in range(12):
        row, _, seed = request(number)
        engine.submit(row, plan_of(Decoder.named("llada", temperature=float(number % 2)), 4), seed)
    engine.step()
    assert (model.calls, model.rows) == (1, 12)


def test_only_rows_that_are_named_take_a_step():
    model = FakeDenoiser(eos_bias=-50.0)
    engine = engine_of(model)
    plans = [plan_of(Decoder.named("llada", temperature=float(n % 2)), 8) for n in range(4)]
    tickets = [engine.submit(request(n)[0], plan, n) for n, plan in enumerate(plans)]
    sizes = [len(request(n)[0].ids) for n in range(4)]
    assert engine.lengths() == dict(zip(tickets, sizes, strict=True)) | {}
    assert [update.ticket for update in engine.step({tickets[1], tickets[2]})] == [tickets[2], tickets[1]]
    assert (model.calls, model.rows) == (1, 2)
    assert [int(engine.canvas(ticket).step[0]) for ticket in tickets] == [0, 1, 1, 0]
    assert engine.step(set()) == []


def test_what_does_not_fit_leaves_the_engine_as_it_was():
    engine = engine_of(FakeDenoiser(), max_positions=60)
    row, _, _ = request(0)
    blocks = Decoder.named("semi-ar", block_size=2)
    with pytest.raises(ConfigError, match="too few"):
        engine.submit(row, plan_of(blocks, 2))
    with pytest.raises(ConfigError, match="90 positions is longer than the engine's limit of 60"):
        engine.submit(Row([1] + [MASK] * 89, 1), plan_of("llada", 30))
    assert len(engine) == 0
    ticket = engine.submit(row, plan_of(blocks, 30))
    engine.cancel(ticket)
    for call in (engine.canvas, engine.cancel, engine.remove):
        with pytest.raises(KeyError, match="ticket 0"):
            call(ticket)
    with pytest.raises(ConfigError, match="max_rows must be a whole number of at least 1, got 0"):
        engine_of(FakeDenoiser(), max_rows=0)


def test_a_row_that_is_given_to_an_engine_is_copied():
    engine, plan = engine_of(FakeDenoiser(eos_bias=-50.0)), plan_of("llada", 4)
    canvas = canvas_of(torch.tensor([[1] + [MASK] * 9]), plan)
    for copies in (1, 2):  # one alone is not joined with others
        for _ in range(copies):
            ticket = engine.add(canvas, plan)
        waiting = engine.canvas(ticket)
        run(engine)
        assert canvas.ids[0].tolist() == waiting.ids[0].tolist() == [1] + [MASK] * 9
        assert int(canvas.step) == 0


def test_a_row_with_nothing_to_write_is_finished_and_harms_no_other():
    engine, plan = engine_of(FakeDenoiser(eos_bias=-50.0)), plan_of("llada", 4)
    whole = engine.submit(Row([1, 2, 3], 1), plan)
    assert {whole: True} == {update.ticket: update.finished for update in engine.step()}
    tickets = [engine.submit(row, plan) for row in (Row([1, 2, 3], 1), Row([1] + [MASK] * 9, 1))]
    finished = run(engine)
    assert finished[tickets[0]].ids[0, :3].tolist() == [1, 2, 3]
    assert MASK not in finished[tickets[1]].ids[0].tolist()


def test_rows_wait_in_order_for_rows_and_positions():
    engine = engine_of(FakeDenoiser(eos_bias=-50.0), max_rows=3, max_positions=70)
    tickets = [engine.submit(Row([1] + [MASK] * 29, 1), plan_of("llada", 4), i) for i in range(5)]
    seen = []
    while len(engine):
        seen.append([update.ticket for update in engine.step()])
        assert engine.running <= 2  # 30 positions each
    assert seen[0] == tickets[:2]
    assert [t for step in seen for t in step if t == tickets[4]]
    assert sorted({t for step in seen for t in step}) == tickets


def test_a_real_model_gives_the_same_texts_packed_or_alone(model, tokenizer):
    """In double precision the order of sums does not matter; in single it may, rarely (see benchmarks)."""
    exact = copy.deepcopy(model).double()
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    plan = plan_of(Decoder.named("conv", kernel_size=9), 8, eos=eos, mask=mask)
    engine, ids = Engine(exact, tokenizer), []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        given = torch.randint(5, 90, (4 + number,), generator=generator).tolist()
        ids.append(given + [mask] * (20 + 4 * number))
        engine.submit(Row(ids[-1], len(given)), plan, number)
    found = run(engine)
    for number, row in enumerate(ids):
        expected = decode(exact, torch.tensor([row]), plan, [number])
        assert torch.equal(found[number].ids[0, : len(row)], expected.ids[0])


def test_a_broken_row_fails_alone_and_the_others_go_on():
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[(hidden[:, 0] == self.bad).nonzero()[:, 0]] = float("nan")
            return logits

    model = Broken(eos_bias=-50.0)
    engine = engine_of(model)
    tickets = [engine.submit(*request(number)) for number in range(5)]
    canvas = engine.canvas(tickets[3])
    shown = canvas.ids[:, : int(canvas.valid.sum())]
    model.bad = model.hidden(shown)[0, int(canvas.start[0]), 0]
    updates = {update.ticket: update for update in engine.step()}
    broken = updates[tickets[3]]
    assert broken.finished
    assert broken.output is None
    assert "NaN in step 0" in str(broken.error)
    assert all(u.error is None for t, u in updates.items() if t != tickets[3])
    rest = run(engine)
    assert set(rest) == set(tickets) - {tickets[3]}
    for ticket, row in rest.items():
        same(row, alone(ticket, eos_bias=-50.0))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_that_rows_carry_is_mixed_up(seed):
    """Kept states, keys and values, candidates and growing canvases, in a real model: as if alone."""
    model, draw = tiny(shift=True), random.Random(seed)

    def row(number):
        draw = random.Random(number)
        kernel, guidance, penalty = draw.choice([5, 9]), draw.choice([0, 0, 1.5]), draw.choice([1, 1.3])
        decoder = Decoder.named(
            draw.choice(["conv", "llada-conv", "stability"]), kernel_size=kernel, top_k=4, guidance=guidance,
            repetition_penalty=penalty,
        )  # fmt: skip
        free, reuse = draw.random() < 0.5, draw.choice([None, Reuse("dual", 3), Reuse("prefix", 4)])
        pace = {"rate": 2.0} if free else {"steps": 6}
        pace = pace if decoder.reveal.paced or not free else {}
        plan = plan_of(
            decoder, eos=0, mask=TINY_MASK, grow=free or draw.random() < 0.5, reuse=reuse, fit=30, **pace
        )
        given = [number % 50 + 3] * draw.randint(1, 6)
        return Row(given + [TINY_MASK] * (draw.randint(12, 30) - len(given)), len(given)), plan, number

    engine, numbers, found, at_work = engine_of(model), iter(range(seed, seed + 9)), {}, {}
    while len(found) < 9:
        for number in itertools.islice(numbers, draw.randint(0, 3) if at_work else 2):
            at_work[engine.submit(*row(number))] = number
        for update in engine.step(some(engine, draw)):
            if update.finished:
                found[at_work.pop(update.ticket)] = update.canvas
    for number, canvas in found.items():
        alone_row, plan, key = row(number)
        expected = decode(model, torch.tensor([alone_row.ids]), plan, [key])
        size = min(expected.ids.shape[1], canvas.ids.shape[1])
        assert torch.equal(canvas.ids[0, :size], expected.ids[0, :size])
        assert int(canvas.model_calls[0]) == int(expected.model_calls[0])


# ---- text --------------------------------------------------------------------------------------------


def test_confirmed_text_is_never_taken_back_and_ends_in_the_answer():
    engine = engine_of(FakeDenoiser(eos_bias=-1.0), max_rows=4)
    paces = [{"rate": 2.0}, {"rate": 1.0}, {}]
    names = ["conv", "llada", "threshold", "editing", "semi-ar", "stability"]
    plans = [
        Request(decoder=name, max_tokens=40, stop=["ab", "qqq"], **(paces[i % 2] if i in (0, 1, 4) else {}))
        for i, name in enumerate(names)
    ]
    tickets = {}
    for plan in plans:
        for seed in range(6):
            resolved = plan.resolve(engine.model)
            tickets[engine.submit(f"prompt {seed}", resolved, seed=seed)] = (f"prompt {seed}", plan, seed)
    confirmed = dict.fromkeys(tickets, "")
    while len(engine):
        for update in engine.step():
            assert update.confirmed.startswith(confirmed[update.ticket])
            confirmed[update.ticket] = update.confirmed
            assert "ab" not in update.confirmed
            if update.finished:
                assert update.output.text == update.confirmed
                prompt, plan, seed = tickets[update.ticket]
                alone_out = Sampler(engine.model, FakeTokenizer()).generate(prompt, request=plan, seed=seed)
                assert alone_out == update.output


def test_several_threads_share_a_model():
    """Each with an engine of its own; plain, packed and partial calls meet in one model."""
    model = tiny(shift=True)
    plans = [
        plan_of(Decoder.named("conv", kernel_size=9), rate=2.0, grow=True, mask=TINY_MASK, reuse=reuse)
        for reuse in (None, Reuse("dual", 3))
    ]
    lengths = [(4, 9, 2), (7, 7, 7), (3, 11, 5)]
    batches = [[Row([i + 3] * n + [TINY_MASK] * 20, n) for i, n in enumerate(each)] for each in lengths]

    def texts(plan, batch):
        engine = engine_of(model)
        for i, row in enumerate(batch):
            engine.submit(row, plan, i)
        return {
            ticket: canvas.ids[0, : len(batch[ticket].ids)].tolist() for ticket, canvas in run(engine).items()
        }

    jobs = list(itertools.product(plans, batches))
    expected = [texts(*job) for job in jobs]

    def work(offset):
        order = [(i + offset) % len(jobs) for i in range(len(jobs))]
        return {job: texts(*jobs[job]) for job in order}

    with ThreadPoolExecutor(4) as threads:
        for answers in threads.map(work, range(4)):  # raises what a thread raised
            assert answers == dict(enumerate(expected))


def test_rows_wait_in_order_and_one_that_waits_is_cancelled_without_a_step():
    engine = engine_of(FakeDenoiser(eos_bias=-50.0), max_rows=2)
    tickets = [engine.submit(*request(number)) for number in range(8)]
    assert (engine.waiting, engine.running, len(engine)) == (8, 0, 8)
    engine.cancel(tickets[3])
    started = [update.ticket for update in engine.step()]
    assert (engine.waiting, engine.running, started) == (5, 2, tickets[:2])
    assert int(engine.canvas(tickets[4]).step) == 0  # one that waits is as it was submitted
    engine.cancel(tickets[2])
    with pytest.raises(KeyError, match=str(tickets[2])):
        engine.cancel(tickets[2])
    finished = []
    while len(engine):
        assert engine.running <= 2
        updates = engine.step()
        started += [update.ticket for update in updates if update.ticket not in started]
        finished += [update.ticket for update in updates if update.finished]
    assert sorted(finished) == started == [tickets[i] for i in (0, 1, 4, 5, 6, 7)]


def test_a_row_that_has_more_blocks_than_steps_is_refused_when_it_is_submitted():
    engine = engine_of(FakeDenoiser())
    plan = plan_of(Decoder.named("semi-ar", block_size=4), steps=3)
    with pytest.raises(ConfigError, match="3 steps are too few for 7 blocks"):
        engine.submit(Row([5, 5] + [MASK] * 28, 2), plan)
    assert len(engine) == 0


def test_a_ticket_that_is_named_twice_is_cancelled_once():
    engine = Engine(FakeDenoiser(), FakeTokenizer())
    plan = Request(max_tokens=5).resolve(engine.model)
    tickets = [engine.submit("abc", plan) for _ in range(3)]
    engine.cancel(tickets[0], tickets[0])
    engine.step()
    engine.cancel(tickets[1], tickets[1])
    assert len(engine) == 1


@dataclass(frozen=True)
class Wide(RevealRule):
    """A rule with a defect: its score has three numbers for a position."""

    def score(self, logits, choice, state, tokens):
        return logits[:, :3].float()


@dataclass(frozen=True)
class Fussy(Threshold):
    """A rule that fails where the first token of a row is an odd one."""

    def decide(self, view):
        if bool((view.ids[:, 0] % 2 == 1).any()):
            raise KeyError("odd")
        return super().decide(view)


@pytest.mark.parametrize("first", [True, False])
def test_a_rule_that_fails_ends_its_rows_and_no_others(first):
    model = FakeDenoiser(eos_bias=-50.0)
    broken = Request(decoder=Decoder(reveal=Wide()), max_tokens=8).resolve(model)
    row, plan, seed = request(1)
    engine = engine_of(model)
    submitted = [(row, broken, 0), (row, plan, seed)][:: 1 if first else -1]
    tickets = dict(zip(("broken", "good") if first else ("good", "broken"),
                       [engine.submit(*each) for each in submitted], strict=True))  # fmt: skip
    updates = {update.ticket: update for update in engine.step()}
    failed = updates[tickets["broken"]]
    assert failed.finished
    assert failed.output is None
    assert "Wide.score must return a number" in str(failed.error)
    assert len(engine) == 1
    canvas = run(engine)[tickets["good"]]
    assert torch.equal(canvas.ids, alone(1, eos_bias=-50.0).ids)


def test_of_rows_decoded_together_those_that_fail_alone_end():
    model = FakeDenoiser(eos_bias=-50.0)
    plan = Request(decoder=Decoder(reveal=Fussy()), max_tokens=8).resolve(model)
    engine = engine_of(model)
    made = [Row([first, 5, 6, *[MASK] * 8], 3) for first in (4, 7, 8)]
    tickets = [engine.submit(row, plan, 3) for row in made]
    (failed,) = engine.step()  # the others take no step beside it
    assert failed.ticket == tickets[1]
    assert isinstance(failed.error, KeyError)
    with pytest.raises(KeyError, match="odd"):
        failed.raise_error("row 1")
    assert failed.error.__notes__ == ["row 1"]
    found = run(engine)
    for row, ticket in ((made[0], tickets[0]), (made[2], tickets[2])):
        other = engine_of(model)
        number = other.submit(row, plan, 3)
        single = run(other)[number]
        assert torch.equal(found[ticket].ids, single.ids)
        assert torch.equal(found[ticket].model_calls, single.model_calls)


def test_a_row_of_another_kind_of_plan_is_refused_and_harms_no_other():
    model = FakeDenoiser(eos_bias=-50.0)
    plans = {
        "plain": Request(decoder="conv", max_tokens=12).resolve(model),
        "noted": Request(decoder="conv", max_tokens=12, top_logprobs=2).resolve(model),
        "stable": Request(decoder="stability", max_tokens=12).resolve(model),
    }
    for made, wanted in itertools.permutations(plans, 2):
        engine = engine_of(model)
        canvas = engine.remove(engine.submit("ab", plans[made], 1))
        good = engine.submit("cd", plans[wanted], 1)
        with pytest.raises(ConfigError, match="keeps other things of a row"):
            engine.add(canvas, plans[wanted])
        assert list(run(engine)) == [good]
    canvas = canvas_of(torch.tensor([[3, MASK], [4, MASK]]), plans["plain"])
    with pytest.raises(ConfigError, match="one row at a time, got a canvas of 2"):
        engine.add(canvas, plans["plain"])


def test_tickets_and_numbers_that_are_none_are_refused():
    model = FakeDenoiser()
    engine = engine_of(model)
    ticket = engine.submit("ab", Request(decoder="conv", max_tokens=8).resolve(model))
    engine.step()
    with pytest.raises(KeyError, match="no row has the ticket 99"):
        engine.step([ticket, 99])
    with pytest.raises(KeyError, match="no row at work has the ticket 99"):
        engine.predictions([ticket, 99])
    with pytest.raises(ConfigError, match="draws must be"):
        engine.predictions([ticket], draws=0)
    with pytest.raises(ConfigError, match=r"2 copies need as many keys, got \[1\]"):
        engine.fork([ticket, ticket], torch.tensor([5]))
    assert len(engine) == 1


def test_a_row_that_waits_takes_no_step_and_has_no_prediction_yet():
    model = FakeDenoiser(eos_bias=-50.0)
    plan = Request(decoder="conv", max_tokens=8).resolve(model)
    engine = engine_of(model, max_rows=1)
    working, waiting = (engine.submit(text, plan) for text in ("ab", "cd"))
    assert list(engine.predictions([working])) == [working]  # it is taken up for that
    with pytest.raises(KeyError, match=f"no row at work has the ticket {waiting}"):
        engine.predictions([waiting])
    assert engine.step([waiting]) == []


def test_a_row_that_is_done_outlives_an_error_of_those_beside_it():
    @dataclass(frozen=True)
    class Together(Threshold):
        def decide(self, view):
            if len(view.ids) > 1:
                raise KeyError("several")
            return super().decide(view)

    model = FakeDenoiser(eos_bias=-50.0)
    plan = Request(decoder=Decoder(reveal=Together()), max_tokens=8).resolve(model)
    engine = engine_of(model)
    whole = engine.submit(Row([1, 2, 3], 1), plan)
    masked = [engine.submit(Row([1, 2, *[MASK] * 6], 2), plan) for _ in range(2)]
    updates = {update.ticket: update for update in engine.step()}
    assert updates[whole].error is None
    assert all(isinstance(updates[ticket].error, KeyError) for ticket in masked)
    assert len(engine) == 0


def test_an_update_is_read_before_the_next_step_or_refused():
    """A row at work is looked at where it lies; a finished one is kept."""
    engine = engine_of(FakeDenoiser())
    row, plan, seed = request(1)
    engine.submit(row, plan, seed)
    (first,) = engine.step()
    assert first.canvas.step.tolist() == [1]
    (second,) = engine.step()
    for read in (lambda: first.canvas, lambda: first.confirmed, lambda: first.event, lambda: first.partial):
        with pytest.raises(DLMError, match="the engine has taken a step since this update of row 0"):
            read()
    assert second.canvas.step.tolist() == [2]
    last = second
    while len(engine):
        (last,) = engine.step()
    engine.submit(row, plan, seed)
    engine.step()
    assert last.output is not None
    assert bool(last.canvas.done.all())
