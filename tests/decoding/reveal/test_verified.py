"""Tokens that are verified by shadows, against the published loop and in every company."""

import itertools

import pytest
import torch

from decoding import Decoder, Request, Sampler
from decoding.canvas import Row
from decoding.engine import Engine
from decoding.presets import PRESETS
from decoding.request import Reuse
from decoding.reveal import Quota, Stability, StepView, Verified, WideIn
from decoding.reveal.stability import TRACKED
from dlm.errors import ConfigError
from eval.path import path_costs
from tests.decoding.reveal.test_dependence import Without, on_two_models, prompts
from tests.decoding.rig import canvas_of, decode, decode_in_fresh_engines, plan_of
from tests.dlm.test_attention_weights import MASK, model_of
from tests.dlm.test_shadows import explicit
from tests.fakes import FakeDenoiser, FakeTokenizer


def sure(model, factor=0.35):
    """The model with logits spread so that some of its probabilities are high and some are not."""
    with torch.no_grad():
        model.lm_head.weight.mul_(factor / model.lm_head.weight.std())
    return model


def published(model, row, tau, back, size):
    """The loop of WINO over one row, at temperature 0, block after block; (row, calls).

    In Python and with an explicit mask for each shadow. Tokens before the block are never verified.
    """
    row, calls = row.clone(), 0
    start = row.tolist().index(MASK)
    for begin in range(start, len(row), size):
        block = range(begin, min(begin + size, len(row)))
        last = 30
        while masked := [i for i in block if row[i] == MASK]:
            most = min(max(int(len(masked) * 0.7), 5), 20)
            best = model.logits(model.hidden(row[None])[0]).softmax(1).max(1)
            order = sorted(masked, key=lambda i: -float(best.values[i]))
            taken = [i for i in order if best.values[i] > tau][:most] or order[:1]
            worth = {i: leave_one_out(model, row, i) for i in block if row[i] != MASK}
            calls += 1
            unlikely = sorted((i for i in worth if worth[i] < back), key=worth.get)
            unlikely = unlikely[: max(last - 1, 0)] if len(taken) > 1 else []
            for i in taken:
                row[i] = best.indices[i]
            for i in unlikely:
                row[i] = MASK
            last = len(taken)
    return row, calls


def leave_one_out(model, row, position):
    """Probability of the token at a position, by a forward pass that does not see it."""
    return float(model.logits(explicit(model, row, position)).softmax(0)[row[position]])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [8, 21])
@torch.inference_mode()
def test_the_decoder_is_the_published_loop(size, shift):
    model, remasked = sure(model_of("llama", shift=shift)), 0
    for row in prompts(21):
        for tau, back in ((0.3, 0.5), (0.2, 0.9)):
            decoder = Decoder.named("wino", block_size=size, tau=tau, verify=back)
            got = decode(model, row[None], plan_of(decoder, mask=MASK, eos_fill=False))
            expected, calls = published(model, row, tau, back, size)
            assert got.ids[0].tolist() == expected.tolist()
            assert int(got.model_calls) == calls
            plain = Decoder.named("wino", block_size=size, tau=tau, verify=0)
            without = decode(model, row[None], plan_of(plain, mask=MASK, eos_fill=False, early_exit=False))
            remasked += int(got.model_calls) - int(without.model_calls)
    assert remasked > 0


def test_the_least_likely_go_back_and_fewer_than_were_written():
    torch.manual_seed(0)
    masked = torch.zeros(60, 12, dtype=torch.bool)
    masked[:, 8:] = True
    fresh, accepted = torch.rand(60, 12) < 0.5, torch.randint(0, 6, (60,))
    fresh &= ~masked
    likelihood = torch.rand(60, 12)
    view = StepView(
        masked=masked,
        weight=torch.ones(60, 12),
        t=torch.ones(60),
        s=torch.zeros(60),
        quota=torch.randint(1, 3, (60,)),
        written=~masked,
        noise=lambda stream: torch.rand(60, 12),
        score=torch.rand(60, 12),
        leave_one_out=likelihood,
        state={"fresh": fresh, "accepted": accepted},
    )
    for every in (False, True):
        decision = Verified(Quota(), 0.5, every).decide(view)
        assert torch.equal(decision.reveal, Quota().decide(view).reveal)
        for row in range(60):
            may = [i for i in range(12) if (~masked if every else fresh)[row, i]]
            unlikely = sorted((i for i in may if likelihood[row, i] < 0.5), key=lambda i: likelihood[row, i])
            expected = unlikely[: max(int(accepted[row]) - 1, 0)]
            if every and int(view.quota[row]) < 2:
                expected = []
            assert decision.remask[row].nonzero()[:, 0].tolist() == sorted(expected)
        assert torch.equal(decision.state["fresh"], decision.reveal)
        assert torch.equal(decision.state["accepted"], decision.reveal.sum(1))


