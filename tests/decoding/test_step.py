import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Decoder, Sampler
from decoding.pace import Steps, stage_of
from decoding.presets import PRESETS
from decoding.reveal import Quota, Remask
from decoding.scoring import guided
from decoding.step import denoise
from decoding.window import Block, Convolution
from dlm.errors import ConfigError, DLMError
from tests.decoding.rig import LEARNT, canvas_of, decode, plan_of, rows
from tests.fakes import FakeDenoiser, FakeTokenizer


def run(model, ids, decoder, steps, keys=None, **kwargs):
    plan = plan_of(decoder, steps, mask=model.mask_id, eos=model.eos_id, fit=ids.shape[1], **kwargs)
    answer = [int((row == model.mask_id).int().argmax()) for row in ids]
    return decode(model, ids, plan, keys, answer=answer)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    steps=st.integers(1, 20),
    window=st.integers(6, 40),
    reach=st.integers(0, 8),
    prompt=st.integers(0, 5),
    eos_fill=st.booleans(),
    early_exit=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_mask_comes_out_and_pinned_tokens_stay(
    name, steps, window, reach, prompt, eos_fill, early_exit, seed
):
    model = FakeDenoiser()
    options = {}
    if "kernel_size" in PRESETS[name].options:
        options["kernel_size"] = 2 * reach + 1
    if name in ("semi-ar", "dilated", "block-threshold"):
        options["block_size"] = -(-window // steps)
    ids = rows(model, [prompt, 1], window)
    ids[:, -1] = 7  # a pinned token at the far end
    canvas = run(
        model,
        ids,
        Decoder.named(name, **options),
        steps,
        keys=[seed, seed + 1],
        eos_fill=eos_fill,
        early_exit=early_exit,
    )
    assert not (canvas.ids == model.mask_id).any()
    assert not canvas.masked.any()
    given_cells = ids != model.mask_id
    assert torch.equal(canvas.ids[given_cells], ids[given_cells])
    assert (canvas.reveal_step[given_cells] == -1).all()
    assert (canvas.reveal_step[~given_cells] >= 0).all()
    assert (canvas.model_calls <= steps + 1).all()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_row_is_bit_identical_alone_and_in_any_batch(name):
    model = FakeDenoiser(eos_bias=-1.0)
    small = {"semi-ar": {"block_size": 8}, "dilated": {"block_size": 8}, "dprm": LEARNT}
    decoder = Decoder.named(name, **small.get(name, {}))
    lengths = [0, 3, 9, 1, 5, 12, 2, 7]
    ids = rows(model, lengths, 30)
    keys = list(range(100, 108))
    together = run(model, ids, decoder, 10, keys)
    for i in range(len(lengths)):
        alone = run(model, ids[i : i + 1], decoder, 10, keys[i : i + 1])
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(alone.reveal_step[0], together.reveal_step[i])
        assert alone.model_calls[0] == together.model_calls[i]


def test_same_seed_same_text_and_other_seed_other_text():
    sampler = Sampler(FakeDenoiser(eos_bias=-9.0), FakeTokenizer())
    prompts = ["one", "three", "a longer prompt"]
    first = sampler.generate(prompts, decoder="conv", window=40, steps=10, seed=3)
    again = sampler.generate(prompts[::-1], decoder="conv", window=40, steps=10, seed=3, batch_size=2)[::-1]
    other = sampler.generate(prompts, decoder="conv", window=40, steps=10, seed=4)
    per_row = sampler.generate(prompts, decoder="conv", window=40, steps=10, seed=[3, 4, 3])
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert [o.token_ids for o in per_row] == [first[0].token_ids, other[1].token_ids, first[2].token_ids]


def slow_ancestral(model, ids, top_k, kernel, steps, trials, scale=1.0):
    """Independent reference for one row: no batching, no caches, loops over positions, torch's own RNG."""
    generator = torch.Generator().manual_seed(0)
    length = len(ids)
    revealed_at = torch.zeros(trials, length)
    for trial in range(trials):
        row = ids.clone()
        for step in range(steps):
            t, s = 1 - step / steps, 1 - (step + 1) / steps
            masked = [i for i in range(length) if row[i] == model.mask_id]
            if not masked:
                break
            logits = model.logits(model.hidden(row[None])[0]).double()
            p = logits.softmax(-1)
            best = p.topk(top_k, dim=-1)
            q, w = {}, {}
            for i in masked:
                q[i] = float(best.values[i].sum())
                near = [
                    j for j in range(length) if abs(i - j) <= (kernel - 1) // 2 and row[j] != model.mask_id
                ]
                w[i] = float(torch.tanh(torch.tensor(scale * len(near))))
            if sum(w[i] * q[i] for i in masked) == 0:
                w = dict.fromkeys(masked, 1.0)
            z = len(masked) / sum(w[i] * q[i] for i in masked)
            new = row.clone()
            for i in masked:
                a = (t - s) * w[i] * q[i] * z
                if a > 0 and torch.rand((), generator=generator) < a / (a + s):
                    pick = torch.multinomial(best.values[i] / best.values[i].sum(), 1, generator=generator)
                    new[i] = best.indices[i][pick[0]]
                    revealed_at[trial, i] = step
            row = new
        revealed_at[trial][(row == model.mask_id)] = steps
    return revealed_at


def test_the_law_of_reveal_times_agrees_with_an_independent_slow_reference():
    model = FakeDenoiser(vocab=9, mask_id=8, context=False)
    ids = rows(model, [3], 12)[0]
    steps, trials = 5, 3000
    slow = slow_ancestral(model, ids, top_k=3, kernel=5, steps=steps, trials=400)
    decoder = Decoder.named("conv", kernel_size=5, top_k=3)
    fast = run(
        model,
        ids.repeat(trials, 1),
        decoder,
        steps,
        keys=list(range(trials)),
        eos_fill=False,
        early_exit=False,
    )
    for position in range(3, 12):
        for step in range(steps + 1):
            expected = float((slow[:, position] == step).double().mean())
            got = float((fast.reveal_step[:, position] == step).double().mean())
            deviation = (expected * (1 - expected) / 400 + got * (1 - got) / trials) ** 0.5
            assert abs(got - expected) < 4.5 * deviation + 1e-3, (position, step, got, expected)


@pytest.mark.parametrize(
    "name", ["categorical", "top-k", "semi-ar", "llada", "conv", "llada-conv", "threshold"]
)
def test_early_exit_does_not_change_the_answer(name):
    model = FakeDenoiser(eos_bias=1.5)
    decoder = Decoder.named(name)
    ids = rows(model, [2, 4, 6, 1], 24)
    for fill in (True, False):
        stop = run(model, ids, decoder, 12, eos_fill=fill, early_exit=True)
        full = run(model, ids, decoder, 12, eos_fill=fill, early_exit=False)
        for i in range(len(ids)):
            cut = [
                row[: row.index(0)] if 0 in row else row
                for row in (stop.ids[i].tolist(), full.ids[i].tolist())
            ]
            assert cut[0] == cut[1]
        assert (stop.model_calls <= full.model_calls).all()


def test_eos_fill_needs_one_eos_and_ignores_the_prompts():
    model = FakeDenoiser(eos_bias=2.0)
    ids = rows(model, [4], 30)
    ids[0, 1] = model.eos_id  # an EOS inside the prompt must not end the answer
    canvas = run(model, ids, Decoder.named("top-k"), 8)
    answer = canvas.ids[0, 4:].tolist()
    assert model.eos_id in answer
    assert set(answer[answer.index(model.eos_id) :]) == {model.eos_id}
    assert canvas.ids[0, 1] == model.eos_id
    assert canvas.ids[0, 2] != model.eos_id


def test_steps_that_reveal_nothing_cost_no_model_call():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [4], 12)  # 8 masks, 64 steps
    canvas = run(model, ids, Decoder.named("top-k"), 64)
    assert int(canvas.model_calls[0]) == model.calls <= 9
    appeared = canvas.reveal_step[0, 4:].unique()
    assert model.calls == len(appeared)


