"""Negatives against an independent, slow reading of the rules: one row, one token at a time."""

import dataclasses
import itertools

import pytest
import torch

from dlm.errors import ConfigError
from dlm.model import IGNORE
from dlm.noise import fold, key_of
from dlm.noising import Blocks
from finetune.contrast_config import NegativeConfig
from finetune.negatives import RULES, make_negative, writable

MASK, EOS, PAD_FROM = 2, 1, 0
FREQUENT = torch.tensor([7, 8, 9])
NAMES = list(RULES)
OFF = dict.fromkeys(NAMES, 0.0) | {"eos_p": 0.0}


def rows(n, prompt, answer, window):
    """Every cell another token (100 + position), the EOS last, EOS padding up to the window."""
    ids = torch.arange(100, 100 + window).repeat(n, 1)
    length = prompt + answer
    ids[:, length - 1 :] = EOS
    return ids, torch.full((n,), prompt), torch.full((n,), length)


def contrast(n=400, prompt=6, answer=20, window=64, seed="x", **options):
    """Contrasts of n equal rows under n keys, with only the given rules on."""
    rules = NegativeConfig(**{**OFF, **options})
    ids, start, length = rows(n, prompt, answer, window)
    keys = fold(key_of(seed), torch.arange(n))
    return ids, make_negative(
        ids, start, length, keys, mask_id=MASK, eos_id=EOS, frequent=FREQUENT, rules=rules
    )  # fmt: skip


def cuts(made):
    """Where each row's masks begin."""
    return (made.noisy_ids == MASK).int().argmax(1).tolist()


def test_the_true_side_is_the_answer_from_the_cut_to_its_first_eos_and_the_rest_is_masked():
    ids, made = contrast(left=1.0)
    for i, cut in enumerate(cuts(made)):
        assert 6 <= cut <= 25
        assert made.noisy_ids[i].tolist() == ids[i, :cut].tolist() + [MASK] * (64 - cut)
        assert made.targets[i].tolist() == [IGNORE] * cut + ids[i, cut:26].tolist() + [IGNORE] * 38


def test_cuts_are_uniform_from_the_prompts_end_to_the_eos():
    _, made = contrast(n=4000, left=1.0)
    found = torch.bincount(torch.tensor(cuts(made)), minlength=26)[6:].float()
    assert len(found) == 20
    assert ((found - 200) ** 2 / 200).sum() < 43  # chi-square with 19 degrees of freedom, p about 0.001


@pytest.mark.parametrize("window", [27, 40, 90])
def test_the_left_context_is_repeated_at_a_phase_over_a_span_that_ends_with_the_window(window):
    ids, made = contrast(left=1.0, window=window)
    spans, sizes, phases = set(), set(), set()
    for i, cut in enumerate(cuts(made)):
        wrong = made.rejected[i].tolist()
        covered = [j for j in range(window) if wrong[j] != IGNORE]
        assert covered[0] == cut or ids[i, cut] == EOS
        assert covered == list(range(covered[0], covered[-1] + 1))
        spans.add(covered[-1] + 1 - cut)
        units = [
            (g, p)
            for g in range(1, min(15, cut) + 1)
            for p in range(g)
            if all(wrong[j] == int(ids[i, cut - g + (j - cut + p) % g]) for j in covered)
        ]
        assert units, (cut, wrong)
        sizes.add(units[0][0])
        phases.add(units[0][1])
    assert max(spans) <= 50
    if window == 90:
        assert min(spans) == 30
        assert max(spans) == 50
    assert sizes == set(range(1, 16))
    assert len(phases) > 10


def test_a_unit_is_never_longer_than_its_context():
    _, made = contrast(left=1.0, prompt=2, answer=1, window=64)
    assert set(cuts(made)) == {2}
    for wrong in made.rejected.tolist():
        assert set(wrong) - {IGNORE} <= {100, 101}


