"""A browser for tests of the page."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = os.environ.get("CI") == "true" and os.environ.get("DLM_REQUIRE_BROWSER") == "1"


def browser_path() -> str:
    """Path of Chromium: DLM_CHROMIUM, else one on PATH, else Playwright's own; without any, the test is
    skipped, or fails where CI=true and DLM_REQUIRE_BROWSER=1."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install '.[dev]'")
    given = os.environ.get("DLM_CHROMIUM")
    if given and not Path(given).is_file():
        raise FileNotFoundError(f"DLM_CHROMIUM={given}: there is no such file")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if not Path(path).is_file():
        missing("there is no Chromium: install it, or name it in DLM_CHROMIUM, or run 'playwright install'")
    return path


def missing(reason: str) -> NoReturn:
    """Skip, or fail where a browser is required."""
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