WAYS = [
    ("llada-conv", {"kernel_size": 9}, {"rate": 3.0, "grow": True}),
    ("conv", {"kernel_size": 9, "top_k": 5}, {"rate": 3.0, "grow": True}),
    ("conv", {"kernel_size": 9, "gap": 2, "conflict": 0.06}, {"rate": 3.0, "grow": True}),
    ("categorical", {}, {"steps": 7}),
    ("categorical", {}, {"rate": 4.0}),
    ("semi-ar", {"block_size": 8}, {"steps": 9}),
    ("entropy-bound", {"gamma": 9.0}, {}),
    ("dilated", {"block_size": 8}, {}),
    ("wino", {"tau": 0.2}, {}),
]


@on_two_models(WAYS)
@torch.inference_mode()
def test_texts_do_not_depend_on_company_or_on_what_is_cached(way, shift, block_size):
    """Rows alone, together, in another engine after each step, and without states of parts."""
    model, (name, options, pace) = sure(model_of("llama", shift=shift, block_size=block_size)), way
    decoder = Decoder.named(name, **{"verify": 0.8, **options}).fitted(30, model.spec)
    plan, rows = plan_of(decoder, mask=MASK, eos=12, eos_fill=shift, **pace), prompts()
    alone = [decode(model, row[None], plan, [seed]) for seed, row in enumerate(rows)]
    together = decode(model, rows, plan, range(3))
    whole = decode(Without(model, "partial"), rows, plan, range(3))
    for seed, row in enumerate(rows):
        canvas = decode_in_fresh_engines(model, row, plan, seed)
        for got, at in ((together, seed), (whole, seed), (canvas, 0)):
            assert got.ids[at].tolist() == alone[seed].ids[0].tolist()
            assert got.reveal_step[at].tolist() == alone[seed].reveal_step[0].tolist()
        assert int(together.model_calls[seed]) == int(alone[seed].model_calls)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, (way[0], *way[2].values()))))
@torch.inference_mode()
def test_a_threshold_that_is_never_reached_changes_nothing(way):
    model, (name, options, pace) = sure(model_of("llama")), way
    rows = prompts()
    plain, wrapped = (
        decode(model, rows, plan_of(Decoder.named(name, **options, verify=v), mask=MASK, fit=30,
                                    early_exit=False, **pace), range(3))
        for v in (0, 1e-300)
    )  # fmt: skip
    assert plain.ids.tolist() == wrapped.ids.tolist()
    assert plain.reveal_step.tolist() == wrapped.reveal_step.tolist()


@pytest.mark.parametrize("fill", [False, True])
@torch.inference_mode()
def test_it_ends_even_where_nothing_is_ever_likely_enough(fill):
    model, row = sure(model_of("llama")), prompts()[:1]
    masks = int((row == MASK).sum())
    for name, rate in itertools.product(("llada", "top-k"), (1.0, 2.0, 3.0, 7.0)):
        plan = plan_of(Decoder.named(name, verify=1.0), rate=rate, mask=MASK, eos=12, eos_fill=fill)
        got = decode(model, row, plan)
        assert MASK not in got.ids
        assert int(got.model_calls) <= masks


@torch.inference_mode()
def test_an_end_token_that_has_filled_stays_and_others_are_verified():
    """The model writes an end token, which it thinks impossible one call later."""

    class Regretful(FakeDenoiser):
        capabilities = frozenset({"packed", "shadows"})

        def packed_hidden(self, ids, lengths, shadows=()):
            rows = torch.stack(ids.split(lengths))
            states = self.hidden(rows).flatten(0, 1)
            for each in shadows:
                asked.extend(rows[each.rows, each.positions].tolist())
                each.states = torch.full((len(each.rows), 1), -1)
            return states

        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[:, self.eos_id] = torch.where(hidden[:, 0] == -1, -torch.inf, 20.0)
            return logits

    for fill in (True, False):
        model, asked = Regretful(), []
        ids = torch.full((1, 12), model.mask_id)
        ids[0, :2] = 5
        decoder = Decoder.named("llada", verify=0.5)
        canvas = decode(model, ids, plan_of(decoder, rate=3.0, eos_fill=fill))
        assert (model.eos_id in asked) == (not fill)
        assert (canvas.ids[0, 2:] == model.eos_id).all()  # it writes nothing else


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_off_is_the_rule_itself(name):
    rule = Decoder.named(name).reveal
    assert isinstance(rule, Verified) == (name == "wino")
    if name == "wino":
        assert rule == Verified(WideIn(0.6), 0.9, True)
        assert Decoder.named(name, verify=0).reveal == WideIn(0.6)
    elif rule.revises:
        with pytest.raises(ConfigError, match="revises them by itself"):
            Decoder.named(name, verify=0.5)
    elif name != "sliding":
        assert Decoder.named(name, verify=0.5).reveal == Verified(rule, 0.5)


