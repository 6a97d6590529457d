"""The page, in real Chromium against a real server with a tiny model.

What the page shows is compared with what the API answers to the same request and seed. The page's policy
forbids what Playwright's `wait_for_function` would evaluate: conditions are asked for by `wait_for`.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from dlm.tokenizer import END_TOKEN, START_TOKEN
from tests.serve.browser import browser_path
from tests.serve.rig import Running, wait_for

PAGE = Path(__file__).parents[2] / "serve" / "page"
LIMIT = 100_000
CONTROL = (START_TOKEN, END_TOKEN)
WRITTEN = ".turn .canvas .cell.written"
MASKS = ".turn .canvas .cell:is(.open, .shut)"
DONE = "#send:not([hidden])"


class Slow(Running):
    """A server that waits for `pause` seconds before each of its steps."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.pause = 0.0
        step = self.ready().worker.engine.step
        self.worker.engine.step = lambda rows: (time.sleep(self.pause), step(rows))[1]

    def canvas(self, **body):
        """The answer of /v1/canvas."""
        response = self.post("/v1/canvas", **body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def parts(tiny, tokenizer):
    return tiny, tokenizer


@pytest.fixture(scope="module")
def served(parts):
    server = Slow(*parts)
    yield server
    server.stop()


@pytest.fixture
def expected():
    """Patterns of console errors that a test brings about."""
    return []


@pytest.fixture
def visit(browser, served, expected):
    """Opens the page; at the end there may be no error in its console, and nothing from elsewhere."""
    served.pause = 0.0
    contexts, errors, urls = [], [], []

    def open_page(url=served.url, width=1280, scheme="light", before=None, ready="#health:not(:empty)"):
        viewport = {"width": width, "height": 800}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(30000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        if before is not None:
            before(page)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not any(re.search(each, error) for each in expected)] == []
    assert [url for url in urls if not url.startswith("http://127.0.0.1:")] == []


@pytest.fixture
def page(visit):
    opened = visit()
    opened.wait_for_selector(".side .decoder")
    return opened


def ask(page, prompt, seed=7, tokens=24):
    page.fill("#seed", str(seed))
    page.fill("#max-tokens", str(tokens))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def finish(page):
    page.wait_for_selector(DONE)
    page.wait_for_selector(".panel[aria-busy]", state="detached")
    page.evaluate("new Promise(requestAnimationFrame)")


def shown(page, canvas=".canvas"):
    return page.eval_on_selector(canvas, "c => [...c.children].map(cell => cell.textContent).join('')")


def facts(page, panel):
    return dict(
        page.eval_on_selector_all(
            f".panel:nth-of-type({panel}) .facts div",
            "all => all.map(x => [x.querySelector('dt').textContent, x.querySelector('dd').textContent])",
        )
    )


def user(text):
    return [{"role": "user", "content": text}]


def texts_of(answer):
    """Texts of all tokens; control tokens are shown as blocks."""
    return "".join(cell["text"] for cell in answer["cells"] if cell["text"] not in CONTROL)


# ---- answers -----------------------------------------------------------------------------------------


def test_the_canvas_fills_before_ones_eyes(page, served):
    served.pause = 0.02
    ask(page, "sum: 3 4")
    page.wait_for_selector(".canvas:has(.written):has(.open)")  # some are written, some masks are left
    assert page.get_attribute(".panel", "aria-busy") == "true"
    finish(page)
    answer = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)
    assert shown(page) == texts_of(answer)
    assert page.locator(MASKS).count() == 0
    assert answer["text"] in page.text_content("#announcement")
    calls, tokens = answer["model_calls"], answer["usage"]["completion_tokens"]
    numbers = facts(page, 1)
    assert (numbers["calls"], numbers["tokens"]) == (str(calls), str(tokens))
    assert float(numbers["tokens per call"]) == pytest.approx(tokens / calls, rel=0.01)