def test_the_law_of_unit_lengths_is_uniform():
    """The size is seen in how many different tokens a long negative has."""
    _, made = contrast(n=3000, left=1.0, prompt=20, answer=1, window=90)
    sizes = torch.tensor([len(set(wrong) - {IGNORE}) for wrong in made.rejected.tolist()])
    counts = torch.bincount(sizes, minlength=16)[1:].float()
    assert counts.sum() == 3000
    assert ((counts - 200) ** 2 / 200).sum() < 36  # chi-square with 14 degrees of freedom, p about 0.001


def test_answers_of_length_one_and_of_the_windows_length():
    for prompt, answer, window in ((6, 1, 64), (6, 1, 7), (6, 58, 64), (1, 63, 64)):
        ids, made = contrast(left=1.0, prior=1.0, prompt=prompt, answer=answer, window=window)
        n_w = (made.targets != IGNORE).sum(1)
        assert (n_w >= 1).all()
        assert (made.targets[:, prompt + answer - 1] == EOS).all()
        assert made.noisy_ids.shape == ids.shape
        assert ((made.rejected != IGNORE).sum(1) <= 50).all()


def test_negative_cells_are_masked_and_never_hold_the_true_token():
    ids, made = contrast(n=2000, left=1.0, prior=1.0, mixed=1.0, run=1.0, eos_p=1.0)
    covered = made.rejected != IGNORE
    assert (made.noisy_ids[covered] == MASK).all()
    assert (made.rejected[covered] != ids[covered]).all()
    assert covered.any(1).all()
    # rows whose context is what comes next agree with the truth everywhere, and have no negative at all
    same = torch.full((50, 40), 5)
    start, length = torch.full((50,), 5), torch.full((50,), 40)
    made = make_negative(
        same, start, length, torch.arange(50), mask_id=MASK, eos_id=EOS, frequent=FREQUENT,
        rules=NegativeConfig(**{**OFF, "left": 1.0}),
    )  # fmt: skip
    assert (made.rejected == IGNORE).all()


def test_an_early_eos_stands_before_the_true_one_once_and_as_often_as_asked():
    _, made = contrast(n=4000, left=1.0, prompt=8, eos_p=1.0, window=40)
    early = made.rejected == EOS
    assert (early.nonzero()[:, 1] < 27).all()  # the true EOS is cell 27
    for i, cut in enumerate(cuts(made)):
        assert early[i].sum() == (1 if cut < 27 else 0)
    # where it stands is uniform over the cells from the cut to the EOS: the mean place is in the middle
    places = [
        (int(e.int().argmax()) - c + 0.5) / (27 - c) for e, c in zip(early, cuts(made), strict=True) if c < 27
    ]
    assert abs(sum(places) / len(places) - 0.5) < 0.02
    _, made = contrast(n=500, left=1.0, prompt=8, eos_p=1.0, window=60, seed="behind")
    assert ((made.rejected == EOS).nonzero()[:, 1] < 27).all()
    _, made = contrast(n=4000, left=1.0, prompt=8, eos_p=0.25)
    share = float((made.rejected == EOS).any(1).float().mean())
    assert abs(share - 0.25 * 19 / 20) < 0.03  # one cut of twenty is the EOS itself


def test_high_prior_units_are_drawn_in_proportion_to_their_counts():
    ids, start, length = rows(4000, 6, 20, 64)
    made = make_negative(
        ids, start, length, fold(key_of(3), torch.arange(4000)), mask_id=MASK, eos_id=EOS,
        frequent=FREQUENT, frequent_counts=torch.tensor([60, 30, 10]),
        rules=NegativeConfig(**{**OFF, "run": 1.0}),
    )  # fmt: skip
    tokens = made.rejected.amax(1)
    for wrong in made.rejected[:50].tolist():
        assert len(set(wrong) - {IGNORE}) == 1  # a run is one token
    share = torch.bincount(tokens, minlength=10)[7:].float() / 4000
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0)


