"""The baselines of the benchmarks do what they are named for."""

import torch

from decoding import Decoder
from eval.bench import Problem, Run, as_causal, bench_table, published_loop, standard_ways, time_ways
from tests.decoding import test_law as law
from tests.dlm.test_attention import MASK, tiny


def test_the_plain_loop_has_the_law_of_the_definition():
    ids = law.start().repeat(law.FAST, 1)
    texts = published_loop(law.fake(-9.0), ids, law.MASK, law.STEPS, kernel_size=5, top_k=3)
    law.agree(law.slow("conv", 3, -9.0), texts)
    ours = law.fast(Decoder.named("conv", top_k=3, kernel_size=5), -9.0, steps=law.STEPS)
    law.agree(ours, texts)


def test_a_backbone_made_causal_predicts_what_the_model_predicts_at_its_end():
    """The last position sees the same in both, in the first layer; so one layer is enough to compare."""
    model = tiny(layers=1, shift=False, dtype=torch.float32)
    causal = as_causal(model)
    ids = torch.randint(0, 59, (2, 7))
    with torch.no_grad():
        ours = model.logits(model.hidden(ids)[:, -1])
        theirs = causal(ids).logits[:, -1]
    torch.testing.assert_close(ours[:, :MASK], theirs[:, :MASK])


def test_every_way_writes_and_is_counted():
    model = tiny(dtype=torch.float32)
    prompts = torch.randint(3, 50, (2, 5))
    problem = Problem(model, prompts, MASK, 0, window=40, steps=8, limit=30)
    runs = time_ways(standard_ways(problem, as_causal(model), 10), rounds=1)
    assert len(runs) == 11
    assert runs["plain, L=40, S=8"][0].calls == 9
    assert runs["autoregressive, cache"][0].tokens == 20
    for (run,) in runs.values():
        assert 0 <= run.tokens <= 2 * 35
        assert run.calls <= 31


def test_the_table_gives_medians_and_ratios():
    runs = {
        "base": [Run(2.0, 100, 4), Run(4.0, 100, 6), Run(2.0, 100, 5)],
        "ours": [Run(1.0, 100, 2), Run(1.0, 100, 2), Run(1.0, 100, 3)],
    }
    lines = bench_table(runs, ["base"]).splitlines()
    assert lines[2] == "| base | 2.00 | 100 | 5.0 | 50.0 | 1.00 |"
    assert lines[3] == "| ours | 1.00 | 100 | 2.0 | 100.0 | 2.00 |"


def test_the_command_prints_a_table(model, tokenizer, tmp_path, capsys):
    from dlm.cli import main

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["bench", "--model", str(tmp_path), "--window", "60", "--steps", "4", "--max-tokens", "12"]
    assert main([*words, "--rounds", "1", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "| steps, exact |" in out
    assert "× autoregressive, cache" in out
    assert main([*words, "--window", "3"]) == 2
    assert "too long for this window" in capsys.readouterr().err
    assert main(["bench", "--rounds", "0", "--model", "x"]) == 2
    assert "rounds must be at least 1" in capsys.readouterr().err


def test_answers_are_counted_up_to_their_ends():
    problem = Problem(None, torch.zeros(2, 3).long() + 4, MASK, 0)
    ids = torch.tensor([[4, 4, 4, 7, 7, 0, 0], [4, 4, 4, 7, 7, 7, 7]])
    assert problem.length(ids) == 2 + 4
