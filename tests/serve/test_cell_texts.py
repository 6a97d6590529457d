"""Texts of cells: characters of several tokens."""

from decoding.cells import Cell
from dlm.tokenizer import MASK_TOKEN
from serve.api.canvas import cell_texts


def listed(tokenizer, text, masks=()):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    return [
        Cell(mask, "open", None, None) if i in masks else Cell(token, "written", 0.5, 0)
        for i, token in enumerate(ids)
    ]


def texts(tokenizer, cells):
    return cell_texts(cells, lambda *ids: tokenizer.decode(list(ids)))


def test_a_character_of_several_tokens_stands_whole_at_the_first(tokenizer):
    cells = listed(tokenizer, "a€𝄞b")
    assert len(cells) == 9  # 1 + 3 + 4 + 1 bytes
    assert texts(tokenizer, cells) == ["a", "€", "", "", "𝄞", "", "", "", "b"]


def test_a_character_that_is_not_whole_yet_is_a_replacement_character(tokenizer):
    assert texts(tokenizer, listed(tokenizer, "a€b", masks=(2,))) == ["a", "�", "", "�", "b"]


def test_joined_texts_are_the_text(tokenizer):
    text = "the sum: 3 ≠ 4, naïve — 漢字"
    assert "".join(texts(tokenizer, listed(tokenizer, text))) == text
