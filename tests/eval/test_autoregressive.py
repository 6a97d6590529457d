"""The autoregressive baseline: what it writes, by which rule."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from dlm.errors import CheckpointError, ConfigError
from eval.config import EvalConfig
from eval.systems import Autoregressive

TALKS = [[{"role": "user", "content": text}] for text in ("Count from 2 to 5.", "Spell the word stone.")]


@pytest.fixture(scope="module")
def causal(tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval(), tokenizer


def texts(causal, **rule):
    return [reply.text for _, reply in Autoregressive(*causal, 12, **rule).replies(TALKS)]


def written(causal, penalty=0.0):
    """The likeliest token each time, every token that the answer has being `penalty` less likely."""
    model, tokenizer = causal
    out = []
    for talk in TALKS:
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        begun = len(ids)
        with torch.no_grad():
            while len(ids) < begun + 12 and ids[-1] != tokenizer.eos_token_id:
                logits = model(torch.tensor([ids])).logits[0, -1]
                for token in ids[begun:]:
                    logits[token] -= penalty
                ids.append(int(logits.argmax()))
        out.append(tokenizer.decode(ids[begun:], skip_special_tokens=True).strip())
    return out


def test_without_a_nucleus_it_writes_the_likeliest_token(causal):
    expected = written(causal)
    assert texts(causal, top_p=0) == texts(causal, top_p=0, seed=7) == expected


def test_a_frequency_penalty_counts_what_the_answer_has_written(causal):
    expected = written(causal, penalty=-3)
    assert texts(causal, top_p=0, frequency_penalty=-3) == expected
    assert expected != texts(causal, top_p=0)


def test_a_nucleus_draws_the_same_for_the_same_seed_whatever_came_before(causal):
    first = texts(causal, seed=3)
    torch.rand(5)
    assert texts(causal, seed=3) == first
    assert texts(causal, seed=4) != first
    assert first[1] == next(iter(Autoregressive(*causal, 12, seed=3).replies(TALKS[1:])))[1].text


def test_a_nucleus_is_for_autoregressive_models():
    with pytest.raises(ConfigError, match="top_p is for --autoregressive"):
        EvalConfig(task="wiki", model="default", top_p=0.5)
    with pytest.raises(ConfigError, match="from 0 to 1; got 2"):
        EvalConfig(task="wiki", autoregressive="x", top_p=2)
    with pytest.raises(ConfigError, match="frequency_penalty is for --autoregressive"):
        EvalConfig(task="wiki", model="default", frequency_penalty=0.5)
    with pytest.raises(ConfigError, match="frequency_penalty must be a number, got nan"):
        EvalConfig(task="wiki", autoregressive="x", frequency_penalty=float("nan"))


def test_the_checkpoints_own_settings_neither_cut_nor_penalise(causal):
    model, tokenizer = causal
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    plain = texts(causal, top_p=0)
    drawn = texts(causal)
    settings = {"repetition_penalty": 1.5, "temperature": 3.0, "min_p": 0.5, "top_k": 2, "do_sample": True}
    model.generation_config = GenerationConfig(**settings, eos_token_id=tokenizer.eos_token_id)
    assert texts(causal, top_p=0) == plain
    model.generation_config = GenerationConfig(**settings, eos_token_id=tokenizer.eos_token_id)
    assert texts(causal) == drawn


def test_any_of_several_end_tokens_ends_an_answer(causal):
    model, tokenizer = causal
    first = tokenizer(texts(causal, top_p=0)[0])["input_ids"][0]
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, first])
    _, reply = next(iter(Autoregressive(*causal, 12, top_p=0).replies(TALKS[:1])))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    assert (reply.finish_reason, reply.tokens) == ("stop", 0)


def test_a_conversation_longer_than_the_model_has_an_empty_answer(causal):
    model, _ = causal
    long = [{"role": "user", "content": "word " * model.config.max_position_embeddings}]
    replies = [reply for _, reply in Autoregressive(*causal, 4, top_p=0).replies([TALKS[0], long, TALKS[1]])]
    assert [(reply.text == "", reply.finish_reason) for reply in replies][1] == (True, "length")
    assert [replies[0].text, replies[2].text] == [
        reply.text for _, reply in Autoregressive(*causal, 4, top_p=0).replies(TALKS)
    ]


def test_a_model_without_a_chat_template_is_refused(causal):
    model, tokenizer = causal
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(CheckpointError, match="has no chat template"):
            Autoregressive(model, tokenizer, 4)
    finally:
        tokenizer.chat_template = template
