"""The law of decoding against independent references: slow, one row, no caches, torch's own random numbers.

The references call the model at every step for every position, and draw from `torch.rand` and
`torch.multinomial`. What the loop saves (logits of shut positions, calls for rows that did not change, steps
after the answer is complete, the second pass through the head) must not show in the distribution of texts.
"""

import math

import pytest
import torch

from decoding import Decoder
from decoding.pace import Steps
from dlm.schedule import Cosine
from tests.decoding.rig import decode, plan_of
from tests.fakes import FakeDenoiser

VOCAB, MASK, EOS, LENGTH, PROMPT, STEPS = 6, 5, 0, 9, 2, 4
TRIALS, FAST, SEED = 1000, 8_000, 1


def fake(eos_bias=0.0):
    return FakeDenoiser(vocab=VOCAB, mask_id=MASK, eos_id=EOS, eos_bias=eos_bias)


def start():
    row = torch.full((LENGTH,), MASK)
    row[:PROMPT] = torch.tensor([1, 2])
    return row


def best(model, row, top_k, cache):
    """Probabilities [L, V] with all but the top k set to 0; what was computed for a row is looked up."""
    key = tuple(row.tolist())
    if key not in cache:
        p = model.logits(model.hidden(row[None])[0]).double().softmax(-1)
        kept = p.topk(min(top_k or VOCAB, VOCAB - 1), dim=-1)
        cache[key] = torch.zeros_like(p).scatter(-1, kept.indices, kept.values)
    return cache[key]


