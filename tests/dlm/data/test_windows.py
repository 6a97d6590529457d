import pytest
import torch

from dlm.data.windows import EpochSampler, WindowCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8, 0], "prompt_length": 2, "row": 3},
    {"input_ids": [5, 6, 7, 8, 9, 9, 9, 0], "prompt_length": 4, "row": 9},
]


def test_fixed_windows_end_in_eos_that_is_maskable_but_carries_no_loss():
    batch = WindowCollator(eos_token_id=0, window=12)(ROWS)
    assert batch["input_ids"].tolist()[0] == [5, 6, 7, 8, 0] + [0] * 7
    assert batch["attention_mask"].all()
    assert batch["maskable"].tolist()[0] == [False] * 2 + [True] * 10
    assert batch["loss_mask"].tolist()[0] == [False] * 2 + [True] * 3 + [False] * 7
    every = WindowCollator(eos_token_id=0, window=12, eos_loss_all=True)(ROWS)
    assert torch.equal(every["loss_mask"], every["maskable"])


def test_grouped_windows_have_a_random_tail_per_row_and_epoch_and_padding_nobody_sees():
    collate = WindowCollator(eos_token_id=0, window=64, grouped=True, eos_tail=20, seed=1)
    ends = set()
    for epoch in range(50):
        collate.epoch = epoch
        batch = collate(ROWS)
        real = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] % 8 == 0
        assert batch["input_ids"].shape[1] - int(real.max()) < 8
        assert not (batch["maskable"] & ~batch["attention_mask"]).any()
        assert batch["loss_mask"].sum(1).tolist() == [3, 4]
        alone = collate(ROWS[:1])
        assert int(alone["attention_mask"].sum()) == int(real[0])  # a row's tail is its own
        ends.add(int(real[0]) - 5)
    assert min(ends) >= 0
    assert max(ends) <= 20
    assert len(ends) > 12


def test_tails_never_pass_the_window():
    collate = WindowCollator(eos_token_id=0, window=9, grouped=True, eos_tail=100)
    assert collate(ROWS)["input_ids"].shape[1] <= 9


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    lengths = torch.randint(5, 100, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    for group in (1, 8):
        sampler = EpochSampler(lengths, group, seed=4)
        first = list(sampler)
        torch.rand(10)
        assert list(sampler) == first
        assert sorted(first) == list(range(203))
        sampler.set_epoch(1)
        assert list(sampler) != first
        assert list(EpochSampler(lengths, group, seed=5)) != first


def test_grouping_brings_similar_lengths_together():
    lengths = torch.randint(5, 100, (800,), generator=torch.Generator().manual_seed(0)).tolist()

    def waste(group):
        order = [lengths[i] for i in EpochSampler(lengths, group, seed=0)]
        batches = [order[i : i + 8] for i in range(0, 800, 8)]
        return sum(max(b) * len(b) for b in batches) / sum(lengths) - 1

    assert waste(8) < 0.1 < waste(1)


def test_a_share_of_grouped_rows_ends_inside_the_answer():
    rows = [{"input_ids": [5, 6, 7, *range(10, 30), 0], "prompt_length": 3, "row": i} for i in range(4000)]
    collate = WindowCollator(eos_token_id=0, window=64, grouped=True, eos_tail=0, cut_share=0.25, seed=1)
    batch = collate(rows)
    end = batch["attention_mask"].sum(1)
    cut = end < 24
    assert abs(float(cut.float().mean()) - 0.25) < 0.03
    assert set(end[cut].tolist()) == set(range(4, 24))  # at least one token of the answer, never its EOS
    assert torch.equal(batch["length"], end)
    assert torch.equal(batch["loss_mask"].sum(1), end - 3)
    assert collate([{**rows[0], "prompt_length": 0}] * 50)["attention_mask"].sum(1).unique().tolist() == [24]


@pytest.mark.parametrize("group", [1, 8])
def test_several_processes_leave_out_what_does_not_fill_a_batch(group):
    lengths = [i % 9 + 1 for i in range(61)]
    whole = list(EpochSampler(lengths, group, seed=3))
    shared = EpochSampler(lengths, group, seed=3, multiple=8)
    assert list(shared) == whole[:56]
    assert len(shared) == 56
    few = EpochSampler(lengths[:5], group, seed=3, multiple=8)
    assert sorted(few) == list(range(5))
