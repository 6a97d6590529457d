import pytest

from decoding.chat.conversation import Conversation
from decoding.chat.sources import EndpointSource, SamplerSource
from decoding.request import Request
from decoding.sampler import Sampler
from dlm.errors import DLMError
from tests.eval.endpoint import serving


def test_the_sampler_source_ends_with_the_text_of_generate(model, tokenizer):
    sampler, request = Sampler(model, tokenizer), Request(max_tokens=12, decoder="conv")
    source = SamplerSource(sampler)
    texts = list(source.stream([{"role": "user", "content": "Count to ten."}], request, seed=4))
    out = sampler.generate("Count to ten.", request=request, seed=4)
    assert texts[-1] == out.text
    assert len(texts) == out.steps
    assert source.count("one two") == len(sampler.rows.text("one two"))


def test_the_oldest_turns_go_first_and_the_system_message_stays(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    said = [{"role": "system", "content": "Be short."}]
    for number in range(6):
        said += [{"role": "user", "content": f"Question {number}."}, {"role": "assistant", "content": "Yes."}]
    said.append({"role": "user", "content": "The last one."})
    source, size = SamplerSource(sampler), sampler.prompt_length(said)
    for room in (size, size - 1, size // 2, 30):
        fitted = source.fitted(said, Request(window=2 * room, steps=4))
        assert fitted[0] == said[0]
        assert fitted[1:] == said[len(said) - len(fitted) + 1 :]
        assert sampler.prompt_length(fitted) <= room or len(fitted) <= 3
        assert (len(fitted) == len(said)) == (room >= size)


def test_an_endpoint_streams_and_is_sent_what_the_api_has(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    request = Request(
        max_tokens=9, stop=["\n\n"], decoder="conv", options={"temperature": 0.5, "kernel_size": 9}
    )
    with serving(lambda body: f"You said [/b] {body['messages'][-1]['content']} ") as endpoint:
        talk = Conversation(EndpointSource(endpoint.url, "some-model"), request, system="Be short.", seed=2)
        texts = list(talk.ask("hello there"))
        words = ["You", " said", " [/b]", " hello", " there", " "]
        assert texts == ["".join(words[: i + 1]) for i in range(len(words))]
        list(talk.ask("again"))
    body = endpoint.seen[1]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == texts[-1]
    assert (body["model"], body["stream"], body["seed"]) == ("some-model", True, 2)
    assert (body["max_tokens"], body["stop"], body["temperature"]) == (9, ["\n\n"], 0.5)
    assert (body["decoder"], body["options"]) == ("conv", {"kernel_size": 9})
    assert endpoint.keys == ["Bearer secret"] * 2


def test_an_endpoint_that_fails_is_named_and_the_conversation_goes_on(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: "fine", faults=[400, "garbage"]) as endpoint:
        talk = Conversation(EndpointSource(endpoint.url, "m"))
        with pytest.raises(DLMError, match=r"http://127.0.0.1:\d+/v1/: .*scripted 400"):
            list(talk.ask("one"))
        assert talk.messages == []
        assert list(talk.retry())[-1] == "fine" or list(talk.retry())[-1] == "fine"
    with (
        serving(lambda body: "fine", faults=[401]) as endpoint,
        pytest.raises(DLMError, match="OPENAI_API_KEY"),
    ):
        list(Conversation(EndpointSource(endpoint.url, "m")).ask("one"))
    with pytest.raises(DLMError, match="Connection error"):
        list(Conversation(EndpointSource("http://127.0.0.1:9/v1", "m")).ask("one"))
