"""The recorded canvas is well-formed, without scripts, and holds every token once."""

from xml.etree import ElementTree

from decoding import Sampler
from examples.record_canvas import COLUMNS, Recording, drawn, placed, record

SVG = "{http://www.w3.org/2000/svg}"


def test_a_recording_says_when_each_position_and_token_appeared(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    settings = {"decoder": "conv", "options": {"kernel_size": 5}, "max_tokens": 40, "margin": 4}
    recording = record(sampler, "add 2 3", **settings)
    output = sampler.generate("add 2 3", **settings)
    assert recording.token_step == output.reveal_step
    assert "".join(recording.pieces) == output.text
    assert all(first <= last for first, last in zip(recording.mask_step, recording.token_step, strict=True))


def test_the_picture_has_a_block_and_a_text_for_each_token():
    root = ElementTree.fromstring(
        drawn(Recording("a <b>?", ["1", " &", "\n", " four"], [0, 0, 1, 2], [1, 0, 2, 2]))
    )
    texts = [node.text for node in root.iter(f"{SVG}text") if node.get("class", "").startswith("a ")]
    assert texts == ["1", "&", "four"]
    assert len([node for node in root.iter(f"{SVG}rect") if node.get("class")]) == 4
    assert not list(root.iter(f"{SVG}script"))


def test_lines_break_before_a_piece_that_does_not_fit():
    assert placed(["a" * (COLUMNS - 1), "bb", "\n", "c"]) == [(0, 0), (1, 0), (2, 0), (2, 0)]
