"""Texts with gaps: what is given stays, what is written lies in the gaps."""

import pytest
import torch

from decoding import Decoder, Sampler
from decoding.gaps import OPEN_GAP, Gap, pieces_of
from decoding.presets import PRESETS
from dlm.cli import main
from dlm.errors import ConfigError
from tests.fakes import FakeDenoiser, FakeTokenizer


def sampler(positions=4096, **kwargs):
    model = FakeDenoiser(**kwargs)
    model.config.max_positions = positions
    return Sampler(model, FakeTokenizer())


@pytest.mark.parametrize("name", list(PRESETS))
def test_given_tokens_stay_and_gaps_are_filled_with_as_many_as_asked(name):
    text = "abc<mask:4>defg<mask:1>h"
    pace = {"steps": 6}
    for seed in range(5):
        got = sampler(eos_bias=5.0).infill(text, decoder=name, seed=seed, **pace)
        known = [FakeTokenizer()(part)["input_ids"] for part in ("abc", "defg", "h")]
        assert got.token_ids[:3] == known[0]
        assert got.token_ids[7:11] == known[1]
        assert got.token_ids[12:] == known[2]
        assert len(got.token_ids) == 13
        written = [3, 4, 5, 6, 11]
        assert [i for i, step in enumerate(got.reveal_step) if step >= 0] == written
        assert all(got.token_ids[i] not in (0, 22) for i in written)  # neither the end nor a mask
        assert [len(gap) for gap in got.gaps] == [4, 1]
        assert got.text == "".join(chr(97 + i) for i in got.token_ids)


def test_without_steps_one_token_is_written_per_call():
    got = sampler().infill("ab<mask:5>cd", decoder="conv")
    assert got.model_calls == 5
    assert sorted(step for step in got.reveal_step if step >= 0) == list(range(5))


def test_a_convolution_opens_a_gap_from_both_sides():
    decoder = Decoder.named("conv", kernel_size=3)
    first = []
    for seed in range(60):
        got = sampler().infill("abcdef<mask:9>ghijkl", decoder=decoder, seed=seed)
        first.append(got.reveal_step.index(0))
    assert set(first) == {6, 14}  # the ends of the gap, and nothing between


def test_a_text_may_be_the_answer_to_a_prompt_and_batches_do_not_interfere():
    texts = ["ab<mask:3>", "<mask:2>abcdefgh<mask:6>z", "x<mask:12>y"]
    how = {"prompt": "question", "decoder": Decoder.named("conv", kernel_size=5), "rate": 2.0, "seed": 3}
    together = sampler().infill(texts, **how)
    assert together == [sampler().infill(text, **how) for text in texts]
    alone = sampler().infill(texts[0], **{**how, "prompt": None})
    assert len(alone.token_ids) == len(together[0].token_ids) == 5
    assert alone.token_ids != together[0].token_ids


def test_mask_tokens_written_in_a_text_are_text(model, tokenizer):
    real = Sampler(model, tokenizer)
    got = real.infill("a <|mask|> b <mask:2> c", steps=3)
    assert sum(step >= 0 for step in got.reveal_step) == 2
    assert "<|mask|>" in got.text


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        ("no gap", {}, "text 0: there is no gap; write one as <mask:3>"),
        ("a<mask:0>b", {}, "a gap needs at least one token"),
        ("a<mask:50>b", {}, "text 0 is longer than the model's 40 positions"),
        ("a<mask:5000000>b", {}, "text 0 is longer"),
        ("a<mask:2>b", {"eos_fill": True}, "eos_fill means nothing here"),
        ("a<mask:2>b", {"window": 9}, "window means nothing here"),
        ("a<mask:2>b", {"steps": 2, "rate": 2.0}, "either steps or a rate"),
    ],
)
def test_texts_that_cannot_be_filled_say_why(text, how, message):
    own = sampler(positions=40)
    with pytest.raises(ConfigError, match=message):
        own.infill(text, **how)