def test_quota_takes_the_number_of_llada():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [2], 12)  # 10 masks in 4 steps: 3, 3, 2, 2
    canvas = run(model, ids, Decoder.named("llada"), 4)
    assert [int((canvas.reveal_step[0] == s).sum()) for s in range(4)] == [3, 3, 2, 2]


def test_quota_with_convolution_goes_outside_the_reach_only_when_it_must():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [2], 12)
    canvas = run(
        model, ids, Decoder.named("llada-conv", kernel_size=3), 5
    )  # reach 1: one open position, quota 2
    first = (canvas.reveal_step[0] == 0).nonzero()[:, 0].tolist()
    assert 2 in first
    assert len(first) == 2


def test_blocks_are_written_in_order_and_counted_from_the_prompt():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [3, 5], 19)
    canvas = run(model, ids, Decoder.named("semi-ar", block_size=4), 8)
    for row, start, blocks in ((0, 3, 4), (1, 5, 4)):
        for b in range(blocks):
            cells = canvas.reveal_step[row, start + 4 * b : start + 4 * (b + 1)]
            assert set(cells.tolist()) <= {2 * b, 2 * b + 1}


def test_the_far_side_of_a_convolution_is_filled_by_the_last_pass():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [4], 64)
    canvas = run(model, ids, Decoder.named("conv", kernel_size=3), 4)
    assert not (canvas.ids == model.mask_id).any()
    assert (
        canvas.reveal_step[0] == 4
    ).sum() > 40  # reach 1, four steps: most of the row is left to the last pass


