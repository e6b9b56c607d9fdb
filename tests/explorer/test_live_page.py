"""The live page in a real Chromium, from a file with the network off: slider, scorers, views, keyboard, sizes."""

from __future__ import annotations

import json
import os
import statistics

import numpy as np
import pytest

from sdtp_lib.explorer import page as live
from sdtp_lib.explorer.export import export_state, view_payload
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.pruning.token_fates import simulate
from tests.explorer.made_up import LAYERS, NASTY, MadeUpSource

pytestmark = [pytest.mark.browser, pytest.mark.timeout(200)]

STAGES = """() => [...document.querySelectorAll('#text .t')].map(span => {
  const look = [...span.classList].find(name => /^(k|s\\d+)$/.test(name));
  return look === 'k' ? -1 : +look.slice(1); })"""
# From the moved slider to the first frame that ends with style, layout and paint done.
SLIDER_TO_PAINT = """async moves => {
  const slider = document.getElementById('ratio'), times = [];
  for (let i = 0; i < moves; i++) {
    const started = performance.now();
    slider.value = 10 + (i * 7) % 55;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
    await new Promise(resolve => requestAnimationFrame(() => { const channel = new MessageChannel();
      channel.port1.onmessage = resolve; channel.port2.postMessage(0); }));
    times.push(performance.now() - started);
    await new Promise(resolve => setTimeout(resolve, 40));
  }
  return times;
}"""
# The goal on an idle machine is a frame or two; a busy one gets room before this test fails.
SLOWEST_MEDIAN_MS = 200


def opened(page, tmp_path, state, against=None):
    (html,) = (f for f in export_state(state, tmp_path, "view", against=against) if f.suffix == ".html")
    page.context.set_offline(True)
    page.goto(html.as_uri())
    return page


def slide(page, ratio: float) -> None:
    page.evaluate(
        "at => { const one = document.getElementById('ratio'); one.value = at; one.dispatchEvent(new Event('input')) }",
        live.RATIOS.index(ratio),
    )


@pytest.fixture
def state():
    return ExplorerState(MadeUpSource(300), prompt="nasty", keep_ratio=0.8)


def test_the_page_cuts_as_python_does_at_every_ratio_and_for_every_scorer(page, tmp_path, state):
    state.update(protect=(50, 51, 200))
    opened(page, tmp_path, state, against="recency")
    page.select_option("#against", "")
    never = np.isin(np.arange(300), state.protect)
    for scorer in ("learned", "recency"):
        page.select_option("#scorer", scorer)
        for ratio in (0.3, 0.55, 0.7, 0.9, 0.97, 1.0):
            slide(page, ratio)
            config = state.config.replace(keep_ratio=ratio)
            wanted = simulate(state.source.scored("nasty", scorer).scores, config, LAYERS, protect=never)
            stages = np.array(page.evaluate(STAGES))
            assert (np.where(stages < 0, len(config.layers), stages) == wanted.stage_of_token()).all(), (scorer, ratio)
            assert f"{wanted.kept_count} of 300" in page.inner_text("#numbers")
    assert page.wrong == []


def test_exact_and_approximate_are_told_apart_and_a_mark_leads_to_the_exact_one(page, tmp_path, state):
    state.run()
    opened(page, tmp_path, state)
    assert page.inner_text("#exactness").startswith("Exact")
    assert "pruned at 80 %" in page.inner_text("#answers")
    slide(page, 0.7)
    assert page.inner_text("#exactness").startswith("Approximate")
    assert "80 %, the nearest ratio that was run" in page.inner_text("#answers")
    page.locator("#marks button").click()
    assert page.inner_text("#exactness").startswith("Exact") and page.inner_text("#ratio-said") == "80 %"
    assert page.wrong == []


