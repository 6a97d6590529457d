"""Given tokens, texts that end an answer, gaps of open length, and spans that are written again."""

import itertools
import math

import pytest
import torch

from decoding import Decoder, Engine, Request, Sampler
from decoding.gaps import Gap, combinations, pieces_of, without_span
from decoding.infill import MOST_LENGTHS
from decoding.presets import PRESETS
from dlm.errors import ConfigError
from tests.fakes import FakeDenoiser, FakeTokenizer


class Letters(FakeTokenizer):
    """One letter, one token, there and back."""

    def __call__(self, text, add_special_tokens=False, **kwargs):
        return {"input_ids": [ord(c) - 96 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + i) for i in ids if i != 0)


def sampler(positions=4096, **kwargs):
    model = FakeDenoiser(**kwargs)
    model.config.max_positions = positions
    return Sampler(model, Letters())


# ---- stop texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"max_tokens": 60, "rate": 3.0}, {"window": 60, "steps": 20}])
@pytest.mark.parametrize("name", ["conv", "top-k", "llada", "semi-ar"])
def test_an_answer_is_cut_before_the_first_stop_text_and_ends_early(name, how):
    saved = 0
    for seed in range(12):
        whole = sampler(eos_bias=-50).generate(["abc"], decoder=name, seed=seed, **how)[0]
        stop = whole.text[10:12]
        out = sampler(eos_bias=-50).generate(["abc"], decoder=name, seed=seed, stop=["nope", stop], **how)[0]
        assert out.text == whole.text[: whole.text.index(stop)]
        assert out.finish_reason == "stop"
        assert out.token_ids == whole.token_ids[: len(out.text)]
        assert len(out.reveal_step) == len(out.confidence) == len(out.token_ids)
        assert out.model_calls <= whole.model_calls
        saved += out.model_calls < whole.model_calls
        last = list(sampler(eos_bias=-50).stream("abc", decoder=name, seed=seed, stop=stop, **how))[-1]
        assert last.text == out.text
        assert last.token_ids == out.token_ids
    assert saved > 2 or name in ("llada", "top-k")  # these write the beginning late


def test_a_stop_text_that_never_comes_changes_nothing():
    how = {"decoder": "conv", "max_tokens": 40, "seed": 5}
    one, two = (sampler(eos_bias=-50).generate(["ab"], stop=s, **how)[0] for s in (None, "zzzzzz"))
    assert one == two
    with pytest.raises(ConfigError, match="stop text must not be empty"):
        sampler().generate(["ab"], stop=["a", ""])


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "semi-ar"])
def test_a_stopped_text_is_the_whole_text_cut(name):
    """Also where what is written may be masked again, which no stop text may rely on."""
    how = {"decoder": name, "window": 24, "steps": 30}
    for seed in range(8):
        whole = sampler(eos_bias=-50).generate(["abc"], seed=seed, **how)[0].text
        out = sampler(eos_bias=-50).generate(["abc"], seed=seed, stop=[whole[9:11], "a"], **how)[0]
        places = [whole.find(stop) for stop in (whole[9:11], "a") if stop in whole]
        assert out.text == whole[: min(places)]


def test_a_stop_text_within_what_was_given_is_none():
    own = sampler(eos_bias=-50)
    whole = own.generate(["q"], begin="ab", max_tokens=20)[0]
    assert own.generate(["q"], begin="ab", stop="ab", max_tokens=20)[0].text == whole.text
    ends = {"ending": "st", "max_tokens": 20}
    whole_with_end = own.generate(["q"], **ends)[0]
    assert "st" not in whole_with_end.text[:-2]
    assert "t" not in whole_with_end.text[:-2]
    for stop in ("st", "t"):
        assert own.generate(["q"], stop=stop, **ends)[0].text == whole_with_end.text
    over_the_edge = whole_with_end.text[-3:-1]
    assert own.generate(["q"], stop=over_the_edge, **ends)[0].text == whole_with_end.text[:-3]
    across = "b" + whole.text[2]
    assert own.generate(["q"], begin="ab", stop=across, max_tokens=20)[0].text == "a"


