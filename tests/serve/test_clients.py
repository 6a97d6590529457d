"""Other people's clients, unmodified: huggingface_hub, Ollama's protocol, curl, lm-evaluation-harness."""

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import InferenceClient

from dlm.backbone import from_scratch
from dlm.prepacking import prepack
from tests.serve.conftest import SIZES
from tests.serve.rig import Running, events, running

PROMPT = "Sort the words:"


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The tests run with the hub shut off, which shuts its client off altogether."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def plain(server):
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5}
    return server.post("/v1/completions", **body).json()["choices"][0]["text"]


def test_text_generation_of_huggingface_hub(server, plain):
    client = InferenceClient(server.url)
    assert client.text_generation(PROMPT, max_new_tokens=12, seed=5) == plain
    detailed = client.text_generation(PROMPT, max_new_tokens=12, seed=5, details=True, top_n_tokens=2)
    assert detailed.generated_text == plain
    assert detailed.details.generated_tokens == len(detailed.details.tokens)
    assert all(token.logprob <= 0 for token in detailed.details.tokens)
    assert all(len(each) == 2 for each in detailed.details.top_tokens)
    assert client.text_generation(PROMPT, max_new_tokens=12, seed=5, return_full_text=True) == PROMPT + plain
    parts = list(client.text_generation(PROMPT, max_new_tokens=12, seed=5, stream=True, details=True))
    assert parts[-1].generated_text == plain
    assert [part.index for part in parts] == list(range(1, len(parts) + 1))
    assert [part.token.id for part in parts] == [token.id for token in detailed.details.tokens]
    assert all(part.details is None for part in parts[:-1])
    assert "".join(part.token.text for part in parts) == plain
    assert parts[-1].details.finish_reason == detailed.details.finish_reason


def test_tokens_of_a_tgi_stream_join_to_the_answer_also_where_a_stop_text_cuts_one(server):
    """A stop text of one letter, of a text at 24 tokens, so that most lie within a token."""
    ends = set()
    for seed, stop in itertools.product(range(6), "eaoi"):
        body = {"inputs": PROMPT, "parameters": {"seed": seed, "temperature": 1.0, "max_new_tokens": 24}}
        free = server.post("/generate", **body).json()["generated_text"]
        body["parameters"]["stop"] = [free[:1] if seed == 0 and free else stop]
        whole = server.post("/generate", **body).json()["generated_text"]
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            parts = [data for _, data in events(response)]
        assert "".join(part["token"]["text"] for part in parts) == whole
        assert parts[-1]["generated_text"] == whole
        ends.add((parts[-1]["token"]["special"], bool(whole)))
    assert ends == {(True, False), (False, True)}, "an empty answer, and others"


def test_chat_completion_of_huggingface_hub(server):
    client = InferenceClient(server.url)
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat_completion(messages, max_tokens=12, seed=5)
    text = "".join(
        part.choices[0].delta.content or ""
        for part in client.chat_completion(messages, max_tokens=12, seed=5, stream=True)
        if part.choices
    )
    assert whole.choices[0].message.content == text


def test_the_paths_of_tgi(server, plain):
    info = server.client.get("/info").json()
    assert info["model_id"] == "tiny"
    assert info["max_total_tokens"] > info["max_input_tokens"] > 100
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "seed": 5}}
    assert server.post("/generate", **body).json() == {"generated_text": plain}
    assert server.post("/", **body).json() == [{"generated_text": plain}]
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        assert events(response)[-1][1]["generated_text"] == plain
    letters = re.search("[a-z]{2}", plain)[0]
    stopped = server.post(
        "/generate",
        inputs=PROMPT,
        parameters={"max_new_tokens": 12, "seed": 5, "stop": [letters], "details": True},
    ).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == plain[: plain.index(letters)]
    for parameters, name in (
        ({"watermark": True}, "watermark"),
        ({"grammar": {}}, "grammar"),
        ({"best_of": 2}, "best_of"),
    ):
        response = server.post("/generate", inputs="a", parameters=parameters)
        assert response.status_code == 400
        assert response.json()["param"] == f"parameters.{name}"


