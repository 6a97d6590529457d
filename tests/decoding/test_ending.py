"""What end tokens do, against a loop over positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding.pace import EndTokens
from decoding.presets import Decoder
from tests.decoding.rig import decode, plan_of, rows
from tests.fakes import FakeDenoiser

MASK = 9
cells = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=12)


def slowly(ending, ids, masked, free):
    """One row by the definition."""
    ids, masked = list(ids), list(masked)
    ends = [i for i, token in enumerate(ids) if token in ending.end_ids and free[i] and not masked[i]]
    if ending.fill and ends:
        for i in range(ends[0] + 1, len(ids)):
            if free[i]:
                ids[i], masked[i] = ending.eos_id, False
    complete = not any(masked) or (
        ending.early_exit and bool(ends) and not any(masked[i] for i in range(ends[0]))
    )
    if complete:
        ids = [ending.eos_id if m else token for token, m in zip(ids, masked, strict=True)]
        masked = [False] * len(ids)
    return ids, masked, complete


@given(row=cells, fill=st.booleans(), early=st.booleans(), ends=st.sampled_from([(0,), (0, 3)]))
def test_ends_have_the_effect_of_the_definition(row, fill, early, ends):
    masked = [m for _, m, _ in row]
    ids = [MASK if m else token for token, m, _ in row]
    free = [f or m for _, m, f in row]
    ending = EndTokens(0, ends, fill=fill, early_exit=early)
    got = ending.apply(torch.tensor([ids]), torch.tensor([masked]), torch.tensor([free]))
    expected = slowly(ending, ids, masked, free)
    assert (got.ids[0].tolist(), got.masked[0].tolist(), bool(got.complete)) == expected


def test_a_canvas_closes_at_an_end_or_when_the_row_is_done():
    ended, done = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    assert EndTokens(0, (0,)).closed(ended, done).tolist() == [True, True, False]
    assert EndTokens(0, (0,), closes=False).closed(ended, done).tolist() == [False, True, False]
    assert not EndTokens(0, (0,), closes=False, early_exit=False).closed(ended, done).any()


def test_any_of_several_end_tokens_ends_an_answer():
    """LLaDA's chat models have two."""
    model = FakeDenoiser(eos_bias=-50.0)
    ids, decoder = rows(model, [3], 40), Decoder.named("categorical")
    one = decode(model, ids, plan_of(decoder, 30), [4])
    assert 0 not in one.ids[0, 3:].tolist()
    two = decode(model, ids, plan_of(decoder, 30, end_ids=(5, 6)), [4])
    answer = two.ids[0, 3:].tolist()
    first = next(i for i, token in enumerate(answer) if token in (5, 6))
    assert set(answer[first + 1 :]) == {0}
