"""A real Chromium against a real JupyterLab and a real Voila: notebooks run, sliders move pictures, nothing goes wrong.

Screenshots and the measured redraw times are kept under data/results/browser (ignored by git).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import yaml

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-ui")

pytestmark = [pytest.mark.browser, pytest.mark.timeout(280)]

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "data" / "results" / "browser"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A median of 100 ms is the goal on two idle cores (see LOG.md); a busy machine gets room before this test fails.
SLOWEST_MEDIAN_MS = 400
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},
}
PLAYGROUND = """from test_widgets import MadeUpSource
from sdtp_lib import widgets
explorer = widgets.Explorer(widgets.ExplorerState(MadeUpSource(4096)))
explorer.box"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    KEPT.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A 13-inch page that collects what goes wrong; no dialog may open, whatever a prompt says."""
    one = browser.new_page(viewport={"width": 1280, "height": 800})
    one.wrong = []
    one.on("console", lambda message: one.wrong.append(message.text) if message.type == "error" else None)
    one.on("pageerror", lambda error: one.wrong.append(f"uncaught: {error}"))
    # Voila's template asks a CDN for icons; a test must not depend on whether there is a network.
    one.route(re.compile(r"^https://cdn\."), lambda route: route.fulfill(body="", content_type="text/css"))
    one.on("dialog", lambda dialog: (one.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield one
    one.close()


@contextmanager
def serving(command: list[str], folder: Path, ready: str, extra: dict[str, str] | None = None):
    """A server process with a home of its own, stopped at the end; its log stays in ``folder``."""
    private = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    private["JUPYTER_RUNTIME_DIR"] = str(folder / "runtime")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, **private, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1", **(extra or {})}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(ready, timeout=2)
                    break
                except urllib.error.HTTPError:
                    break  # it answers: that is all that is asked
                except OSError:
                    time.sleep(0.25)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def copy_with_quick_parameters(path: Path, target: Path, run_dir: Path) -> None:
    """The notebook with its quick values as a second cell after its parameters, as papermill would inject them."""
    chosen = yaml.safe_load((ROOT / "workflow/params/quick.yaml").read_text())["notebooks"].get(path.stem) or {}
    notebook = nbformat.read(path, as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    values = {**chosen, "run_dir": str(run_dir)}
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in values.items())))
    nbformat.write(notebook, target)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for plugin, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    work = folder / "work"
    work.mkdir()
    for path in NOTEBOOKS:
        copy_with_quick_parameters(path, work / path.name, folder / "run")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    playground = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(PLAYGROUND)])
    nbformat.write(playground, work / "playground.ipynb")
    port, token = free_port(), secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}",
        "--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={folder / 'workspaces'}",
        f"--LabApp.user_settings_dir={folder / 'settings'}",
    ]  # fmt: skip
    with serving(command, folder, f"http://127.0.0.1:{port}/api"):
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={token}&reset"


def open_and_run(page, address: str) -> list[str]:
    """Open a notebook in JupyterLab, run all its cells, and return the errors that cells show."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_timeout(300)
    return page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets
        .filter(cell => cell.model.type === 'code')
        .flatMap(cell => cell.model.outputs.toJSON())
        .filter(output => output.output_type === 'error')
        .map(output => output.ename + ': ' + output.evalue)""")


def drag(page, handle, pixels: int) -> None:
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(1, 6):
        page.mouse.move(x + pixels * step / 5, y)
    page.mouse.up()


def moved_map(page, move) -> tuple[str, str]:
    """The map before and after ``move``."""
    before = page.locator("svg.sdtp-map .cells").last.inner_html()
    move()
    page.wait_for_function(
        "old => [...document.querySelectorAll('svg.sdtp-map .cells')].at(-1)?.innerHTML !== old", arg=before
    )
    page.wait_for_timeout(300)
    return before, page.locator("svg.sdtp-map .cells").last.inner_html()


REDRAW = """async moves => {
  const handle = document.querySelector('.noUi-handle'), times = [];
  for (let i = 0; i < moves; i++) {
    const old = document.querySelector('.widget-html svg.sdtp-map'), host = old.closest('.widget-html');
    const updated = new Promise(resolve => new MutationObserver((_, observer) => {
      const now = host.querySelector('svg.sdtp-map');
      if (!now || now === old) return;
      observer.disconnect();
      // the first frame after the change ends with style, layout and paint done
      requestAnimationFrame(() => { const channel = new MessageChannel();
        channel.port1.onmessage = () => resolve(performance.now()); channel.port2.postMessage(0); });
    }).observe(host, {childList: true, subtree: true}));
    const started = performance.now();
    handle.dispatchEvent(new KeyboardEvent('keydown', {key: i % 20 < 10 ? 'Left' : 'Right', bubbles: true}));
    times.push(await updated - started);
    await new Promise(resolve => setTimeout(resolve, 150));
  }
  return times;
}"""


