"""OpenAI's interface, by its own client: what a client may rely on, whatever server it talks to."""

import functools
import itertools
import json
import math
import operator

import openai
import pytest

from decoding import Sampler
from tests.decoding.test_answer import ByteFallback
from tests.serve.rig import events, running, stream_of

CHAT = {"messages": [{"role": "user", "content": "Sort the words: b a c"}], "max_tokens": 24}
TEXT = {"prompt": "Sort the words:", "max_tokens": 24}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def text_of(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


def joined(chunks, index=0):
    """Text, finish reasons and number of roles of one choice of a stream."""
    text, reasons, roles = "", [], 0
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else []:
            if choice["index"] == index:
                delta = choice.get("delta", choice)
                text += delta.get("content", delta.get("text", "")) or ""
                roles += delta.get("role") == "assistant"
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, reasons, roles


def test_the_same_text_as_the_python_api(server, client, tiny, tokenizer):
    sampler = Sampler(tiny, tokenizer)
    for seed in (0, 7):
        for options in ({}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}):
            expected = sampler.generate(
                "Sort the words: b a c", max_tokens=24, seed=seed, options=options or None
            )
            got = client.chat.completions.create(model="tiny", seed=seed, **CHAT, **options)
            assert got.choices[0].message.content == expected.text
            assert got.choices[0].finish_reason == expected.finish_reason
            assert got.usage.completion_tokens == len(expected.token_ids)
            assert got.usage.prompt_tokens == sampler.prompt_length("Sort the words: b a c")
            assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
@pytest.mark.parametrize("decoder", ["conv", "llada", "remdm", "entropy-bound"])
def test_a_stream_says_what_the_whole_answer_says(server, path, body, decoder):
    body = {**body, "seed": 3, "n": 3, "decoder": decoder, "stop": ["e"]}
    if decoder == "remdm":
        body |= {"steps": 12}
    whole = server.post(path, **body).json()
    chunks = stream_of(server, path, **body, stream_options={"include_usage": True})
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    for i, choice in enumerate(whole["choices"]):
        text, reasons, roles = joined(chunks, i)
        assert text == text_of(choice)
        assert reasons == [choice["finish_reason"]]
        assert roles == (path == "/v1/chat/completions")
        assert "e" not in text
    if roles:
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum(len(text_of(choice)) > 0 for choice in whole["choices"]) > 0
    assert len({text_of(choice) for choice in whole["choices"]}) > 1 or decoder in ("llada", "entropy-bound")