def test_the_paths_of_ollama(server):
    assert server.client.get("/api/tags").json()["models"][0]["name"] == "tiny"
    assert server.client.get("/api/version").json()["version"]
    messages = [{"role": "user", "content": PROMPT}]
    chat = server.post("/v1/chat/completions", messages=messages, max_tokens=12, seed=5).json()
    text = chat["choices"][0]["message"]["content"]
    options = {"num_predict": 12, "seed": 5}
    whole = server.post(
        "/api/chat", model="tiny:latest", messages=messages, options=options, stream=False
    ).json()
    assert whole["message"] == {"role": "assistant", "content": text}
    assert whole["eval_count"] == chat["usage"]["completion_tokens"]
    with server.client.stream(
        "POST", "/api/chat", json={"model": "tiny", "messages": messages, "options": options}
    ) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == text
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    answer = server.post("/api/generate", model="tiny", prompt=PROMPT, options=options, stream=False).json()
    assert answer["response"] == text
    raw = server.post(
        "/api/generate", model="tiny", prompt=PROMPT, raw=True, options=options, stream=False
    ).json()
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5}
    assert raw["response"] == server.post("/v1/completions", **body).json()["choices"][0]["text"]
    assert server.post("/api/chat", model="other", messages=messages).status_code == 404
    images = [{**messages[0], "images": []}]
    assert server.post("/api/chat", model="tiny", messages=images, stream=False).status_code == 200
    images = [{**messages[0], "images": ["aGk="]}]
    refused = server.post("/api/chat", model="tiny", messages=images, stream=False)
    assert "images is not supported" in refused.json()["error"]
    refused = server.post("/api/generate", model="tiny", prompt="a", format="json")
    assert refused.json()["param"] == "format"
    assert "format" in refused.json()["error"]