def test_a_prompt_full_of_markup_stays_text(page, tmp_path, state):
    state.run()
    opened(page, tmp_path, state)
    assert page.locator("#text .t").first.inner_text() == NASTY
    assert page.locator("#answers b").count() == 0 and "<b>pruned</b>" in page.inner_text("#answers")
    page.locator("#text .t").first.hover()
    assert NASTY in page.inner_text("#info")
    page.locator("#text .t").nth(150).hover()
    line, cells = (page.locator(f"#{name}").bounding_box() for name in ("cursor", "cells"))
    column = cells["x"] + cells["width"] * 150.5 / 300
    assert abs(line["x"] + 1 - column) < 3, "the map shows where the token is"
    assert page.wrong == []


def test_one_layer_can_be_looked_at_and_two_scorers_compared(page, tmp_path, state):
    opened(page, tmp_path, state, against="recency")
    page.select_option("#against", "")
    page.locator("#legend button").nth(1).click()
    assert page.inner_text("#view-said") == "what layer 7 reads"
    gone, now = page.locator("#text .gone").count(), page.locator("#text .s1").count()
    assert gone == int((state.fates.dropped_at == 4).sum()) and now == int((state.fates.dropped_at == 7).sum())
    page.locator("#legend button").nth(1).click()
    page.select_option("#against", "recency")
    mine, other = state.fates.dropped_at == LAYERS, state.fates_of("recency").dropped_at == LAYERS
    assert page.locator("#text .a").count() == int((mine & ~other).sum()) > 0
    assert page.locator("#text .b").count() == int((other & ~mine).sum()) > 0
    assert page.wrong == []


def test_everything_can_be_reached_without_a_mouse(page, tmp_path, state):
    opened(page, tmp_path, state)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "scorer", "ratio", "view", "against", "text", "ask"} <= set(reached)
    page.focus("#ratio")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#ratio-said") == "79 %"
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 1 of 300" in page.inner_text("#info")
    page.locator(".ask").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("[popover]:popover-open").count() == 1
    assert page.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_nothing_sticks_out_and_text_can_be_read_at_every_width(page, tmp_path, state, scheme, width, shots):
    page.set_viewport_size({"width": width, "height": 844 if width == 390 else width * 10 // 16})
    page.emulate_media(color_scheme=scheme)
    state.run()
    opened(page, tmp_path, state, against="recency")
    page.select_option("#against", "")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate("""() => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const light = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(c => c / 255)
          .map(c => c <= .04 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
      return Math.min(...[...document.querySelectorAll('#text .t')].map(span => {
        const look = getComputedStyle(span);
        const [a, b] = [light(look.color), light(look.backgroundColor)].sort((x, y) => y - x);
        return (a + .05) / (b + .05); })); }""")
    assert contrast >= 4.5
    page.screenshot(path=shots / f"live-page-{width}-{scheme}.png", full_page=True)
    assert page.wrong == []


def test_the_slider_is_painted_in_time(page, tmp_path, browser, shots):
    opened(page, tmp_path, ExplorerState(MadeUpSource(1024)))
    times = sorted(page.evaluate(SLIDER_TO_PAINT, 60))
    measured = {
        "browser": browser.version,
        "tokens": 1024,
        "moves": len(times),
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(times[int(0.95 * len(times)) - 1], 1),
        "load": os.getloadavg()[0],
    }
    (shots / "live-page.json").write_text(json.dumps(measured, indent=1))
    print(f"\nslider to paint: {measured}")
    assert measured["median_ms"] < SLOWEST_MEDIAN_MS and page.wrong == []


def test_a_schedule_of_ones_own_is_shown_as_it_was_run(page, tmp_path):
    state = ExplorerState(MadeUpSource(), layers=(4, 7, 10), keep_ratio=(0.9, 0.8, 0.55))
    outcome = state.run()
    assert view_payload(state, "own")["start"]["ratio"] is not None
    opened(page, tmp_path, state)
    assert page.inner_text("#ratio-said") == "55 % to 90 %"
    stages = np.array(page.evaluate(STAGES))
    assert (np.where(stages < 0, 3, stages) == outcome.fates.stage_of_token()).all()
    assert page.wrong == []