def test_what_cannot_be_is_refused_in_a_line(model, tokenizer):
    for name, bad, words in (
        ("conv", {"verify": -0.1}, "verify must lie in"),
        ("conv", {"verify": 1.5}, "verify must lie in"),
        ("conv", {"verify_all": True}, "give verify"),
        ("conv", {"verify": 0.5, "verify_all": 1}, "must be true or false"),
        ("conv", {"verify": 0.5, "guidance": 1.0}, "give no guidance"),
        ("sliding", {"verify": 0.5}, "cannot go with a rule that remasks"),
    ):
        with pytest.raises(ConfigError, match=words):
            Decoder.named(name, **bad)
    decoder = Decoder.named("llada", verify=0.5)
    with pytest.raises(ConfigError, match="give no reuse"):
        plan_of(decoder, rate=2.0, reuse=Reuse())
    poor = Without(FakeDenoiser(), "shadows")
    with pytest.raises(ConfigError, match=r"the decoder wino\) needs a model that computes a mask beside"):
        decode(poor, torch.full((1, 4), 22), plan_of(decoder, rate=2.0))
    engine = Engine(poor, FakeTokenizer())
    with pytest.raises(ConfigError, match=r"the decoder wino\) needs a model that computes a mask beside"):
        engine.submit(Row([5, 22, 22], 1), plan_of(decoder, rate=2.0))
    assert len(engine) == 0
    plan = Request(decoder=decoder, window=20, rate=2.0).resolve(model)
    with pytest.raises(ConfigError, match="masks tokens again: its path has no such cost"):
        next(path_costs(model, [([1, 2], [3])], plan))
    out = Sampler(model, tokenizer).generate("copy: 1 2", decoder="wino", max_tokens=20)
    assert out.model_calls >= 1


@pytest.mark.parametrize("option", ["verify", "conflict"])
@torch.inference_mode()
def test_states_that_are_there_already_are_no_reason_to_ask_nothing(option):
    """A prediction computes the states of the next step, but no shadows and no attention."""
    model, (row, *_) = sure(model_of("llama")), prompts()
    decoder = Decoder.named("llada", **{option: {"verify": 0.8, "conflict": 0.06}[option]})
    plan = plan_of(decoder, rate=3.0, mask=MASK, eos=12)
    engine = Engine(model, FakeTokenizer())
    ticket, update = engine.add(canvas_of(row[None], plan, [0]), plan), None
    while update is None or not update.finished:
        engine.predictions([ticket])
        (update,) = engine.step()
    alone = decode(model, row[None], plan, [0])
    assert update.canvas.ids.tolist() == alone.ids.tolist()
    assert update.canvas.reveal_step.tolist() == alone.reveal_step.tolist()


def test_what_a_rule_remembers_of_a_position_begins_anew_with_its_mask():
    """A token that is taken back was no stable one: it has to prove itself from the start."""
    rule = Verified(Stability(tau=0.1, history=1), 0.5)
    state = rule.initial_state(1, 4) | {
        "stable": torch.full((1, 4), 5), "probability": torch.full((1, 4, TRACKED), 0.1),
        "fresh": torch.tensor([[True, True, False, False]]), "accepted": torch.tensor([2]),
    }  # fmt: skip
    masked = torch.tensor([[False, False, True, True]])
    score = torch.zeros(1, 4)
    view = StepView(
        masked=masked, weight=torch.ones(1, 4), t=torch.ones(1), s=torch.zeros(1), quota=torch.ones(1),
        written=~masked, noise=lambda stream: torch.zeros(1, 4), score=score, state=state, observed=state,
        leave_one_out=torch.tensor([[0.1, 0.9, torch.inf, torch.inf]]),
    )  # fmt: skip
    decision = rule.decide(view)
    assert decision.remask.tolist() == [[True, False, False, False]]
    assert decision.state["stable"][0, :2].tolist() == [0, 5]
    assert decision.state["probability"][0, 0].tolist() == [0.0] * TRACKED
