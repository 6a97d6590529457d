"""The pages of the families say what is in the code."""

from html import unescape
from pathlib import Path

import pytest

from benchmarks.family_sizes import MODELS, row
from dlm.families import PUBLIC

ROOT = Path(__file__).parents[3]
PAGES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "docs/families").glob("*.md"))}


@pytest.mark.parametrize("family", PUBLIC, ids=lambda family: family.name)
def test_a_family_has_a_page_with_its_models_and_its_decoder(family):
    pages = {name for name, text in PAGES.items() for each in family.ids if f"`{each}`" in text}
    assert len(pages) == 1, f"{family.name}: on the pages {sorted(pages)}"
    text = PAGES[pages.pop()]
    assert all(f"`{each}`" in text for each in family.ids)
    assert f"`{family.generation['decoder']}`" in text
    for stop in (*family.ends, family.mask):
        assert stop is None or stop in unescape(text)


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_as_calculated(name):
    assert any(row(*MODELS[name]) in text for text in PAGES.values())


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert len(PAGES) == 8
    assert all(f"families/{name}.md" in navigation for name in PAGES)