def test_usage_can_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream_of(server, "/v1/chat/completions", **CHAT, seed=1, stream_options=options)[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    assert all(
        c["usage"]["total_tokens"] == c["usage"]["prompt_tokens"] + c["usage"]["completion_tokens"]
        for c in chunks
    )


def test_the_answers_of_one_request_are_those_of_its_seeds(server):
    several = server.post("/v1/chat/completions", **CHAT, n=4, seed=10).json()["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    for i, choice in enumerate(several):
        alone = server.post("/v1/chat/completions", **CHAT, seed=10 + i).json()["choices"][0]
        assert alone["message"] == choice["message"]
    unseeded = {server.post("/v1/chat/completions", **CHAT).text.split('"content":')[1] for _ in range(6)}
    assert len(unseeded) > 1


def test_prompts_in_lists_and_of_token_ids(server, tokenizer):
    one, two = (list(tokenizer(text)["input_ids"]) for text in ("Sort the words:", "Count to"))
    body = {"max_tokens": 12, "seed": 2, "n": 2}
    texts = server.post("/v1/completions", prompt=["Sort the words:", "Count to"], **body).json()
    ids = server.post("/v1/completions", prompt=[one, two], **body).json()
    assert texts["choices"] == ids["choices"]
    assert [choice["index"] for choice in ids["choices"]] == [0, 1, 2, 3]
    assert texts["usage"]["prompt_tokens"] == len(one) + len(two)
    alone = server.post("/v1/completions", prompt=two, **body).json()
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in ids["choices"][2:]]


def test_an_echo_begins_with_the_prompt_in_whole_and_in_parts(server):
    body = {**TEXT, "seed": 4, "echo": True, "logprobs": 2}
    whole = server.post("/v1/completions", **body).json()["choices"][0]
    plain = server.post("/v1/completions", **{**body, "echo": False}).json()["choices"][0]
    assert whole["text"] == TEXT["prompt"] + plain["text"]
    assert joined(stream_of(server, "/v1/completions", **body))[0] == whole["text"]
    given = len(whole["logprobs"]["tokens"]) - len(plain["logprobs"]["tokens"])
    assert "".join(whole["logprobs"]["tokens"][:given]) == TEXT["prompt"]
    assert set(whole["logprobs"]["token_logprobs"][:given]) == {None}
    offsets = [x + len(TEXT["prompt"]) for x in plain["logprobs"]["text_offset"]]
    assert whole["logprobs"]["text_offset"][given:] == offsets
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert whole["logprobs"][name][given:] == plain["logprobs"][name]
    parts = [c["choices"][0]["logprobs"] for c in stream_of(server, "/v1/completions", **body)[:-1]]
    assert (
        functools.reduce(operator.iadd, (part["text_offset"] for part in parts if part), [])
        == whole["logprobs"]["text_offset"]
    )


def test_log_probabilities_are_those_of_the_tokens_when_they_were_written(server, client, tiny, tokenizer):
    got = client.chat.completions.create(model="tiny", seed=3, logprobs=True, top_logprobs=4, **CHAT)
    expected = Sampler(tiny, tokenizer).generate("Sort the words: b a c", max_tokens=24, seed=3)
    content = got.choices[0].logprobs.content
    assert [math.exp(x.logprob) for x in content] == pytest.approx(expected.confidence, rel=1e-5)
    assert all(len(x.top_logprobs) == 4 for x in content)
    assert all(x.top_logprobs[0].logprob >= x.logprob - 1e-6 for x in content)
    assert (
        b"".join(bytes(x.bytes) for x in content).decode(errors="replace") == got.choices[0].message.content
    )
    whole = server.post("/v1/completions", **TEXT, seed=3, logprobs=3).json()["choices"][0]["logprobs"]
    size = len(whole["tokens"])
    assert {len(whole[name]) for name in ("token_logprobs", "top_logprobs", "text_offset")} == {size}
    assert all(
        token in top and len(top) <= 4
        for token, top in zip(whole["tokens"], whole["top_logprobs"], strict=True)
    )
    parts = stream_of(server, "/v1/completions", **TEXT, seed=3, logprobs=3)[:-1]
    streamed = {name: [] for name in whole}
    for part in parts:
        for name, values in (part["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == whole
    none = server.post("/v1/completions", **TEXT, seed=3, logprobs=0).json()["choices"][0]["logprobs"]
    assert none["token_logprobs"] == whole["token_logprobs"]
    assert all(len(top) == 1 for top in none["top_logprobs"])


def test_sampling_parameters_are_honoured(server, tokenizer):
    base = {**TEXT, "seed": 5, "max_tokens": 40, "logprobs": 0}

    def tokens(**given):
        return server.post("/v1/completions", **base, **given).json()["choices"][0]["logprobs"]["tokens"]

    greedy = [tuple(tokens(temperature=0)) for _ in range(2)]
    assert greedy[0] == greedy[1]
    plain = tokens()
    for given in (
        {"temperature": 0.2}, {"top_p": 0.3}, {"top_k": 1}, {"min_p": 0.9}, {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"logit_bias": {"50": 100}}, {"rate": 8},
        {"decoder": "llada"}, {"kernel_size": 3}, {"options": {"kernel_size": 3}},
    ):  # fmt: skip
        assert tokens(**given) != plain, given
    word = tokenizer.decode([50])
    assert set(tokens(logit_bias={"50": 100})) == {word}
    banned = tokenizer(plain[0])["input_ids"][0]
    assert plain[0] not in tokens(logit_bias={str(banned): -100})


def test_options_of_diffusion_come_by_extra_body(client):
    extra = {"decoder": "llada-conv", "steps": 6, "kernel_size": 9, "return_metadata": True}
    got = client.chat.completions.create(model="tiny", seed=1, extra_body=extra, **CHAT)
    metadata = got.choices[0].model_extra["metadata"]
    assert metadata["steps"] == 6
    assert metadata["model_calls"] <= 7
    assert len(metadata["reveal_steps"]) == metadata["completion_tokens"] == got.usage.completion_tokens
    assert metadata["tokens_per_call"] == pytest.approx(
        metadata["completion_tokens"] / metadata["model_calls"], abs=1e-3
    )


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 1.0},
        {"steps": 7},
        {"window": 70, "steps": 9, "eos_fill": False},
        {"decoder": "llada", "steps": 9, "reuse": "prefix", "refresh": 2},
        {"decoder": "conv", "kernel_size": 5, "min_p": 0.1, "top_k": 9, "temperature": 0.8},
        {"canvas": "full", "begin": "Sorted", "ending": ".", "forced": {"9": "x"}},
    ],
)
def test_options_of_diffusion_are_those_of_the_python_api(server, tiny, tokenizer, given):
    names = ("kernel_size", "min_p", "top_k", "temperature")
    options = {name: given[name] for name in names if name in given}
    fields = {name: value for name, value in given.items() if name not in names}
    length = {} if "window" in given else {"max_tokens": 24}
    if "steps" in given and "window" not in given:
        fields["canvas"] = "full"
    if "forced" in fields:
        fields["forced"] = {int(place): text for place, text in fields["forced"].items()}
    message = CHAT["messages"][-1]["content"]
    sampler = Sampler(tiny, tokenizer)
    expected = sampler.generate(message, seed=3, options=options or None, **length, **fields)
    body = {"messages": CHAT["messages"], "seed": 3, "return_metadata": True, **length, **given}
    (choice,) = server.post("/v1/chat/completions", **body).json()["choices"]
    assert choice["message"]["content"] == expected.text
    metadata = choice["metadata"]
    assert (metadata["model_calls"], metadata["steps"]) == (expected.model_calls, expected.steps)
    assert metadata["reveal_steps"] == expected.reveal_step