def test_a_kernel_larger_than_the_window_and_an_empty_prompt_work():
    model = FakeDenoiser()
    ids = rows(model, [0], 9)
    assert not run(model, ids, Decoder.named("conv", kernel_size=101), 3).masked.any()
    # nothing is unmasked at first: every weight is 0 and w = 1 is used instead
    assert not run(model, ids, Decoder.named("conv", kernel_size=3), 3).masked.any()


def test_nan_logits_name_the_step_and_the_row():
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            out = super().logits(hidden)
            return out * float("nan") if self.calls >= 3 else out

    model = Broken(eos_bias=-50.0)
    with pytest.raises(DLMError, match="NaN in step 2, row 0"):
        run(model, rows(model, [2, 3], 40), Decoder.named("top-k"), 4)


@pytest.mark.parametrize("decoder", [*PRESETS, "margin", "entropy"])
def test_nan_logits_are_noticed_by_every_decoder(decoder):
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            out = super().logits(hidden)
            out[:, 3] = float("nan")
            return out

    orders = {name: Decoder.named("llada", order=name) for name in ("margin", "entropy")}
    model = Broken(eos_bias=-50.0)
    chosen = orders.get(decoder) or Decoder.named(decoder)
    with pytest.raises(DLMError, match="returned NaN in step 0"):
        run(model, rows(model, [2, 3], 40), chosen, 8)


def test_bad_settings_say_what_would_be_right():
    model = FakeDenoiser()
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        Steps(0)
    with pytest.raises(ConfigError, match="3 steps are too few for 7 blocks"):
        run(model, rows(model, [2], 30), Decoder.named("semi-ar", block_size=4), 3)
    sampler = Sampler(model, FakeTokenizer())
    with pytest.raises(ConfigError, match="13 tokens and the window 10; the window must be at least 14"):
        sampler.generate(["thirteen char"], window=10, steps=2)


def test_clock_gives_every_block_its_share_and_its_own_time():
    stages = torch.tensor([1, 3, 4])
    seen = {int(b): [] for b in stages}
    for step in range(10):
        stage, index, count = stage_of(torch.tensor(step), 10, stages)
        for i, b in enumerate(stages.tolist()):
            begin, end = (1 - float((index[i] + later) / count[i]) for later in (0, 1))
            seen[b].append((int(stage[i]), begin, end))
    assert [round(t, 6) for _, t, _ in seen[1]] == [round(1 - k / 10, 6) for k in range(10)]
    assert [j for j, _, _ in seen[3]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    for b, steps in seen.items():
        for j in range(b):
            times = [(t, s) for stage, t, s in steps if stage == j]
            assert times[0][0] == 1
            assert times[-1][1] == 0


def test_streaming_ends_in_the_text_of_generate():
    model = FakeDenoiser(eos_bias=-3.0)
    sampler = Sampler(model, FakeTokenizer())
    events = list(sampler.stream("hello", decoder="conv", window=30, steps=6, seed=1))
    output = sampler.generate(["hello"], decoder="conv", window=30, steps=6, seed=1)[0]
    assert events[-1].text == output.text
    assert [e.step for e in events] == sorted(e.step for e in events)
    assert model.mask_id in events[0].token_ids


def test_convolution_opens_from_both_sides():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [2], 40)
    ids[0, -2:] = 5
    canvas = run(model, ids, Decoder(window=Convolution(5), reveal=Quota()), 12, eos_fill=False)
    early = (canvas.reveal_step[0] == 0).nonzero()[:, 0]
    assert len(early) == 3  # 36 masks in 12 steps
    assert not ((early >= 4) & (early <= 35)).any()
    assert canvas.reveal_step[0, 4:8].max() < canvas.reveal_step[0, 18:22].min()
    assert canvas.reveal_step[0, 32:36].max() < canvas.reveal_step[0, 18:22].min()