@pytest.mark.parametrize("ending", [None, "st"])
@pytest.mark.parametrize("name", ["semi-ar", "llada", "conv"])
def test_with_forced_texts_and_stop_texts_nothing_that_was_confirmed_is_taken_back(name, ending):
    own = sampler(eos_bias=-50)
    options = {"block_size": 1} if name == "semi-ar" else None
    request = Request(
        decoder=name,
        options=options,
        forced={5: "st"},
        stop="st",
        max_tokens=12,
        canvas="full",
        ending=ending,
    )
    engine = Engine(own.model, own.tokenizer)
    engine.submit("q", request.resolve(own.model), seed=1)
    told = [""]
    while len(engine):
        told += [update.confirmed for update in engine.step()]
        assert told[-1].startswith(told[-2])
    assert "st" not in told[-1]


# ---- given tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"max_tokens": 30}, {"window": 40, "steps": 8}])
@pytest.mark.parametrize("name", ["conv", "llada", "top-k", "semi-ar"])
def test_given_tokens_stand_where_they_were_put(name, how):
    own = sampler(eos_bias=3.0)
    out = own.generate(["prompt"], decoder=name, begin="ab", forced={7: "cde", 12: "f"}, ending="st", **how)[
        0
    ]
    size = 30 if "max_tokens" in how else 40 - len("prompt")
    assert len(out.token_ids) == size - 1  # the last is the end token
    assert out.finish_reason == "stop"
    assert out.text[:2] == "ab"
    assert out.text[7:10] == "cde"
    assert out.text[12] == "f"
    assert out.text.endswith("st")
    given = [i for i, step in enumerate(out.reveal_step) if step == -1]
    assert given == [0, 1, 7, 8, 9, 12, size - 3, size - 2]
    assert [i for i, p in enumerate(out.confidence) if p is None] == given
    assert all(0 < p <= 1 for p in out.confidence if p is not None)


def test_a_beginning_is_part_of_the_answer_and_the_answer_ends_by_itself():
    own = sampler(eos_bias=1.0)
    outs = [own.generate(["q"], begin="hello", max_tokens=40, seed=s)[0] for s in range(8)]
    assert all(out.text.startswith("hello") for out in outs)
    assert any(out.finish_reason == "stop" for out in outs)
    events = list(own.stream("q", begin="hello", max_tokens=40, seed=3))
    assert events[0].text.startswith("hello")
    assert events[-1].text == outs[3].text


def test_an_answer_with_forced_tokens_ends_by_itself_behind_them():
    own = sampler(eos_bias=3.0)
    outs = [own.generate(["q"], forced={6: "st"}, max_tokens=300, seed=s)[0] for s in range(10)]
    assert all(out.text[6:8] == "st" for out in outs)
    assert all(out.finish_reason == "stop" for out in outs)
    assert all(8 <= len(out.token_ids) < 60 for out in outs)


@pytest.mark.parametrize("name", ["conv", "semi-ar", "llada-conv"])
@pytest.mark.parametrize("given", [{"ending": "st"}, {"forced": {3: "st"}}, {"begin": "st"}])
def test_given_tokens_do_not_let_rows_meet(name, given):
    prompts = ["ab", "c" * 150, "d" * 40, "e"]
    together = sampler().generate(prompts, decoder=name, max_tokens=40, **given)
    for prompt, out in zip(prompts, together, strict=True):
        assert out == sampler().generate([prompt], decoder=name, max_tokens=40, **given)[0]


def test_an_ending_does_not_go_with_a_canvas_that_grows():
    for how in ({"canvas": "growing", "window": 40, "steps": 4}, {"margin": 3}):
        with pytest.raises(ConfigError, match="an ending stands at the end"):
            sampler().generate(["q"], ending="st", **how)


