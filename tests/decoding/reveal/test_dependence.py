"""Tokens of one call that do not attend to each other, against a slow greedy decoder."""

import itertools
from dataclasses import replace

import pytest
import torch

from decoding import Decoder, Request, Sampler
from decoding.canvas import Row
from decoding.engine import Engine
from decoding.presets import PRESETS
from decoding.request import Reuse
from decoding.reveal import Quota, Separated
from decoding.reveal.dependence import EVEN_SHARES, Dependence
from decoding.reveal.separated import choose_apart
from decoding.scoring import ConflictCache
from dlm.attention_weights import AttentionWeights
from dlm.errors import ConfigError
from dlm.graphs import BucketedModel
from tests.decoding.rig import canvas_of, decode, decode_in_fresh_engines, plan_of
from tests.decoding.test_engine import run
from tests.dlm.test_attention_weights import MASK, eager, model_of, pointed
from tests.fakes import FakeDenoiser, FakeTokenizer

TAU, LAYERS = 0.06, 2
LENGTHS = [5, 9, 3]


def prompts(length=30):
    ids = torch.full((len(LENGTHS), length), MASK)
    for i, n in enumerate(LENGTHS):
        ids[i, :n] = torch.arange(n) * (i + 3) % 50 + 3
    return ids


def couplings(model, ids, dependence):
    """[L, L] bool by the definition, in Python, from the attention that transformers returns."""
    every = eager(model, ids)[-dependence.layers :].mean((0, 1)).tolist()
    size, length = model.config.block_size, len(ids)
    ends = [length if size is None else min(length, (j // size + 1) * size) for j in range(length)]
    incoming = [sum(every[q][j] for q in range(ends[j])) / ends[j] for j in range(length)]
    sinks = [incoming[j] > max(dependence.sink, EVEN_SHARES / ends[j]) for j in range(length)]
    row = [max(i - 1, 0) if model.config.shift else i for i in range(length)]
    share = [[0.0 if sinks[j] else every[row[i]][j] for j in range(length)] for i in range(length)]
    return [
        [max(share[i][j], share[j][i]) >= dependence.threshold for j in range(length)] for i in range(length)
    ]


def greedy(order, eligible, number, conflict):
    """Positions one after the other, in Python."""
    taken = []
    for position in sorted(eligible, key=lambda i: (order[i], i)):
        if len(taken) < number and not any(conflict[position][other] for other in taken):
            taken.append(position)
    return taken


def test_conflicts_are_those_of_the_definition():
    torch.manual_seed(0)
    record = AttentionWeights(torch.arange(2), torch.tensor([[3, 5, 8], [1, 2, -1]]), 2)
    record.shares, record.observers = torch.rand(2, 3, 3) * 0.2, torch.tensor([[500] * 3, [20] * 3])
    record.incoming = torch.tensor([[0.02, 0.005, 0.009], [0.02, 0.2, 0.1]])
    found = Dependence(0.1).conflicts(record)
    sinks = [[True, False, False], [False, True, False]]  # 0.01 in a long row, 3/20 in a short one
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        pays = 0.0 if sinks[b][j] else record.shares[b, i, j]
        receives = 0.0 if sinks[b][i] else record.shares[b, j, i]
        assert bool(found[b, i, j]) == (max(pays, receives) >= 0.1)


def test_positions_are_taken_in_order_and_without_conflict():
    torch.manual_seed(1)
    order = torch.randint(0, 9, (100, 20)).double()  # with ties
    eligible, number = torch.rand(100, 20) < 0.6, torch.randint(0, 12, (100,))
    conflict = torch.rand(100, 20, 20) < 0.15
    conflict = conflict | conflict.transpose(1, 2)
    taken = choose_apart(order, eligible, number, lambda first: conflict[torch.arange(100), first[:, 0]])
    for row in range(100):
        places = eligible[row].nonzero()[:, 0].tolist()
        expected = greedy(order[row].tolist(), places, int(number[row]), conflict[row].tolist())
        assert taken[row].nonzero()[:, 0].tolist() == sorted(expected)


def test_a_cache_of_conflicts_follows_its_rows():
    model = FakeDenoiser()
    canvas = canvas_of(torch.full((3, 6), model.mask_id), plan_of("llada", 3))
    cache = ConflictCache(canvas)
    found = torch.zeros(2, 2, 2, dtype=torch.bool)
    found[0] = ~torch.eye(2, dtype=torch.bool)
    cache.put(torch.tensor([0, 2]), torch.tensor([[4, 1], [3, -1]]), found)
    first = torch.tensor([[4], [0], [3]])
    expected = [[1], [], []]
    assert [row.nonzero()[:, 0].tolist() for row in cache.at(slice(None), first, 6)] == expected
    larger = torch.ones(1, 3, 3, dtype=torch.bool)
    cache.put(torch.tensor([1]), torch.tensor([[0, 1, 5]]), larger)
    cache.follow(canvas.take(torch.tensor([1, 0])), torch.tensor([1, 0]))
    both = cache.at(torch.tensor([0, 1]), torch.tensor([[0], [1]]), 6)
    assert [row.nonzero()[:, 0].tolist() for row in both] == [[0, 1, 5], [4]]


def reference(model, row, dependence, rate):
    """The most confident first, at a rate, no two of a call in conflict: a slow loop over one row."""
    row, step, owed, steps = row.clone(), 0, 0, {}
    while masked := (row == MASK).nonzero()[:, 0].tolist():
        best = model.logits(model.hidden(row[None])[0]).float().softmax(1).max(1)
        order = [-float(value) for value in best.values]
        number = min(int((step + 1) * rate) - int(step * rate), len(masked)) + owed
        taken = greedy(order, masked, number, couplings(model, row, dependence))
        owed = number - len(taken)
        for i in taken:
            row[i], steps[i] = best.indices[i], step
        step += 1
    return row, steps


def both(threshold, /, **options):
    return Decoder.named(**options), Decoder.named(**options, conflict=threshold, conflict_layers=LAYERS)


@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_texts_are_those_of_the_slow_loop(shift):
    model = model_of("llama", shift=shift)
    plain, apart_ = (
        plan_of(decoder, rate=3.0, mask=MASK, early_exit=False, eos_fill=False)
        for decoder in both(TAU, name="llada")
    )
    for row in prompts():
        expected, steps = reference(model, row, Dependence(TAU, LAYERS), 3.0)
        got = decode(model, row[None], apart_)
        assert got.ids[0].tolist() == expected.tolist()
        assert [got.reveal_step[0, i] for i in steps] == list(steps.values())
        assert decode(model, row[None], plain).reveal_step.tolist() != got.reveal_step.tolist()


WAYS = [
    ("llada-conv", {"kernel_size": 9}, {"rate": 3.0, "grow": True}),
    ("conv", {"kernel_size": 9, "top_k": 5}, {"rate": 3.0, "grow": True}),
    ("categorical", {}, {"steps": 7}),
    ("categorical", {}, {"rate": 4.0}),
    ("semi-ar", {"block_size": 8}, {"steps": 9}),
    ("sliding", {"size": 9}, {"steps": 9}),
    ("sliding", {"size": 20, "temperature": 2.0}, {"steps": 70}),
    ("entropy-bound", {"gamma": 9.0}, {}),
    ("dilated", {"block_size": 8}, {}),
    ("editing", {"tau": 0.05, "tau_edit": 0.2}, {}),
    ("remdm", {}, {"steps": 12}),
]
MODELS = [(False, None), (True, None), (False, 8), (True, 8)]


def on_two_models(ways):
    """Each way with two models; between them they have a shift and none, blocks and none."""
    cases = [(way, *MODELS[place]) for i, way in enumerate(ways) for place in (i % 2, 3 - i % 2)]
    names = ["-".join(map(str, (way[0], *way[2].values(), *model))) for way, *model in cases]
    return pytest.mark.parametrize(("way", "shift", "block_size"), cases, ids=names)


def plans_of(model, name, options, pace, threshold=TAU):
    """Without and with conflicts; None where the decoder is none for the model."""
    try:
        return [
            plan_of(decoder.fitted(30, model.spec), mask=MASK, **pace)
            for decoder in both(threshold, name=name, **options)
        ]
    except ConfigError:
        return None


@on_two_models(WAYS)
@torch.inference_mode()
def test_texts_do_not_depend_on_company_or_on_what_is_cached(way, shift, block_size):
    """Rows alone, together, in another engine after each step, packed, padded, and blocks in part."""
    model = model_of("llama", shift=shift, block_size=block_size)
    plans = plans_of(model, *way)
    if plans is None:
        return
    plan, rows = plans[1], prompts()
    alone = [decode(model, row[None], plan, [seed]) for seed, row in enumerate(rows)]
    together = decode(model, rows, plan, range(3))
    padded = decode(Without(model, "packed"), rows, plan, range(3))
    whole = decode(Without(model, "partial"), rows, plan, range(3))
    for seed, row in enumerate(rows):
        canvas = decode_in_fresh_engines(model, row, plan, seed)
        for got, at in ((together, seed), (padded, seed), (whole, seed), (canvas, 0)):
            assert got.ids[at].tolist() == alone[seed].ids[0].tolist()
            assert got.reveal_step[at].tolist() == alone[seed].reveal_step[0].tolist()


class Without:
    """A model without one of its capabilities."""

    def __init__(self, model, capability):
        self.model, self.capabilities = model, model.capabilities - {capability}

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, (way[0], *way[2].values()))))
@torch.inference_mode()
def test_a_threshold_that_is_never_reached_changes_nothing(way):
    for shift, block_size in MODELS:
        model = model_of("llama", shift=shift, block_size=block_size)
        plans = plans_of(model, *way, threshold=1.0)
        if plans is not None:
            plain, wrapped = (decode(model, prompts(), plan, range(3)) for plan in plans)
            assert plain.ids.tolist() == wrapped.ids.tolist()
            assert plain.reveal_step.tolist() == wrapped.reveal_step.tolist()