def test_remasking_stays_within_the_block():
    model = FakeDenoiser(eos_bias=-50.0)
    ids = rows(model, [2], 34)
    decoder = Decoder(window=Block(8), reveal=Remask(eta=0.3))
    canvas = run(model, ids, decoder, 40, eos_fill=False)
    for b in range(4):  # every block is full when its own time is over: nothing is left to the last pass
        steps = canvas.reveal_step[0, 2 + 8 * b : 2 + 8 * (b + 1)]
        assert steps.min() >= 10 * b
        assert steps.max() < 10 * (b + 1)


def test_the_repetition_penalty_sees_what_the_row_holds_and_spares_the_end_token():
    """Rank by hand: a token that stands in the row loses by the penalty, elsewhere nothing changes."""
    base = torch.zeros(23)
    base[5], base[6], base[0] = 2.0, 1.9, 1.8

    class Constant(FakeDenoiser):
        def logits(self, hidden):
            out = base.expand(len(hidden), -1).clone()
            out[:, self.mask_id] = float("-inf")
            return out

    ids = torch.full((2, 6), 22)
    ids[0, :2], ids[1, :2] = torch.tensor([5, 0]), torch.tensor([9, 0])  # one row holds 5, both the end token
    decoder = Decoder.named("llada", repetition_penalty=1.5)
    plan = plan_of(decoder, 4, eos_fill=False, early_exit=False)
    canvas = canvas_of(ids, plan)
    steps = denoise(Constant(), canvas, plan)
    next(steps)
    first = [int(canvas.ids[i][canvas.reveal_step[i] == 0][0]) for i in (0, 1)]
    assert first == [6, 5]  # 2/1.5 < 1.9 in the first row
    next(steps)
    second = [int(canvas.ids[i][canvas.reveal_step[i] == 1][0]) for i in (0, 1)]
    assert second == [0, 6]  # 5 and 6 are both penalised now in the first row, the end token never is


def test_the_frequency_penalty_counts_what_the_row_has_written_and_not_its_prompt():
    """One token a step from constant logits: each choice is the argmax of what the counts leave, by hand."""
    base = torch.full((23,), -9.0)
    base[5], base[6], base[7] = 2.0, 1.9, 1.55

    class Constant(FakeDenoiser):
        def logits(self, hidden):
            out = base.expand(len(hidden), -1).clone()
            out[:, self.mask_id] = float("-inf")
            return out

    ids = torch.full((1, 9), 22)
    ids[0, :3] = 5  # the prompt holds 5 three times, which costs it nothing
    decoder = Decoder.named("llada", frequency_penalty=0.3, presence_penalty=0.1, logit_bias={7: 0.2})
    plan = plan_of(decoder, 6, eos_fill=False, early_exit=False)
    canvas = canvas_of(ids, plan)
    list(denoise(Constant(), canvas, plan))
    order = canvas.reveal_step[0, 3:].argsort()
    written = canvas.ids[0, 3:][order].tolist()
    counts, expected = dict.fromkeys((5, 6, 7), 0), []
    for _ in range(6):
        value = {t: float(base[t]) + 0.2 * (t == 7) - 0.3 * n - 0.1 * (n > 0) for t, n in counts.items()}
        best = max(value, key=value.__getitem__)
        counts[best] += 1
        expected.append(best)
    assert written == expected
    assert set(expected) == {5, 6, 7}


def test_guidance_mixes_the_distributions_with_and_without_the_prompt():
    model = FakeDenoiser()
    ids = torch.full((1, 9), 22)
    ids[0, :4] = torch.tensor([3, 4, 5, 6])
    blind = ids.clone()
    blind[0, :4] = 22
    decoder = Decoder.named("llada", guidance=1.5)
    plan = plan_of(decoder, 5, eos_fill=False, early_exit=False)
    canvas = canvas_of(ids, plan)
    next(denoise(model, canvas, plan))
    with_prompt = model.logits(model.hidden(ids)[0]).double().log_softmax(1)
    without = model.logits(model.hidden(blind)[0]).double().log_softmax(1)
    mixed = (2.5 * with_prompt - 1.5 * without)[4:, :22].softmax(1)
    best = int(mixed.amax(1).argmax())
    assert canvas.reveal_step[0].tolist().index(0) == 4 + best
    assert int(canvas.ids[0, 4 + best]) == int(mixed[best].argmax())
    assert int(canvas.model_calls[0]) == 2  # one with the prompt, one without


def test_no_guidance_is_the_model_itself_and_costs_nothing():
    logits = torch.randn(4, 9)
    logits[:, 2] = float("-inf")
    got = guided(logits, torch.randn(4, 9), 0.0).softmax(1)
    torch.testing.assert_close(got, logits.softmax(1))
    with pytest.raises(ConfigError, match="guidance must lie between 0 and"):
        Decoder.named("conv", guidance=-1.0)