def test_guidance_masks_the_prompt_and_nothing_else():
    seen = []

    class Watched(FakeDenoiser):
        def hidden(self, input_ids, attention_mask=None):
            seen.extend(input_ids.tolist())
            return super().hidden(input_ids, attention_mask)

    own = Sampler(Watched(), Letters())
    own.generate(["abc"], begin="de", decoder=Decoder.named("conv", guidance=1.0), window=12, steps=2)
    blind = [row for row in seen if row[0] == 22]
    assert blind
    assert all(row[:5] == [22, 22, 22, 4, 5] for row in blind)


def test_what_was_given_is_seen_from_the_left():
    """The tokens before a goal depend on it."""
    texts = {
        goal: sampler(eos_bias=-50).generate(["q"], decoder="llada", ending=goal, max_tokens=12)[0].text[:9]
        for goal in ("ab", "cd")
    }
    assert texts["ab"] != texts["cd"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ending": "abcdefghij"}, "11 given tokens at place -1 do not fit in an answer of 10"),
        ({"forced": {9: "abc"}}, "3 given tokens at place 9 do not fit"),
        ({"forced": {-1: "a"}}, "at place -1 do not fit"),
        ({"begin": "abc", "forced": {2: "x"}}, "at place 2 overlap"),
        ({"begin": "abc", "forced": {0: "x"}}, "both name place 0"),
        ({"forced": {8: "xy"}, "ending": "z"}, "overlap"),
        ({"begin": "abcdefghij"}, "leave nothing to write"),
    ],
)
def test_given_tokens_that_do_not_fit_say_so(given, message):
    with pytest.raises(ConfigError, match=message):
        sampler().generate(["q"], max_tokens=10, **given)


def test_confidences_are_the_models_probabilities():
    class Flat(FakeDenoiser):
        def logits(self, hidden):
            logits = torch.zeros(len(hidden), self.vocab)
            logits[:, 3] = math.log(20)
            logits[:, self.eos_id] = logits[:, self.mask_id] = -math.inf
            return logits

    model = Flat()
    out = Sampler(model, Letters()).generate(["ab"], decoder="conv", window=30, steps=5)[0]
    for token, p in zip(out.token_ids, out.confidence, strict=True):
        assert p == pytest.approx((20 if token == 3 else 1) / 40, rel=1e-5)


# ---- gaps of open length ------------------------------------------------------------------------------


def test_gaps_are_read_from_the_text():
    assert pieces_of("a<mask:3>b<mask:2-6>") == ["a", Gap(3, 3), "b", Gap(2, 6), ""]
    for text, message in (
        ("<mask:0-2>", "at least one token, got 0"),
        ("<mask:4-2>", "4 to 2 tokens has no length"),
        ("<mask:x>", "there is no gap"),
        ("<mask:3-7>" * 4, f"625 combinations of lengths; at most {MOST_LENGTHS}"),
        ("a<mask:1-9999999>" * 90, "1000000000 or more combinations of lengths"),  # at once, none is made
    ):
        with pytest.raises(ConfigError, match=message):
            sampler().infill(text)


def test_the_length_with_the_greatest_likelihood_is_taken():
    lengths = set()
    for seed in range(6):
        own = sampler(positions=300)
        best = own.infill("abcdef<mask:1-5>ghijkl", seed=seed)
        size = len(best.token_ids) - 12
        lengths.add(size)
        each = []
        for n in range(1, 6):
            out = own.infill(f"abcdef<mask:{n}>ghijkl", seed=seed)
            ids = torch.tensor([out.token_ids])
            near = [i for i in range(len(out.token_ids)) if 2 <= i < 6 or 6 + n <= i < 10 + n]
            shown = ids.clone()
            shown[0, near] = 22
            p = own.model.logits(own.model.hidden(shown)[0]).log_softmax(-1)
            beside = [float(p[i, out.token_ids[i]]) for i in near]
            each.append(sum(beside) + out.score)
            if n == size:
                assert best.token_ids == out.token_ids
        assert best.score == pytest.approx(max(each), abs=1e-5)
        assert size == 1 + each.index(max(each))
        assert best.model_calls > 5
    assert len(lengths) > 1


