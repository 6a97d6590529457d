"""Particles against the law that they approach: every text of a small space, with its probability."""

import itertools
import math
from collections import Counter
from functools import lru_cache

import pytest
import torch

from decoding import Decoder, Engine, Sampler
from decoding.canvas import Row
from decoding.tilted.particles import drawn, effective_number, particle_keys, shares, steer, systematic
from decoding.tilted.tilt import Tilt
from dlm.errors import ConfigError, DLMError
from dlm.noise import fold, key_of
from tests.decoding.rig import decode, plan_of
from tests.fakes import FakeDenoiser, FakeTokenizer

VOCAB, MASK, EOS, LENGTH = 5, 4, 0, 3
PROMPT = [1, 2]
BETA = 0.4
PLAN = plan_of(Decoder.named("categorical"), rate=1.0, eos=EOS, mask=MASK)


def fake():
    return FakeDenoiser(vocab=VOCAB, mask_id=MASK, eos_id=EOS, eos_bias=-1.5)


def score(text):
    """A reward whose values for prefixes are no good guide to those of whole texts."""
    return 0.5 * text.count("c") - 0.4 * text.startswith("c") + 0.3 * text.endswith("b") + 0.2 * len(text)


def reward(prompts, completions):
    assert set(prompts) <= {"the prompt"}
    return [score(text) for text in completions]


def text_of(ids):
    return FakeTokenizer().decode(itertools.takewhile(lambda token: token != EOS, ids))


@lru_cache(None)
def law(row=(*PROMPT, *[MASK] * LENGTH)):
    """Probability of each text: masks are written one by one, each of them next with the same probability."""
    masked = [i for i, token in enumerate(row) if token == MASK]
    if not masked:
        return {text_of(row[len(PROMPT) :]): 1.0}
    model, total = fake(), Counter()
    p = model.logits(model.hidden(torch.tensor([row]))[0]).double().softmax(-1).tolist()
    for i in masked:
        for token in range(VOCAB - 1):
            tail = [EOS] * (len(row) - i - 1) if token == EOS else row[i + 1 :]
            for text, share in law((*row[:i], token, *tail)).items():
                total[text] += share * p[i][token] / len(masked)
    return dict(total)


def normaliser():
    return sum(p * math.exp(score(text) / BETA) for text, p in law().items())


def tilted():
    return {text: p * math.exp(score(text) / BETA) / normaliser() for text, p in law().items()}


def populations(seeds, particles, **how):
    tilt = Tilt(reward, particles, BETA, **how)
    row = Row(PROMPT + [MASK] * LENGTH, len(PROMPT), "the row")
    rows = ((row, "the prompt", seed) for seed in seeds)
    return list(steer(Engine(fake(), FakeTokenizer()), PLAN, tilt, rows, 1024))


def p_value(observed, expected, size):
    """Of a chi-square test; cells of less than 5 are taken together."""
    cells = [(observed.get(text, 0), size * p) for text, p in expected.items()]
    large = [cell for cell in cells if cell[1] >= 5]
    small = [cell for cell in cells if cell[1] < 5]
    large.append((sum(o for o, _ in small), sum(e for _, e in small)))
    assert len(large) > 2, "too few texts to compare"
    statistic = sum((o - e) ** 2 / e for o, e in large if e > 0)
    return float(torch.special.gammaincc(torch.tensor((len(large) - 1) / 2), torch.tensor(statistic / 2)))


# The law.


@pytest.mark.parametrize(("twist", "size"), [("written", 48), ("predicted", 36)])
def test_at_256_particles_the_law_is_the_tilted_one(twist, size):
    outs = populations(range(size), 256, twist=twist, threshold=1.0)
    assert all(out.resampled == [0, 1] for out in outs)
    assert p_value(Counter(out.text for out in outs), tilted(), size) > 0.01
    weight = {text: torch.zeros(size) for text in tilted()}
    for i, out in enumerate(outs):
        for text, share in zip(out.texts, out.weights, strict=True):
            weight[text][i] += share
    for text, p in tilted().items():  # by all particles, which is sharper
        assert abs(float(weight[text].mean()) - p) < 4 * float(weight[text].std()) / size**0.5 + 0.002, text


def test_the_test_of_the_law_can_tell_laws_apart():
    plain = Counter(out.text for out in populations(range(80), 1, twist="none"))
    assert p_value(plain, law(), 80) > 0.01
    assert p_value(plain, tilted(), 80) < 1e-4


