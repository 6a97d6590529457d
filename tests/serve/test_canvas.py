"""The native interface: every cell, its state, its probability and its step."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from decoding import Request, Sampler
from decoding.cells import cells, open_positions
from decoding.engine import Engine
from decoding.reveal.order_table import OrderTable
from serve.api.mercury import marked
from tests.decoding.rig import canvas_of, order_table, plan_of
from tests.fakes import FakeDenoiser, FakeTokenizer
from tests.serve.rig import events, stream_of

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "Sort the words: b a c", "max_tokens": 20, "seed": 3}


def stream(server, **body):
    """The events of a stream, each with all cells."""
    with server.client.stream("POST", "/v1/canvas", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        items, known = events(response), {}
    for name, data in items:
        if name == "canvas" and "changes" in data:
            data["cells"] = list(known[data.get("candidate")])
            for change in data["changes"]:
                index = change.pop("index")
                assert data["cells"][index : index + 1] != [change]
                data["cells"][index : index + 1] = [change]
        known[data.get("candidate")] = data["cells"]
    return items


def test_the_cells_of_an_answer_are_those_of_the_python_api(server, tiny, tokenizer):
    got = server.post("/v1/canvas", **BODY).json()
    expected = Sampler(tiny, tokenizer).generate(BODY["prompt"], max_tokens=20, seed=3)
    assert got["text"] == expected.text
    assert [cell["token_id"] for cell in got["cells"]] == expected.token_ids
    assert [cell["step"] for cell in got["cells"]] == expected.reveal_step
    assert [cell["probability"] for cell in got["cells"]] == pytest.approx(expected.confidence)
    assert {cell["state"] for cell in got["cells"]} == {"written"}
    assert (got["model_calls"], got["seed"]) == (expected.model_calls, 3)
    assert got["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("decoder", ["conv", "llada", "semi-ar", "entropy-bound", "editing"])
def test_a_stream_shows_every_step_and_ends_with_the_answer(server, decoder):
    body = {**BODY, "decoder": decoder}
    items = stream(server, **body)
    whole = server.post("/v1/canvas", **body).json()
    names = [name for name, _ in items]
    assert names == ["canvas"] * (len(names) - 1) + ["done"]
    done = items[-1][1]
    assert {k: done[k] for k in ("text", "cells", "step")} == {k: whole[k] for k in ("text", "cells", "step")}
    assert ["changes" in data for _, data in items[:-1]] == [False] + [True] * (len(items) - 2)
    steps = [data["step"] for _, data in items[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    for _, data in items[:-1]:
        states = [cell["state"] for cell in data["cells"]]
        assert set(states) <= {"written", "open", "shut"}
        assert all(cell["probability"] is None for cell in data["cells"] if cell["state"] in ("open", "shut"))
        if "written" in states and decoder != "editing":
            assert all(
                0 < c["probability"] <= 1 for c in data["cells"] if c["step"] is not None and c["probability"]
            )
    assert any("open" in str(data) for _, data in items)


def test_open_cells_are_those_that_the_window_lets_be_written():
    """By hand: within reach of what is known for a convolution, the first block for blocks."""
    model, reach = FakeDenoiser(eos_bias=-50.0), 2
    for decoder, expected in (("conv", {2, 3}), ("semi-ar", set(range(2, 6))), ("llada", set(range(2, 12)))):
        options = {"conv": {"kernel_size": 2 * reach + 1}, "semi-ar": {"block_size": 4}, "llada": {}}[decoder]
        request = Request(decoder=decoder, options=options or None, window=12, steps=12)
        plan = request.resolve(model)
        canvas = canvas_of(torch.tensor([[1, 2] + [22] * 10]), plan)
        assert set(open_positions(canvas, plan)[0].nonzero()[:, 0].tolist()) == expected, decoder
        states = [cell.state for cell in cells(canvas, plan)]
        assert [i + 2 for i, state in enumerate(states) if state == "open"] == sorted(expected)


def test_a_token_is_only_ever_written_where_a_cell_was_open():
    for name in ("conv", "semi-ar", "sliding", "dilated", "threshold"):
        plan = plan_of(name, *([] if name in ("threshold", "dilated") else [9]), fit=30)
        engine = Engine(FakeDenoiser(eos_bias=-50.0), FakeTokenizer())
        ticket = engine.add(canvas_of(torch.tensor([[1, 2] + [22] * 28]), plan), plan)
        while len(engine):
            before = engine.canvas(ticket)
            allowed = open_positions(before, plan)
            (update,) = engine.step()
            written = before.masked & ~update.canvas.masked
            assert not bool((written & ~allowed).any()), name


def test_texts_at_places_are_given_cells(server):
    body = {
        "prompt": "x",
        "max_tokens": 12,
        "seed": 1,
        "begin": "ab",
        "forced": {"6": "cd"},
        "decoder": "conv",
    }
    got = server.post("/v1/canvas", **body).json()
    given = [i for i, cell in enumerate(got["cells"]) if cell["state"] == "given"]
    assert got["text"].startswith("ab")
    assert 0 in given
    assert 6 in given
    ended = server.post("/v1/canvas", prompt="x", max_tokens=12, seed=1, ending=" end").json()
    assert ended["text"].endswith(" end")


@pytest.mark.parametrize("text", ["ab <mask:3> cd", "ab <mask:1-3> cd <mask:1> e", "ab <mask> cd"])
def test_gaps_are_filled_as_the_python_api_fills_them(server, tiny, tokenizer, text):
    body = {"text": text, "seed": 2, "max_tokens": 3}
    got = server.post("/v1/canvas", **body).json()
    plain = text.replace("<mask>", "<mask:1-3>")
    expected = Sampler(tiny, tokenizer).infill(plain, seed=2)
    assert (got["text"], got["gaps"]) == (expected.text, expected.gaps)
    assert got["model_calls"] == expected.model_calls
    assert [cell["token_id"] for cell in got["cells"]] == expected.token_ids
    items = stream(server, **body)
    assert items[-1][0] == "done"
    assert items[-1][1]["text"] == got["text"]
    candidates = {data.get("candidate") for name, data in items if name == "canvas"}
    assert candidates == ({None} if text == "ab <mask:3> cd" else {0, 1, 2})
    if None not in candidates:  # the last of the one that was taken is the answer
        (*_, last) = (data for _, data in items[:-1] if data["candidate"] == got["candidate"])
        assert last["cells"] == got["cells"]


def test_more_steps_than_gaps_can_use_are_left_out_as_in_the_python_api(server, tiny, tokenizer):
    how = {"seed": 2, "decoder": "top-k", "steps": 5000}
    got = server.post("/v1/canvas", text="ab <mask:3> cd", **how).json()
    expected = Sampler(tiny, tokenizer).infill("ab <mask:3> cd", **how)
    assert (got["text"], got["model_calls"]) == (expected.text, expected.model_calls)
    steps = [cell["step"] for cell in got["cells"] if cell["step"] is not None]
    assert len(steps) == 3
    assert max(steps) <= 3 * 16


def test_a_stream_of_changes_holds_each_step_as_the_engine_has_it(server, tiny, tokenizer):
    """Whole canvases made of the changes, against the cells of the engine after each step."""
    for options in ({"decoder": "llada", "steps": 9}, {"rate": 2.0}, {"decoder": "remdm", "steps": 9}):
        items = stream(server, **BODY, **options)
        canvas = {"canvas": "full"} if "steps" in options else {}
        plan = Request.of(max_tokens=20, **options, **canvas).resolve(tiny)
        engine = Engine(tiny, tokenizer)
        engine.submit(BODY["prompt"], plan, BODY["seed"])
        for _, data in items[:-1]:
            (update,) = engine.step()
            expected = [asdict(cell) for cell in cells(update.canvas, plan)]
            assert [{k: v for k, v in cell.items() if k != "text"} for cell in data["cells"]] == expected


def test_the_example_of_the_documentation_follows_a_stream(server, capsys):
    """It prints the canvas after each step; the last line is the answer."""
    text = (ROOT / "docs" / "serve.md").read_text()
    (code,) = [block for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "v1/canvas" in block]
    code = code.replace("http://127.0.0.1:8000", server.url).replace("import httpx", "import httpx2 as httpx")
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    answer = server.post("/v1/canvas", prompt="What is a cat?", seed=1, max_tokens=32).json()
    assert lines[-1] == repr("".join(cell["text"] for cell in answer["cells"]))
    assert len(lines) > 3
    assert "░" in lines[0]


def test_what_does_not_fit_a_canvas_is_refused_by_name(server):
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"text": "no gap"}, "text"),
        ({"text": "a <mask:0> b"}, "text"),
        ({"text": "a <mask:0-32> b"}, "text"),
        ({"text": "a <mask:1-4000> b"}, None),
        ({"text": "a <mask:2> b", "stop": "x"}, "stop"),
        ({"text": "a <mask:2> b", "begin": "x"}, "begin"),
        ({"text": "a <mask:2> b", "window": 20}, "window"),
        ({"prompt": "a", "forced": {"x": "y"}}, "forced"),
        ({"prompt": "a", "canvas": "huge"}, "canvas"),
    ):
        response = server.post("/v1/canvas", **body)
        assert response.status_code == 400, (body, response.text)
        assert response.json()["error"]["param"] == param, (body, response.text)
    assert server.post("/v1/canvas", text="a <mask:1-99> b <mask:1-99>").status_code == 400


def test_decoders_are_listed_with_their_options(server):
    listed = server.client.get("/v1/decoders").json()
    names = [each["name"] for each in listed["data"]]
    assert listed["default"] == "conv"
    assert {"conv", "llada", "entropy-bound"} <= set(names)
    conv = listed["data"][names.index("conv")]
    assert "kernel_size" in conv["options"]
    assert conv["paper"]


def test_a_client_names_order_tables_and_reads_no_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path))
    secret = order_table().save(tmp_path / "secret.json")
    order_table().save("mine")
    (tmp_path / "orders" / "bad.json").write_text("{")
    read = []
    monkeypatch.setattr(OrderTable, "load", read.append)
    body = {"prompt": "a", "max_tokens": 4, "decoder": "dprm"}
    for table in (str(secret), "../secret.json", "mine.json", "/etc/passwd", "", 3, ["mine"], {"counts": []}):
        for path in ("/v1/canvas", "/v1/completions", "/api/generate", "/v1/fim/completions"):
            given = {**body, "options": {"table": table}}
            if path == "/api/generate":  # there, all of ours stand among the options
                given = {"model": "tiny", "prompt": "a", "options": {"decoder": "dprm", **given}}
            response = server.post(path, **given)
            assert response.status_code == 400, (path, table, response.text)
            assert "must be the name of an order table" in response.text
    assert not read


def test_order_tables_by_name_are_those_of_the_server(server, tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path))
    table = order_table()
    table.save("mine")
    (tmp_path / "orders" / "bad.json").write_text("{")
    body = {"prompt": "a b c", "max_tokens": 20, "canvas": "full", "steps": 10, "decoder": "dprm"}
    options = {"warm_up": 0.0, "switch": 0.2, "ready": 1}
    got = server.post("/v1/canvas", **body, options={**options, "table": "mine"}, seed=3).json()
    expected = Sampler(tiny, tokenizer).generate(
        "a b c", max_tokens=20, canvas="full", steps=10, decoder="dprm", options={**options, "table": table},
        seed=3,
    )  # fmt: skip
    assert [cell["step"] for cell in got["cells"]] == expected.reveal_step
    other = server.post("/v1/canvas", **body, options=options, seed=3).json()
    assert [cell["step"] for cell in other["cells"]] != expected.reveal_step
    for name, message in (("mime", "Did you mean 'mine'"), ("bad", "order table 'bad' is damaged")):
        response = server.post("/v1/canvas", **body, options={"table": name})
        assert response.status_code == 400
        assert message in response.text
        assert str(tmp_path) not in response.text


def test_mercury_fills_between_prompt_and_suffix(server):
    body = {"prompt": "The words are", "suffix": " and that.", "max_tokens": 4, "seed": 1}
    got = server.post("/v1/fim/completions", **body).json()
    assert got["object"] == "text_completion"
    assert got["choices"] == server.post("/v1/completions", **body).json()["choices"]
    chunks = stream_of(server, "/v1/fim/completions", **body)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == got["choices"][0]["text"]


def test_marks_of_mercury_go_and_what_stands_beside_them_stays():
    message = (
        "<|current_file_content|>\ncurrent_file_path: a.py\nold <|cursor|>tail\n<|code_to_edit|>\n"
        "hello <|cursor|>world\n<|/code_to_edit|>\nend\n<|/current_file_content|>"
    )
    text, (begin, end) = marked(message)
    assert text == "\nold tail\nhello world\nend\n"
    assert text[begin:end] == "hello world"
    message = "a\r\n<|cursor|>\r\n<|code_to_edit|>\r\nb\r\n<|/code_to_edit|>\r\n<|end|>\r\nc"
    text, (begin, end) = marked(message)
    assert (text, text[begin:end]) == ("a\r\n\r\nb\r\nc", "b")


def test_a_shortest_replacement_needs_a_longest(server):
    response = server.post("/v1/edit/completions", text="The cat sat", span="cat", min_tokens=9)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "min_tokens")


def test_mercury_writes_a_marked_region_again(server, tiny, tokenizer):
    text, words = "one two three four", "two three"
    sampler = Sampler(tiny, tokenizer)
    expected = sampler.edit(text, words, seed=4)
    native = server.post("/v1/edit/completions", text=text, span=words, seed=4).json()
    assert native["choices"][0]["message"]["content"] == "".join(expected.gaps)
    assert native["usage"]["completion_tokens"] == sum(step >= 0 for step in expected.reveal_step)
    places = server.post("/v1/edit/completions", text=text, span=[4, 13], seed=4).json()
    assert places["choices"] == native["choices"]
    message = (
        "<|current_file_content|>\ncurrent_file_path: a.txt\n"
        "one <|code_to_edit|>two three<|/code_to_edit|> four"
        "<|/current_file_content|>"
    )
    marked = server.post(
        "/v1/edit/completions", messages=[{"role": "user", "content": message}], seed=4
    ).json()
    assert marked["object"] == "chat.completion"
    assert marked["choices"][0]["message"]["content"]
    chunks = stream_of(server, "/v1/edit/completions", text=text, span=words, seed=4)
    assert chunks[0]["choices"][0]["delta"]["content"] == native["choices"][0]["message"]["content"]
    for body in ({"text": "a"}, {"text": "a", "span": "b"}, {"messages": [{"role": "user", "content": "x"}]}):
        assert server.post("/v1/edit/completions", **body).status_code == 400
