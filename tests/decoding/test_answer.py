"""Text of rows: what is confirmed, what is cut, what a finished row says."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding import Decoder, Request, Sampler
from decoding.answer import (
    BLANK,
    HALF_CHARACTER,
    Detokenizer,
    _aligned_cut,
    confirmed,
    event,
    find_stop,
    output,
    partial,
    show,
)
from decoding.engine import Engine
from dlm.errors import ConfigError
from tests.decoding.rig import canvas_of, plan_of
from tests.fakes import FakeDenoiser, FakeTokenizer

MASK = 22


class Bytes(FakeTokenizer):
    """Token i is the i-th byte of a text with characters of several bytes."""

    text = " aé€😀b".encode()

    def decode(self, ids, skip_special_tokens=True):
        return bytes(self.text[i - 1] for i in ids if 0 < i <= len(self.text)).decode(errors="replace")


def row(answer, done=False, **plan_fields):
    """A canvas of a prompt of two tokens and an answer, None being a mask."""
    ids = torch.tensor([[3, 4, *(MASK for _ in answer)]])
    plan = plan_of(Decoder.named("llada"), 9, **plan_fields)
    canvas = canvas_of(ids, plan, answer=[2])
    for i, token in enumerate(answer):
        if token is not None:
            canvas.ids[0, 2 + i], canvas.masked[0, 2 + i] = token, False
    canvas.done[0] = done
    return canvas, plan


def test_text_is_what_the_tokens_say_white_space_included():
    canvas, plan = row([1, 2, 1, 0, 0], done=True)
    out = output(canvas, plan, Detokenizer(Bytes()))
    assert out.text == " a "
    assert (out.token_ids, out.finish_reason) == ([1, 2, 1], "stop")
    canvas, plan = row([1, 2, 1], done=True)
    assert output(canvas, plan, Detokenizer(Bytes())).finish_reason == "length"


def test_confirmed_text_ends_at_whole_characters_before_the_first_mask():
    every = list(range(1, len(Bytes.text) + 1))
    texts = []
    for n in range(len(every) + 1):
        canvas, plan = row([*every[:n], *[None] * (len(every) - n + 1)])
        texts.append(confirmed(canvas, plan, Detokenizer(Bytes())))
    whole = Bytes.text.decode()
    assert all(whole.startswith(text) for text in texts)
    assert [len(text) for text in texts] == [0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 6]
    assert not any(HALF_CHARACTER in text for text in texts)


def test_confirmed_text_waits_where_a_stop_text_may_begin():
    tokenizer = FakeTokenizer()  # letters: token i is chr(97 + i)
    for answer, expected in (
        ([2, 3, None], "cd"),
        ([2, 3, 4, None], "cd"),
        ([2, 3, 4, 5, None], "cd"),
        ([2, 3, 4, 7, None], "cdeh"),
        ([2, 3, 4, 5, 6, None], "cd"),
    ):
        canvas, plan = row(answer)
        plan = plan_with(plan, stop=("efg",))
        assert confirmed(canvas, plan, Detokenizer(tokenizer)) == expected
    canvas, plan = row([2, 3, 4, 5, 6, None])
    cut = find_stop(canvas, plan_with(plan, stop=("efg", "g")), Detokenizer(tokenizer))
    assert (cut.tokens, cut.text) == (2, "cd")


def plan_with(plan, **fields):
    from dataclasses import replace

    return replace(plan, **fields)


def test_nothing_is_confirmed_while_tokens_may_be_revised():
    canvas, _ = row([2, 3, None])
    assert confirmed(canvas, plan_of(Decoder.named("editing")), Detokenizer(FakeTokenizer())) == ""


def test_half_characters_beside_masks_are_blanks_and_a_finished_row_says_its_text():
    canvas, plan = row([1, 3, None, 2, None])
    assert show(canvas.ids[0, 2:].tolist(), plan, Detokenizer(Bytes())) == f" {BLANK}{BLANK}a"
    canvas, plan = row([1, 3, 2, 0], done=True)
    assert (
        event(canvas, plan, Detokenizer(Bytes())).text
        == output(canvas, plan, Detokenizer(Bytes())).text
        == f" {HALF_CHARACTER}a"
    )


def test_the_last_event_is_the_answer_for_every_decoder():
    sampler = Sampler(FakeDenoiser(eos_bias=-1.0), FakeTokenizer())
    for name in ("conv", "editing", "remdm", "stability"):
        for seed in range(5):
            how = {"decoder": Decoder.named(name), "seed": seed, "window": 40}
            assert list(sampler.stream("abc", **how))[-1].text == sampler.generate("abc", **how).text


class Peaked(FakeDenoiser):
    """A model that is sure of everything, and of another token for the same place now and then."""

    def logits(self, hidden):
        return 20 * super().logits(hidden)


def test_rules_with_a_pace_of_their_own_always_end():
    for model in (Peaked(eos_bias=3.0), Peaked(eos_bias=0.5), Peaked(eos_bias=-9.0)):
        for name in ("editing", "threshold", "stability", "entropy-bound", "dilated"):
            for grow in (False, True):
                plan = plan_of(Decoder.named(name), grow=grow, fit=40)
                engine = Engine(model, FakeTokenizer())
                for seed in range(20):
                    engine.add(canvas_of(torch.tensor([[1, 2] + [MASK] * 38]), plan, [seed]), plan)
                steps = 0
                while len(engine):
                    engine.step()
                    steps += 1
                    assert steps < 200, (name, grow)


def test_a_failed_row_stays_failed_and_shows_no_junk():
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            logits = super().logits(hidden)
            return logits * float("nan") if self.calls >= 3 else logits

    for name in ("threshold", "editing", "stability", "conv"):
        model = Broken(eos_bias=-50.0, eos_id=5)
        decoder = Decoder.named(name)
        pace = {"rate": 2.0} if decoder.reveal.paced else {}
        plan = plan_of(decoder, grow=True, eos=5, **pace)
        engine, seen, steps = Engine(model, FakeTokenizer()), "", 0
        engine.add(canvas_of(torch.tensor([[1, 2] + [MASK] * 90]), plan), plan)
        while len(engine):
            (update,) = engine.step()
            assert update.confirmed.startswith(seen)
            assert update.canvas.ids[0, :92].tolist().count(MASK) > 0
            seen, steps = update.confirmed, steps + 1
        assert (update.finished, update.output, steps) == (True, None, 3)
        assert "NaN in step 2" in str(update.error)


def test_the_likeliest_tokens_are_those_of_the_call_that_wrote_the_token():
    """Recomputed from the row as it stood before each step, moved to another engine on the way."""
    model = FakeDenoiser(eos_bias=-50.0)
    plan = Request(decoder="llada", max_tokens=9, rate=1.0, top_logprobs=3).resolve(model)
    first, second = Engine(model, FakeTokenizer()), Engine(model, FakeTokenizer())
    ticket = first.submit("abc", plan)
    before, outputs = [], []
    for step in range(20):
        engine = first if len(first) else second
        before.append(engine.canvas(ticket))
        (update,) = engine.step()
        if update.finished:
            outputs.append(update.output)
            break
        if step == 4:
            ticket = second.add(first.remove(ticket), plan)
    (out,) = outputs
    assert len(out.top_logprobs) == len(out.token_ids) == 9
    for i, (step, token, pairs) in enumerate(
        zip(out.reveal_step, out.token_ids, out.top_logprobs, strict=True)
    ):
        canvas = before[step]
        width = int(canvas.valid.sum())
        logp = model.logits(model.hidden(canvas.ids[:, :width]))[0, 3 + i].log_softmax(0)
        best = logp.topk(3)
        assert float(logp[token].exp()) == pytest.approx(out.confidence[i], abs=1e-6)
        assert [t for t, _ in pairs] == best.indices.tolist()
        assert [x for _, x in pairs] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert pairs[0][0] == token  # greedy
    assert Request().resolve(model).top_logprobs == 0
    with pytest.raises(ConfigError, match="top_logprobs must be at most 100, got 101"):
        Request(top_logprobs=101)


def test_a_part_of_an_answer_holds_the_tokens_whose_text_is_confirmed():
    canvas, plan = row([2, 3, 4, None, 5])
    plan = plan_with(plan, stop=("eg",))
    part = partial(canvas, plan, Detokenizer(FakeTokenizer()))
    assert (part.text, part.token_ids, part.finish_reason) == (
        "cd",
        [2, 3],
        "",
    )  # "e" may begin the stop text
    assert part.text == confirmed(canvas, plan, Detokenizer(FakeTokenizer()))
    canvas, plan = row([2, 3, 0, 0], done=True)
    assert partial(canvas, plan, Detokenizer(FakeTokenizer())) == output(
        canvas, plan, Detokenizer(FakeTokenizer())
    )


def test_token_ids_are_a_prompt_as_they_are():
    model = FakeDenoiser()
    plan = Request(decoder="llada", max_tokens=5).resolve(model)
    engine = Engine(model, FakeTokenizer())
    engine.rows.tokenizer = Sized()
    ticket = engine.submit([4, 5, 6], plan)
    assert engine.canvas(ticket).ids[0, :3].tolist() == [4, 5, 6]
    for prompt, message in (([4, 99], "from 0 to 22, got 99"), ([4, MASK], r"must not hold the mask token")):
        with pytest.raises(ConfigError, match=message):
            engine.submit(prompt, plan)


class Sized(FakeTokenizer):
    def __len__(self):
        return 23


@given(
    pieces=st.lists(st.sampled_from([*b"ab", *"é€😀".encode(), 0xFF, 0xC3, 0xE2]), max_size=24),
    sizes=st.lists(st.integers(1, 4), min_size=24, max_size=24),
)
def test_a_prefix_that_grows_is_read_as_if_all_of_it_were_decoded(pieces, sizes):
    """Also over half-written characters, bytes that are none, and a token that writes nothing."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: bytes(ids).decode(errors="replace"))
    growing, size = Detokenizer(tokenizer), 0
    for step in sizes:
        size = min(size + step, len(pieces))
        assert growing.prefix(pieces[:size]) == growing.text(pieces[:size])
    assert growing.prefix([98, 98]) == "bb"  # another row: read from its beginning