def test_rules_come_as_often_as_their_weights_say():
    weights = {"left": 2.0, "prior": 1.0, "mixed": 1.0, "run": 4.0}
    _, made = contrast(n=8000, **weights)
    share = torch.bincount(made.rule, minlength=len(NAMES)) / 8000
    for i, name in enumerate(NAMES):
        assert abs(float(share[i]) - weights.get(name, 0) / 8) < 0.02, name
    assert NegativeConfig().left > 0
    assert sum(getattr(NegativeConfig(), name) > 0 for name in NAMES) == len(NAMES)  # diverse by default


def test_mixed_units_hold_tokens_of_both_kinds():
    _, made = contrast(n=500, mixed=1.0)
    wrong = made.rejected[made.rejected != IGNORE]
    frequent = float((wrong < 10).float().mean())
    assert 0.4 < frequent < 0.6


def text(n=2000, length=60, window=64, **options):
    return contrast(n=n, prompt=0, answer=length, window=window, **options)


@pytest.mark.parametrize("inside", [1.0, 0.0])
def test_text_is_masked_inside_or_outside_one_span(inside):
    ids, made = text(left=1.0, right=1.0, in_span=inside)
    for i in range(len(ids)):
        assert (made.noisy_ids[i, 60:] == (EOS if inside else MASK)).all()
        masked = (made.noisy_ids[i, :60] == MASK).tolist()
        runs = sum(a != b for a, b in itertools.pairwise(masked))
        assert runs <= 2
        held = masked if inside else [not m for m in masked]
        where = [j for j, h in enumerate(held) if h]
        assert where == list(range(where[0], where[-1] + 1))
        assert len(where) == 30  # spans are 30 to 50, and never more than half of the row
        a, b = where[0], where[-1] + 1
        assert made.targets[i].tolist()[:60] == [
            int(x) if m else IGNORE for x, m in zip(ids[i, :60], masked, strict=True)
        ]
        tokens = {w - 100 for w in made.rejected[i].tolist() if w not in (IGNORE, EOS)}
        name = NAMES[int(made.rule[i])]
        if inside and name == "left":
            assert all(max(0, a - 15) <= t < a for t in tokens)
        elif inside:
            assert all(b <= t < b + 15 for t in tokens)
        elif name == "left":
            assert all(max(a, b - 15) <= t < b for t in tokens)
        else:
            assert all(a <= t < min(b, a + 15) for t in tokens)
    assert set(made.rule.tolist()) == {0, 1}


