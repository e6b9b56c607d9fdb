"""A headless Chromium for the explorer's tests; screenshots stay under data/results/browser (ignored by git)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def shots():
    """Where screenshots and measured times go."""
    folder = Path(__file__).resolve().parents[2] / "data" / "results" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-ui")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A 13-inch page that collects what goes wrong in ``.wrong``: errors, dialogs, and requests to another host."""
    one = browser.new_page(viewport={"width": 1280, "height": 800})
    one.wrong = []
    one.on("console", lambda message: one.wrong.append(message.text) if message.type == "error" else None)
    one.on("pageerror", lambda error: one.wrong.append(f"uncaught: {error}"))
    one.on("dialog", lambda dialog: (one.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    at_home = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:", "ws://127.0.0.1:")
    one.on("request", lambda asked: asked.url.startswith(at_home) or one.wrong.append(f"another host: {asked.url}"))
    yield one
    one.close()
