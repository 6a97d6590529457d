import itertools

import numpy as np
import pytest
import torch

from decoding import Decoder, Sampler, TokenRule, list_decoders
from decoding.pace import OwnPace
from decoding.presets import PRESETS
from decoding.reveal import Quota
from decoding.window import Convolution
from dlm.errors import ConfigError
from tests.decoding.rig import decode, plan_of, rows
from tests.fakes import FakeDenoiser


@pytest.fixture
def sampler(model, tokenizer):
    return Sampler(model, tokenizer)


def test_an_argument_of_another_verb_is_told_as_one(sampler):
    for call in (
        lambda: sampler.stream("a", n=2),
        lambda: sampler.infill("a<mask:2>", n=2),
        lambda: sampler.stream("a", batch_size=2),
    ):
        with pytest.raises(ConfigError, match="means nothing here: it is an argument of generate"):
            call()


def test_numbers_of_numpy_count_as_pythons_own(sampler):
    plain = sampler.generate(["a", "b"], decoder="llada-conv", options={"kernel_size": 3, "temperature": 0.5},
                             seed=[3, 4], max_tokens=8, rate=2.0, batch_size=1)  # fmt: skip
    options = {"kernel_size": np.int64(3), "temperature": np.float32(0.5)}
    given = {"max_tokens": np.int32(8), "rate": np.float32(2), "batch_size": np.int64(1), "options": options}
    for seed in (np.array([3, 4]), (3, np.int64(4)), torch.tensor([3, 4]), range(3, 5)):
        assert sampler.generate(["a", "b"], decoder="llada-conv", seed=seed, **given) == plain
    for wrong in (1.5, np.float64(1), "1", [1.5, 2], True, None, {1, 2}, itertools.count(), np.array(1.5)):
        with pytest.raises(ConfigError, match="seed must be a whole number"):
            sampler.generate(["a", "b"], seed=wrong)


def test_a_real_model_answers_prompts_of_different_lengths(sampler):
    prompts = ["Count from 9 to 50.", [{"role": "user", "content": "Tell how Anna meets the cat, please."}]]
    outs = sampler.generate(prompts, decoder="conv", window=48, steps=8, seed=1)
    for out in outs:
        assert out.finish_reason in ("stop", "length")
        assert len(out.token_ids) == len(out.reveal_step)
        assert all(0 <= step <= 8 for step in out.reveal_step)
        assert 1 <= out.model_calls <= 9
        assert sampler.spec.mask_token_id not in out.token_ids
        assert sampler.spec.eos_token_id not in out.token_ids
        assert out.text == sampler.tokenizer.decode(out.token_ids, skip_special_tokens=True)


def test_one_in_gives_one_out_and_a_list_gives_a_list(sampler):
    prompt, how = "Spell the word stone.", {"window": 40, "steps": 4}
    talk = [{"role": "user", "content": prompt}]
    alone = sampler.generate(prompt, **how)
    assert alone == sampler.generate(talk, **how)
    assert [alone] == sampler.generate([prompt], **how) == sampler.generate([talk], **how)
    assert [alone] == sampler.generate((text for text in [prompt]), **how)
    assert [alone, alone] == sampler.generate([prompt, talk], **how)
    assert sampler.generate([], **how) == []

    text = "Spell <mask:2> word."
    filled = sampler.infill(text)
    assert [filled] == sampler.infill([text]) == sampler.infill(iter([text]))
    edited = sampler.edit("Spell the word.", "the", length=(1, 3))
    assert [edited] == sampler.edit(["Spell the word."], "the", length=(1, 3))
    both = sampler.edit(["the cat", "see the dog"], "the", seed=[4, 5])
    each = [sampler.edit("the cat", "the", seed=4), sampler.edit("see the dog", "the", seed=5)]
    assert [one.text for one in both] == [one.text for one in each]
    with pytest.raises(ConfigError, match="text 1: the span 'the' does not occur"):
        sampler.edit(["the cat", "a dog"], "the")

    events = list(sampler.stream(prompt, **how))
    assert [[event] for event in events] == list(sampler.stream([prompt], **how))
    assert events == list(sampler.stream(talk, **how))