@pytest.mark.parametrize(
    "how",
    [
        {"twist": "none"},
        {"twist": "written", "threshold": 0.0},
        {"twist": "written", "threshold": 1.0},
        {"twist": "written", "threshold": 0.7},
        {"twist": "predicted", "predictions": 1, "threshold": 1.0},
        {"twist": "predicted", "threshold": 0.8},
    ],
    ids=str,
)
def test_the_estimate_of_z_has_expectation_z(how):
    outs = populations(range(600), 4, **how)
    z = torch.tensor([math.exp(out.log_z) for out in outs], dtype=torch.float64)
    assert abs(float(z.mean()) - normaliser()) < 3 * float(z.std()) / len(z) ** 0.5
    assert float(z.std()) / len(z) ** 0.5 < 0.05 * normaliser(), "too rough to see a bias"
    resampled = sum(len(out.resampled) for out in outs)
    assert resampled == 0 if how["twist"] == "none" or how.get("threshold") == 0 else resampled > 20


def pairs(choose):
    """The law of one of two independent texts; `choose(first, second)` is the chance of the first."""
    total = Counter()
    for (first, p), (second, q) in itertools.product(law().items(), repeat=2):
        chance = choose(score(first), score(second))
        total[first] += p * q * chance
        total[second] += p * q * (1 - chance)
    return total


@pytest.mark.parametrize(
    ("select", "chance"),
    [
        ("sample", lambda a, b: 1 / (1 + math.exp((b - a) / BETA))),
        ("best", lambda a, b: float(a >= b)),
    ],
)
def test_without_a_twist_it_is_soft_best_of_n_and_best_of_n(select, chance):
    outs = populations(range(2000), 2, twist="none", select=select)
    assert p_value(Counter(out.text for out in outs), pairs(chance), 2000) > 0.01
    for out in outs[:50]:
        size = [math.exp(score(text) / BETA) for text in out.texts]
        assert out.rewards == [score(text) for text in out.texts]
        assert out.weights == pytest.approx([w / sum(size) for w in size])
        assert out.log_z == pytest.approx(math.log(sum(size) / 2))
        assert out.ess[-1] == pytest.approx(sum(size) ** 2 / sum(w * w for w in size))
        assert out.reward == (max(out.rewards) if select == "best" else score(out.text))
        assert out.text in out.texts


# Its parts.


@pytest.mark.parametrize(
    "weights", [[0.5, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02], [1.0], [0.0, 1.0, 0.0], [0.1] * 10]
)
def test_resampling_draws_each_particle_as_often_as_its_weight_says_on_average(weights):
    size, points = len(weights), 1000
    counts = [systematic(weights, (i + 0.5) / points) for i in range(points)]
    for i, weight in enumerate(weights):
        assert {count[i] for count in counts} <= {
            math.floor(size * weight + 1e-9),
            math.ceil(size * weight - 1e-9),
        }
        assert sum(count[i] for count in counts) / points == pytest.approx(size * weight, abs=1.01 / points)
    assert {sum(count) for count in counts} == {size}


def test_one_particle_is_drawn_by_weight():
    weights = [0.2, 0.0, 0.5, 0.3]
    frequency = Counter(drawn(weights, (i + 0.5) / 1000) for i in range(1000))
    assert frequency == {0: 200, 2: 500, 3: 300}
    assert effective_number(weights) == pytest.approx(1 / 0.38)
    assert shares([math.log(w) if w else -math.inf for w in weights]) == pytest.approx(weights)
    assert shares([-3000.0, -3000.0]) == [0.5, 0.5]


def test_keys_of_particles_are_all_different_and_the_first_is_that_of_the_row_alone():
    key = key_of(7)
    keys = [int(each) for each in itertools.islice(particle_keys(key), 1000)]
    assert keys[0] == int(key)
    steps = [int(fold(key, step)) for step in range(1000)]
    assert len({*keys, *steps}) == 2000


RANDOM = {
    "categorical": {"steps": 9},
    "conv": {"rate": 1.6, "grow": True},
    "semi-ar": {"steps": 10},
    "remdm": {"steps": 9},
    "llada": {"rate": 2.0},
    "entropy-bound": {},
    "top-k": {"steps": 200},
}
"""Under the last, most steps look at every position and write nothing."""
OPTIONS = {"top-k": {"top_k": 5}, "conv": {"kernel_size": 9}, "semi-ar": {"block_size": 8}}