def test_colours_follow_the_step(page, served):
    ask(page, "sum: 3 4")
    finish(page)
    answer = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)
    colours = page.eval_on_selector_all(WRITTEN, "all => all.map(x => getComputedStyle(x).backgroundColor)")
    by_step = {}
    for cell, colour in zip(answer["cells"], colours, strict=True):
        by_step.setdefault(cell["step"], set()).add(colour)
    assert len(by_step) > 3
    assert all(len(each) == 1 for each in by_step.values())
    assert len(set.union(*by_step.values())) == len(by_step)


def test_a_token_tells_its_probability_and_step(page, served):
    ask(page, "sum: 3 4")
    finish(page)
    cell = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)["cells"][2]
    page.hover(".turn .canvas .cell >> nth=2")
    chance = "below 0.001" if cell["probability"] < 0.0005 else f"{cell['probability']:.3f}"
    assert f"probability {chance}, step {cell['step'] + 1}" in page.text_content("#tip")
    page.mouse.move(0, 0)
    assert page.is_hidden("#tip")


def test_two_decoders_side_by_side_under_one_seed(page, served):
    page.check("#compare")
    page.select_option(".side:nth-child(1) .decoder", "llada")
    page.select_option(".side:nth-child(2) .decoder", "categorical")
    page.select_option(".side:nth-child(2) .pace", "rate")
    page.fill(".side:nth-child(2) .pace-value", "4")
    ask(page, "sum: 3 4")
    finish(page)
    sides = [{"decoder": "llada"}, {"decoder": "categorical", "rate": 4}]
    for i, side in enumerate(sides, start=1):
        answer = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24, **side)
        assert shown(page, f".panel:nth-of-type({i}) .canvas") == texts_of(answer)
        calls, tokens = answer["model_calls"], answer["usage"]["completion_tokens"]
        numbers = facts(page, i)
        assert numbers["calls"] == str(calls)
        assert float(numbers["tokens per call"]) == pytest.approx(tokens / calls, rel=0.01)
        assert float(numbers["tokens per second"]) > 0
    assert facts(page, 1)["calls"] != facts(page, 2)["calls"]


def test_a_decoder_that_goes_by_time_gets_steps(page, served):
    page.select_option(".decoder >> nth=0", "remdm")
    assert page.input_value(".pace >> nth=0") == "steps"
    page.fill(".pace-value >> nth=0", "6")
    ask(page, "sum: 3 4")
    finish(page)
    body = {"decoder": "remdm", "steps": 6, "messages": user("sum: 3 4"), "seed": 7, "max_tokens": 24}
    assert shown(page) == texts_of(served.canvas(**body))


def test_options_are_sent_and_a_refusal_is_shown(page, served, expected):
    expected.append("status of 400")
    page.click(".side summary >> nth=0")
    page.fill("input[name=temperature] >> nth=0", "0.5")
    page.fill("input[name=kernel_size] >> nth=0", "3")
    ask(page, "sum: 3 4")
    finish(page)
    options = {"temperature": 0.5, "kernel_size": 3}
    assert shown(page) == texts_of(
        served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24, options=options)
    )
    page.fill("input[name=temperature] >> nth=0", "-1")
    ask(page, "sum: 3 4")
    page.wait_for_selector(".problem:has-text('temperature')")


def test_yes_and_no_are_boxes_and_tables_have_names(page, served, expected):
    expected.append("status of 400")
    page.select_option(".decoder >> nth=0", "categorical")
    page.click(".side summary >> nth=0")
    assert page.get_attribute("input[name=verify_all] >> nth=0", "type") == "checkbox"
    page.fill("input[name=verify] >> nth=0", "0.4")
    page.check("input[name=verify_all] >> nth=0")
    ask(page, "sum: 3 4")
    finish(page)
    body = {"messages": user("sum: 3 4"), "seed": 7, "max_tokens": 24, "decoder": "categorical"}
    assert shown(page) == texts_of(served.canvas(**body, options={"verify": 0.4, "verify_all": True}))
    page.select_option(".decoder >> nth=0", "dprm")
    page.fill("input[name=table] >> nth=0", "nowhere")
    ask(page, "sum: 3 4")
    page.wait_for_selector(".problem:has-text('nowhere')")