def test_several_open_gaps_are_filled_in_all_combinations_and_answers_stay_in_order():
    own = sampler()
    texts = ["ab<mask:1-3>cd<mask:2-3>ef", "t<mask:2>u", "<mask:1-4>s"]
    outs = own.infill(texts, batch_size=3, seed=1)
    assert [len(out.gaps) for out in outs] == [2, 1, 1]
    assert outs == [own.infill(text, seed=1) for text in texts]


# ---- editing ------------------------------------------------------------------------------------------


def test_a_span_is_written_again_and_the_rest_stays():
    own = sampler(eos_bias=4.0)
    out = own.edit("abcdefgh", "cde", seed=2)
    assert len(out.token_ids) == 8
    assert (out.text[:2], out.text[5:]) == ("ab", "fgh")
    assert out.reveal_step[:2] + out.reveal_step[5:] == [-1] * 5
    assert out.gaps == [out.text[2:5]]
    assert len(own.edit("abcdefgh", (0, 2), length=5).token_ids) == 11
    assert len(own.edit("abcdefgh", (6, 8), length=(1, 3)).token_ids) in (7, 8, 9)
    for span, message in (
        ("zz", "does not occur"),
        ("", "does not occur"),
        ((3, 3), "does not lie in a text of 8"),
        ((5, 99), "does not lie"),
    ):
        with pytest.raises(ConfigError, match=message):
            own.edit("abcdefgh", span)
    for text, span in (("abab", "ab"), ("aaab", "aa")):
        with pytest.raises(ConfigError, match="several times"):
            own.edit(text, span)


def test_by_default_as_many_tokens_are_written_as_the_words_have_in_their_place(model, tokenizer):
    own = Sampler(model, tokenizer)
    text = "Count from 2 to 5."
    for word in ("from", "to", "Count"):
        out = own.edit(text, word)
        assert len(out.token_ids) == len(own.rows.text(text)), word


def test_a_mark_of_a_gap_in_an_edited_text_is_text():
    pieces = without_span("a<mask:3>b", (9, 10), None, len)
    assert pieces == ["a<mask:3>", Gap(1, 1), ""]


def test_convolution_opens_a_gap_from_both_sides():
    own = sampler()
    out = own.infill("abc<mask:20>def", decoder=Decoder.named("conv", kernel_size=3), rate=1.0)
    born = out.reveal_step[3:23]
    known = {-1, 20}
    for _, place in sorted((step, i) for i, step in enumerate(born)):
        assert place - 1 in known or place + 1 in known
        known.add(place)
    assert born[0] < born[10] or born[19] < born[10]


def test_forbidden_texts_never_come_out():
    own = Sampler(FakeDenoiser(), Letters())

    def said(decoder):
        return "".join(own.generate(["q"], seed=s, max_tokens=60, decoder=decoder)[0].text for s in range(4))

    letter = max(set(said("top-k")), key=said("top-k").count)
    shut = own.without([letter], "top-k")
    assert shut.name == "top-k"
    assert letter not in said(shut)
    with pytest.raises(ConfigError, match="'ab' is 2 tokens"):
        own.without(["ab"])


def test_combinations_of_lengths_are_counted_as_far_as_a_thousand_million():
    for text in ("a", "<mask:2>b<mask:3>", "<mask:1-4>b<mask:2-3>", "<mask:1-3>" * 5):
        pieces = pieces_of(text) if "<" in text else [text]
        lists = [piece.lengths for piece in pieces if isinstance(piece, Gap)]
        assert combinations(pieces) == len(list(itertools.product(*lists)))
    assert combinations([Gap(1, 40, coarse=True)]) == len(Gap(1, 40, coarse=True).lengths) < 20
    assert combinations([Gap(1, 9_999_999)] * 50_000) == 10**9