def test_a_stop_text_over_two_deltas_never_appears(server, tokenizer):
    letters = {str(tokenizer.convert_tokens_to_ids(letter)): 60 for letter in "abcdefghijklmnop"}
    body = {"prompt": "a b c", "max_tokens": 40, "seed": 3, "rate": 1, "logit_bias": letters}
    body |= {"decoder": "conv", "kernel_size": 3, "temperature": 1}
    chunks = stream_of(server, "/v1/completions", **body)[:-1]
    deltas = [text for chunk in chunks if (text := chunk["choices"][0]["text"])]
    stops = [first[-1] + second[0] for first, second in itertools.pairwise(deltas)]
    assert len(stops) > 4
    plain = "".join(deltas)
    for stop in stops[:8]:
        chunks = stream_of(server, "/v1/completions", **body, stop=[stop])[:-1]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == plain[: plain.index(stop)]
        assert [r for c in chunks if (r := c["choices"][0]["finish_reason"])] == ["stop"]


def test_snapshots_replace_each_other_and_end_with_the_answer(server):
    chunks = stream_of(server, "/v1/chat/completions", **CHAT, seed=3, diffusing=True)
    snapshots = [
        c["choices"][0]["delta"]["content"] for c in chunks[:-1] if "content" in c["choices"][0]["delta"]
    ]
    whole = server.post("/v1/chat/completions", **CHAT, seed=3).json()["choices"][0]
    assert snapshots[-1] == whole["message"]["content"]
    assert any("░" in text for text in snapshots)
    assert joined(chunks)[1] == [whole["finish_reason"]]


def test_the_last_message_can_be_gone_on_with(server):
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Sorted:"}]
    got = server.post(
        "/v1/chat/completions", messages=turns, max_tokens=9, seed=1, continue_final_message=True
    ).json()
    assert got["choices"][0]["message"]["content"]
    assert (
        got["usage"]["prompt_tokens"]
        > server.post("/v1/chat/completions", **CHAT).json()["usage"]["prompt_tokens"]
    )
    for bad in (CHAT["messages"], [turns[1]]):
        refused = server.post("/v1/chat/completions", messages=bad, continue_final_message=True)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_a_gap_before_a_suffix_is_filled(server):
    body = {"prompt": "The words are", "suffix": " and that is all.", "max_tokens": 6, "seed": 1}
    whole = server.post("/v1/completions", **body).json()
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "stop"
    assert 1 <= whole["usage"]["completion_tokens"] <= 6
    chunks = stream_of(server, "/v1/completions", **body, stream_options={"include_usage": True})
    assert joined(chunks)[:2] == (choice["text"], ["stop"])
    assert chunks[-2]["usage"] == whole["usage"]
    two = server.post("/v1/completions", **body, n=2).json()["choices"]
    assert two[0]["text"] == choice["text"]