# ---- gaps --------------------------------------------------------------------------------------------


def test_gaps_typed_in_place_are_filled(page, served):
    page.fill("#prompt", "the first  word")
    page.evaluate("document.getElementById('prompt').setSelectionRange(10, 10)")
    page.click("#gap")
    page.keyboard.type("5")  # over the length, which is selected
    assert page.input_value("#prompt") == "the first <mask:5> word"
    assert page.text_content("#send") == "Fill"
    served.pause = 0.02
    ask(page, page.input_value("#prompt"))
    page.wait_for_selector(MASKS)
    assert page.locator(".turn .cell.given").count() > 0
    finish(page)
    answer = served.canvas(text="the first <mask:5> word", seed=7, max_tokens=24)
    assert shown(page) == texts_of(answer)
    assert page.locator(WRITTEN).count() == 5


def test_lengths_of_an_open_gap_are_watched_and_the_likeliest_stays(page, served):
    served.pause = 0.05
    ask(page, "the first <mask:2-4> word", tokens=8)
    page.wait_for_selector(".turn .canvas >> nth=2")
    page.wait_for_selector("text=3 lengths are tried.")
    page.wait_for_selector(MASKS)
    finish(page)
    served.pause = 0.0
    answer = served.canvas(text="the first <mask:2-4> word", seed=7)
    assert page.locator(".turn .canvas").count() == 1
    assert shown(page) == texts_of(answer)
    page.press(".timeline input", "Home")
    first = sum(cell["step"] == 0 for cell in answer["cells"])
    wait_for(lambda: page.locator(WRITTEN).count() == first)
    served.pause = 0.05
    ask(page, "the <mask:1-4> first <mask:2-4> word", tokens=8)
    page.wait_for_selector("text=12 lengths are tried. The first 8 are shown.")
    assert page.locator(".turn:last-child .canvas").count() == 8
    finish(page)
    served.pause = 0.0
    assert page.locator(".turn:last-child .canvas").count() == 1
    answer = served.canvas(text="the <mask:1-4> first <mask:2-4> word", seed=7)
    assert shown(page, ".turn:last-child .canvas") == texts_of(answer)
    assert page.locator(".turn").count() == 2
    assert page.locator(".panel .problem:not(:empty)").count() == 0


def test_what_is_sent_before_the_decoders_are_listed_waits_for_them(visit, served):
    held = []

    def hold(route):
        held.append(route)

    page = visit(before=lambda page: page.route("**/v1/decoders", hold))
    ask(page, "sum: 3 4")
    page.wait_for_selector("#hint:has-text('once the server is there')")
    wait_for(lambda: page.evaluate("1") and held)
    held[0].continue_()
    page.wait_for_selector(".canvas")  # it has begun
    finish(page)
    assert page.text_content(".asked") == "sum: 3 4"
    assert shown(page) == texts_of(served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24))


# ---- conversation ------------------------------------------------------------------------------------


def bodies(page):
    sent = []
    page.on("request", lambda request: "/v1/canvas" in request.url and sent.append(request.post_data_json))
    return sent


def test_a_conversation_of_two_turns(page, served):
    sent = bodies(page)
    ask(page, "sum: 3 4")
    finish(page)
    ask(page, "fill <mask:2> in")  # no part of it
    finish(page)
    ask(page, "and 5 6")
    finish(page)
    first = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)["text"]
    turns = [*user("sum: 3 4"), {"role": "assistant", "content": first}, *user("and 5 6")]
    assert sent[2]["messages"] == turns
    second = served.canvas(messages=turns, seed=7, max_tokens=24)
    assert shown(page, ".turn:nth-of-type(3) .canvas") == texts_of(second)
    page.click("#new")
    ask(page, "sum: 3 4")
    finish(page)
    assert sent[3]["messages"] == user("sum: 3 4")