def test_spans_of_text_have_every_length_and_place_and_the_two_are_independent():
    _, made = text(n=6000, length=60, left=1.0, right=1.0, in_span=1.0, span_min=3, span_max=12)
    masked = made.noisy_ids[:, :60] == MASK
    width, start = masked.sum(1), masked.int().argmax(1)
    assert set(width.tolist()) == set(range(3, 13))
    assert set(start.tolist()) == set(range(58))
    room = (60 - width).float()
    assert abs(float((start / room).mean()) - 0.5) < 0.02
    correlation = torch.corrcoef(torch.stack([start / room, width.float()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_a_row_with_nothing_to_repeat_falls_back_on_runs_of_frequent_tokens():
    ids, made = text(n=600, length=8, left=1.0, in_span=1.0, span_min=1, span_max=4)
    for i in range(len(ids)):
        first = int((made.noisy_ids[i] == MASK).int().argmax())
        assert NAMES[int(made.rule[i])] == ("run" if first == 0 else "left")


def test_a_side_without_context_is_never_repeated():
    ids, made = text(n=4000, length=8, left=1.0, right=1.0, in_span=1.0, span_min=1, span_max=4)
    for i in range(len(ids)):
        masked = (made.noisy_ids[i, :8] == MASK).nonzero()[:, 0].tolist()
        if masked[0] == 0:
            assert NAMES[int(made.rule[i])] == "right"
        if masked[-1] == 7:
            assert NAMES[int(made.rule[i])] == "left"


def test_a_text_of_one_token_still_has_something_to_learn():
    _, made = text(length=1, left=1.0, prior=1.0)
    assert (made.targets[:, 0] == EOS).all()
    assert (made.rule == NAMES.index("prior")).all()


def test_padding_is_left_alone():
    ids, start, length = rows(300, 6, 10, 40)
    real = torch.arange(40).expand(300, -1) < 22
    made = make_negative(
        ids, start, length, torch.arange(300), mask_id=MASK, eos_id=EOS, frequent=FREQUENT, real=real
    )
    assert torch.equal(made.noisy_ids[~real], ids[~real])
    assert (made.rejected[~real] == IGNORE).all()


def test_a_rows_negative_depends_on_its_key_alone():
    ids, start, length = rows(64, 6, 20, 64)
    keys = fold(key_of(1), torch.arange(64))
    options = {"mask_id": MASK, "eos_id": EOS, "frequent": FREQUENT}
    whole = make_negative(ids, start, length, keys, **options)
    part = make_negative(ids[5:9], start[5:9], length[5:9], keys[5:9], **options)
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(part, field.name), getattr(whole, field.name)[5:9])


def test_bad_rules_say_what_is_wrong():
    with pytest.raises(ConfigError, match="all 0"):
        NegativeConfig(left=0, right=1, prior=0, mixed=0, run=0)
    with pytest.raises(ConfigError, match="span_min <= span_max, got 9 and 3"):
        NegativeConfig(span_min=9, span_max=3)
    with pytest.raises(ConfigError, match="eos_p must lie"):
        NegativeConfig(eos_p=1.5)
    ids, start, length = rows(2, 6, 20, 64)
    with pytest.raises(ConfigError, match="at least one high-prior"):
        make_negative(ids, start, length, torch.arange(2), mask_id=2, eos_id=1, frequent=FREQUENT[:0])


def test_the_command_takes_the_names_that_every_command_takes(capsys):
    from dlm.cli import main

    words = ["--data.source", "rules", "--data.limit", "40", "--data.validation_rows", "0", "--rows", "2"]
    assert main(["inspect", "negatives", "default", "--data.window", "96", *words]) == 0
    assert "negative" in capsys.readouterr().out


def test_a_position_that_leads_its_block_is_contrasted_alone():
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, 6:] = True
    assert writable(masked, Blocks(6, lead=True))[0].nonzero()[:, 0].tolist() == [6]
    assert writable(masked, Blocks(6))[0].nonzero()[:, 0].tolist() == list(range(6, 12))
    masked[0, 3:] = True  # the lead of this block is known
    assert (writable(masked, Blocks(6, lead=True)) & masked)[0].nonzero()[:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("lead", [False, True])
def test_in_blocks_only_what_can_be_written_is_contrasted_and_an_early_end_lies_there(lead):
    rules = NegativeConfig(**{**OFF, "left": 1.0, "eos_p": 1.0})
    ids, start, length = rows(600, 6, 20, 64)
    keys = fold(key_of("blocks"), torch.arange(600))
    options = {"mask_id": MASK, "eos_id": EOS, "frequent": FREQUENT, "rules": rules}
    whole = make_negative(ids, start, length, keys, **options)
    made = make_negative(ids, start, length, keys, blocks=Blocks(8, lead), **options)
    assert torch.equal(made.noisy_ids, whole.noisy_ids)
    ends = 0
    for i, cut in enumerate(cuts(made)):
        last = cut if lead and cut % 8 == 0 else cut // 8 * 8 + 7
        allowed = range(cut, last + 1)
        assert {p for p in range(64) if made.targets[i, p] != IGNORE} == {p for p in allowed if p < 26}
        wrong = {p for p in range(64) if made.rejected[i, p] != IGNORE}
        assert wrong <= set(allowed)
        early = [p for p in wrong if made.rejected[i, p] == EOS]
        assert len(early) == (1 if cut < 25 else 0)  # a cut at the end itself has none before it
        ends += len(early)
    assert ends > 500
