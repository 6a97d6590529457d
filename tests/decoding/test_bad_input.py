"""What users get wrong, and what they are told; and inputs that look wrong and are not."""

import gc
import math
import tracemalloc

import pytest
import torch

from decoding import Decoder, Request, Sampler
from decoding.infill import rows_with_gaps
from decoding.reveal import Quota, Separated
from decoding.tokens import TokenRule
from decoding.window import Sliding
from dlm.errors import ConfigError, DLMError
from dlm.tokenizer import longest_token
from tests.decoding.test_given import Letters
from tests.fakes import FakeDenoiser, FakeTokenizer


def sampler(positions=4096, tokenizer=FakeTokenizer, **kwargs):
    model = FakeDenoiser(**kwargs)
    model.config.max_positions = positions
    return Sampler(model, tokenizer())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"window": 3},
            "prompt 0: the prompt has 5 tokens and the window 3; the window must be at least 6",
        ),
        ({"window": 30, "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"window": 5000}, "window must lie between 1 and the model's 4096 positions, got 5000"),
        ({"window": 30, "canvas": "grow"}, "'grow'. Did you mean 'growing'. Choices: full, growing"),
        ({"rate": 2.0, "canvas": "full"}, 'canvas "full" needs a window, or max_tokens'),
        ({"window": 30, "margin": 4}, "a margin is for a canvas that grows"),
        ({"max_tokens": 30, "margin": -1}, "margin must be a whole number, not negative, got -1"),
        ({"window": 30, "rate": 2.0, "canvas": "growing"}, "what max_tokens gives"),
        ({"reuse": "all"}, "'all'"),
        ({"refresh": 3}, "refresh says how often .* give reuse"),
        ({"decoder": "sliding", "rate": 2.0, "window": 30}, "goes by time: it needs steps, not a rate"),
        ({"decoder": "conf"}, "'conf'. Did you mean 'conv'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": [1, 2]}, "seed lists 2 seeds, but there are fewer prompts"),
    ],
)
def test_settings_that_cannot_be_say_what_would_be_right(how, message):
    with pytest.raises(ConfigError, match=message):
        sampler().generate(["abcde"], **how)


def test_an_even_kernel_names_both_odd_neighbours():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 64; use 63 or 65"):
        Decoder.named("conv", kernel_size=64)
    with pytest.raises(ValueError, match="got 0; use 1 or 3"):
        Decoder.named("llada-conv", kernel_size=0)


def test_a_kernel_larger_than_the_window_is_a_window_that_is_open_everywhere():
    wide = sampler(eos_bias=-50).generate(
        ["abc"], decoder=Decoder.named("conv", kernel_size=999), window=30, steps=6
    )[0]
    assert len(wide.token_ids) == 27
    assert 22 not in wide.token_ids


def test_an_empty_prompt_is_answered(model, tokenizer):
    for how in ({"window": 30, "steps": 5}, {"max_tokens": 12}):
        assert Sampler(model, tokenizer).generate([""], **how)[0].steps > 0
        assert sampler().generate([""], decoder="conv", **how)[0].steps > 0  # not even a template
    assert sampler().generate([]) == []


def test_top_k_beyond_the_vocabulary_keeps_everything():
    how = {"window": 30, "steps": 6, "seed": 4}
    everything = sampler().generate(["ab"], decoder=Decoder.named("top-k", top_k=10**6), **how)[0]
    assert everything == sampler().generate(["ab"], decoder=Decoder.named("top-k", top_k=23), **how)[0]
    assert len(everything.token_ids) > 0


@pytest.mark.parametrize("name", ["conv", "categorical", "llada", "threshold", "remdm"])
def test_nan_names_the_step_and_the_row(name):
    class Broken(FakeDenoiser):
        def logits(self, hidden):
            logits = super().logits(hidden)
            if self.calls == 3:
                logits[-1] = math.nan
            return logits

    model = Broken(eos_bias=-50)
    with pytest.raises(DLMError, match=r"the model returned NaN in step \d+, row 1"):
        Sampler(model, FakeTokenizer()).generate(["a", "b"], decoder=Decoder.named(name), window=40, steps=10)