def test_a_comparison_goes_on_with_the_chosen_answer(page, served):
    sent = bodies(page)
    page.check("#compare")
    page.check("#in-turn")
    page.select_option(".side:nth-child(2) .decoder", "llada")
    ask(page, "sum: 3 4")
    finish(page)
    page.check(".panel:nth-of-type(2) input[type=radio]")
    page.uncheck("#compare")
    ask(page, "and 5 6")
    finish(page)
    chosen = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24, decoder="llada")["text"]
    assert sent[-1]["messages"][1] == {"role": "assistant", "content": chosen}


def test_stop_frees_the_row(page, served):
    sent = bodies(page)
    cancelled = served.metric("request_cancelled_total")
    served.pause = 0.1
    ask(page, "sum: 3 4", tokens=256)
    page.wait_for_selector(WRITTEN)
    assert served.metric("num_rows_running") == 1
    page.click("#stop")
    page.wait_for_selector("text=Stopped")
    wait_for(lambda: served.metric("num_rows_running") == 0)
    assert served.metric("request_cancelled_total") == cancelled + 1
    served.pause = 0.0
    ask(page, "and 5 6")
    finish(page)
    assert sent[-1]["messages"] == user("and 5 6")


def test_markup_in_a_prompt_stays_text(page):
    prompt = '<img src=x onerror="window.harmed = 1"><script>window.harmed = 1</script><b>bold</b>'
    ask(page, prompt)
    finish(page)
    assert page.text_content(".asked") == prompt
    assert page.locator(".turn :is(img, script, b)").count() == 0
    assert page.evaluate("window.harmed") is None


# ---- the timeline ------------------------------------------------------------------------------------


def test_scrubbing_and_replay(page, served):
    ask(page, "sum: 3 4")
    finish(page)
    cells = served.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)["cells"]
    whole, steps = shown(page), page.get_attribute(".timeline input", "max")
    page.press(".timeline input", "Home")
    page.press(".timeline input", "ArrowRight")
    wait_for(lambda: page.text_content(".timeline output") == f"step 2 of {steps}")
    early = texts_of({"cells": [cell for cell in cells if cell["step"] < 2]})
    assert shown(page) == early
    assert page.locator(MASKS).count() > 0
    page.click("text=Replay")
    wait_for(lambda: page.input_value(".timeline input") == steps)
    assert shown(page) == whole


# ---- keyboard, phone, colours ------------------------------------------------------------------------


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def tab_to(page, name, key="Tab"):
    for _ in range(60):
        page.keyboard.press(key)
        if name in focused(page).split():
            return
    raise AssertionError(f"{name} is never in focus")