def test_ollama_takes_a_body_that_calls_itself_a_form(server):
    """As curl sends it, and as Ollama's documentation has it."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    body = b'{"model": "tiny", "prompt": "hi", "stream": false}'
    assert server.client.post("/api/generate", content=body, headers=form).status_code == 200
    response = server.client.post("/v1/completions", content=body, headers=form)
    assert response.status_code == 400
    assert "sent as application/json" in response.text


def test_ollama_is_told_the_size_of_a_model_with_prepacked_weights(tokenizer):
    sizes = []
    for prepared in (lambda model: model, prepack):
        torch.manual_seed(1)
        with running(prepared(from_scratch(SIZES, tokenizer).eval()), tokenizer) as server:
            shown = server.post("/api/show", model="tiny").json()["model_info"]["general.parameter_count"]
            sizes.append((shown, server.client.get("/api/tags").json()["models"][0]["size"]))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("drafts", "status"), [(0, 200), (3, 400)])
def test_drafts_count_among_the_positions_of_a_server(tiny, tokenizer, drafts, status):
    with running(tiny, tokenizer, max_positions=100) as server:
        body = {"prompt": [5] * 20, "max_tokens": 20, "drafts": drafts}
        response = server.post("/v1/completions", **body)
        assert response.status_code == status
        if drafts:
            assert "40 tokens, and as many for each of 3 drafts" in response.json()["error"]["message"]


def test_there_is_somebody_at_the_root_without_a_page(tiny, tokenizer):
    with running(tiny, tokenizer, page=False) as server:
        assert (server.client.get("/").status_code, server.client.head("/").status_code) == (200, 200)


def test_the_client_of_ollama(server, tiny, tokenizer):
    """Its own package: list, show, ps; chat and generate, whole and as streams; errors."""
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.url)
    (model,) = client.list().models
    count = sum(each.numel() for each in tiny.parameters())
    assert (model.model, model.size) == ("tiny", sum(each.nbytes for each in tiny.parameters()))
    assert client.ps().models[0].model == "tiny"
    shown = client.show("tiny:latest")
    assert shown.template == tokenizer.chat_template
    assert shown.modelinfo["general.parameter_count"] == count
    assert shown.modelinfo["dlm.context_length"] == tiny.spec.positions
    assert shown.details.parameter_size == f"{count / 1e6:.0f}M"
    assert shown.capabilities == ["completion"]
    messages = [{"role": "user", "content": PROMPT}]
    options = {"num_predict": 12, "seed": 5}
    chat = server.post("/v1/chat/completions", messages=messages, max_tokens=12, seed=5).json()
    text = chat["choices"][0]["message"]["content"]
    whole = client.chat(model="tiny", messages=messages, options=options)
    assert (whole.message.content, whole.done_reason) == (text, chat["choices"][0]["finish_reason"])
    parts = list(client.chat(model="tiny", messages=messages, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == text
    assert client.generate(model="tiny", prompt=PROMPT, options=options).response == text
    parts = list(client.generate(model="tiny", prompt=PROMPT, options=options, stream=True))
    assert "".join(part.response for part in parts) == text
    for fails, status in (
        (lambda: client.show("other"), 404),
        (lambda: client.chat(model="other", messages=messages), 404),
        (lambda: client.chat(model="tiny", messages=messages, format="json"), 400),
    ):
        with pytest.raises(ollama.ResponseError) as error:
            fails()
        assert error.value.status_code == status


def test_litellm(server):
    """Whole, streamed, async, options of diffusion; by both interfaces. It is no dependency."""
    litellm = pytest.importorskip("litellm")
    messages = [{"role": "user", "content": PROMPT}]
    chat = server.post("/v1/chat/completions", messages=messages, max_tokens=12, seed=5).json()
    text = chat["choices"][0]["message"]["content"]
    openai = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none"}
    ollama = {"model": "ollama_chat/tiny", "api_base": server.url}
    for way in (openai, ollama):
        settings = {**way, "messages": messages, "max_tokens": 12, "seed": 5}
        assert litellm.completion(**settings).choices[0].message.content == text
        parts = list(litellm.completion(**settings, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text

    async def wait():
        settings = {**openai, "messages": messages, "max_tokens": 12, "seed": 5}
        whole = await litellm.acompletion(**settings)
        parts = [part async for part in await litellm.acompletion(**settings, stream=True)]
        return whole, "".join(part.choices[0].delta.content or "" for part in parts)

    whole, streamed = asyncio.run(wait())
    assert whole.choices[0].message.content == streamed == text
    assert whole.usage.completion_tokens == chat["usage"]["completion_tokens"]
    body = {"messages": messages, "max_tokens": 12, "seed": 5, "decoder": "llada", "steps": 6}
    expected = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    extra = {"decoder": "llada", "steps": 6}
    answer = litellm.completion(**openai, messages=messages, max_tokens=12, seed=5, extra_body=extra)
    assert answer.choices[0].message.content == expected
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(litellm.BadRequestError, match="tools is not supported"):
        litellm.completion(**openai, messages=messages, tools=[tool])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server, plain):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "seed": 5})
    command = [
        "curl",
        "-sS",
        f"{server.url}/v1/completions",
        "-H",
        "content-type: application/json",
        "-d",
        body,
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)["choices"][0]["text"] == plain


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_evaluation_harness_generates_through_the_server(server, kind):
    pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval's API models are not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    path = "/v1/completions" if kind == "local-completions" else "/v1/chat/completions"
    cls = LocalCompletionsAPI if kind == "local-completions" else LocalChatCompletion
    settings = {"base_url": server.url + path, "model": "tiny", "max_retries": 1, "num_concurrent": 1}
    lm = cls(**settings, tokenizer_backend=None, tokenized_requests=False)
    gen = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0}
    context = PROMPT if kind == "local-completions" else json.dumps([{"role": "user", "content": PROMPT}])
    if kind == "local-chat-completions":
        from lm_eval.models.api_models import JsonChatStr

        context = JsonChatStr(context)
    requests = [Instance("generate_until", {}, (context, gen), i) for i in range(2)]
    answers = lm.generate_until(requests, disable_tqdm=True)
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert answers[0]
    assert "\n" not in answers[0]
    assert sys.version_info >= (3, 11)


def test_lm_evaluation_harness_is_told_what_scores_in_place_of_the_server(server, tokenizer, caplog):
    """Never a wrong number: log-likelihoods of a prompt are refused, with what to use."""
    pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval's API models are not installed")
    import requests
    import tenacity
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    settings = {"base_url": f"{server.url}/v1/completions", "model": "tiny", "max_retries": 1}
    lm = LocalCompletionsAPI(**settings, tokenizer_backend=None, tokenized_requests=False)
    payload = lm._create_payload([[5, 6, 7]], generate=False, gen_kwargs={"seed": 1}, eos="")
    response = server.post("/v1/completions", **payload)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "echo", "unsupported_parameter")
    assert "python -m eval.lm_harness run --model dlm" in error["message"]
    lm.tokenizer, lm.tokenized_requests = tokenizer, True
    with pytest.raises((tenacity.RetryError, requests.HTTPError)), caplog.at_level("WARNING"):
        lm._loglikelihood_tokens([(("a b", " c"), [5, 6], [7])], disable_tqdm=True)
    assert "eval.lm_harness" in caplog.text
    for body in (
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "logprobs": 0, "max_tokens": 1},
    ):
        assert server.post("/v1/completions", prompt="a", **body).json()["error"]["param"] == "echo"
    for body in ({"echo": True, "max_tokens": 1}, {"logprobs": 1, "max_tokens": 1}):
        assert server.post("/v1/completions", prompt="a", **body).status_code == 200


def test_dlm_eval_and_dlm_chat_talk_to_the_server(server, tmp_path, capsys):
    from decoding.chat.sources import EndpointSource
    from decoding.request import Request
    from dlm.cli import main

    questions = tmp_path / "q.jsonl"
    questions.write_text('{"instruction": "Sort the words:", "dataset": "x", "output": "y"}\n')
    words = [
        "eval",
        "alpaca_eval",
        "--endpoint",
        f"{server.url}/v1",
        "--endpoint_model",
        "tiny",
        "--max_tokens",
        "8",
    ]
    assert main([*words, "--data", str(questions), "--output", str(tmp_path / "runs")]) == 0
    (file,) = (tmp_path / "runs").rglob("answers.jsonl")
    answer = json.loads(file.read_text().splitlines()[0])
    source = EndpointSource(f"{server.url}/v1", "tiny")
    messages = [{"role": "user", "content": PROMPT}]
    request = Request(decoder="llada", options={"temperature": 0.0}, max_tokens=9, steps=None, begin="ab")
    texts = list(source.stream(messages, request, seed=1))
    assert texts[-1].startswith("ab")
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert answer["text"] or answer["finish_reason"]
    capsys.readouterr()


def test_errors_have_the_form_of_their_path(server, tiny, tokenizer):
    with server.client.stream(
        "POST", "/generate_stream", json={"inputs": PROMPT, "parameters": {"timeout": 0.001}}
    ) as response:
        last = events(response)[-1][1]
    assert isinstance(last["error"], str)
    assert last["error_type"] == "generation"
    locked = Running(tiny, tokenizer, api_key=["secret"]).ready()
    try:
        refused = locked.post("/generate", inputs=PROMPT)
        assert (refused.status_code, refused.json()["error_type"]) == (401, "generation")
        assert isinstance(locked.post("/api/chat", model="tiny").json()["error"], str)
        assert isinstance(locked.post("/v1/chat/completions").json()["error"], dict)
    finally:
        locked.stop()


def test_sampling_that_is_asked_for_is_done(tiny, tokenizer):
    tiny.config.generation = {"decoder": "llada"}
    server = Running(tiny, tokenizer).ready()
    try:
        texts = {
            sample: {
                server.post(
                    "/generate", inputs=PROMPT,
                    parameters={"do_sample": sample, "seed": seed, "max_new_tokens": 12},
                ).json()["generated_text"]
                for seed in range(4)
            }
            for sample in (None, True)
        }  # fmt: skip
        assert len(texts[None]) == 1
        assert len(texts[True]) > 1
    finally:
        server.stop()
        tiny.config.generation = None


@pytest.mark.parametrize("path", ["/", "/generate_stream"])
def test_a_stream_of_tgi_ends_with_the_whole_text(server, path):
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "seed": 1, "return_full_text": True}}
    whole = server.post("/generate", **body).json()["generated_text"]
    more = {"stream": True} if path == "/" else {}
    with server.client.stream("POST", path, json=body | more) as response:
        last = events(response)[-1][1]
    assert last["generated_text"] == whole
    assert whole.startswith(PROMPT)


@pytest.mark.parametrize(("path", "key"), [("/api/generate", "response"), ("/api/chat", "message")])
def test_a_request_of_ollama_without_a_prompt_has_the_model_loaded(server, path, key):
    for more in ({"stream": False}, {}, {"prompt": ""} if key == "response" else {"messages": []}):
        answer = json.loads(server.post(path, model="tiny", **more).text)
        assert (answer["done"], answer["done_reason"]) == (True, "load")
        assert answer[key] in ("", {"role": "assistant", "content": ""})


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, "no template for a system message"),
        ("/api/generate", {"prompt": "a", "options": {"repeat_penalty": 1e9}}, "repeat_penalty"),
        (
            "/api/generate",
            {"prompt": "a", "options": {"repeat_penalty": 1.1, "repetition_penalty": 5.0}},
            "give one of them",
        ),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "logprobs": 0}, "means nothing beside a suffix"),
        (
            "/v1/completions",
            {"prompt": "a", "suffix": "b", "logit_bias": {"9999": 5.0}},
            "names token 9999",
        ),
        ("/v1/canvas", {"prompt": "a", "options": {"logit_bias": {"9999": 5.0}}}, "names token 9999"),
        (
            "/v1/canvas",
            {"text": "a <mask:2>", "options": {"logit_bias": {"9999": 5.0}}},
            "names token 9999",
        ),
    ],
)
def test_no_parameter_is_ignored(server, path, body, message):
    refused = server.post(path, model="tiny", **body)
    assert refused.status_code == 400
    assert message in refused.text
