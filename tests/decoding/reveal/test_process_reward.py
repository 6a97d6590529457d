"""DPRM against a slow reference, its laws by chi-square, and the tilted law by enumeration."""

import itertools
import math

import pytest
import torch

from decoding import Decoder, Request
from decoding.reveal import ProcessReward, Quota, StepView
from decoding.reveal.base import Course
from decoding.reveal.order_table import OrderTable
from decoding.reveal.process_reward import shortlist
from dlm.errors import ConfigError
from dlm.noise import cell_noise, fold, key_of
from tests.decoding.rig import LEARNT, decode, order_table, plan_of, rows
from tests.fakes import FakeDenoiser


def view(confidence, *, masked=None, weight=None, quota=1, elapsed=0.5, seed=0):
    """A step of rows with these confidences [b, W]; places are even."""
    b, width = confidence.shape
    keys = fold(key_of(seed), torch.arange(b))
    place = (torch.arange(width).double() / width).expand(b, -1)
    share = torch.as_tensor(elapsed, dtype=torch.float64).expand(b)
    return StepView(
        masked=torch.ones(b, width).bool() if masked is None else masked,
        weight=torch.ones(b, width) if weight is None else weight,
        t=torch.ones(b), s=torch.zeros(b), quota=torch.as_tensor(quota).expand(b),
        written=torch.zeros(b, width).bool(),
        noise=lambda stream: cell_noise(keys, torch.full((b,), seed), width, stream),
        score=confidence, course=lambda: Course(share, place),
    )  # fmt: skip


# ---- the score ---------------------------------------------------------------------------------------


def slow_score(rule, confidence, weight, elapsed, place):
    """The score of one position, in plain Python."""
    base, table = math.log(confidence * weight), rule.table
    if rule.control == "entropy":
        return 1 - confidence
    if table is None or rule.control == "gate":
        return base
    phases, bins, places = table.shape
    cell = (min(int(elapsed * phases), phases - 1), min(int(confidence * bins), bins - 1),
            min(int(place * places), places - 1))  # fmt: skip
    n = int(table.counts[cell])
    if n == 0:
        return base
    rewards, total = float(table.log_sums[cell]), float(table.log_sums.exp().sum())
    mean = math.log(total / int(table.counts.sum())) / table.beta
    value = mean if rule.control == "counts" else (rewards - math.log(n)) / table.beta
    value -= mean if rule.normalise else 0
    gate = min(1.0, max(0.0, (elapsed - rule.warm_up) / (rule.switch - rule.warm_up)))
    return base + min(1.0, n / rule.ready) * gate * rule.strength * value


@pytest.mark.parametrize("control", ["none", "gate", "counts", "entropy"])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_order_is_that_of_the_slow_reference(control, normalise):
    """Rows of eight positions, so that the shortlist holds them all."""
    torch.manual_seed(0)
    table = order_table(seed=2, tokens=1500)
    table = OrderTable(table.counts, table.log_sums, 1.0)
    rule = ProcessReward(table, control, normalise, strength=0.7, ready=5)
    differs = 0
    for elapsed in (0.0, 0.13, 0.2, 0.4, 0.69, 0.7, 0.99, 1.0):
        confidence, weight = torch.rand(40, 8) * 0.98 + 0.01, torch.rand(40, 8) + 0.01
        step = view(confidence, weight=weight, quota=3, elapsed=elapsed)
        got = rule.decide(step).reveal
        for row in range(40):
            score = [
                slow_score(rule, float(confidence[row, i]), float(weight[row, i]), elapsed, i / 8)
                for i in range(8)
            ]
            best = sorted(range(8), key=lambda i: -score[i])[:3]
            assert got[row].nonzero()[:, 0].tolist() == sorted(best)
        differs += int((got != Quota().decide(step).reveal).any(1).sum())
    nothing = control == "gate" or (control == "counts" and normalise)
    assert differs == 0 if nothing else differs > 30


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_pull_is_the_h_transform_where_the_strength_is_beta(beta):
    """E/n is the mean of exp(βR) in a cell; exp(pull) must be it, whatever β, at λ = β and in full cells."""
    rewards = [0.3, 1.0, 0.7]
    table = OrderTable.empty((1, 1, 1), beta).credited(
        torch.zeros(3, dtype=torch.int64), torch.tensor(rewards)
    )
    h = sum(math.exp(beta * reward) for reward in rewards) / len(rewards)
    assert float(ProcessReward(table, ready=1, strength=beta).pull) == pytest.approx(math.log(h))
    if beta != 1:
        assert float(ProcessReward(table, ready=1).pull) != pytest.approx(math.log(h), rel=0.1)