def conv(row, i, kernel):
    cells = row.tolist()
    near = [j for j in range(LENGTH) if abs(i - j) <= (kernel - 1) // 2 and cells[j] != MASK]
    return math.tanh(len(near))


def masks(row):
    return [i for i, token in enumerate(row.tolist()) if token == MASK]


def fill(row):
    """Everything behind the first EOS of the answer becomes EOS."""
    ends = [i for i, token in enumerate(row.tolist()) if i >= PROMPT and token == EOS]
    if ends:
        row[ends[0] :] = EOS
    return row


def chances(name, row, p, step):
    """Reveal probability of each masked position, by the definition of the method."""
    masked = masks(row)
    t, s = 1 - step / STEPS, 1 - (step + 1) / STEPS
    if name == "cosine":
        t, s = math.sin(math.pi * t / 2), math.sin(math.pi * s / 2)
    times = dict.fromkeys(masked, (t, s))
    w = dict.fromkeys(masked, 1.0)
    if name == "conv":
        w = {i: conv(row, i, 5) for i in masked}
    if name == "semi-ar":  # blocks of 4 and 3 positions, two steps each
        block = step // 2
        masked = [i for i in masked if (i - PROMPT) // 4 == block]
        times = dict.fromkeys(masked, (1 - (step % 2) / 2, 1 - (step % 2 + 1) / 2))
    if name == "sliding":
        count, size = LENGTH - PROMPT, 3
        times = {
            i: tuple(
                min(1.0, max(0.0, (i - PROMPT + 1 - n * count / STEPS) / size)) for n in (step, step + 1)
            )
            for i in masked
        }
        masked = [i for i in masked if times[i][1] < 1]
    kept = p.sum(-1).tolist()
    q = {i: kept[i] for i in masked}
    if sum(w[i] * q[i] for i in masked) == 0:
        w = dict.fromkeys(masked, 1.0)
    total = sum(w[i] * q[i] for i in masked)
    out = {}
    for i in masked:
        a = (times[i][0] - times[i][1]) * w[i] * q[i] * len(masked) / total
        out[i] = a / (a + times[i][1]) if a > 0 else 0.0
    return out


def finished(row, p, generator):
    """Every position that is still masked gets its token."""
    for i in masks(row):
        row[i] = int(torch.multinomial(p[i], 1, generator=generator))
    return fill(row)


def slow(name, top_k, eos_bias):
    """Texts [TRIALS, L] by the definition; the row is filled to its end in any case."""
    generator = torch.Generator().manual_seed(SEED)
    model, cache, texts = fake(eos_bias), {}, []
    for _ in range(TRIALS):
        row = start()
        for step in range(STEPS):
            if not masks(row):
                break
            p = best(model, row, top_k, cache)
            new = row.clone()
            for i, chance in chances(name, row, p, step).items():
                if torch.rand((), generator=generator) < chance:
                    new[i] = int(torch.multinomial(p[i], 1, generator=generator))
            row = fill(new)
        texts.append(finished(row, best(model, row, top_k, cache), generator))
    return torch.stack(texts)


def slow_events(top_k, eos_bias):
    """One token per event, position i next with probability proportional to w_i q_i (first-hitting)."""
    generator = torch.Generator().manual_seed(SEED)
    model, cache, texts = fake(eos_bias), {}, []
    for _ in range(TRIALS):
        row = start()
        while masked := masks(row):
            p = best(model, row, top_k, cache)
            speed = torch.zeros(LENGTH)
            speed[masked] = torch.tensor([conv(row, i, 5) * float(p[i].sum()) for i in masked])
            i = int(torch.multinomial(speed, 1, generator=generator))
            row[i] = int(torch.multinomial(p[i], 1, generator=generator))
            row = fill(row)
        texts.append(row)
    return torch.stack(texts)


def by_certainty(name, row, drawn, p, whole, step):
    """The masked positions that a rule of confidence or entropy writes, the tokens being drawn already."""
    masked = masks(row)
    sure = {i: float(whole[i, drawn[i]]) for i in masked}
    best = sorted(masked, key=lambda i: -sure[i])
    if name == "llada":  # 7 positions in 4 steps
        return best[: 2 if step < 3 else 1]
    if name == "threshold":
        return [i for i in best if sure[i] >= 0.4] or best[:1]
    nats = {i: float(torch.special.entr(whole[i]).sum()) for i in masked}  # entropy bound
    chosen, before = [], 0.0
    for i in sorted(masked, key=nats.get):
        if before <= 1.0:
            chosen.append(i)
        before += nats[i]
    return chosen


def slow_by_certainty(name, top_k, eos_bias):
    """Texts by rules that look at the tokens drawn, or at how sure the model is."""
    generator = torch.Generator().manual_seed(SEED)
    model, cache, everything, texts = fake(eos_bias), {}, {}, []
    for _ in range(TRIALS):
        row, step = start(), 0
        while masked := masks(row):
            p, whole = best(model, row, top_k, cache), best(model, row, 0, everything)
            drawn = {i: int(torch.multinomial(p[i], 1, generator=generator)) for i in masked}
            for i in by_certainty(name, row, drawn, p, whole, step):
                row[i] = drawn[i]
            row, step = fill(row), step + 1
        texts.append(row)
    return torch.stack(texts)


def share_of_masks(t, on=0.8, begin=0.6, end=0.3):
    """ReMDM-loop with α_on = on: fill up to time `begin`, trade until `end`, then finish."""
    if t > begin:
        return 1 - (1 - t) * on / (1 - begin)
    return 1 - on if t > end else t * (1 - on) / end


def slow_remdm(top_k, eos_bias, on=0.8, eta=0.3):
    """Texts of ReMDM-loop, by its definition."""
    generator = torch.Generator().manual_seed(SEED)
    model, cache, texts = fake(eos_bias), {}, []

    def coin(chance):
        return bool(torch.rand((), generator=generator) < chance)

    for _ in range(TRIALS):
        row = start()
        for step in range(STEPS):
            t, s = 1 - step / STEPS, 1 - (step + 1) / STEPS
            looping = t <= 0.6 and t > 0.3 and s > 0
            p, new = best(model, row, top_k, cache), row.clone()
            masked, kept = masks(row), p.sum(-1).tolist()
            q = {i: kept[i] for i in masked}
            for i in masked:
                a = (share_of_masks(t) - share_of_masks(s)) * q[i] * len(masked) / sum(q.values())
                chance = min(1.0, on * eta / (1 - on) * q[i]) if looping else a / (a + share_of_masks(s))
                if coin(chance):
                    new[i] = int(torch.multinomial(p[i], 1, generator=generator))
            for i in range(PROMPT, LENGTH):
                if looping and row[i] != MASK and coin(eta):
                    new[i] = MASK
            row = fill(new)
        texts.append(finished(row, best(model, row, top_k, cache), generator))
    return torch.stack(texts)


def fast(decoder, eos_bias, **how):
    plan = plan_of(decoder, eos=EOS, mask=MASK, fit=LENGTH, **how)
    return decode(fake(eos_bias), start().repeat(FAST, 1), plan).ids


def answers(texts):
    """Up to its first EOS, everything behind it being the same."""
    return torch.stack([fill(row.clone()) for row in texts])


def agree(slowly, quickly):
    """Every pair of neighbouring tokens is as frequent in both, within 4.5 deviations and two texts."""
    slowly, quickly = answers(slowly), answers(quickly)
    for i in range(PROMPT, LENGTH - 1):
        for a in range(VOCAB):
            for b in range(VOCAB):
                x, y = (
                    ((texts[:, i] == a) & (texts[:, i + 1] == b)).double().mean().item()
                    for texts in (slowly, quickly)
                )
                pooled = (x * len(slowly) + y * len(quickly)) / (len(slowly) + len(quickly))
                deviation = (pooled * (1 - pooled) * (1 / len(slowly) + 1 / len(quickly))) ** 0.5
                assert abs(x - y) <= 4.5 * deviation + 2 / len(slowly), (i, a, b, x, y)


@pytest.mark.parametrize("eos_bias", [-9.0, 1.0])
@pytest.mark.parametrize(
    ("name", "top_k", "options"),
    [
        ("categorical", 0, {}),
        ("top-k", 3, {"top_k": 3}),
        ("conv", 3, {"top_k": 3, "kernel_size": 5}),
        ("semi-ar", 3, {"top_k": 3, "block_size": 4}),
        ("sliding", 3, {"top_k": 3, "size": 3}),
    ],
)
def test_texts_have_the_law_of_the_definition(name, top_k, options, eos_bias):
    agree(slow(name, top_k, eos_bias), fast(Decoder.named(name, **options), eos_bias, steps=STEPS))


@pytest.mark.parametrize("eos_bias", [-9.0, 1.0])
def test_under_another_noise_schedule_texts_have_the_law_of_its_curve(eos_bias):
    pace = Steps(STEPS, Cosine())
    agree(slow("cosine", 3, eos_bias), fast(Decoder.named("top-k", top_k=3), eos_bias, pace=pace))


def test_at_rate_one_texts_have_the_law_of_infinitely_fine_steps():
    decoder = Decoder.named("conv", top_k=3, kernel_size=5)
    agree(slow_events(3, 0.5), fast(decoder, 0.5, steps=None, rate=1.0))


@pytest.mark.parametrize("eos_bias", [-9.0, 1.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llada", {"temperature": 1.0, "top_k": 3}),
        ("threshold", {"temperature": 1.0, "top_k": 3, "tau": 0.4}),
        ("entropy-bound", {"temperature": 1.0, "top_k": 3, "gamma": 1.0}),
    ],
)
def test_rules_that_look_at_the_token_have_the_law_of_their_definition(name, options, eos_bias):
    agree(slow_by_certainty(name, 3, eos_bias), fast(Decoder.named(name, **options), eos_bias, steps=STEPS))


@pytest.mark.parametrize("eos_bias", [-9.0, 0.0])
def test_tokens_that_go_back_have_the_law_of_their_definition(eos_bias):
    options = {"alpha_on": 0.8, "t_on": 0.6, "t_off": 0.3, "eta": 0.3, "top_p": 1.0, "top_k": 3}
    agree(slow_remdm(3, eos_bias), fast(Decoder.named("remdm", **options), eos_bias, steps=STEPS))


def test_the_references_can_tell_laws_apart():
    """The comparison would notice another kernel; so it can fail."""
    other = fast(Decoder.named("conv", top_k=3, kernel_size=3), -9.0, steps=STEPS)
    with pytest.raises(AssertionError):
        agree(slow("conv", 3, -9.0), other)