def random_plan(name):
    heat = {} if name in ("categorical", "conv", "semi-ar", "remdm", "top-k") else {"temperature": 1.0}
    return plan_of(Decoder.named(name, **OPTIONS.get(name, {}), **heat), fit=30, **RANDOM[name])


def finish(engine):
    """All rows until they are finished, by ticket."""
    found = {}
    while len(engine):
        found.update({update.ticket: update.canvas for update in engine.step() if update.finished})
    return found


@pytest.mark.parametrize("look", [False, True], ids=["", "after predictions"])
@pytest.mark.parametrize("name", RANDOM)
def test_copies_part_and_the_row_that_was_copied_stays_as_it_is(name, look):
    plan, row = random_plan(name), Row([1, 2, 3] + [22] * 24, 3)
    engine, other = (Engine(FakeDenoiser(eos_bias=-50.0), FakeTokenizer()) for _ in range(2))
    ticket, neighbour = engine.submit(row, plan, 5), engine.submit(row, plan, 6)
    engine.step()
    if look:
        engine.predictions([ticket, neighbour], 2)
    before, keys = engine.canvas(ticket), torch.stack([key_of(1), key_of(2), key_of(3)])
    copies = engine.fork([ticket, neighbour, ticket], keys)
    assert len(engine) == engine.running == 5
    assert torch.equal(engine.canvas(copies[2]).ids, before.ids)
    moved = engine.canvas(neighbour)
    moved.key = keys[1:2]
    expected = other.add(moved, plan)
    done = finish(engine)
    alone = {
        seed: decode(FakeDenoiser(eos_bias=-50.0), torch.tensor([row.ids]), plan, [seed]) for seed in (5, 6)
    }
    assert torch.equal(done[ticket].ids, alone[5].ids), "the row has changed"
    assert torch.equal(done[neighbour].ids, alone[6].ids), "the row beside it has changed"
    assert torch.equal(done[copies[1]].ids, finish(other)[expected].ids), (
        "the copy is not the row with that key"
    )
    assert len({str(done[i].ids) for i in (ticket, copies[0], copies[2])}) == 3, "the copies did not part"


def test_copies_of_what_is_not_at_work_and_beyond_the_limits_are_refused():
    engine = Engine(fake(), FakeTokenizer(), max_rows=2)
    row, key = Row(PROMPT + [MASK] * LENGTH, len(PROMPT)), torch.stack([key_of(1), key_of(2)])
    ticket = engine.submit(row, PLAN)
    with pytest.raises(KeyError, match="no row at work"):
        engine.fork([ticket], key[:1])
    engine.step()
    with pytest.raises(ConfigError, match="2 copies are more than the engine has room for"):
        engine.fork([ticket, ticket], key)
    assert len(engine.fork([ticket], key[:1])) == 1


@pytest.mark.parametrize("name", RANDOM)
def test_predictions_change_nothing_and_cost_no_model_call(name):
    plan, row = random_plan(name), Row([1, 2, 3] + [22] * 24, 3)
    done = []
    for draws in (0, 3):
        model = FakeDenoiser(eos_bias=-1.0)
        engine = Engine(model, FakeTokenizer())
        tickets = [engine.submit(row, plan, seed) for seed in range(4)]
        canvases = {}
        while len(engine):
            updates = engine.step()
            canvases.update({update.ticket: update.canvas for update in updates if update.finished})
            going = [update.ticket for update in updates if not update.finished]
            if draws:
                texts = engine.predictions(going, draws)
                assert list(texts) == going
                assert not any(chr(97 + 22) in text for each in texts.values() for text in each), "a mask"
                assert texts == engine.predictions(going, draws), "equal rows give equal predictions"
        done.append([canvases[ticket].ids.tolist() for ticket in tickets])
        calls = [model.calls, *(int(canvases[ticket].model_calls[0]) for ticket in tickets)]
        done.append(calls)
    assert done[0] == done[2]
    assert done[1] == done[3]


def test_predictions_have_the_law_of_the_model_and_say_nothing_of_the_next_token():
    engine, size = Engine(fake(), FakeTokenizer()), 3000
    row = Row([*PROMPT, 3, MASK], len(PROMPT))
    tickets = [engine.submit(row, PLAN, seed) for seed in range(size)]
    engine.lengths()
    texts = engine.predictions(tickets, 2)
    p = fake().logits(fake().hidden(torch.tensor([row.ids]))[0])[-1].double().softmax(-1)
    expected = {"d" + text_of([token]): float(p[token]) for token in range(VOCAB - 1)}
    for draw in range(2):
        assert p_value(Counter(text[draw] for text in texts.values()), expected, size) > 0.01
    written = {update.ticket: update.output.text for update in engine.step()}
    for draw in range(2):
        equal = sum(texts[ticket][draw] == written[ticket] for ticket in tickets) / size
        assert equal == pytest.approx(float((p**2).sum()), abs=4 / size**0.5)
    assert sum(a == b for a, b in texts.values()) / size == pytest.approx(
        float((p**2).sum()), abs=4 / size**0.5
    )


