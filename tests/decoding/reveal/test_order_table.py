"""Tables against sums in plain Python; files that are none."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.reveal.order_table import LARGEST_REWARD, OrderTable, is_name, names, tables_folder
from dlm.errors import ConfigError, DataError
from tests.decoding.rig import order_table

SHAPE = (2, 3, 2)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 11), st.floats(-30, 30)), max_size=40),
    parts=st.integers(1, 4),
    beta=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_cells_hold_the_counts_and_the_sums_of_exponentials(tokens, parts, beta):
    table = OrderTable.empty(SHAPE, beta)
    for part in range(parts):
        some = tokens[part::parts]
        cells = torch.tensor([cell for cell, _ in some], dtype=torch.int64)
        table = table.credited(cells, torch.tensor([reward for _, reward in some], dtype=torch.float64))
    total = 0.0
    for cell in range(12):
        rewards = [max(-20.0, min(20.0, reward)) for c, reward in tokens if c == cell]
        expected = math.fsum(math.exp(beta * reward) for reward in rewards)
        total += expected
        assert int(table.counts.flatten()[cell]) == len(rewards)
        value = float(table.values.flatten()[cell])
        right = math.log(expected / len(rewards)) / beta if rewards else 0.0
        assert value == pytest.approx(right, abs=1e-9)
    overall = math.log(total / len(tokens)) / beta if tokens else 0.0
    assert table.overall == pytest.approx(overall, abs=1e-9)


def test_rewards_are_summed_where_their_exponentials_would_overflow():
    table = OrderTable.empty(SHAPE, beta=100.0)
    table = table.credited(torch.tensor([3, 3, 3]), torch.tensor([20.0, 20.0, 1e9]))
    assert float(table.values.flatten()[3]) == pytest.approx(20.0)
    low = OrderTable.empty(SHAPE, beta=100.0).credited(torch.tensor([3]), torch.tensor([-math.inf]))
    assert float(low.values.flatten()[3]) == pytest.approx(-LARGEST_REWARD)
    with pytest.raises(ConfigError, match="a reward is NaN"):
        table.credited(torch.tensor([0]), torch.tensor([math.nan]))


def test_a_cell_is_phase_confidence_and_position_each_in_equal_bins():
    table = OrderTable.empty((8, 16, 4))
    for steps in (1, 5, 8, 24, 56, 1000):
        for step in range(steps + 1):
            for confidence, place in ((0.0, 0.0), (0.0625, 0.25), (0.99, 0.74), (1.0, 1.0)):
                share = torch.tensor(step, dtype=torch.float64) / steps
                cell = int(table.cells(share, torch.tensor(confidence), torch.tensor(place)))
                phase = min(8 * step // steps, 7)
                assert cell == (phase * 16 + min(int(confidence * 16), 15)) * 4 + min(int(place * 4), 3)


def test_a_merged_table_holds_the_tokens_of_both():
    cells, rewards = torch.arange(12).repeat(4), torch.linspace(-3, 3, 48)
    empty = OrderTable.empty(SHAPE)
    one, two = empty.credited(cells[:20], rewards[:20]), empty.credited(cells[20:], rewards[20:])
    whole = empty.credited(cells, rewards)
    merged = one.merged(two)
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.log_sums, whole.log_sums)
    assert torch.equal(one.merged(empty).log_sums, one.log_sums)
    for other in (OrderTable.empty((2, 3, 3)), OrderTable.empty(SHAPE, beta=2.0)):
        with pytest.raises(ConfigError, match="one shape and one beta"):
            one.merged(other)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_gives_the_table_back_bit_for_bit(suffix, tmp_path):
    table = OrderTable.empty((3, 4, 2), beta=0.1).credited(torch.arange(20), torch.randn(20) * 30)
    for each in (table, OrderTable.empty()):
        again = OrderTable.load(each.save(tmp_path / "deep" / f"table{suffix}"))
        assert again == each
        assert torch.equal(again.counts, each.counts)
        assert torch.equal(again.log_sums, each.log_sums)
        assert again.beta == each.beta
        assert hash(again) == hash(each)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == [f"table{suffix}"]
    assert pickle.loads(pickle.dumps(table)) == table
    assert table != OrderTable.empty((3, 4, 2), beta=0.1)
    assert table != OrderTable(table.counts, table.log_sums + 1e-9, 0.1)


WRONG = {
    "counts of another shape": ({"counts": [1] * 11}, "does not fit 11 counts and 12 sums"),
    "a negative count": ({"counts": [-1] + [0] * 11, "log_sums": [None] * 12}, "at least 0, got -1"),
    "half a token": ({"counts": [0.5] * 12}, "whole numbers"),
    "no numbers": ({"log_sums": [math.nan] * 12}, "lie within ±20"),
    "endless rewards": ({"log_sums": [math.inf] * 12}, "lie within ±20"),
    "rewards out of range": ({"log_sums": [21.0] * 12}, "lie within ±20"),
    "tokens without rewards": ({"log_sums": [None] * 12}, "lie within ±20"),
    "a reward without a token": ({"counts": [0] * 12}, "a reward in a cell without a token"),
    "another format": ({"format": "x"}, "its format is 'x'"),
    "no beta": ({"beta": 0}, "beta must be above 0"),
    "a beta that is text": ({"beta": "1"}, "beta must be above 0"),
    "a shape of two": ({"shape": [3, 4]}, "does not fit"),
    "counts beyond numbers": ({"counts": [2**70] * 12}, "not an order table"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_table_is_refused_in_one_line(name, tmp_path):
    changes, message = WRONG[name]
    body = {"format": "dlm order table", "beta": 1.0, "shape": list(SHAPE)}
    body |= {"counts": [1] * 12, "log_sums": [0.5] * 12}
    file = tmp_path / "t.json"
    file.write_text(json.dumps(body))
    OrderTable.load(file)
    file.write_text(json.dumps(body | changes))
    with pytest.raises(DataError, match=message) as caught:
        OrderTable.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    del body["counts"]
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match="'counts' is missing"):
        OrderTable.load(file)


def test_files_of_other_kinds_are_refused(tmp_path):
    for file, text, message in (
        ("a.json", "{", "damaged"),
        ("a.safetensors", "nonsense", "not an order table"),
        ("a.txt", "", r"a \.json or \.safetensors file"),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            OrderTable.load(tmp_path / file)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such order table"):
        OrderTable.load(tmp_path / "b.json")
    with pytest.raises(ConfigError, match=r"a \.json or \.safetensors file, got 'b.txt'"):
        order_table().save(tmp_path / "b.txt")
    with pytest.raises(ConfigError, match="three numbers of at least 1"):
        OrderTable.empty((8, 0, 4))


def test_a_name_stands_for_a_file_of_the_folder_and_paths_for_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no order table 'mine': none has a name yet"):
        OrderTable.named("mine")
    table = order_table()
    table.save(tables_folder() / "mine.json")
    OrderTable.empty().save(tables_folder() / "other.safetensors")
    assert tables_folder() == tmp_path / "orders"
    assert names() == ["mine", "other"]
    assert OrderTable.named("mine") == table
    assert OrderTable.named(table) is table
    assert OrderTable.named("other") == OrderTable.named(str(tables_folder() / "other.safetensors"))
    with pytest.raises(ConfigError, match="unknown order table 'mime'. Did you mean 'mine'"):
        OrderTable.named("mime")
    with pytest.raises(ConfigError, match="by its name or file, got 3"):
        OrderTable.named(3)
    (tables_folder() / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^order table 'bad' is damaged; see dlm orders bad$"):
        OrderTable.named("bad")
    with pytest.raises(DataError, match="damaged"):
        OrderTable.named(tables_folder() / "bad.json")
    OrderTable.empty().save(tables_folder() / "mine.json")  # a changed file is read again
    assert OrderTable.named("mine") == OrderTable.empty()


def test_what_could_be_a_path_is_no_name():
    for text in ("a/b", "../a", "a.json", "/etc/passwd", "", ".", "a\\b", "~", "c:x", "a\n", 3, None):
        assert not is_name(text)
    assert is_name("sorted-words_2")