def test_the_command_fills_words_and_lines(model, tokenizer, tmp_path, capsys, monkeypatch):
    import io

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["infill", "--model", str(tmp_path)]
    assert main([*words, "Anna counts: <mask:3> 50"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("Anna counts:")
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna counts: <mask:3> 50\n\nb <mask:1> c\n"))
    assert main([*words, "--json", "--decoder", "llada", "--steps", "2"]) == 0
    assert capsys.readouterr().out.count('"gaps"') == 2
    assert main([*words, "a <mask:1>", "--steps", "2", "--rate", "2"]) == 2
    assert "either steps or a rate" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("b <mask:1> c\nno gap\n"))
    assert main([*words, "--batch-size", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("b")  # what was finished is not lost
    assert "text 1: there is no gap" in captured.err
    assert main([*words, "no gap"]) == 2
    assert "there is no gap" in capsys.readouterr().err
    assert main(["infill", "--model", "", "x <mask:2>"]) == 2
    assert "--model must name" in capsys.readouterr().err
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("pace", [{}, {"steps": 40}])
def test_a_filled_text_is_the_same_alone_and_beside_a_longer_one(name, pace):
    if Decoder.named(name).timed and not pace:
        pytest.skip("it needs steps")
    texts = ["ab<mask:6>cd", "x<mask:60>y", "<mask:2>z"]
    for seed in range(3):
        together = sampler().infill(texts, decoder=name, seed=seed, **pace)
        assert together == [sampler().infill(text, decoder=name, seed=seed, **pace) for text in texts]


def test_a_gap_without_a_length_is_tried_with_a_few():
    gap = pieces_of("a <mask> b")[1]
    assert (
        gap.lengths
        == Gap(1, OPEN_GAP, True).lengths
        == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 22, 26, 31, 32]
    )
    out = sampler().infill("ab<mask>cd")
    given = [FakeTokenizer()(part)["input_ids"] for part in ("ab", "cd")]
    assert [out.token_ids[:2], out.token_ids[-2:]] == given
    assert len(out.token_ids) - 4 in gap.lengths


def test_a_space_before_a_gap_is_the_gaps(model, tokenizer):
    real = Sampler(model, tokenizer)
    got = real.infill("Anna <mask:2> counts", steps=2)
    before = tokenizer("Anna")["input_ids"]
    after = tokenizer(" counts")["input_ids"]
    assert got.token_ids[: len(before)] == before
    assert got.token_ids[len(before) + 2 :] == after
    assert not set(got.token_ids) & set(tokenizer.all_special_ids)


def test_a_shifted_model_is_given_something_to_look_at_before_a_first_gap(model, tokenizer):
    model.config.shift = True
    seen = []
    hidden = model.hidden
    model.hidden = lambda ids, mask=None: seen.append(ids.clone()) or hidden(ids, mask)
    got = Sampler(model, tokenizer).infill("<mask:2> counts", steps=1)
    assert seen[0][0, 0] == tokenizer.eos_token_id
    assert len(got.token_ids) == 2 + len(tokenizer(" counts")["input_ids"])


@pytest.mark.parametrize("text", ["<mask:1>" + "abcd" * 20, "ab<mask:1>" + "abcd" * 20 + "<mask:1>cd"])
def test_blocks_without_a_gap_take_no_steps_from_those_with_one(text):
    for decoder, options in (("semi-ar", {"block_size": 4}), ("llada", {"block_size": 4})):
        for steps in (40, 500):
            got = sampler().infill(text, decoder=decoder, options=options, steps=steps)
            assert sum(step >= 0 for step in got.reveal_step) == text.count("<mask")


def test_the_token_before_a_first_gap_counts_among_the_positions(model, tokenizer):
    model.config.shift, model.config.backbone = True, {**model.config.backbone, "max_position_embeddings": 16}
    own = Sampler(model, tokenizer)
    assert own.spec.positions == 16
    assert len(own.infill("<mask:15>").token_ids) == 15
    with pytest.raises(ConfigError, match="longer than the model's 16 positions"):
        own.infill("<mask:16>")


def test_a_score_is_a_number_however_unlikely_the_tokens_are(model, tokenizer):
    with torch.no_grad():
        model.backbone.norm.weight.mul_(400)
    for text in ("a <mask:3> b", "a <mask:1-2> b"):
        out = Sampler(model, tokenizer).infill(text, decoder="categorical", options={"temperature": 1e5})
        assert -104 * 3 - 1e4 < out.score < -90, "as unlikely as float32 can say, token by token"