# Populations.


@pytest.mark.parametrize("twist", ["none", "written", "predicted"])
def test_a_population_does_not_depend_on_those_beside_it(twist):
    tilt = Tilt(reward, 6, BETA, twist=twist, threshold=None if twist == "none" else 0.9)
    long = Row([3, 1] + [MASK] * 5, 2, "a long row")
    short = Row(PROMPT + [MASK] * LENGTH, 2, "a short row")

    def outputs(rows, batch_size=64):
        each = ((row, "the prompt", seed) for row, seed in rows)
        return list(steer(Engine(fake(), FakeTokenizer()), PLAN, tilt, each, batch_size))

    rows = [(long, 1), (short, 2), (short, 3), (long, 2), (short, 2)]
    together = outputs(rows)
    assert together == outputs(rows, 1) == outputs(rows, 13) == [outputs([row])[0] for row in rows]
    assert together[1] == together[4] != together[2]


def test_copies_of_one_particle_have_keys_of_their_own(monkeypatch):
    """With the key of its parent a copy would write what the parent writes."""
    forked, plain = [], Engine.fork

    def fork_and_look(engine, tickets, keys):
        parents = [int(engine.canvas(ticket).key[0]) for ticket in tickets]
        copies = plain(engine, tickets, keys)
        forked.append((parents, [int(engine.canvas(copy).key[0]) for copy in copies]))
        return copies

    monkeypatch.setattr(Engine, "fork", fork_and_look)
    populations([3], 16, twist="written", threshold=1.0)
    assert len(forked) == 2  # after either of the first two steps
    assert any(len(set(parents)) < len(parents) for parents, _ in forked)  # several copies of one
    copies = [key for _, keys in forked for key in keys]
    assert len(set(copies)) == len(copies)
    assert not set(copies) & set(forked[0][0])
    assert all(not set(parents) & set(keys) for parents, keys in forked)


@pytest.mark.parametrize("twist", ["none", "written", "predicted"])
def test_model_calls_are_those_of_all_rows(twist):
    model = fake()
    tilt = Tilt(reward, 8, BETA, twist=twist, threshold=None if twist == "none" else 1.0)
    row = Row(PROMPT + [MASK] * LENGTH, len(PROMPT))
    (out,) = steer(Engine(model, FakeTokenizer()), PLAN, tilt, iter([(row, "the prompt", 4)]), 8)
    assert out.model_calls == model.rows
    assert model.calls == LENGTH
    assert len(out.ess) == LENGTH
    assert len(out.texts) == len(out.weights) == len(out.rewards) == 8
    assert sum(out.weights) == pytest.approx(1)
    assert out.resampled == ([] if twist == "none" else [0, 1])


def test_a_model_that_fails_and_a_reward_that_is_no_number_are_errors_with_names():
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            return super().logits(hidden) * float("nan")

    row = Row(PROMPT + [MASK] * LENGTH, len(PROMPT), "prompt 4")

    def run(model, function):
        tilt = Tilt(function, 2)
        return list(steer(Engine(model, FakeTokenizer()), PLAN, tilt, iter([(row, "", 0)]), 8))

    with pytest.raises(DLMError, match=r"the model returned NaN in step 0, prompt 4, particle 0"):
        run(
            Broken(vocab=VOCAB, mask_id=MASK, eos_id=EOS),
            lambda prompts, completions: [0.0] * len(completions),
        )
    for value, message in ((math.nan, "got nan for "), (math.inf, "got inf for ")):
        with pytest.raises(DLMError, match=message):
            run(fake(), lambda prompts, completions, value=value: [value] * len(completions))
    huge = Tilt(lambda prompts, completions: [1e300] * len(completions), 2, beta=0.1)
    with pytest.raises(DLMError, match=r"the reward 1e\+300 over beta 0.1 is no weight; give a larger beta"):
        list(steer(Engine(fake(), FakeTokenizer()), PLAN, huge, iter([(row, "", 0)]), 8))
    with pytest.raises(DLMError, match="the reward must give a number for each of 8 texts, gave 1"):
        run(fake(), lambda prompts, completions: [1.0])