def test_shuffled_cells_have_the_same_counts_and_the_same_rewards_elsewhere():
    table = order_table(seed=1)
    straight = ProcessReward(table, ready=1).pull
    mixed = ProcessReward(table, "shuffled", ready=1).pull
    used = table.counts.flatten() > 0
    assert torch.equal(straight.sort().values, mixed.sort().values)
    assert float((straight == mixed)[used].float().mean()) < 0.05
    assert (mixed[~used] == 0).all()
    assert torch.equal(mixed, ProcessReward(table, "shuffled", ready=1).pull)  # nothing is drawn anew
    few = ProcessReward(table, "shuffled", ready=10**6).pull
    torch.testing.assert_close(few, mixed * table.counts.flatten() / 10**6)


def test_an_empty_cell_is_zero_and_with_normalisation_an_average_one():
    table = OrderTable.empty((1, 2, 1)).credited(torch.tensor([0] * 64), torch.ones(64))
    confidence = torch.tensor([[0.3, 0.6]])  # a cell with reward 1, and an empty one
    late = view(confidence, elapsed=1.0)
    assert ProcessReward(table).decide(late).reveal.tolist() == [[True, False]]
    assert ProcessReward(table, normalise=True).decide(late).reveal.tolist() == [[False, True]]
    assert ProcessReward(OrderTable.empty()).decide(late).reveal.tolist() == [[False, True]]


def test_a_cell_counts_in_part_until_it_is_ready_and_rewards_are_cut():
    table = OrderTable.empty((1, 1, 1)).credited(torch.zeros(16, dtype=torch.int64), torch.full((16,), 1e6))
    assert float(ProcessReward(table).pull[0]) == pytest.approx(16 / 64 * 20)
    assert float(ProcessReward(table, ready=16).pull[0]) == pytest.approx(20)
    assert float(ProcessReward(table, ready=4, strength=0.5).pull[0]) == pytest.approx(10)


def test_positions_beyond_the_window_go_last_and_only_if_the_quota_asks_for_them():
    table = OrderTable.empty((1, 2, 1)).credited(torch.tensor([1] * 99), torch.full((99,), 20.0))
    confidence = torch.tensor([[0.9, 0.2, 0.1, 0.8, 0.95]])
    masked = torch.tensor([[True, True, True, True, False]])
    weight = torch.tensor([[0.0, 0.5, 1.0, 0.0, 1.0]])
    rule = ProcessReward(table)
    for quota, expected in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        step = view(confidence, masked=masked, weight=weight, quota=quota, elapsed=1.0)
        first = rule.decide(step).reveal[0].nonzero()[:, 0].tolist()
        assert first == expected if quota > 1 else len(first) == 1
        assert rule.evidence(step).scored[0].tolist() == (
            [False, True, True, False, False] if quota < 3 else masked[0].tolist()
        )


# ---- the shortlist -----------------------------------------------------------------------------------


def without_replacement(mass, size):
    """Probability of each set of `size` positions, drawn one after the other in proportion to their mass."""
    chance = {}
    for order in itertools.permutations(range(len(mass)), size):
        p, left = 1.0, sum(mass)
        for i in order:
            p, left = p * mass[i] / left, left - mass[i]
        chance[frozenset(order)] = chance.get(frozenset(order), 0.0) + p
    return chance


def agrees(counts, chance):
    """Whether observed numbers by outcome follow a law, by chi-square; rare outcomes count together."""
    assert set(counts) <= set(chance)
    total, cells, rest = sum(counts.values()), [], [0.0, 0.0]
    for outcome, p in chance.items():
        observed, expected = counts.get(outcome, 0), p * total
        if expected >= 5:
            cells.append((observed, expected))
        else:
            rest = [rest[0] + observed, rest[1] + expected]
    cells += [tuple(rest)] if rest[1] >= 5 else []
    chi2, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    return chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_the_shortlist_is_drawn_without_replacement_in_proportion_to_the_confidence():
    trials, mass = 20_000, [0.9, 0.05, 0.3, 0.6, 0.02, 0.2, 0.45, 0.1, 0.7, 0.33]
    base = torch.tensor(mass).double().log().expand(trials, -1)
    noise = cell_noise(fold(key_of("law"), torch.arange(trials)), torch.zeros(trials).long(), 10, 0)
    listed = shortlist(base, torch.ones(trials, 10).bool(), torch.ones(trials).long(), noise)
    counts = {}
    for row in listed:
        key = frozenset(row.nonzero()[:, 0].tolist())
        counts[key] = counts.get(key, 0) + 1
    assert agrees(counts, without_replacement(mass, 8))


SIZES = [(200, 1, 8), (200, 2, 8), (200, 5, 20), (200, 16, 64), (200, 40, 64), (200, 80, 80)]
SIZES += [(6, 1, 6), (30, 12, 30)]  # or all that there are


