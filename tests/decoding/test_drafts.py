"""Drafts: the same texts in fewer calls, and the states of rows that are not there yet."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from decoding import Decoder, Request, Sampler
from decoding.canvas import Canvas
from decoding.drafts import LEAST_CHANCE, DraftedRow, likeliest_drafts
from decoding.engine import Engine
from decoding.presets import PRESETS
from decoding.reveal import Quota
from decoding.step import Batch, denoise, raise_first, run_work
from decoding.window import Full
from dlm.errors import ConfigError
from tests.decoding.rig import LEARNT, canvas_of, decode, plan_of, rows
from tests.dlm.test_attention import MASK as TINY_MASK
from tests.dlm.test_attention import tiny
from tests.fakes import FakeDenoiser, FakeTokenizer

SMALL = {"semi-ar": {"block_size": 8}, "dilated": {"block_size": 8}, "dprm": LEARNT}
WITHOUT = [name for name in sorted(PRESETS) if not Decoder.named(name, **SMALL.get(name, {})).reveal.requires]
RECORDS = ("ids", "reveal_step", "confidence", "step", "revision", "alternatives")


class Sure(FakeDenoiser):
    """Says of a position the same whatever the row is, and is certain of it."""

    def __init__(self, **given):
        super().__init__(context=False, **given)

    def logits(self, hidden):
        return super().logits(hidden) * 20


class Unsure(FakeDenoiser):
    """As `Sure`, but the token is another one where the token before it is even: half of the drafts fail."""

    def hidden(self, input_ids, attention_mask=None):
        states = super().hidden(torch.zeros_like(input_ids), attention_mask)
        before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], 1)
        return states + ((before % 2 == 0) & (before != self.mask_id))[..., None]

    def packed_hidden(self, ids, lengths):
        return torch.cat([self.hidden(row[None])[0] for row in ids.split(lengths)])

    def logits(self, hidden):
        return super().logits(hidden) * 4


def sharp(shift=False):
    """A small model whose tokens look much alike: often sure, and not always for long."""
    model = tiny(shift=shift)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 4)
    embeddings = model.get_input_embeddings().weight.data
    embeddings += 2 * embeddings[:1].clone()
    return model


def blocks(shift, causal):
    model = sharp(shift)
    model.config.block_size, model.config.causal_context = 4, causal
    return model


MODELS = {
    "all in sight": sharp,
    "all in sight, shift": lambda: sharp(True),
    "blocks": lambda: blocks(False, False),
    "blocks, shift, causal context": lambda: blocks(True, True),
}


def prompts(mask, lengths=(5, 2, 9), size=33):
    ids = torch.full((len(lengths), size), mask)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.arange(n) * (i + 2) % 50 + 3
    return ids


def same(one, other):
    for name in RECORDS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)


@pytest.mark.parametrize("place", sorted(MODELS))
@pytest.mark.parametrize("name", WITHOUT)
def test_texts_are_the_same_with_and_without(name, place):
    model, ids = MODELS[place](), prompts(TINY_MASK)
    decoder = Decoder.named(name, **SMALL.get(name, {}))
    paces = [{"steps": 12}] if decoder.timed else [{"steps": 12}, {"rate": 2.0, "grow": True}]
    for pace in paces if decoder.reveal.paced else [{"grow": True}]:
        plan = replace(plan_of(decoder, mask=TINY_MASK, fit=33, **pace), top_logprobs=2)
        without, guessed = (decode(model, ids, replace(plan, drafts=n)) for n in (0, 3))
        same(without, guessed)
        assert (guessed.model_calls <= without.model_calls).all()


@pytest.mark.parametrize("place", sorted(MODELS))
def test_drafts_that_come_true_save_calls_in_every_kind_of_model(place):
    model, ids = MODELS[place](), prompts(TINY_MASK, (5,))
    calls = []
    for count in (0, 1, 3, 8):
        plan = plan_of("llada", rate=1.0, grow=True, mask=TINY_MASK, drafts=count)
        calls.append(int(decode(model, ids, plan).model_calls[0]))
    assert calls[0] > calls[1] >= calls[2] >= calls[3]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_where_every_draft_comes_true_a_call_writes_one_token_more_for_each(count):
    model = Sure(eos_bias=-99.0)
    plan = plan_of("llada", rate=1.0, drafts=count)
    canvas = decode(model, rows(model, [3], 30), plan)
    left = 27 - 1  # nothing has been said before the first call
    assert int(canvas.model_calls[0]) == model.calls == 1 + -(-left // (count + 1))
    same(canvas, decode(model, rows(model, [3], 30), plan_of("llada", rate=1.0)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"guidance": 1.0}, {"frequency_penalty": 0.7}])
def test_drafts_that_fail_leave_no_trace(options):
    ids = rows(Unsure(), [3, 7, 1], 40)
    found = []
    for count in (0, 4):
        model = Unsure(eos_bias=-9.0)
        plan = plan_of(
            Decoder.named("llada-conv", kernel_size=3, **options), rate=1.0, grow=True, drafts=count
        )
        canvas = decode(model, ids, plan)
        found.append((canvas, model))
    same(found[0][0], found[1][0])
    calls = [int(canvas.model_calls.sum()) for canvas, _ in found]
    assert 0.4 * calls[0] < calls[1] < 0.95 * calls[0], "some came true, and some did not"


class Coarse(Sure):
    """Many tokens are equally likely."""

    def logits(self, hidden):
        return super().logits(hidden).div(20).round() * 20


@pytest.mark.parametrize("shown", [1, 3, 6])
def test_of_equally_likely_tokens_the_same_are_noted(shown):
    model = Coarse(vocab=3000, mask_id=2999)
    plan = replace(plan_of("llada", rate=1.0, mask=2999), top_logprobs=shown)
    ids = rows(model, [3], 30)
    same(*(decode(model, ids, replace(plan, drafts=count)) for count in (0, 4)))


def test_a_row_goes_on_elsewhere_and_beside_others_as_alone():
    model = Unsure(eos_bias=-1.0)
    ids = rows(model, [3, 7, 1, 12, 5, 9], 40)
    alone = decode(model, ids, plan_of("llada-conv", rate=1.0, grow=True), range(6))
    plan = plan_of("llada-conv", rate=1.0, grow=True, drafts=6)
    same(decode(model, ids, plan, range(6)), alone)
    engines = [Engine(model, FakeTokenizer()) for _ in range(2)]
    waiting = {i: canvas_of(ids[i : i + 1], plan, [i]) for i in range(6)}
    tickets, finished = [{}, {}], {}
    for turn in itertools.count():
        engine, there, here = engines[turn % 2], tickets[turn // 3 % 2], tickets[turn % 2]
        if turn % 3 == 0 and waiting:  # they come one after the other, move, and leave when they are done
            i, canvas = waiting.popitem()
            here[engine.add(canvas, plan)] = i
        if turn % 5 == 0 and here and there is not here:
            ticket = next(iter(here))
            there[engines[turn // 3 % 2].add(engine.remove(ticket), plan)] = here.pop(ticket)
        if not any(map(len, engines)) and not waiting:
            break
        for update in engine.step():
            if update.finished:
                finished[here.pop(update.ticket)] = update.canvas
    assert sorted(finished) == list(range(6))
    for i, canvas in finished.items():
        assert torch.equal(canvas.ids[0], alone.ids[i])
    assert sum(int(canvas.model_calls[0]) for canvas in finished.values()) < int(alone.model_calls.sum())


@pytest.mark.parametrize(("count", "most"), [(3, 4), (4, 8), (6, 10)])
def test_a_call_computes_no_more_drafts_than_were_asked_for_and_none_for_more_rows(count, most):
    model = Sure(eos_bias=-99.0)
    canvas = canvas_of(rows(model, [4, 4, 4, 4], 30), plan_of("llada", rate=1.0, drafts=count))
    sizes, before = [], 0
    for _ in denoise(model, canvas, plan_of("llada", rate=1.0, drafts=count)):
        sizes.append(model.rows - before)
        before = model.rows
    assert max(sizes) == most
    assert sizes[0] == 4, "nothing has been said before the first call"


def test_rows_of_an_engine_wait_for_each_other_so_that_a_call_is_for_all():
    """Else nearly every step needs one, for some row whose drafts have failed."""
    found = []
    for count in (0, 8):
        model = Unsure(eos_bias=-99.0)
        plan = plan_of("llada", rate=1.0, drafts=count)
        ids, engine = rows(model, [4, 4, 4, 4], 34), Engine(model, FakeTokenizer())
        tickets = [engine.add(canvas_of(ids[i : i + 1], plan, [i]), plan) for i in range(4)]
        finished = {}
        while len(engine):
            finished |= {x.ticket: x.canvas for x in engine.step() if x.finished}
        found.append(([finished[ticket].ids.tolist() for ticket in tickets], model.calls))
        most = max(int(canvas.model_calls[0]) for canvas in finished.values())
        assert model.calls <= 1.15 * most
    assert found[0][0] == found[1][0]
    assert found[1][1] < 0.8 * found[0][1]


@dataclass(frozen=True)
class Waiting(Quota):
    """Writes nothing for a while."""

    def decide(self, view):
        decision = super().decide(view)
        return replace(decision, reveal=decision.reveal & (view.step >= 9)[:, None])


def test_a_row_that_writes_nothing_keeps_nobody_waiting():
    model = Sure(eos_bias=-99.0)
    ids, engine = rows(model, [3, 4], 30), Engine(model, FakeTokenizer())
    plans = [plan_of(x, rate=1.0, drafts=2) for x in (Decoder(Full(), Waiting()), "llada")]
    tickets = [engine.add(canvas_of(ids[i : i + 1], plan), plan) for i, plan in enumerate(plans)]
    for _ in range(8):
        engine.step()
    steps = [int(engine.canvas(ticket).step[0]) for ticket in tickets]
    assert min(steps) >= 3, "a step of all comes at the latest behind as many as there are drafts"


@dataclass(frozen=True)
class Failing(Quota):
    """Fails on a row of which more than so many positions are written."""

    most: int = 10

    def decide(self, view):
        if bool((view.written.sum(1) > self.most).any()):
            raise ValueError("as it does without drafts")
        return super().decide(view)


def test_a_rule_that_fails_on_a_draft_fails_when_the_row_is_there_and_alone():
    model = Sure(eos_bias=-99.0)
    ids = rows(model, [3, 4], 30)
    found = []
    for count in (0, 3):
        engine = Engine(model, FakeTokenizer())
        sound = engine.add(canvas_of(ids[:1], plan := plan_of("llada", rate=1.0, drafts=count)), plan)
        failing = plan_of(Decoder(Full(), Failing()), rate=1.0, drafts=count)
        ticket = engine.add(canvas_of(ids[1:], failing), failing)
        ends = {}
        while len(engine):
            for update in engine.step():
                if update.finished:
                    canvas = update.canvas
                    ends[update.ticket] = int(canvas.step), str(update.error), canvas.ids.tolist()
        assert ends[ticket][1] == "as it does without drafts"
        found.append((ends[sound], ends[ticket]))
    assert found[0] == found[1]


class Broken(Sure):
    """Says nothing sensible of one position."""

    def logits(self, hidden):
        broken = hidden[:, 0] == self.hidden(torch.zeros(1, 30, dtype=torch.int64))[0, 14, 0]
        return super().logits(hidden).masked_fill(broken[:, None], torch.nan)


@pytest.mark.parametrize("name", ["llada-conv", "conv"])
def test_a_row_fails_in_the_step_that_needs_what_the_model_cannot_tell(name):
    decoder = Decoder.named(name, kernel_size=3)
    found = []
    for count in (0, 3):
        model = Broken(eos_bias=-99.0)
        engine = Engine(model, FakeTokenizer())
        plan = plan_of(decoder, rate=1.0, drafts=count)
        engine.add(canvas_of(rows(model, [3], 30), plan), plan)
        updates = [update for _ in range(40) for update in engine.step()]
        found.append((len(updates), str(updates[-1].error)))
    assert found[0] == found[1]
    assert "NaN" in found[0][1]


# ---- the tree ---------------------------------------------------------------------------------------------


def tree(likely, count, ranks):
    """Drafts of rows that are written from left to right, the tokens and chances being given: the reference.

    likely: [b, L, ranks] chances of tokens 0 … ranks - 1 at each position, whatever the row.
    """
    everything = []
    for row, chances in enumerate(likely.tolist()):
        trunk = 1.0
        for depth in range(count):
            for rank in range(ranks):
                everything.append((trunk * chances[depth][rank], row, [0] * depth + [rank]))
            trunk *= chances[depth][0]
    everything.sort(key=lambda draft: -draft[0])
    chosen = [draft for draft in everything[:count] if draft[0] >= LEAST_CHANCE]
    return sorted((row, tokens) for _, row, tokens in chosen)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_drafts_are_the_likeliest_of_the_tree(count, seed):
    generator, ranks, size, length = torch.Generator().manual_seed(seed), min(count, 4), 3, 12
    likely = (
        (torch.randn(size, length, 6, generator=generator) * 2).softmax(2).sort(2, descending=True).values
    )
    plan = plan_of("llada", rate=1.0)
    canvas = canvas_of(torch.full((size, length), plan.mask_id), plan)

    def take_step(canvas: Canvas, source, rank):
        """Writes the token `rank` at the first mask, with its chance."""
        row, place = torch.arange(len(canvas)), canvas.masked.int().argmax(1)
        canvas.ids[row, place], canvas.masked[row, place] = rank, False
        canvas.reveal_step[row, place] = canvas.step
        canvas.confidence[row, place] = likely[source, place, rank].float()
        canvas.step += 1
        canvas.revision += 1
        return torch.ones(len(canvas), dtype=torch.bool)

    drafts = likeliest_drafts(canvas, count, ranks, take_step)
    got = [
        (row, ids[~masked].tolist())
        for row, ids, masked in zip(drafts.rows.tolist(), drafts.ids, drafts.masked, strict=True)
    ]
    assert sorted(got) == tree(likely, count, ranks)
    assert drafts.rows.tolist() == sorted(drafts.rows.tolist())


def test_there_is_no_draft_of_what_is_not_known_or_done_or_unlikely():
    plan = plan_of("llada", rate=1.0)
    canvas = canvas_of(torch.full((1, 4), plan.mask_id), plan)

    def step(chance=1.0, known=True, done=False, changes=True):
        def take_step(canvas, source, rank):
            canvas.reveal_step[:, 0], canvas.confidence[:, 0] = canvas.step, chance
            canvas.done[:] = done
            canvas.revision += changes
            return torch.full((len(canvas),), known)

        return take_step

    assert likeliest_drafts(canvas, 1, 1, step()) is not None
    assert likeliest_drafts(canvas, 1, 1, step(changes=False)) is None
    assert likeliest_drafts(canvas, 1, 1, step(known=False)) is None
    assert likeliest_drafts(canvas, 1, 1, step(done=True)) is None
    assert likeliest_drafts(canvas, 1, 1, step(LEAST_CHANCE / 2)) is None
    assert int(canvas.revision[0]) == 0, "the row itself stays as it is"


def test_a_drafted_row_is_its_ids_and_covers_its_positions():
    draft = DraftedRow(torch.tensor([4, 5, 6]), torch.tensor([False, True, True]), torch.zeros(2, 1))
    assert draft.is_of(torch.tensor([4, 5, 6]))
    assert not draft.is_of(torch.tensor([4, 5, 7]))
    assert not draft.is_of(torch.tensor([4, 5]))
    assert draft.covers(torch.tensor([False, True, False, False]))
    assert draft.covers(torch.tensor([False, True]))
    assert not draft.covers(torch.tensor([True, False, False]))


# ---- guests of a memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_guests_have_their_own_states_and_leave_nothing(shift, causal):
    """Three versions of one row in one call, and then the row alone: all as if each were a row of its own."""
    model = blocks(shift, causal)
    ids = torch.randint(1, 50, (2, 18), generator=torch.Generator().manual_seed(2))
    ids[:, 9:] = TINY_MASK
    valid = torch.ones_like(ids, dtype=torch.bool)
    memory, plain = model.new_memory(), model.new_memory()
    numbers = torch.arange(2)
    for each in (memory, plain):
        model.partial_hidden(ids, valid, valid, each, numbers)
    ids[:, 9] = torch.tensor([7, 8])
    guests = ids[[1, 0, 1]].clone()
    guests[:, 10] = torch.tensor([3, 4, 5])
    guests[2, 11] = 6  # its block is finished, and the next one is needed
    active = torch.arange(18) // 4 == 2
    active = active.expand(5, -1).clone()
    active[4] |= torch.arange(18) // 4 == 3
    every = torch.cat([ids, guests])
    together = model.partial_hidden(
        every, active, valid[[0] * 5], memory, torch.tensor([0, 1, 1, 0, 1]), guests=3
    )
    torch.testing.assert_close(together, model.hidden(every)[active])
    alone = model.partial_hidden(ids, active[:2], valid, plain, numbers)
    torch.testing.assert_close(together[: len(alone)], alone)
    for layer in plain.keys:
        torch.testing.assert_close(memory.keys[layer], plain.keys[layer])
        torch.testing.assert_close(memory.values[layer], plain.values[layer])


# ---- from outside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_forks_and_predictions_are_what_they_are_without(guidance):
    """Also with guidance in a block-causal model, whose second cache is shown other ids."""
    model, ids = blocks(True, True), prompts(TINY_MASK, (5, 9))
    decoder = Decoder.named("llada-conv", kernel_size=5, temperature=0.3, guidance=guidance)
    found = []
    for count in (0, 6):
        plan = plan_of(decoder, rate=1.0, grow=True, mask=TINY_MASK, drafts=count)
        batch = Batch(model, canvas_of(ids, plan), plan)
        predicted: list[torch.Tensor] = []
        for step in range(12):
            works = [batch.predict(torch.tensor([1]), 2, predicted)] if step == 5 else [batch.step()]
            if step == 3:
                batch.fork(torch.tensor([0, 1]), torch.tensor([7, 8]))
            with torch.no_grad():
                raise_first(run_work(model, works))
        found.append((batch.canvas, predicted))
    same(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_samplers_take_them_for_answers_streams_and_gaps(model, tokenizer):
    full, text = Sampler(model, tokenizer), "The cat <mask:4> and a dog <mask:3> here."
    filled = [full.infill(text, decoder="llada", drafts=count) for count in (0, 4)]
    assert filled[0].token_ids == filled[1].token_ids
    assert filled[0].reveal_step == filled[1].reveal_step
    model, tokenizer = Unsure(eos_bias=-1.0), FakeTokenizer()
    sampler = Sampler(model, tokenizer)
    plain = sampler.generate(["one", "another"], decoder="llada", rate=1.0, max_tokens=20, top_logprobs=2)
    guessed = sampler.generate(
        ["one", "another"], decoder="llada", rate=1.0, max_tokens=20, top_logprobs=2, drafts=4
    )
    assert [x.token_ids for x in guessed] == [x.token_ids for x in plain]
    assert [x.top_logprobs for x in guessed] == [x.top_logprobs for x in plain]
    assert sum(x.model_calls for x in guessed) < sum(x.model_calls for x in plain)
    streams = [
        list(sampler.stream("one", decoder="llada", rate=1.0, max_tokens=20, drafts=n)) for n in (0, 4)
    ]
    assert [x.token_ids for x in streams[0]] == [x.token_ids for x in streams[1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drafts": -1}, "drafts must be a whole number, not negative, got -1"),
        ({"drafts": 17}, "drafts must be at most 16, got 17"),
        ({"drafts": 2, "reuse": "dual"}, "drafts do not go with reuse"),
        ({"drafts": 2, "options": {"verify": 0.5}}, "drafts do not go with .* verify"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Request.of(**given).resolve(tiny())