def test_a_prefix_that_grows_decodes_what_is_new_alone():
    decoded = []
    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: (decoded.append(len(ids)), "x" * len(ids))[1]
    )
    detokenizer = Detokenizer(tokenizer)
    for size in range(1, 100):
        assert detokenizer.prefix([7] * size) == "x" * size
    assert max(decoded) == 2


def test_a_prefix_that_grows_is_exact_with_a_real_tokenizer(tokenizer):
    text = "Ünïcode – 100 %: “naïve” 😀 漢字\n\n  two  spaces ."
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    for size in range(len(ids) + 1):
        assert detokenizer.prefix(ids[:size]) == detokenizer.text(ids[:size])


def with_byte_fallback(ids, skip_special_tokens):
    """Text of bytes, each byte of a character that is not whole shown by itself, as sentencepiece does."""
    text, held = "", b""
    for byte in ids:
        held += bytes([byte])
        try:
            text, held = text + held.decode(), b""
        except UnicodeDecodeError:
            if len(held) == 4:
                text, held = text + HALF_CHARACTER * 4, b""
    return text + HALF_CHARACTER * len(held)


def check_cut(detokenizer, tokens, share):
    """The most tokens whose text is no longer than a share of the whole, tried one by one."""
    text = detokenizer.text(tokens)[: round(share * len(tokens))]
    size = len(tokens)
    while size and len(detokenizer.text(tokens[:size])) > len(text):
        size -= 1
    assert _aligned_cut(detokenizer, tokens, text).tokens == size


