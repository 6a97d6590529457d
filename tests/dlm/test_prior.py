import json
import math

import pytest
import torch
from datasets import Dataset

from dlm.errors import CheckpointError
from dlm.prior import COUNTS_FILE, TokenPrior

ROWS = Dataset.from_dict(
    {"input_ids": [[9, 9, 3, 4, 4, 0], [9, 4, 5, 0], [6, 4]], "prompt_length": [2, 1, 0], "row": [0, 1, 2]}
)


@pytest.fixture
def prior():
    return TokenPrior.of(ROWS, 11, special=(0, 10))


def test_answers_are_counted_and_prompts_are_not(prior):
    assert prior.counts.tolist() == [2, 0, 0, 1, 4, 1, 1, 0, 0, 0, 0]


def test_the_most_frequent_tokens_are_ordinary_ones_that_occur(prior):
    assert prior.top(2).tolist() == [4, 3]
    assert sorted(prior.top(100).tolist()) == [3, 4, 5, 6]


def test_the_log_prior_is_a_smoothed_distribution(prior):
    log_prior = prior.log_prior()
    assert float(log_prior.exp().sum()) == pytest.approx(1)
    assert float(log_prior[4]) == pytest.approx(math.log(5 / 20))
    assert float(log_prior[8]) == pytest.approx(math.log(1 / 20))


def test_the_median_is_that_of_the_tokens_written_not_of_the_vocabulary(prior):
    # 9 tokens written: log priors of 3, 5, 6 (count 1), then 0 twice (count 2), then 4 four times
    assert prior.median_log_prior() == pytest.approx(math.log(3 / 20))


def test_counts_come_back_from_a_folder_and_damage_is_named(prior, tmp_path):
    assert TokenPrior.load(tmp_path) is None
    prior.save(tmp_path)
    again = TokenPrior.load(tmp_path)
    assert torch.equal(again.counts, prior.counts)
    assert again.special == (0, 10)
    (tmp_path / COUNTS_FILE).write_bytes(json.dumps({}).encode())
    with pytest.raises(CheckpointError, match="damaged"):
        TokenPrior.load(tmp_path)


def test_a_hub_id_that_cannot_be_reached_has_no_counts():
    assert TokenPrior.load("nobody/nothing") is None