@pytest.mark.parametrize(("width", "k", "size"), SIZES)
def test_the_shortlist_has_as_many_positions_as_it_should(width, k, size):
    noise = cell_noise(key_of(k)[None], torch.zeros(1).long(), width, 0)
    listed = shortlist(torch.zeros(1, width).double(), torch.ones(1, width).bool(), torch.tensor([k]), noise)
    assert int(listed.sum()) == size


def test_the_best_of_the_shortlist_are_written_and_nothing_else():
    torch.manual_seed(2)
    table, confidence = order_table(), torch.rand(300, 60)
    weight = (torch.rand(300, 60) < 0.8).float()
    step, rule = view(confidence, weight=weight, quota=2, elapsed=0.9), ProcessReward(table)
    base = (confidence.double() * weight).clamp(min=1e-12).log()
    listed = shortlist(base, weight > 0, step.quota, step.noise(0))
    score = torch.where(listed, base + rule.reward(step), -torch.inf)
    expected = torch.zeros(300, 60).bool().scatter(1, score.topk(2).indices, True)
    assert torch.equal(rule.decide(step).reveal, expected)


@pytest.mark.parametrize("draws", [0, 2])
def test_what_is_open_comes_before_what_is_shut_also_beyond_the_shortlist(draws):
    torch.manual_seed(4)
    confidence, weight = torch.rand(50, 40), (torch.rand(50, 40) < 0.6).float()
    masked = torch.rand(50, 40) < 0.9
    rule, step = ProcessReward(order_table(), draws=draws), view(confidence, masked=masked, weight=weight)
    order, open_ = rule.precedence(step), masked & (weight > 0)
    for row in range(50):
        last_open, last_shut = order[row][open_[row]].max(), order[row][masked[row]].max()
        assert last_open < order[row][masked[row] & ~open_[row]].min()
        assert last_shut < order[row][~masked[row]].min()


# ---- soft best-of-N and the tilted law ---------------------------------------------------------------

CONFIDENCE = [0.7, 0.2, 0.55, 0.35]
TABLE = OrderTable.empty((3, 16, 2))
for _cell, _reward in enumerate(
    torch.linspace(-2.5, 2.5, 96)[torch.randperm(96, generator=torch.Generator().manual_seed(3))]
):
    TABLE = TABLE.credited(torch.full((8,), _cell), _reward.repeat(8))


def soft_rule(draws):
    return ProcessReward(TABLE, draws=draws, ready=8, warm_up=0.0, switch=0.6)


def reward_of(i, stage):
    """Process reward of a position at a stage of four, in plain Python."""
    elapsed, place, p = stage / 4, i / 4, CONFIDENCE[i]
    value = float(TABLE.values[min(int(elapsed * 3), 2), int(p * 16), int(place * 2)])
    return min(1.0, elapsed / 0.6) * value


def tilted(free, stage):
    """The h-transformed law of the next position: in proportion to confidence · exp(process reward)."""
    mass = {i: CONFIDENCE[i] * math.exp(reward_of(i, stage)) for i in free}
    return {i: x / sum(mass.values()) for i, x in mass.items()}


def best_of(free, stage, draws):
    """The law of soft best-of-N, all sets of candidates enumerated."""
    total = sum(CONFIDENCE[i] for i in free)
    out = dict.fromkeys(free, 0.0)
    for counts in itertools.product(range(draws + 1), repeat=len(free)):
        if sum(counts) != draws:
            continue
        chance = math.factorial(draws)
        for i, n in zip(free, counts, strict=True):
            chance *= (CONFIDENCE[i] / total) ** n / math.factorial(n)
        mass = [n * math.exp(reward_of(i, stage)) for i, n in zip(free, counts, strict=True)]
        for i, x in zip(free, mass, strict=True):
            out[i] += chance * x / sum(mass)
    return out


def orders(law):
    """Probability of each order in which all four are written, one at each stage."""
    chance = {(): 1.0}
    for stage in range(4):
        chance = {
            (*done, i): p * q
            for done, p in chance.items()
            for i, q in law(tuple(i for i in range(4) if i not in done), stage).items()
        }
    return chance


def written(draws, trials, seed):
    """Orders that the rule writes, with their numbers."""
    rule, masked = soft_rule(draws), torch.ones(trials, 4).bool()
    confidence, taken = torch.tensor(CONFIDENCE).expand(trials, -1), []
    for stage in range(4):
        step = view(confidence, masked=masked, elapsed=stage / 4, seed=seed + stage)
        reveal = rule.decide(step).reveal
        assert (reveal.sum(1) == 1).all()
        taken.append(reveal.int().argmax(1))
        masked = masked & ~reveal
    seen, counts = torch.stack(taken, 1).unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, seen.tolist()), counts.tolist(), strict=True))


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_each_stage_follows_the_law_of_soft_best_of_n(draws):
    expected = orders(lambda free, stage: best_of(free, stage, draws))
    assert sum(expected.values()) == pytest.approx(1)
    assert agrees(written(draws, 20_000, seed=10 * draws), expected)