def test_models_are_listed_and_described(client):
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny").model_extra["max_model_len"] > 100
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(model="other", **CHAT),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert (error.value.code, error.value.param) == ("model_not_found", "model")


REFUSED = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x" * 300]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"decoder": "convv"}, "decoder"),
    ({"options": {"kernel_sise": 5}}, "options"),
    ({"options": {"gap": 0}}, "options.gap"),
    ({"options": {"gap": "x"}}, "options.gap"),
    ({"options": {"temperature": -1}}, "temperature"),
    ({"decoder": "llada", "kernel_size": 9}, "options"),
    ({"rate": 0.5}, "rate"),
    ({"steps": 4, "rate": 2}, "steps"),
    ({"window": 3, "max_tokens": None}, "window"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"diffusing": True}, "diffusing"),
    ({"temprature": 1}, "temprature"),
    ({"best_of": 3}, "best_of"),
    ({"ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("given", "param"), REFUSED, ids=lambda x: json.dumps(x)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(server, given, param):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        response = server.post(path, **{**body, **given})
        error = response.json()["error"]
        assert response.status_code == 400, (path, response.text)
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param, error


def test_as_many_answers_as_the_best_are_chosen_of_are_all_of_them(server):
    choices = server.post("/v1/completions", **TEXT, n=2, best_of=2).json()["choices"]
    assert len(choices) == 2


def test_a_part_of_a_message_with_a_field_too_many_names_it(server):
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    body = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
    error = server.post("/v1/chat/completions", **body).json()["error"]
    assert error["param"] == "messages.0.content.0.cache_control"
    assert error["code"] == "unknown_parameter"


CHAT_ONLY = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_completion_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "god", "content": "x"}]}, "messages.0.role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}]},
        "messages.0.content.input_audio",
    ),
    ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, None),
    ({"temperature": 2, "options": {"temperature": 0.1}}, "temperature"),
    ({"kernel_size": 9, "options": {"kernel_size": 9}}, "kernel_size"),
    ({"messages": [{"role": "user"}]}, "messages"),
]


@pytest.mark.parametrize(("given", "param"), CHAT_ONLY, ids=lambda x: json.dumps(x)[:40])
def test_what_a_chat_cannot_have_is_refused_by_name(server, given, param):
    response = server.post("/v1/chat/completions", **{**CHAT, **given})
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param, response.text
    assert server.post("/v1/chat/completions", **CHAT).status_code == 200


def test_values_that_ask_for_nothing_are_taken(server):
    nothing = {
        "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "user": "me",
        "logprobs": False, "top_logprobs": 0,
        "store": False,
        "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"],
        "logit_bias": None, "stop": None, "n": 1, "stream": False, "temperature": None,
    }  # fmt: skip
    got = server.post("/v1/chat/completions", **CHAT, seed=1, **nothing)
    assert got.status_code == 200, got.text
    plain = server.post("/v1/chat/completions", **CHAT, seed=1).json()
    assert got.json()["choices"] == plain["choices"]
    with server.client.stream(
        "POST",
        "/v1/chat/completions",
        json={**CHAT, "stream": True, "stream_options": {"include_obfuscation": False}},
    ) as response:
        assert response.status_code == 200
    assert server.post("/v1/canvas", text="The <mask:1> sat", stop=[]).status_code == 200
    parts = [{"type": "text", "text": "Sort the words:"}, {"type": "text", "text": " b a c"}]
    body = {**CHAT, "messages": [{"role": "user", "content": parts}]}
    assert server.post("/v1/chat/completions", **body, seed=1).json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"5", b"null", b"", b"{", b'{"prompt": NaN}', b"\xff", b"[" * 20000]
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/canvas", "/api/chat"]
)
def test_bodies_that_are_no_requests_are_400(server, path, body):
    response = server.client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]