def test_dragging_the_keep_ratio_redraws_4096_tokens_in_time(page, lab, browser):
    assert open_and_run(page, lab("playground.ipynb")) == []
    page.wait_for_selector("svg.sdtp-map")
    text = page.locator(".sdtp .text").first.inner_html()
    before, after = moved_map(page, lambda: drag(page, page.locator(".noUi-handle").first, -60))
    assert before != after
    assert page.locator(".sdtp .text").first.inner_html() == text, "the text is sent once, not at each move"
    times = sorted(page.evaluate(REDRAW, 40))
    measured = {
        "browser": browser.version,
        "tokens": 4096,
        "moves": len(times),
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(times[int(0.95 * len(times)) - 1], 1),
        "load": os.getloadavg()[0],
    }
    (KEPT / "redraw.json").write_text(json.dumps(measured, indent=1))
    print(f"\nredraw: {measured}")
    page.screenshot(path=KEPT / "explorer-light.png")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_timeout(1200)
    page.screenshot(path=KEPT / "explorer-dark.png")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    page.wait_for_timeout(600)
    assert page.wrong == []
    assert measured["median_ms"] < SLOWEST_MEDIAN_MS


def test_a_prompt_full_of_markup_stays_text_in_the_page(page, lab):
    open_and_run(page, lab("playground.ipynb"))
    page.locator(".widget-dropdown select").first.select_option("nasty")
    page.wait_for_selector("text=alert(1)")
    assert page.locator(".sdtp .text").first.inner_text().startswith("<script>alert(1)</script>")
    assert page.wrong == []


def test_the_explorer_works_without_a_mouse(page, lab):
    open_and_run(page, lab("playground.ipynb"))
    page.locator(".widget-dropdown select").nth(2).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.locator(".noUi-handle").first.focus()
    moved_map(page, lambda: page.keyboard.press("ArrowLeft"))
    page.locator("button:has-text('run the engine')").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("text=what the engine did")
    assert page.wrong == []


@pytest.mark.embedded
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_jupyterlab_without_an_error(page, lab, path):
    assert open_and_run(page, lab(path.name)) == []
    if path.stem == "03_pruning":
        page.wait_for_selector("text=seen by layer")
        handle = page.locator(".noUi-handle").first
        handle.scroll_into_view_if_needed()
        before, after = moved_map(page, lambda: drag(page, handle, -50))
        assert before != after
    page.screenshot(path=KEPT / f"{path.stem}.png")
    assert page.wrong == []


@pytest.mark.embedded
def test_the_app_shows_the_explorer_without_code_behind_a_token(page, tmp_path):
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "sdtp_lib.explorer.app", f"--port={port}", f"--token={token}"]
    command += ["--prompt-tokens=300"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/"):
        refused = page.goto(f"http://127.0.0.1:{port}/")
        assert refused.status == 403 or "login" in page.url
        page.wrong.clear()
        page.goto(f"http://127.0.0.1:{port}/?token={token}", timeout=120_000)
        page.wait_for_selector("svg.sdtp-map", timeout=120_000)
        assert page.locator(".jp-InputArea-editor, .cm-editor").count() == 0
        assert "default_source" not in page.inner_text("body")
        moved_map(page, lambda: drag(page, page.locator(".noUi-handle").first, -60))
        page.screenshot(path=KEPT / "app.png", full_page=True)
        page.locator("button:has-text('run the engine')").click()
        page.wait_for_selector("text=what the engine did", timeout=60_000)
        page.screenshot(path=KEPT / "app-engine.png", full_page=True)
        assert page.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_exported_page_opens_from_a_file_and_zooms(page, tmp_path, monkeypatch, scheme):
    monkeypatch.syspath_prepend(ROOT / "tests")
    from test_widgets import MadeUpSource

    from sdtp_lib.explorer.export import export_state
    from sdtp_lib.explorer.state import ExplorerState

    state = ExplorerState(MadeUpSource(300), prompt="nasty", keep_ratio=0.7)
    state.run()
    files = export_state(state, tmp_path, "view")
    page.emulate_media(color_scheme=scheme)
    page.goto(next(file for file in files if file.suffix == ".html").as_uri())
    cells = page.locator("svg.sdtp-map .cells")
    assert cells.get_attribute("viewBox") == "0 0 300 12"
    page.locator(".sdtp[role=group]").focus()
    page.keyboard.press("+")
    zoomed = [float(number) for number in cells.get_attribute("viewBox").split()]
    assert zoomed[2] == pytest.approx(240) and zoomed[0] == pytest.approx(30)
    page.keyboard.press("0")
    page.locator(".sdtp .t").nth(40).hover()
    assert page.evaluate("getComputedStyle(document.querySelectorAll('.sdtp .t')[40], '::after').content").startswith(
        '"position 40'
    )
    page.screenshot(path=KEPT / f"export-{scheme}.png", full_page=True)
    assert page.wrong == []
