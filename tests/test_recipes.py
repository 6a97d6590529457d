"""The Python code of the README, of CONTRIBUTING and of the pages runs, page by page."""

import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import dlm
from decoding import Decoder
from decoding.presets import PRESETS
from decoding.reveal import Quota, RevealRule, Separated
from decoding.tokens import TokenRule
from decoding.window import Full, Window
from tests.decoding.rig import decode, decode_in_fresh_engines, plan_of, rows
from tests.fakes import FakeDenoiser

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    if BLOCK.search(path.read_text("utf-8"))
)
WITH_STRATEGIES = ("CONTRIBUTING.md", "docs/strategies.md")


def run_page(page, model, tokenizer):
    """Names that the code of a page leaves behind; a tiny model stands for the one that it loads."""
    text = (ROOT / page).read_text("utf-8")
    namespace = {"__name__": "recipe"}
    with (
        patch.object(dlm, "load_model", lambda *a, **k: (model, tokenizer), create=True),
        patch.dict(PRESETS),
    ):
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block.group(1), page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, model, tokenizer, capsys):
    run_page(page, model, tokenizer)


@pytest.mark.parametrize("page", WITH_STRATEGIES)
def test_strategies_of_a_page_keep_what_holds_for_every_strategy(page, model, tokenizer, capsys):
    strategies = [
        value()
        for value in run_page(page, model, tokenizer).values()
        if isinstance(value, type)
        and value.__module__ == "recipe"
        and issubclass(value, Window | RevealRule | TokenRule)
    ]
    assert len(strategies) >= 2
    for strategy in strategies:
        decoder = Decoder(
            strategy if isinstance(strategy, Window) else Full(),
            strategy if isinstance(strategy, RevealRule) else Quota(),
            strategy if isinstance(strategy, TokenRule) else TokenRule(),
        )
        _check(decoder)
        if isinstance(strategy, RevealRule):
            _check(replace(decoder, reveal=Separated(strategy, 3)))


def _check(decoder):
    fake = FakeDenoiser()
    ids = rows(fake, [2, 5], 24)
    ids[:, -1] = 7  # a given token at the far end
    paces = [{"steps": 6}, {"rate": 2.0}] if decoder.reveal.paced else [{"steps": None}]
    for pace in paces:
        plan = plan_of(decoder, **pace, fit=24)
        both = decode(fake, ids, plan, [3, 4], answer=[2, 5])
        alone = decode(fake, ids[1:], plan, [4], answer=[5])
        given = ids != fake.mask_id
        assert not (both.ids == fake.mask_id).any(), "a mask came out"
        assert torch.equal(both.ids[given], ids[given]), "a given token changed"
        assert torch.equal(both.ids[1], alone.ids[0]), "a row's text depends on the rows beside it"
        moved = decode_in_fresh_engines(fake, ids[1], plan, 4, answer=[5])
        assert torch.equal(moved.ids, alone.ids), "a row that is moved changes its text"
