"""The explorer's state as a plain object, and the widgets as a thin layer over it; a made-up source, no model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer import live_html, widgets
from sdtp_lib.explorer.state import ExplorerState, Outcome, Scored, parse_layers
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.token_fates import simulate

LAYERS = 12


class MadeUpSource:
    """Scores out of a generator; counts how often the "model" is asked."""

    num_layers = LAYERS
    prompts = ("short", "nasty")
    scorers = ("learned", "recency")
    shape = ModelShape(LAYERS, 64, 4, 2, 16, 128, 256)

    def __init__(self, tokens: int = 120) -> None:
        self.tokens = tokens
        self.scored_calls = self.run_calls = 0
        self._cache: dict = {}

    def scored(self, prompt, scorer):
        if (prompt, scorer) not in self._cache:
            self.scored_calls += 1
            rng = np.random.default_rng(len(prompt) + 7 * len(scorer))
            base = np.arange(self.tokens) if scorer == "recency" else rng.normal(size=self.tokens)
            layers = range(1, LAYERS) if scorer == "recency" else range(4, LAYERS, 3)
            texts = [f" w{i}" for i in range(self.tokens)]
            if prompt == "nasty":
                texts[0] = "<script>alert(1)</script>"
            scores = {layer: base + 0.1 * rng.normal(size=self.tokens) for layer in layers}
            self._cache[prompt, scorer] = Scored(texts, scores)
        return self._cache[prompt, scorer]

    def run(self, prompt, scorer, config):
        self.run_calls += 1
        rough = simulate(self.scored(prompt, scorer).scores, config, LAYERS)
        import dataclasses

        fates = dataclasses.replace(rough, approximate=False)
        return Outcome(fates, "the <b>pruned</b> answer", "the full answer", 1.0, 2.0, 1.5, 3.0, 600, 1000)


@pytest.fixture
def source():
    return MadeUpSource()


@pytest.fixture
def state(source):
    return ExplorerState(source)


def test_importing_the_widgets_loads_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, sdtp_lib.explorer.widgets; assert 'torch' not in sys.modules"], check=True
    )


def test_the_state_starts_at_a_preset(state):
    assert state.config == PruningConfig.preset("keep09", LAYERS)
    assert (state.prompt, state.scorer, state.preset) == ("short", "learned", "keep09")


def test_moving_the_keep_ratio_asks_no_model_and_is_marked_approximate(state, source):
    calls = source.scored_calls
    before = state.fates.kept_count
    state.update(keep_ratio=0.5)
    assert state.fates.kept_count < before
    assert state.fates.approximate and state.preset == "own"
    assert (source.scored_calls, source.run_calls) == (calls, 0)


def test_a_preset_brings_its_layers_and_its_ratio_back(state):
    state.update(keep_ratio=0.42, layers=(4,))
    state.update(preset="keep07")
    assert state.config == PruningConfig.preset("keep07", LAYERS) and state.preset == "keep07"


def test_the_position_mode_is_kept_by_a_preset_and_does_not_make_it_ones_own(state):
    state.update(positions="compact")
    assert state.preset == "keep09" and state.config.positions == "compact"
    state.update(preset="keep08")
    assert state.config.positions == "compact" and state.preset == "keep08"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"layers": (4, 99)}, "99"),
        ({"layers": (5,)}, r"no scores at layer\(s\) \[5\]"),
        ({"scorer": "nobody"}, "learned, recency"),
        ({"prompt": "gone"}, "short, nasty"),
        ({"preset": "keep05"}, "keep09"),
        ({"positions": "sideways"}, "original"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_impossible_choice_is_refused_by_name_and_leaves_the_state_as_it_was(state, choices, words):
    before, kept = state.passport(), state.fates.kept_count
    with pytest.raises(ValueError, match=words):
        state.update(**choices)
    assert state.passport() == before and state.fates.kept_count == kept


def test_a_half_bad_change_changes_nothing(state):
    with pytest.raises(ValueError, match="keep_ratio"):
        state.update(scorer="recency", keep_ratio=7)
    assert state.scorer == "learned"


def test_running_shows_the_engines_set_until_the_next_change(state, source):
    state.run()
    assert source.run_calls == 1 and not state.fates.approximate
    state.update(keep_ratio=0.8)
    assert state.fates.approximate and state.outcome is None


def test_the_numbers_follow_from_the_tokens_of_each_layer(source):
    state = ExplorerState(source, layers=(4, 7, 10), keep_ratio=1.0)
    assert state.numbers() == {
        "prompt_tokens": 120,
        "kept_tokens": 120,
        "compression_ratio": 1.0,
        "kv_share": 1.0,
        "prefill_flops_share": 1.0,
    }
    state.update(keep_ratio=0.5, layers=(4,))
    numbers = state.numbers()
    assert numbers["kept_tokens"] == 60
    assert numbers["kv_share"] == pytest.approx((4 * 120 + 8 * 60) / (12 * 120))
    assert 0.6 < numbers["prefill_flops_share"] < 0.7


def test_the_passport_is_json_and_holds_no_prompt_text(source):
    state = ExplorerState(source, prompt="nasty")
    text = json.dumps(state.passport())
    assert "alert" not in text and '"pruning_keep_ratio": 0.9' in text


def test_layers_are_read_from_lists_and_spans():
    assert parse_layers("4, 7 10") == (4, 7, 10)
    assert parse_layers("4-10:3, 12") == (4, 7, 10, 12)
    with pytest.raises(ValueError, match="'4-x' is neither"):
        parse_layers("4-x")


def test_the_text_is_cut_into_blocks_at_line_ends_where_there_are_any():
    assert live_html.block_ends(["a"] * 700) == [320, 640]
    assert live_html.block_ends(["a"] * 100 + ["b\n"] + ["a"] * 50) == [101]
    assert live_html.block_ends(["a\n"] * 50) == []


def test_the_style_colours_each_token_by_the_layer_that_drops_it(state):
    state.update(keep_ratio=0.6)
    style = live_html.style_html(state.fates, "x0t")
    for layer in state.config.layers:
        rule = next(r for r in style.split("}") if f"before layer {layer}" in r)
        chosen = {int(p) for p in re.findall(r"#x0t(\d+)", rule)}
        assert chosen == set(np.flatnonzero(state.fates.dropped_at == layer).tolist())


def test_the_comparison_marks_what_only_one_scorer_keeps(source):
    state = ExplorerState(source, layers=(4,), keep_ratio=0.5)
    mine, other = state.fates, state.fates_of("recency")
    style = live_html.compare_style_html(mine, other, "x0t", ('a"}<', "recency"))
    rule = next(r for r in style.split("}") if "only recency" in r)
    chosen = {int(p) for p in re.findall(r"#x0t(\d+)", rule)}
    assert chosen == set(np.flatnonzero((other.dropped_at == LAYERS) & (mine.dropped_at < LAYERS)).tolist())
    assert 'a"' not in style and "</" not in style.removesuffix("</style>")


def test_a_moved_slider_redraws_the_map_and_not_the_text(source):
    explorer = widgets.Explorer(ExplorerState(source))
    text, picture = explorer.text.value, explorer.picture.value
    explorer.keep_ratio.value = 0.6
    assert explorer.text.value == text and explorer.picture.value != picture
    assert explorer.preset.value == "own" and source.run_calls == 0
    assert "approximate" in explorer.picture.value


def test_choosing_a_preset_moves_the_slider_and_the_layers(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.preset.value = "keep07"
    assert explorer.keep_ratio.value == 0.7 and explorer.layers.value == "4, 7, 10"


def test_a_bad_layer_list_is_answered_in_words_and_put_back(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.layers.value = "4, <b>"
    assert "&lt;b&gt;" in explorer.message.value and "<b>" not in explorer.message.value
    assert explorer.layers.value == "4, 7, 10"
    explorer.keep_ratio.value = 0.8
    assert explorer.message.value == ""


def test_the_text_of_the_explorer_is_escaped(source):
    explorer = widgets.Explorer(ExplorerState(source, prompt="nasty"))
    shown = explorer.text.value + explorer.picture.value + explorer.inspected.value
    assert "<script>alert" not in shown and "&lt;script&gt;alert" in shown


def test_the_button_runs_the_engine_and_shows_answer_and_savings(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.run.click()
    assert source.run_calls == 1 and not explorer.run.disabled
    assert "what the engine did" in explorer.picture.value
    assert "50 % saved" in explorer.result.value and "40 % saved" in explorer.result.value
    assert "<b>pruned" not in explorer.result.value
    explorer.keep_ratio.value = 0.8
    assert explorer.result.value == "" and "approximate" in explorer.picture.value


def test_an_engine_that_refuses_is_answered_in_words(source, monkeypatch):
    explorer = widgets.Explorer(ExplorerState(source))

    def refuse(*_):
        raise RuntimeError("positions='compact' needs <rotary> positions")

    monkeypatch.setattr(source, "run", refuse)
    explorer.run.click()
    assert "&lt;rotary&gt;" in explorer.message.value and not explorer.run.disabled


def test_a_token_can_be_inspected_without_a_mouse(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.token.value = 17
    assert "<code> w17</code>" in explorer.inspected.value and "position 17" in explorer.inspected.value


def test_two_explorers_on_one_page_do_not_colour_each_others_text(source):
    first, second = (widgets.Explorer(ExplorerState(source)) for _ in range(2))
    ids = [set(re.findall(r"id=(x\d+t)0", e.text.value)) for e in (first, second)]
    assert ids[0].isdisjoint(ids[1])


def test_a_saved_view_is_a_page_a_picture_and_what_made_them(source, tmp_path):
    explorer = widgets.Explorer(ExplorerState(source, prompt="nasty"), export_to=tmp_path)
    explorer.run.click()
    explorer.save.click()
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".html", ".png", ".svg", ".json"}
    page = files[".html"].read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert json.loads(files[".json"].read_text())["approximate"] is False


def test_a_redraw_at_4096_tokens_leaves_the_kernel_half_of_its_100_ms(source):
    source.tokens = 4096
    explorer = widgets.Explorer(ExplorerState(source))
    times = []
    for ratio in np.linspace(0.4, 0.98, 9):
        started = time.perf_counter()
        explorer.keep_ratio.value = float(ratio)
        times.append(time.perf_counter() - started)
    assert np.median(times) < 0.05
    assert len(explorer.picture.value) < 150_000