def test_ten_thousand_prompts_are_streamed():
    """They are read as they are answered, and what is finished is let go of."""
    read = 0

    def prompts():
        nonlocal read
        for number in range(10_000):
            read += 1
            yield "ab" if number % 2 else "abc"

    own = sampler(eos_bias=60.0, tokenizer=Letters)  # every answer ends at once
    answered = 0
    tracemalloc.start()
    for out in own.iter_generate(prompts(), decoder="llada", window=6, steps=1, batch_size=64):
        answered += 1
        assert read - answered < 2 * 64
        assert out.finish_reason == "stop"
        if answered == 1000:
            gc.collect()  # freed memory that Python holds back would count
            early = tracemalloc.get_traced_memory()[0]
    assert answered == 10_000
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] < early + 200_000
    tracemalloc.stop()


def test_given_mask_tokens_in_a_prompt_are_text_except_in_a_gap(model, tokenizer):
    own = Sampler(model, tokenizer)
    for text in ("say <|mask|> twice <|mask|>", "<mask:3>"):
        row = own.rows.answer_row(text, own.plan(max_tokens=10))
        assert row.ids.count(tokenizer.mask_token_id) == 10
        assert own.generate([text], max_tokens=8)[0].steps > 0
    ((row, _),) = rows_with_gaps(own.rows, ["a", "<|mask|>"], None, own.plan(), "x")
    assert row.ids.count(tokenizer.mask_token_id) == 0


def test_a_model_out_of_range_is_not_asked_for_positions_that_it_does_not_have():
    seen = []

    class Wide(FakeDenoiser):
        def hidden(self, input_ids, attention_mask=None):
            seen.append(input_ids.shape[1])
            return super().hidden(input_ids, attention_mask)

    model = Wide(eos_bias=-50)
    model.config.max_positions = 25
    out = Sampler(model, FakeTokenizer()).generate(["abcde"], max_tokens=1000)[0]
    assert len(out.token_ids) == 20
    assert out.finish_reason == "length"
    assert max(seen) == 25
    assert torch.is_grad_enabled()


def test_a_prompt_that_does_not_fit_loses_none_of_the_others():
    own = sampler(positions=40, eos_bias=-50)
    outs = own.iter_generate(["ab", "abc", "x" * 50, "abcd"], max_tokens=10)
    texts = [next(outs).text, next(outs).text]
    assert texts == [out.text for out in own.generate(["ab", "abc"], max_tokens=10)]
    with pytest.raises(ConfigError, match="prompt 2: the prompt has 50 tokens"):
        next(outs)


def test_the_modules_that_make_and_the_docs_run_are_there():
    import importlib.util
    import re
    from pathlib import Path

    root = Path(__file__).parents[2]
    files = [
        root / "Makefile",
        root / "README.md",
        *root.glob("docs/results/*.md"),
        *root.glob("benchmarks/*.py"),
    ]
    named = {
        m for f in files for m in re.findall(r"-m\W+((?:benchmarks|examples)\.\w+)", f.read_text("utf-8"))
    }
    assert len(named) > 5
    for module in named:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": 3}, "stop must be a text or several, got 3"),
        ({"seed": 1.5}, "seed must be a whole number, or one for each prompt, got 1.5"),
        ({"seed": "ab"}, "seed must be a whole number, or one for each prompt, got 'ab'"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": [None]}, "seed must be a whole number"),
        ({"batch_size": "a"}, "batch_size must be a whole number of at least 1, got 'a'"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"decoder": "conv", "options": {"kernel_size": True}}, "kernel_size .* must be a number, got True"),
    ],
)
def test_arguments_of_other_types_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        sampler().generate(["ab"], max_tokens=4, **given)


@pytest.mark.parametrize("verb", ["generate", "stream", "infill"])
@pytest.mark.parametrize("given", [5, None, b"abc", [5.5], [None], [b"x"], 1.5])
def test_what_is_no_prompt_is_named(verb, given):
    with pytest.raises(ConfigError, match="must be a text"):
        list(getattr(sampler(), verb)(given))