def test_a_stream_of_several_prompts_ends_with_their_answers(sampler):
    prompts, how = (
        ["Count from 9 to 50.", "Hi", "Spell the word stone."],
        {"max_tokens": 9, "seed": [1, 2, 3]},
    )
    shown = list(sampler.stream(prompts, **how))
    assert all(len(events) == 3 for events in shown)
    assert [event.text for event in shown[-1]] == [out.text for out in sampler.generate(prompts, **how)]
    lengths = [len(list(sampler.stream(p, max_tokens=9, seed=i + 1))) for i, p in enumerate(prompts)]
    assert len(shown) == max(lengths)
    assert list(sampler.stream([], max_tokens=9)) == []


def test_prompts_are_read_as_they_are_needed(sampler):
    seen = []

    def endless():
        for i in range(10**9):
            seen.append(i)
            yield f"Count from {i % 40 + 5} to 50."

    outs = sampler.iter_generate(endless(), decoder="llada", window=40, steps=2, batch_size=4)
    for _ in range(6):
        next(outs)
    assert len(seen) == 8


def test_a_mask_token_in_a_prompt_is_text(sampler):
    out = sampler.generate(["what is <|mask|>?"], decoder="conv", window=48, steps=4)[0]
    row = sampler.rows.answer_row("what is <|mask|>?", sampler.plan(window=48))
    assert row.ids.count(sampler.spec.mask_token_id) == 48 - row.answer_start
    assert out.steps == 4
    assert sampler.spec.mask_token_id not in out.token_ids


