"""The pictures of the page, taken in Chromium from a running `dlm serve`.

python docs/page_pictures.py [FOLDER] [--url URL] [--chromium PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ANSWER = "Give three tips for staying healthy."
GAPS = "Dear Anna, thank you for <mask:5>. It was <mask:3> to see you."


def opened(browser: Browser, url: str, scheme: str, width: int, height: int) -> Page:
    """The page, once the decoders are there."""
    size = {"width": width, "height": height}
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector(".side .decoder")
    return page


def ask(page: Page, prompt: str, seed: int, step: int) -> None:
    """Have a prompt answered, and go back to a step."""
    page.fill("#seed", str(seed))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    page.locator(".timeline input").fill(str(step))
    page.evaluate("document.getElementById('settings').scrollTop = 0")
    page.focus("#prompt")
    page.wait_for_timeout(600)  # colours fade in


def compared(browser: Browser, url: str, path: Path) -> None:
    """Two decoders half-way, and the tip of a token."""
    page = opened(browser, url, "light", 1200, 760)
    page.check("#compare")
    page.check("#in-turn")
    ask(page, ANSWER, 3, 14)
    page.hover(".turn .canvas .cell.written >> nth=6")
    page.wait_for_timeout(300)
    page.screenshot(path=path)


def filled(browser: Browser, url: str, path: Path) -> None:
    """A text with gaps, half-way, in the dark."""
    page = opened(browser, url, "dark", 1000, 640)
    ask(page, GAPS, 1, 5)
    page.screenshot(path=path)


def main() -> None:
    """Take both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chromium", help="path of Chromium; by default Playwright's own")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        compared(browser, options.url, options.folder / "page-compare.png")
        filled(browser, options.url, options.folder / "page-gaps.png")
        browser.close()


if __name__ == "__main__":
    main()
