"""Verified prefixes: the laws of both rules, by enumeration and by draws, and the base's text when greedy."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch

from benchmarks.verified_prefix import (
    Drafter,
    Law,
    Verifier,
    acceptance,
    adapt,
    base_for,
    gumbel,
    main,
    mixture,
    residual,
    write_alone,
    write_verified,
)
from dlm.errors import ConfigError

VOCAB, LENGTH = 3, 3


def table(seed, *key):
    """[VOCAB] logits that depend on a key."""
    generator = torch.Generator().manual_seed(seed + sum((k + 1) * 7**i for i, k in enumerate(key)))
    return 1.5 * torch.randn(VOCAB, generator=generator)


class TableDrafter:
    """Marginals that depend on the text and the place alone."""

    def restart(self):
        pass

    def logits(self, text, count):
        return torch.stack([table(100 + i, *text[1:]) for i in range(count)])


class TableVerifier:
    """A causal model whose conditionals are a table of the whole text."""

    def restart(self):
        pass

    def logits(self, text, tokens):
        rows = [[*text, *tokens[:i]] for i in range(len(tokens) + 1)]
        return torch.stack([table(500, *row[1:]) for row in rows])


def base_law(law):
    """Probability of each text of LENGTH tokens under the base, by the chain rule."""
    out = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        out[text] = math.prod(
            float(law.probabilities(table(500, *text[:i]))[token]) for i, token in enumerate(text)
        )
    return out


@pytest.mark.parametrize("law", [Law(), Law(temperature=0.6), Law(top_k=2)])
def test_one_token_has_exactly_the_bases_law(law):
    """P(v) = q(v) a(v) + Σ_x q(x) (1 - a(x)) r(v), enumerated."""
    for seed in range(30):
        q, p = law.probabilities(table(seed)).double(), law.probabilities(table(seed, 1)).double()
        taken, rest = q * acceptance(p, q), residual(p, q)
        assert torch.allclose(taken + (q - taken).sum() * rest, p, atol=1e-6)


def chi_square(counts, law, draws):
    return sum((counts[text] - draws * p) ** 2 / (draws * p) for text, p in law.items() if p > 0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_whole_texts_have_the_bases_law(count):
    """27 texts, 26 degrees of freedom: chi-square is above 54.05 once in a thousand times."""
    law, draws = Law(temperature=0.8), 4000
    counts = Counter(
        tuple(
            write_verified(
                [0], TableDrafter(), TableVerifier(), law=law, count=count, limit=LENGTH, seed=seed
            ).ids
        )
        for seed in range(draws)
    )
    assert chi_square(counts, base_law(law), draws) < 54.05


def test_the_drafts_own_law_would_be_found_out():
    law, draws = Law(temperature=0.8), 4000
    counts = Counter(
        tuple(
            write_verified(
                [0], TableDrafter(), TableVerifier(), law=law, share=1.0, count=3, limit=LENGTH, seed=seed
            ).ids
        )
        for seed in range(draws)
    )
    assert chi_square(counts, base_law(law), draws) > 200


def slow_adapt(tokens, draft, base, share, noise, temperature):
    """APD's rule in plain Python."""
    out = []
    for i, token in enumerate(tokens):
        first, second = ([math.exp(float(x)) for x in row] for row in (draft[i], base[i]))
        products = [
            (a / sum(first)) ** share * (b / sum(second)) ** (1 - share)
            for a, b in zip(first, second, strict=True)
        ]
        heated = [x ** (1 / temperature) for x in products]
        scores = [math.log(x / sum(heated)) + float(g) for x, g in zip(heated, noise[i], strict=True)]
        if i and scores.index(max(scores)) != token:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_mixture_is_drawn_with_the_drafts_noise(share):
    generator = torch.Generator().manual_seed(1)
    lengths = set()
    for _ in range(60):
        draft, base = (2 * torch.randn(n, 5, generator=generator) for n in (4, 5))
        noise, law = gumbel((4, 5), generator), Law(temperature=0.7)
        tokens = (law.probabilities(draft).log() + noise).argmax(-1)
        found = adapt(share, noise)(tokens, draft, base, law, generator)
        assert found == slow_adapt(tokens.tolist(), draft, base, share, noise, 0.7)
        lengths.add(len(found))
    assert lengths == ({4} if share == 1.0 else {1, 2, 3, 4})