def test_defaults_come_from_the_checkpoint(model, tokenizer):
    model.config.generation = {"decoder": "llada", "window": 40, "steps": 5, "max_tokens": 7}
    sampler = Sampler(model, tokenizer)
    assert sampler.generate(["hello"], window=30)[0].steps == 5
    assert sampler.generate(["hello"], decoder="remdm")[0].steps == 5  # what goes by time has a window
    free = sampler.generate(["hello"])[0]
    assert len(free.token_ids) <= 7
    assert free == sampler.generate(["hello"], decoder="llada", max_tokens=7)[0]
    assert free.steps == -(-len(free.reveal_step) // 2)  # llada at the default rate, 2 tokens a step
    model.config.generation = None


def test_a_checkpoint_can_give_its_decoder_options_and_a_rate(model, tokenizer):
    model.config.generation = {"decoder": "conv", "options": {"kernel_size": 5, "top_k": 3}, "rate": 1.0}
    sampler = Sampler(model, tokenizer)
    decoder = Decoder.named("conv", kernel_size=5, top_k=3)
    own = sampler.generate(["hello"], max_tokens=9)[0]
    assert own == sampler.generate(["hello"], decoder=decoder, max_tokens=9, rate=1.0)[0]
    assert own.model_calls == own.steps  # one token a call
    assert sampler.generate(["hello"], decoder="threshold", max_tokens=9)[0].token_ids  # has its own pace
    model.config.generation = None


def test_the_options_of_a_checkpoint_go_with_its_decoder_by_name_and_can_be_changed(model, tokenizer):
    model.config.generation = {"decoder": "entropy-bound", "options": {"kernel_size": 5}}
    sampler = Sampler(model, tokenizer)

    def plan(decoder=None, **fields):
        return sampler.plan(decoder=decoder, **fields)

    own = Decoder.named("entropy-bound", kernel_size=5)
    assert plan().decoder == plan("entropy-bound").decoder == own
    warm = Decoder.named("entropy-bound", kernel_size=5, temperature=1.0)
    assert plan(options={"temperature": 1.0}).decoder == warm
    assert plan(options={"temperature": 1.0}, rate=2.0).decoder == warm.with_given_pace()
    narrow = Decoder.named("entropy-bound", kernel_size=3)
    assert plan("entropy-bound", options={"kernel_size": 3}).decoder == narrow
    assert plan("conv").decoder == Decoder.named("conv", kernel_size=65)
    assert plan("llada", options={"block_size": 4}).decoder == Decoder.named("llada", block_size=4)
    assert plan(Decoder.named("entropy-bound")).decoder == Decoder.named("entropy-bound")
    with pytest.raises(ConfigError, match="has been built already"):
        plan(own, options={"kernel_size": 3})
    with pytest.raises(ConfigError, match="option of decoder 'entropy-bound'"):
        plan(options={"kernel": 3})
    model.config.generation = None


def test_a_decoder_with_a_pace_of_its_own_keeps_its_order_at_the_pace_of_the_caller(model, tokenizer):
    model.config.generation = {"decoder": "entropy-bound", "options": {"kernel_size": 5}}
    sampler = Sampler(model, tokenizer)
    bound = Decoder.named("entropy-bound", kernel_size=5)
    free = sampler.generate(["hello"], max_tokens=9)[0]
    assert free == sampler.generate(["hello"], decoder=bound, max_tokens=9)[0]
    paced = sampler.generate(["hello"], max_tokens=9, rate=2.0)[0]
    ordered = Decoder(Convolution(5), Quota(order="entropy"), TokenRule(temperature=0))
    assert paced == sampler.generate(["hello"], decoder=ordered, max_tokens=9, rate=2.0)[0]
    fixed = sampler.generate(["hello"], window=40, steps=4)[0]
    assert fixed == sampler.generate(["hello"], decoder=ordered, window=40, steps=4)[0]
    letter = sampler.tokenizer.decode(5)
    assert sampler.without([letter]) == bound.without(5)
    assert sampler.without([letter], rate=2.0) == bound.with_given_pace().without(5)
    with pytest.raises(ConfigError, match="says itself how many tokens"):
        sampler.generate(["hello"], decoder=bound, max_tokens=9, rate=2.0)
    model.config.generation = None


def test_a_decoder_with_a_pace_of_its_own_takes_as_many_steps_in_a_window_as_it_needs(model, tokenizer):
    model.config.generation = {
        "decoder": "entropy-bound",
        "options": {"gamma": 0.0},
        "window": 40,
        "steps": 3,
    }
    sampler = Sampler(model, tokenizer)
    plan = sampler.plan(window=40)
    assert (plan.pace, plan.margin) == (OwnPace(), None)
    output = sampler.generate(["hello"], window=40, eos_fill=False)[0]
    assert max(output.reveal_step.count(step) for step in output.reveal_step) == 1  # one a call, to the end
    model.config.generation = None


def test_unknown_names_and_options_list_the_choices():
    with pytest.raises(ValueError, match="'convv'. Did you mean 'conv'. Choices: block-threshold, cat"):
        Decoder.named("convv")
    with pytest.raises(
        ValueError,
        match="'kernel_sise'. Did you mean 'kernel_size'. Choices: conflict, conflict_layers, freq",
    ):
        Decoder.named("conv", kernel_sise=3)
    with pytest.raises(ConfigError, match="use 127 or 129"):
        Decoder.named("conv", kernel_size=128)
    assert {"categorical", "top-k", "semi-ar", "llada", "conv", "llada-conv"} <= set(list_decoders())


def test_windows_that_cannot_be_are_refused(sampler):
    with pytest.raises(ConfigError, match="between 1 and the model's 2048 positions, got 4096"):
        sampler.generate(["x"], window=4096)
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
        sampler.generate(["x"], window=40, steps=2, batch_size=0)
    with pytest.raises(ConfigError, match="'role' and a text 'content'"):
        sampler.generate([[{"content": 3}]], window=40, steps=2)


def test_streaming_leaves_the_callers_gradient_mode_alone(sampler):
    stream = sampler.stream("Count from 9 to 50.", window=40, steps=4)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    stream.close()
    assert not torch.is_inference_mode_enabled()


def test_seeds_must_be_as_many_as_prompts(sampler):
    for seeds, message in (([1, 2], "more prompts"), ([1, 2, 3, 4], "fewer prompts")):
        with pytest.raises(ConfigError, match=f"{len(seeds)} seeds, but there are {message}"):
            sampler.generate(["a", "b", "c"], window=40, steps=2, seed=seeds)


def test_a_prompt_that_does_not_fit_is_named_by_number(sampler):
    with pytest.raises(ConfigError, match="prompt 1: the prompt has"):
        sampler.generate(["a", "b " * 50], window=40, steps=2)


def test_an_empty_conversation_is_refused(sampler):
    with pytest.raises(ConfigError, match="at least one message"):
        sampler.generate([[]], window=40, steps=2)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decoder_knows_whether_a_seed_can_change_its_texts(name, temperature):
    fake = FakeDenoiser()
    decoder = Decoder.named(name, temperature=temperature)
    ids = rows(fake, [3], 24)
    for pace in (
        [{"steps": 6}] if decoder.timed or not decoder.reveal.paced else [{"steps": 6}, {"rate": 2.0}]
    ):
        plan = plan_of(decoder, **(pace if decoder.reveal.paced else {"steps": None}), fit=24)
        texts = {tuple(decode(fake, ids, plan, [seed], answer=[3]).ids[0].tolist()) for seed in range(8)}
        assert (len(texts) > 1) == decoder.random


def test_several_answers_to_a_prompt_are_those_of_the_seeds_that_follow(model, tokenizer):
    sampler, settings = Sampler(model, tokenizer), {"decoder": "conv", "max_tokens": 12}
    prompts = ["Count to ten.", "Say hello."]
    several = sampler.generate(prompts, n=3, seed=[5, 40], batch_size=2, **settings)
    seeds = [(prompt, seed + i) for prompt, seed in zip(prompts, (5, 40), strict=True) for i in range(3)]
    alone = [sampler.generate(prompt, seed=seed, **settings) for prompt, seed in seeds]
    assert [out.text for out in several] == [out.text for out in alone]
    assert [out.reveal_step for out in several] == [out.reveal_step for out in alone]
    assert len({out.text for out in several[:3]}) > 1
    assert len(sampler.generate(prompts[0], n=2, **settings)) == 2
    with pytest.raises(
        ValueError, match=r"decoder 'llada' draws nothing at random, so 2 answers would be equal"
    ):
        sampler.generate(prompts, n=2, decoder="llada", max_tokens=4)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
            sampler.generate(prompts, n=wrong)


def test_a_forbidden_token_changes_nothing_else_of_the_published_settings(model, tokenizer):
    published = {"decoder": "llada", "options": {"block_size": 16}, "max_tokens": 32, "steps": 32}
    model.config.generation = {**published, "canvas": "full", "eos_fill": False}
    sampler = Sampler(model, tokenizer)
    for fields in ({}, {"rate": 2.0}, {"max_tokens": 16}):
        usual = sampler.plan(**fields)
        without = sampler.plan(decoder=sampler.without(" a", **fields), **fields)
        assert without.decoder.tokens.forbidden
        for name in ("pace", "ending", "margin", "positions", "tokens", "stop"):
            assert getattr(without, name) == getattr(usual, name), name


def test_a_lone_text_is_one_token_and_what_is_no_text_is_refused(sampler):
    assert sampler.without(" a") == sampler.without([" a"])
    with pytest.raises(ConfigError, match="tokens are given as texts"):
        sampler.without([5])


def test_what_means_nothing_is_refused_before_a_model_call(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    sampler.model = None  # nobody may ask it
    with pytest.raises(ConfigError, match="seed lists 2 seeds, but there are more prompts"):
        sampler.generate(["a", "b", "c"], seed=[1, 2])
    for fields, message in (
        ({"request": {"max_tokens": 4}}, "request must be a Request"),
        ({"batch_size": 10**23}, "batch_size must be at most"),
        ({"canvas": "full", "max_tokens": 8, "margin": 4}, "a margin is for a canvas that grows"),
        ({"decoder": ""}, "decoder must be a name or a Decoder"),
        ({"decoder": type("Odd", (), {"reveal": 1})()}, "decoder must be a name or a Decoder"),
        ({"options": {"logit_bias": {3.7: 5}}}, "got 3.7 for an id"),
        ({"options": {"logit_bias": {1: 10**400}}}, "logit_bias must map token ids to numbers"),
        ({"options": {"logit_bias": False}}, "logit_bias"),
        ({"decoder": "entropy-bound", "options": {"gamma": 10**400}}, "must be a number within"),
        ({"decoder": "threshold", "options": {"tau": None}}, "option tau .* must be a number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sampler.generate("a", **fields)
    with pytest.raises(ConfigError, match="top_logprobs means nothing here"):
        sampler.infill("a <mask:2>", top_logprobs=3)


def test_a_bias_of_a_token_that_there_is_not_is_refused(sampler):
    with pytest.raises(ConfigError, match=f"and there are {len(sampler.tokenizer)}"):
        sampler.generate("a", options={"logit_bias": {len(sampler.tokenizer): 1.0}}, max_tokens=4)
