"""Every page of docs/ in a headless Chromium, from a file: no error, no request to another host, nothing cut off."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from notebook_parameters import load_notebook, source_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-ui")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(280)]

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.html"))
RENDERED = (ROOT / "docs" / "index.html").is_file()
CUT_OFF = """[...document.querySelectorAll('.wide:has(table), [class*=output]:has(table)')]
  .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText.slice(0, 40))"""
SHOTS = ROOT / "data" / "results" / "browser" / "docs"


def named_pictures(notebook: Path) -> list[str]:
    """The pictures that a notebook saves in every run."""
    text = "\n".join(source_of(cell) for cell in load_notebook(notebook)["cells"])
    return [name for name in re.findall(r"\d\d_\w+(?=\.png)", text) if name != "05_real_longbench"]


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.skipif(not PAGES, reason="docs/ is not rendered yet: make docs")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_opens_from_a_file_and_asks_nobody_else(chromium, scheme, width):
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_offline(True)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or wrong.append(asked.url))
    SHOTS.mkdir(parents=True, exist_ok=True)
    for path in PAGES:
        page.goto(path.as_uri())
        page.screenshot(path=SHOTS / f"{path.stem}-{scheme}-{width}.png")
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1"):
            wrong.append(f"{path.name} is wider than {width} pixels")
        if width > 1000 and (cut := page.evaluate(CUT_OFF)):
            wrong.append(f"{path.name} has tables that do not fit {width} pixels: {cut}")
        if page.evaluate("[...document.images].some(image => image.complete && !image.naturalWidth)"):
            wrong.append(f"{path.name} has a picture that is not there")
    context.close()
    assert wrong == []


@pytest.mark.skipif(not (ROOT / "docs" / "explorer.html").is_file(), reason="python -m sdtp_lib.explorer.publish")
def test_the_published_explorer_moves_with_the_network_off(chromium):
    explorer = ROOT / "docs" / "explorer.html"
    assert explorer.stat().st_size < 3e6
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_offline(True)
    page = context.new_page()
    page.goto(explorer.as_uri())
    assert page.locator("#prompt option").count() == 3 and page.locator("#scorer option").count() >= 5
    before = page.inner_text("#numbers")
    page.focus("#ratio")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#numbers") != before
    context.close()


@pytest.mark.skipif(not RENDERED, reason="docs/ is not rendered yet: make docs")
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_a_notebooks_page_shows_every_picture_that_it_names(chromium, notebook):
    """Notebook 03's main picture was a line of text, <Figure size ...>, and nothing failed."""
    page = chromium.new_page()
    page.goto((ROOT / "docs" / f"{notebook.stem}.html").as_uri())
    shown = page.evaluate("[...document.images].filter(image => image.naturalWidth > 300).length")
    text = page.inner_text("main")
    page.close()
    assert shown >= len(named_pictures(notebook)) > 0
    assert "<Figure size" not in text and "{'loss'" not in text and "NaN" not in text and "e+0" not in text