@pytest.mark.parametrize("verb", ["generate", "stream", "infill", "infill prompt", "edit", "edit all"])
@pytest.mark.parametrize("size", [10**5, 2 * 10**7])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(model, tokenizer, monkeypatch, verb, size):
    sampler, text = Sampler(model, tokenizer), "x" * size
    limit = model.config.max_positions * max(map(len, tokenizer.get_vocab()))
    refuse = lambda tokenizer, text, **_: pytest.fail("encoded") if len(text) > limit else [5]  # noqa: E731
    monkeypatch.setattr("decoding.row_maker.encode_text", refuse)
    monkeypatch.setattr("dlm.tokenizer._encode", refuse)
    calls = {
        "generate": lambda: sampler.generate(text, max_tokens=4),
        "stream": lambda: list(sampler.stream([{"role": "user", "content": text}], max_tokens=4)),
        "infill": lambda: sampler.infill(f"{text}<mask:2>"),
        "infill prompt": lambda: sampler.infill("a<mask:2>", prompt=text),
        "edit": lambda: sampler.edit(f"{text} word", "word"),
        "edit all": lambda: sampler.edit(text, (0, size)),
    }
    room = f"the model's {model.config.max_positions} positions"
    message = rf"has {size // 1000}\d+ characters; {room} hold {limit} at most"
    with pytest.raises(ConfigError, match=message):
        calls[verb]()


def test_a_text_within_the_bound_is_encoded_and_counted_in_tokens(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    size = model.config.max_positions * longest_token(tokenizer)
    frame = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False,
                                              add_generation_prompt=True))  # fmt: skip
    with pytest.raises(ConfigError, match=r"prompt 0: the prompt has [\d]+ tokens and the model"):
        sampler.generate("x" * (size - frame), max_tokens=4)
    with pytest.raises(ConfigError, match=rf"prompt 0: the prompt has {size + 1} characters"):
        sampler.generate("x" * (size - frame + 1), max_tokens=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a b", 5), "a span is words of the text or their place"),
        (("a b", (0,)), "a span is words of the text or their place"),
        (("a b", ("a", "b")), "a span is words of the text or their place"),
        ((5, "a"), "must be a text"),
        (([5], "a"), "text 0 must be a text, got 5"),
    ],
)
def test_what_cannot_be_edited_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        sampler().edit(*words)
    for length in ("x", (1,), (1, 2, 3), 1.5):
        with pytest.raises(ConfigError, match="length must be a number of tokens or two"):
            sampler().edit("a b", "a", length=length)


@pytest.mark.parametrize("name", ["temperature", "presence_penalty", "frequency_penalty"])
def test_numbers_that_overflow_are_refused(name):
    for value in (10**30, 1e300):
        with pytest.raises(ConfigError, match=f"{name} must"):
            TokenRule(**{name: value})


def test_more_likely_tokens_than_there_are_tokens(model, tokenizer):
    fake = FakeDenoiser(vocab=24)
    (out,) = Sampler(fake, FakeTokenizer()).generate(["abc"], max_tokens=4, top_logprobs=40)
    assert out.top_logprobs
    assert all(0 < len(pairs) < 24 for pairs in out.top_logprobs), "the mask never comes out"
    assert all(logprob > -math.inf for pairs in out.top_logprobs for _, logprob in pairs)


def test_a_sliding_window_and_a_quota_by_time_are_not_combined():
    by_time = Quota(order="margin", spread="remaining")
    for rule in (by_time, Separated(by_time, 3)):
        with pytest.raises(ConfigError, match="times of its own"):
            Decoder(Sliding(3), rule)
    Decoder(Sliding(3), Quota(order="margin", spread="remaining", per_step=2))


@pytest.mark.parametrize("verb", ["iter_generate", "iter_traced", "iter_infill", "iter_edit"])
def test_what_is_wrong_with_all_prompts_is_said_before_the_first_is_read(verb):
    sampler, span = Sampler(FakeDenoiser(), FakeTokenizer()), ("b",) if verb == "iter_edit" else ()

    def unread():
        raise AssertionError("read")
        yield

    for wrong, said in (
        ({"rate": 0.5}, "rate must be at least 1"),
        ({"rate": math.inf}, "rate must be at most"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"no_such": 1}, "no_such"),
        ({"seed": "x"}, "seed must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            getattr(sampler, verb)(unread(), *span, **wrong)


@pytest.mark.parametrize("wrong", [None, "default", 3])
def test_what_is_no_model_is_said_so(wrong):
    for call in (lambda: Sampler(wrong, FakeTokenizer()), lambda: Request().resolve(wrong)):
        with pytest.raises(ConfigError, match="a model has a spec or a config"):
            call()