@torch.inference_mode()
def test_requests_with_other_layers_and_without_share_a_call():
    model, calls = model_of("llama"), []
    decoders = [
        Decoder.named("llada", **more)
        for more in ({}, *({"conflict": TAU, "conflict_layers": n} for n in (1, 3)))
    ]
    plans = [plan_of(decoder, rate=3.0, mask=MASK) for decoder in decoders]
    rows = [Row(row.tolist(), n) for row, n in zip(prompts(), LENGTHS, strict=True)]
    engine = Engine(model, FakeTokenizer())
    tickets = {engine.submit(row, plan): (row, plan) for row, plan in zip(rows, plans, strict=True)}
    count = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    canvases = run(engine)
    count.remove()
    assert len(calls) == max(int(canvas.model_calls[0]) for canvas in canvases.values())
    for ticket, (row, plan) in tickets.items():
        alone = decode(model, torch.tensor([row.ids]), plan, [0])
        assert alone.ids.tolist() == canvases[ticket].ids.tolist()


@pytest.mark.parametrize("name", ["conv", "llada-conv", "top-k"])
def test_the_pace_holds_on_average(model, tokenizer, name):
    sampler = Sampler(pointed(model), tokenizer)
    plain = Request(decoder=name, rate=2.0, max_tokens=150, eos_fill=False)
    cautious = replace(plain, options={"conflict": TAU})
    outputs = [sampler.generate([f"copy: {i}" for i in range(8)], request=each) for each in (plain, cautious)]
    pace = [sum(len(o.reveal_step) for o in each) / sum(o.steps for o in each) for each in outputs]
    assert pace[1] == pytest.approx(pace[0], rel=0.06)
    assert [o.reveal_step for o in outputs[0]] != [o.reveal_step for o in outputs[1]]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_off_is_the_rule_itself(name):
    unverified = {"verify": 0} if name == "wino" else {}
    rule = Decoder.named(name, **unverified).reveal
    assert not isinstance(rule, Separated)
    for gap in (1, 2):
        wrapped = Decoder.named(name, conflict=0.07, gap=gap, **unverified).reveal
        assert wrapped == Separated(rule, gap, Dependence(0.07, 4))


def test_what_cannot_be_is_refused_in_a_line(model, tokenizer):
    for bad, words in (
        ({"conflict": -0.1}, "conflict must lie in"),
        ({"conflict": 1.5}, "conflict must lie in"),
        ({"conflict": "x"}, "must be a number"),
        ({"conflict": 0.07, "conflict_layers": 0}, "conflict_layers must be a whole number"),
        ({"conflict_layers": 2}, "give conflict"),
    ):
        with pytest.raises(ConfigError, match=words):
            Decoder.named("conv", **bad)
    decoder = Decoder.named("llada", conflict=0.07)
    with pytest.raises(ConfigError, match="give no reuse"):
        plan_of(decoder, rate=2.0, reuse=Reuse())
    with pytest.raises(ConfigError, match="the option conflict needs a model that gives its attention"):
        decode(FakeDenoiser(), torch.full((1, 4), 22), plan_of(decoder, rate=2.0))
    with pytest.raises(ConfigError, match="the option conflict needs a model that gives its attention"):
        Sampler(BucketedModel(model, graphs=False), tokenizer).generate("a", decoder=decoder)
    assert Separated(Quota(), 1, Dependence(0.07)).with_given_pace() == Separated(
        Quota(), 1, Dependence(0.07)
    )