def test_gumbel_noise_draws_from_the_law():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.7])
    drawn = (p.log() + gumbel((20_000, 3), generator)).argmax(-1).bincount(minlength=3) / 20_000
    assert torch.allclose(drawn, p, atol=0.011)  # three standard errors
    assert torch.allclose(mixture(p.log(), p.log(), 0.4).exp(), p)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, rows):
    """An autoregressive model, and a diffusion model made of it and moved, as an adapter would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlm.backbone import from_causal_lm
    from dlm.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("causal")
    tokenizer = train_tokenizer([str(row) for row in rows], 320)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).eval()
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, _ = from_causal_lm(str(folder))
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return causal, model.eval(), folder


@pytest.mark.parametrize("reuse", [False, True])
def test_a_greedy_text_is_the_bases_token_for_token(pair, reuse):
    causal, model, _ = pair
    drafter = Drafter(model, causal.config.vocab_size, margin=2, reuse=reuse)
    taken = 0
    for seed in range(6):
        prompt = torch.randint(5, 300, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        greedy = causal.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 7, dtype=torch.long), do_sample=False,
            max_new_tokens=24, eos_token_id=None, pad_token_id=0,
        )[0, 7:].tolist()  # fmt: skip
        found = write_verified(prompt, drafter, Verifier(causal), law=Law(0), count=4, limit=24)
        assert found.ids == greedy
        assert write_alone(prompt, Verifier(causal), law=Law(0), limit=24).ids == greedy
        taken += 24 - found.calls
    assert taken > 0  # drafts were taken, and what stood behind them was right


def test_reuse_computes_the_first_draft_as_it_is(pair):
    causal, model, _ = pair
    text = [5, 6, 7, 8, 9]
    kept, whole = (Drafter(model, causal.config.vocab_size, margin=2, reuse=reuse) for reuse in (True, False))
    assert torch.allclose(kept.logits(text, 3), whole.logits(text, 3), atol=1e-4)
    after = kept.logits([*text, 10, 11], 3)  # the text's keys and values are those of five tokens and masks
    assert not torch.allclose(after, whole.logits([*text, 10, 11], 3), atol=1e-4)
    ids = torch.tensor([[*text, 10, 11, *[int(model.config.mask_token_id)] * 5]])
    assert torch.allclose(after, model.logits(
        fresh(model, ids, 5)[2:5])[:, : causal.config.vocab_size], atol=1e-4)  # fmt: skip


def fresh(model, ids, first):
    """States from `first` on, behind keys and values of what stood there when the text had `first` tokens."""
    memory, rows = model.new_memory(), torch.tensor([0])
    mask = int(model.config.mask_token_id)
    before = torch.cat([ids[:, :first], torch.full((1, 5), mask)], dim=1)
    everything = torch.ones_like(before, dtype=torch.bool)
    model.partial_hidden(before, everything, everything, memory, rows)
    active = torch.arange(ids.shape[1])[None] >= first
    return model.partial_hidden(ids, active, torch.ones_like(active), memory, rows)


def test_the_text_ends_where_the_end_is_written(pair):
    causal, model, _ = pair
    drafter = Drafter(model, causal.config.vocab_size)
    whole = write_verified([5, 6], drafter, Verifier(causal), law=Law(0), limit=20)
    end = whole.ids[4]
    found = write_verified([5, 6], drafter, Verifier(causal), law=Law(0), limit=20, ends=frozenset({end}))
    assert found.ids == whole.ids[: whole.ids.index(end) + 1]


def test_a_model_without_a_base_is_refused(pair):
    with pytest.raises(ConfigError, match="has no verifier: only an adapter"):
        base_for(str(pair[2]))


def test_the_table_of_an_adapter_and_its_base(pair, tmp_path, capsys):
    from dlm.adapter import add_adapter
    from dlm.backbone import from_causal_lm

    model, tokenizer = from_causal_lm(str(pair[2]))
    adapted = add_adapter(model, str(pair[2]), r=2, alpha=2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert base_for(str(tmp_path / "adapter")) == str(pair[2])
    rows = [{"instruction": f"Count to {i}.", "output": f"1 {i}"} for i in range(8)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    words = ["--model", str(tmp_path / "adapter"), "--data", str(tmp_path / "q.json"), "--limit", "4"]
    main([*words, "--max-tokens", "8", "--temperatures", "0", "--counts", "2", "3", "--shares", "0.5"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    names = [cells[0].removeprefix("| T = 0: ") for cells in lines]
    verified = [
        f"{rule}, K = {k}{r}" for k in (2, 3) for rule, r in (("speculative", ""), ("APD", ", R = 0.5"))
    ]
    assert names == ["base alone, cache", *verified, "| default decoder", "| default decoder, reuse"]
    assert lines[0][1] == lines[1][1] == lines[3][1]  # greedy: the same texts, of the same length
    assert lines[0][5:] == lines[1][5:] == lines[3][5:]  # nats and relevance
    assert lines[0][2] == lines[0][4] == "1.00"