def test_everything_goes_by_keyboard(page, served):
    page.keyboard.press("Tab")
    assert focused(page) == "skip"
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt:focus")
    page.keyboard.type("sum: 3 4")
    tab_to(page, "send")
    served.pause = 0.1
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:focus")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped")
    assert focused(page) == "prompt"
    served.pause = 0.0
    page.keyboard.type("sum: 3 4")
    page.keyboard.press("Enter")
    finish(page)
    tab_to(page, "canvas", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.activeElement.parentElement.children[1]")
    assert "probability" in page.text_content("#tip")
    assert page.get_attribute(".cell:focus", "aria-describedby") == "tip"
    page.keyboard.press("Escape")
    assert focused(page) == "canvas"
    tab_to(page, "compare")
    page.keyboard.press("Space")
    assert page.is_visible(".side:nth-child(2)")


def test_a_phone_has_no_sideways_scroll(visit):
    page = visit(width=360)

    def check():
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

    check()
    page.click("#settings-toggle")
    page.click(".side summary >> nth=0")
    page.check("#compare")
    check()
    ask(page, "W" * 200)
    finish(page)
    check()
    page.hover(".turn .canvas .cell >> nth=3")
    check()
    boxes = page.eval_on_selector_all(".panel", "all => all.map(x => x.getBoundingClientRect().top)")
    assert boxes[1] > boxes[0]  # one below the other


CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour, under) => {
    context.fillStyle = under; context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    const chain = [];
    for (; e; e = e.parentElement) chain.unshift(getComputedStyle(e).backgroundColor);
    return chain.reduce((under, over) => `rgb(${rgb(over, under)})`, 'white');
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility() || e.matches('script, option')) continue;
    const under = ground(e), a = light(rgb(getComputedStyle(e).color, under)), b = light(rgb(under, under));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([node.data.trim().slice(0, 30), ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(visit, scheme, expected):
    expected.append("status of 400")
    page = visit(scheme=scheme)
    page.click(".side summary >> nth=0")
    ask(page, "sum: 3 4")
    finish(page)
    page.hover(".turn .canvas .cell >> nth=1")
    page.fill("input[name=temperature] >> nth=0", "-1")
    ask(page, "sum: 3 4")
    page.wait_for_selector(".problem:has-text('temperature')")
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    assert dark == (scheme == "dark")


def test_every_control_has_a_name(page):
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea')]
      .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"""
    ask(page, "sum: 3 4")
    finish(page)
    assert page.evaluate(nameless) == []


# ---- the server goes and comes -----------------------------------------------------------------------


def test_it_says_when_the_server_is_gone_and_when_it_is_back(visit, parts, expected):
    expected += ["ERR_", "status of 503"]
    server = Slow(*parts)
    page = visit(server.url)
    page.wait_for_selector(".side .decoder")
    server.pause = 0.1
    ask(page, "sum: 3 4", tokens=256)
    page.wait_for_selector(WRITTEN)
    server.stop()
    page.wait_for_selector("#health:has-text('The server is gone')")
    page.wait_for_selector(".panel .problem:not(:empty)")
    again = Slow(*parts, port=int(server.url.rsplit(":", 1)[1]))
    try:
        page.wait_for_selector("#health:has-text('The server is back')")
        ask(page, "sum: 3 4")
        finish(page)
        answer = again.canvas(messages=user("sum: 3 4"), seed=7, max_tokens=24)
        assert shown(page, ".turn:nth-of-type(2) .canvas") == texts_of(answer)
    finally:
        again.stop()


def test_a_key_is_asked_for_and_stays_in_the_tab(visit, parts, expected):
    expected.append("status of 401")
    server = Slow(*parts, api_key=["right"])
    try:
        page = visit(server.url)
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("text=refused this key")
        page.fill("#key", "right")
        page.press("#key", "Enter")
        page.wait_for_selector(".side .decoder")
        assert page.is_hidden("#key-form")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        ask(page, "sum: 3 4")
        finish(page)
        assert page.locator(".panel .problem:not(:empty)").count() == 0
        page.reload()
        page.wait_for_selector(".side .decoder")
    finally:
        server.stop()


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_the_interfaces_can_be_tried_without_anything_from_elsewhere(visit, parts, shown):
    """Swagger UI, also where the page is switched off; that nothing else is loaded `visit` checks."""
    server = Slow(*parts, page=shown, api_key=["secret"])
    page = visit(f"{server.url}/docs", ready="#operations-operations-health_health_get")
    assert page.locator(".opblock").count() == sum(
        len(each) for each in server.client.get("/openapi.json").json()["paths"].values()
    )
    page.click("#operations-operations-health_health_get button.opblock-summary-control")
    page.click("text=Try it out")
    page.click("button.execute")
    page.wait_for_selector(".live-responses-table:has-text('alive')")
    headers = server.client.get("/docs").headers
    assert "script-src" not in headers["content-security-policy"]  # default-src 'self' holds for scripts
    assert "default-src 'self'" in headers["content-security-policy"]
    server.stop()


def test_the_page_is_small_and_keeps_to_its_policy():
    files = [path for path in PAGE.iterdir() if path.is_file() and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    html = (PAGE / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?:", html)
    for path in PAGE.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()
        )