# The sampler.


@pytest.mark.parametrize("name", ["conv", "categorical", "semi-ar", "remdm", "top-k"])
def test_one_particle_is_the_plain_answer(name, model, tokenizer):
    sampler = Sampler(model, tokenizer)
    how = {"decoder": name, "window": 40, "steps": 6, "seed": 3}
    prompts = ["Count to ten.", "Spell the word stone."]
    plain = sampler.generate(prompts, **how)
    twist = "predicted" if name == "remdm" else "written"
    tilted_ones = sampler.generate(prompts, reward="length=5", particles=1, twist=twist, **how)
    names = [item for item in vars(plain[0]) if item != "model_calls"]
    for one, other in zip(plain, tilted_ones, strict=True):
        assert [getattr(one, item) for item in names] == [getattr(other, item) for item in names]


def test_a_sampler_steers_towards_the_reward(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    seen = []

    def few_letters(prompts, completions):
        seen.extend(prompts)
        return [-float(len(text)) for text in completions]

    how = {"decoder": "conv", "max_tokens": 12}
    plain = sampler.generate(["a", "b"] * 4, seed=list(range(8)), **how)
    outs = sampler.generate(
        ["a", "b"] * 4, seed=list(range(8)), reward=few_letters, particles=8, beta=2.0, **how
    )
    assert set(seen) == {"a", "b"}
    assert sum(len(out.text) for out in outs) < sum(len(out.text) for out in plain)
    alone = sampler.generate("b", seed=1, reward=few_letters, particles=8, beta=2.0, **how)
    assert alone == outs[1]
    both = sampler.generate("b", n=2, seed=1, reward=few_letters, particles=8, beta=2.0, **how)
    assert both[0] == alone
    assert both[1] == sampler.generate("b", seed=2, reward=few_letters, particles=8, beta=2.0, **how)
    best = sampler.generate("b", seed=1, reward=few_letters, twist="none", select="best", particles=8, **how)
    assert best.reward == max(best.rewards) == -len(best.text)


REFUSED = [
    ({"decoder": "llada"}, "draws nothing at random, so 8 particles would be equal; give it a temperature"),
    ({"decoder": "conv", "reuse": "dual"}, "give no reuse"),
    ({"decoder": "remdm", "window": 40, "twist": "written"}, 'revises .*: give twist="predicted" or "none"'),
    ({"particles": 0}, "particles must be a whole number of at least 1, got 0"),
    ({"particles": True}, "particles must be a whole number"),
    ({"beta": 0}, "beta must be above 0, got 0"),
    ({"beta": math.inf}, "beta must be above 0"),
    ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
    ({"threshold": 0.5, "twist": "none"}, "which needs a twist"),
    ({"predictions": 2, "twist": "written"}, "predictions are for twist=\"predicted\", got twist='written'"),
    ({"predictions": 0}, "predictions must be a whole number"),
    ({"twist": "writen"}, "unknown twist 'writen'. Did you mean 'written'"),
    ({"select": "max"}, "unknown select 'max'.* Choices: best, sample"),
    ({"reward": "lenght=3"}, "unknown reward 'lenght'. Did you mean 'length'"),
    ({"reward": 3}, "reward must be a name or a callable, got 3"),
    ({"reward": None, "beta": 1.0}, "beta is for texts that are steered by a reward; give reward"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_what_cannot_be_steered_is_refused(given, message, model, tokenizer):
    sampler = Sampler(model, tokenizer)
    with pytest.raises(ConfigError, match=message):
        sampler.generate("a", **{"reward": "length=3", "decoder": "conv", **given})


def test_a_reward_is_for_whole_answers(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    for call in (
        lambda: sampler.stream("a", reward="length=3"),
        lambda: sampler.infill("a <mask:2>", reward="length=3"),
        lambda: sampler.plan(reward="length=3"),
    ):
        with pytest.raises(ConfigError, match="it is for generate and iter_generate alone"):
            call()


def test_a_prompt_that_does_not_fit_is_an_error_after_the_answers_before_it(model, tokenizer):
    answers = Sampler(model, tokenizer).iter_generate(
        ["a", "b " * 60], reward="length=3", particles=2, decoder="conv", window=40, steps=4
    )
    assert next(answers).reward <= 0
    with pytest.raises(ConfigError, match="prompt 1"):
        next(answers)
