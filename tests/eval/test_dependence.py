"""Dependence by distance: against a slow recomputation, and on a chain whose information is known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dlm.errors import ConfigError
from dlm.noise import key_of, uniform
from eval.commands.dependence import DependenceConfig, run
from eval.dependence import by_distance, gains
from tests.fakes import FakeDenoiser

ROWS = [([1, 2], [3, 1, 4, 1, 5, 9, 0]), ([7], [2, 6, 5, 3, 5, 8, 9, 7, 9, 0]), ([4, 4, 4], [2, 0])]


def logp(model, ids, position, token):
    return float(model.logits(model.hidden(torch.tensor([ids]))[0])[position].log_softmax(-1)[token])


def test_gains_are_those_of_one_row_after_the_other():
    model = FakeDenoiser()
    found = {
        (g.answer, g.distance, g.reach, round(g.nats, 4)) for g in gains(model, ROWS, furthest=3, seed=5)
    }
    expected = set()
    for number, (prompt, answer) in enumerate(ROWS):
        ids = [*prompt, *answer]
        edge = len(prompt) + int(float(uniform(key_of("dependence", 5, number), 0)) * len(answer))
        text = [token if i < edge else 22 for i, token in enumerate(ids)]
        for a in (0, 1, 2, 4, 8):
            i = edge + a
            for j in range(edge, len(ids)):
                if i < len(ids) and 0 < abs(i - j) <= 3:
                    told = [ids[i] if k == i else token for k, token in enumerate(text)]
                    nats = logp(model, told, j, ids[j]) - logp(model, text, j, ids[j])
                    expected.add((number, abs(i - j), min(i, j) - edge, round(nats, 4)))
    assert found == expected
    assert len(expected) >= 12


def test_a_model_that_sees_nothing_gains_nothing():
    found = list(gains(FakeDenoiser(context=False), ROWS))
    assert found
    assert max(abs(gain.nats) for gain in found) < 1e-5


def test_a_block_causal_model_is_refused(model):
    model.config.block_size = 4
    with pytest.raises(ConfigError, match="block-causal"):
        next(gains(model, ROWS))


class Chain:
    """The exact conditionals of a symmetric binary chain that flips with probability f."""

    def __init__(self, flip):
        self.flip = flip
        self.config = SimpleNamespace(mask_token_id=2, eos_token_id=3)

    def stays(self, steps):
        return (1 + (1 - 2 * self.flip) ** steps) / 2

    def hidden(self, input_ids, attention_mask=None):
        out = torch.zeros(*input_ids.shape, 2, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            size = int(attention_mask[row].sum()) if attention_mask is not None else len(ids)
            seen = [i for i in range(size) if ids[i] != 2]
            for i in range(size):
                left, right = [k for k in seen if k < i][-1:], [k for k in seen if k > i][:1]
                for value in (0, 1):
                    chances = [
                        self.stays(abs(i - k)) if ids[k] == value else 1 - self.stays(abs(i - k))
                        for k in left + right
                    ]
                    out[row, i, value] = sum(map(math.log, chances))
        return out

    def logits(self, hidden):
        return hidden


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_on_a_chain_it_is_the_mutual_information():
    flip = 0.15
    torch.manual_seed(0)
    flips = torch.rand(600, 9) < flip
    values = (torch.cat([torch.randint(2, (600, 1)), flips.long()], dim=1).cumsum(1) % 2).tolist()
    rows = [(ids[:2], ids[2:]) for ids in values]
    found = by_distance(list(gains(Chain(flip), rows, furthest=4)), reach=0)
    for distance in (1, 2, 3):
        # one of the two stands at the text, the other `distance` behind it
        far = [(1 - (1 - 2 * flip) ** n) / 2 for n in (distance + 1, distance)]
        exact = entropy(far[0]) - entropy(far[1])
        assert found[distance].low < exact < found[distance].high, (distance, exact)


def test_the_command_writes_figures_table_and_plot(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"copy: {i}", "input": "", "output": f"{i} {i + 1} {i}"} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = DependenceConfig(
        models=[str(tmp_path / "model")], data=str(tmp_path / "rows.json"), limit=6, furthest=3,
        output=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    assert run(config) == 0
    assert "distance" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "dependence.json").read_text())
    assert set(figures[str(tmp_path / "model")]) == {"1", "2", "3"}
    assert (tmp_path / "out" / "dependence.svg").read_text().startswith("<?xml")
    assert "| distance |" in (tmp_path / "out" / "dependence.md").read_text()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="name one or more checkpoints"):
        DependenceConfig()
    with pytest.raises(ValueError, match="furthest must be at least 1"):
        DependenceConfig(models=["default"], furthest=0)