def test_the_orders_tend_to_the_tilted_law_with_an_error_that_falls_as_one_over_n():
    exact = orders(tilted)
    distance = {}
    for draws in (4, 8, 16, 32):
        law = orders(lambda free, stage, n=draws: best_of(free, stage, n))
        distance[draws] = sum(abs(law[x] - exact[x]) for x in exact) / 2
    scaled = [n * d for n, d in distance.items()]
    assert distance[4] > 0.04
    assert scaled[2] == pytest.approx(scaled[3], rel=0.03)
    assert all(b < a for a, b in itertools.pairwise(distance.values()))
    trials = 60_000
    for draws, seed in ((1, 70), (4, 80), (64, 90)):
        counts = written(draws, trials, seed)
        got = sum(abs(counts.get(x, 0) / trials - p) for x, p in exact.items()) / 2
        noise = sum(math.sqrt(p / trials) for p in exact.values()) / 2  # of so many trials
        near = scaled[-1] / draws
        assert got < near + 1.3 * noise if draws > 1 else got > 0.15


def test_without_rewards_soft_best_of_n_draws_by_confidence():
    trials = 20_000
    rule = ProcessReward(TABLE, "gate", draws=6)
    reveal = rule.decide(view(torch.tensor(CONFIDENCE).expand(trials, -1), quota=2, seed=5)).reveal
    counts = {}
    for row in reveal:
        key = frozenset(row.nonzero()[:, 0].tolist())
        counts[key] = counts.get(key, 0) + 1
    assert agrees(counts, without_replacement(CONFIDENCE, 2))


# ---- in the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"draws": 3}, {"control": "shuffled"}, {"gap": 3}, {"kernel_size": 7}]
)
def test_a_row_is_the_same_alone_and_in_a_batch_of_other_widths(options):
    model, plan = FakeDenoiser(eos_bias=-1.0), plan_of(Decoder.named("dprm", **LEARNT, **options), 7, fit=40)
    lengths, several = [3, 9, 1, 5], rows(model, [3, 9, 1, 5], 40)
    together = decode(model, several, plan, [4, 5, 6, 7])
    for i in range(len(lengths)):
        alone = decode(model, several[i : i + 1], plan, [4 + i])
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(alone.reveal_step[0], together.reveal_step[i])


def test_the_table_and_each_option_change_the_order():
    model, ids = FakeDenoiser(eos_bias=-50.0), rows(FakeDenoiser(), [3], 60)
    choices = [
        {}, LEARNT, {**LEARNT, "draws": 2}, {**LEARNT, "control": "counts"}, {**LEARNT, "control": "entropy"},
        {**LEARNT, "control": "shuffled"}, {**LEARNT, "normalise": True}, {**LEARNT, "strength": 0.2},
        {**LEARNT, "ready": 64}, {**LEARNT, "warm_up": 0.2}, {**LEARNT, "switch": 0.9},
        {**LEARNT, "kernel_size": 9},
    ]  # fmt: skip
    steps = [
        tuple(decode(model, ids, plan_of(Decoder.named("dprm", **each), 20), [1]).reveal_step[0].tolist())
        for each in choices
    ]
    assert len(set(steps)) == len(choices)
    gate = decode(model, ids, plan_of(Decoder.named("dprm", **LEARNT, control="gate"), 20), [1])
    assert tuple(gate.reveal_step[0].tolist()) == steps[0]


def test_settings_out_of_range_say_what_would_be_right():
    for options, message in (
        ({"control": "gates"}, "unknown control 'gates'. Did you mean 'gate'"),
        ({"ready": 0}, "ready must be a whole number of at least 1, got 0"),
        ({"draws": 257}, "draws must be at most 256, got 257"),
        ({"draws": 1.5}, "draws must be a whole number that is not negative, got 1.5"),
        ({"strength": -1}, "strength must be a finite number that is not negative, got -1"),
        ({"warm_up": 0.8}, "warm_up ≤ switch"),
        ({"normalise": 1}, "option normalise of decoder 'dprm' must be true or false, got 1"),
        ({"table": 3}, "by its name or file, got 3"),
        ({"strength": True}, "must be a number, got True"),
    ):
        with pytest.raises(ConfigError, match=message):
            Request(decoder="dprm", options=options).check_decoder()


def test_equal_tables_are_one_plan_and_others_are_not():
    one, same = order_table(), order_table()
    keys = {plan_of(Decoder.named("dprm", table=table), 4).batch_key for table in (one, same)}
    assert len(keys) == 1
    other = plan_of(Decoder.named("dprm", table=order_table(seed=9)), 4)
    assert other.batch_key not in keys