@pytest.mark.parametrize("depth", [300, 500, 600, 900])
def test_what_is_nested_deep_is_no_failure_of_the_server(server, depth):
    body = b'{"prompt": "a", "metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}"
    response = server.client.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text


def test_what_nobody_expected_to_fail_has_an_id_and_cors(tiny, tokenizer, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    with running(tiny, tokenizer, cors=["https://example.org"]) as server:
        monkeypatch.setattr("serve.api.openai.completion_generation", fails)
        response = server.client.post("/v1/completions", json=TEXT, headers={"origin": "https://example.org"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert response.headers["x-request-id"]
        assert response.headers["access-control-allow-origin"] == "https://example.org"


def test_an_echo_of_nothing_is_nothing(server):
    body = {"max_tokens": 6, "seed": 3}
    for prompt, places in (("", [0]), (["", "a"], [0])):
        plain = server.post("/v1/completions", prompt=prompt, **body).json()["choices"]
        echoed = server.post("/v1/completions", prompt=prompt, echo=True, **body).json()["choices"]
        assert all(echoed[i]["text"] == plain[i]["text"] for i in places)
    assert echoed[1]["text"] == "a" + plain[1]["text"]


@pytest.mark.parametrize("prompt", [[-1], [10**6], "a" * 10**5])
def test_a_prompt_at_fault_is_named(server, prompt):
    assert server.post("/v1/completions", prompt=prompt).json()["error"]["param"] == "prompt"


def test_a_prompt_too_long_names_both_lengths(server, tiny):
    positions = tiny.spec.positions
    response = server.post("/v1/completions", prompt=[5] * (positions + 3))
    assert response.status_code == 400
    assert f"{positions + 3} tokens" in response.text
    assert f"{positions} positions" in response.text
    response = server.post("/v1/completions", prompt=[5] * (positions - 3), max_tokens=9)
    assert "max_tokens asks for 9 more" in response.json()["error"]["message"]
    for prompt, message in (([10**6], "whole numbers from 0"), ([tiny.spec.mask_token_id], "mask token")):
        response = server.post("/v1/completions", prompt=prompt)
        assert response.status_code == 400
        assert message in response.text


def test_half_a_surrogate_pair_is_refused_and_other_characters_are_not(server):
    body = b'{"prompt": "a \\ud800 b", "echo": true}'
    response = server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    for text in ("😀 é 漢", "\x00", "a\u2028b", "<|im_end|>"):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        assert server.post("/v1/chat/completions", **body).status_code == 200


def test_the_async_client_streams_and_may_leave_half_way(server):
    import asyncio

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        whole = await client.completions.create(model="tiny", seed=1, **TEXT)
        text = ""
        async for chunk in await client.completions.create(model="tiny", seed=1, stream=True, **TEXT):
            text += chunk.choices[0].text
        assert text == whole.choices[0].text
        stream = await client.completions.create(
            model="tiny", prompt="a", max_tokens=100, stream=True, seed=1
        )
        async for _ in stream:
            break
        await stream.close()
        await client.close()

    asyncio.run(run())


def test_events_are_one_line_of_json_each(server):
    with server.client.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        assert events(response)[-1] == (None, "[DONE]")


def test_snapshots_show_no_stop_text_and_hold_the_echo(server):
    body = {**TEXT, "seed": 3, "max_tokens": 40}
    plain = server.post("/v1/completions", **body).json()["choices"][0]["text"]
    stop = next(plain[i : i + 2] for i in range(4, 30) if plain[i : i + 2].isprintable())
    chunks = stream_of(server, "/v1/completions", **body, stop=[stop], echo=True, diffusing=True)[:-1]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert all(text.startswith(TEXT["prompt"]) for text in texts)
    assert not any(stop in text[len(TEXT["prompt"]) :] for text in texts)
    whole = server.post("/v1/completions", **body, stop=[stop], echo=True).json()["choices"][0]
    assert texts[-1] == whole["text"]
    refused = server.post("/v1/completions", **body, diffusing=True, stream=True, logprobs=1)
    assert refused.json()["error"]["param"] == "logprobs"


def test_options_keep_the_bounds_of_the_parameters_of_their_names(server):
    for options in ({"repetition_penalty": 1e-300}, {"logit_bias": {"5": 1e308}}, {"temperature": -1}):
        assert server.post("/v1/completions", **TEXT, options=options).status_code == 400, options
    beyond = server.post("/v1/completions", **TEXT, logit_bias={"99999": 1})
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "logit_bias")


def test_separators_of_lines_do_not_cut_events(server, tokenizer):
    """U+2028 as the only token that can come out, read by clients that split at it."""
    from serve.api.sse import sse_line

    text = sse_line({"a": "x\u2028y\u2029z\x85 é"})
    assert len(text.splitlines()) == 1
    assert json.loads(text) == {"a": "x\u2028y\u2029z\x85 é"}


def test_a_body_needs_no_content_type_and_head_is_answered(server):
    response = server.client.post("/v1/completions", content=json.dumps(TEXT).encode())
    assert response.status_code == 200
    for path in ("/health", "/v1/models", "/"):
        head = server.client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_bytes_that_never_become_a_character_count_in_the_places_of_what_follows(tokenizer):
    from serve.api.tokens import TokenTexts

    half, letter = tokenizer("€")["input_ids"][0], tokenizer("M")["input_ids"][0]
    assert TokenTexts(ByteFallback()).offsets([0xC3, 0xA9, 0xFF, 0x141]) == [0, 1, 1, 3]  # never backwards
    tokens = [letter, half, half, letter, *tokenizer("€")["input_ids"], letter]
    places = TokenTexts(tokenizer).offsets(tokens)
    whole = tokenizer.decode(tokens)
    assert whole[places[3]] == whole[places[-1]] == "M"
    assert places[4] == places[5] == places[3] + 1  # of one character, which begins there


def test_places_of_tokens_are_those_of_the_whole_text_also_within_characters(server, tokenizer):
    """A character of several tokens begins where its first token does; in parts the places are the same."""
    text = "é€ 漢字 ow"
    body = {**TEXT, "max_tokens": 24, "logprobs": 1, "seed": 3, "begin": text}
    whole = server.post("/v1/completions", **body).json()["choices"][0]
    given = tokenizer(text)["input_ids"]
    expected = [
        len(tokenizer.decode(given[:i], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}"))
        for i in range(len(given))
    ]
    assert len(given) > len(text)
    offsets = whole["logprobs"]["text_offset"]
    assert offsets[: len(given)] == expected
    parts = [c["choices"][0]["logprobs"] for c in stream_of(server, "/v1/completions", **body)[:-1]]
    assert functools.reduce(operator.iadd, (part["text_offset"] for part in parts if part), []) == offsets


def test_what_cannot_be_decoded_is_refused_before_a_stream_begins(server):
    body = {**TEXT, "decoder": "semi-ar", "options": {"block_size": 2}, "steps": 2, "max_tokens": 8}
    for stream in (False, True):
        refused = server.post("/v1/completions", **body, stream=stream)
        assert (refused.status_code, "2 steps are too few for 4 blocks" in refused.text) == (400, True)
    fill = {"text": "one <mask:8> two", "decoder": "semi-ar", "options": {"block_size": 2}, "steps": 2}
    assert server.post("/v1/canvas", **fill, stream=True).status_code == 400


def test_prompt_text_and_suffix_are_the_text_that_was_written(server, tiny, tokenizer):
    """Where the gap kept the space that the prompt ends with."""
    sampler, count = Sampler(tiny, tokenizer), 0
    prompt, suffix = "The capital of ", " is."
    for seed in range(12):
        whole = sampler.infill(f"{prompt}<mask:1-2>{suffix}", seed=seed).text
        for path in ("/v1/completions", "/v1/fim/completions"):
            given = {"prompt": prompt, "suffix": suffix, "max_tokens": 2, "seed": seed}
            text = server.post(path, **given).json()["choices"][0]["text"]
            if whole.startswith(prompt):
                assert prompt + text + suffix == whole
                count += 1
    assert count


def test_given_texts_that_do_not_fit_are_named(server):
    for name, value in (("forced", {"99": "a"}), ("begin", "a b c d e f g h i j")):
        refused = server.post("/v1/completions", prompt="a", max_tokens=3, **{name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