class ByteFallback:
    """Tokens of one byte, a run of them decoded as a whole, and letters (the kind of Llama 2)."""

    def decode(self, ids, skip_special_tokens):
        text = ""
        for is_byte, run in itertools.groupby(ids, key=lambda token: token < 256):
            run = list(run)
            if not is_byte:
                text += "".join(map(chr, run))
                continue
            try:
                text += bytes(run).decode()
            except UnicodeDecodeError:
                text += HALF_CHARACTER * len(run)
        return text

    def convert_ids_to_tokens(self, token):
        return f"<0x{token:02X}>" if token < 256 else chr(token)


@given(st.lists(st.sampled_from([0x101, 0x102, 0xFF, *"é€".encode()]), max_size=24))
def test_bytes_that_a_later_one_may_turn_into_others_are_not_confirmed(tokens):
    detokenizer, texts = Detokenizer(ByteFallback()), []
    for size in range(len(tokens) + 1):
        canvas, plan = row([*tokens[:size], *[None] * (len(tokens) - size + 1)])
        texts.append(confirmed(canvas, plan, detokenizer))
        assert detokenizer.prefix(tokens[:size]) == detokenizer.text(tokens[:size])
    whole = detokenizer.text(tokens)
    assert all(whole.startswith(text) for text in texts)
    settled = detokenizer.text(detokenizer.settled(tokens))
    assert texts[-1] == settled.rstrip(HALF_CHARACTER)


@given(
    pieces=st.lists(st.sampled_from([0x101, 0x102, 0xFF, *"é€😀".encode()]), max_size=30),
    share=st.floats(0, 1),
)
def test_the_tokens_before_a_cut_in_runs_of_bytes_are_found_as_one_by_one(pieces, share):
    check_cut(Detokenizer(ByteFallback()), pieces, share)


def test_a_stop_text_within_a_run_of_bytes_keeps_the_tokens_before_it():
    tokens = list("😀€šŢţ".encode())
    canvas, plan = row([*tokens, 0, 0], done=True)
    out = output(canvas, plan_with(plan, stop=("ţ",)), Detokenizer(ByteFallback()))
    assert (out.text, out.token_ids) == ("😀€šŢ", tokens[:-2])


@given(pieces=st.lists(st.sampled_from([*b"ab", *"é€😀".encode(), 0xFF]), max_size=40), share=st.floats(0, 1))
@pytest.mark.parametrize(
    "decode", [with_byte_fallback, lambda ids, skip_special_tokens: bytes(ids).decode(errors="replace")]
)
def test_the_tokens_before_a_cut_are_found_as_one_by_one(decode, pieces, share):
    check_cut(Detokenizer(SimpleNamespace(decode=decode)), pieces, share)


def test_a_cut_reads_a_long_answer_few_times():
    decoded = []
    detokenizer = Detokenizer(
        SimpleNamespace(decode=lambda ids, skip_special_tokens: (decoded.append(len(ids)), "x" * len(ids))[1])
    )
    assert _aligned_cut(detokenizer, [7] * 4000, "x" * 10).tokens == 10
    assert len(decoded) < 20
