"""The explorer's state as a plain object, and the widgets as a thin layer over it; a made-up source, no model."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer import controls, live_html, widgets
from sdtp_lib.explorer.export import export_state
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.explorer.typed import parse_layers, parse_protected
from sdtp_lib.views.places import find_spans
from tests.explorer.made_up import LAYERS, MadeUpSource


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


@pytest.mark.parametrize("preset", ["keep07", "fast"])
def test_a_preset_brings_its_layers_and_its_ratio_back(state, preset):
    state.update(keep_ratio=0.42, layers=(4,))
    state.update(preset=preset)
    assert state.config == PruningConfig.preset(preset, LAYERS) and state.preset == preset


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
        ({"prompt": "gone"}, "short, nasty, empty"),
        ({"preset": "keep05"}, "keep09"),
        ({"positions": "sideways"}, "original"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_impossible_choice_is_refused_by_name_and_leaves_the_state_as_it_was(state, choices, words):
    before, kept = state.provenance(), state.fates.kept_count
    with pytest.raises(ValueError, match=words):
        state.update(**choices)
    assert state.provenance() == before and state.fates.kept_count == kept


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


def test_the_provenance_is_json_and_holds_no_prompt_text(source):
    state = ExplorerState(source, prompt="nasty")
    text = json.dumps(state.provenance())
    assert "alert" not in text and '"pruning_keep_ratio": 0.9' in text


def test_layers_are_read_from_lists_and_spans():
    assert parse_layers("4, 7 10") == (4, 7, 10)
    assert parse_layers("4-10:3, 12") == (4, 7, 10, 12)
    assert parse_layers("4-4") == (4,) and parse_layers("") == ()
    for text in ("4-x", "4-", "-", "4-7-10", "4:3", "4-25:", "4-25:0", "4-25:-3"):
        with pytest.raises(ValueError, match=f"layers: '{text}' is neither a number such as 4 nor a span such as 4-25"):
            parse_layers(text)
    with pytest.raises(ValueError, match="layers: '25-4:3' runs backwards; .*: 4-25"):
        parse_layers("25-4:3")


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
    explorer.preset.value = "fast"  # a ratio of its own per stage: the slider shows their mean
    assert explorer.layers.value == "4, 7, 10"
    assert explorer.keep_ratio.value == pytest.approx((0.435 + 0.708 + 0.765) / 3, abs=0.006)
    assert explorer.preset.value == "fast" and explorer.state.config.keep_ratio == (0.435, 0.708, 0.765)
    explorer.keep_ratio.value = 0.6
    assert explorer.preset.value == "own" and explorer.state.config.keep_ratio == 0.6


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
    assert "2.00 → 1.00 s</b> (50 % saved)" in explorer.result.value and "40 % saved" in explorer.result.value
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


def test_views_that_differ_in_anything_but_their_words_do_not_overwrite_each_other(source, tmp_path):
    changes = [{}, {"layers": (4, 7)}, {"protect": (30, 31)}, {"positions": "compact"}]
    saved = [_saved(source, tmp_path, **change) for change in changes]
    saved += [_saved(source, tmp_path, "recency"), _saved(MadeUpSource(name="another"), tmp_path)]
    saved += [_saved(MadeUpSource(tokens=110), tmp_path)]  # another prompt of the same name
    assert len(set(saved)) == len(saved) == len(list(tmp_path.glob("*.html")))
    assert all(name.startswith("short_learned_0.9_approximate_") for name in saved)
    assert _saved(MadeUpSource(), tmp_path) == saved[0], "the same view has the same name in any process"


def test_a_long_name_is_cut_and_still_tells_views_apart(source, tmp_path):
    source.prompts.append("long " * 40)
    saved = {_saved(source, tmp_path, prompt="long " * 40, protect=(n,)) for n in (30, 31)}
    assert len(saved) == 2 and all(len(name) < 140 for name in saved)


def _saved(source, folder, against=None, **choices) -> str:
    state = ExplorerState(source)
    state.update(**choices)
    return next(path.name for path in export_state(state, folder, against=against) if path.suffix == ".html")


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
    assert "<script>alert" not in page and "\\u003cscript>alert" in page
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


def test_a_slider_that_says_0_8999999999999999_means_0_9_and_leaves_the_preset_alone(source):
    state = ExplorerState(source)
    state.update(keep_ratio=0.3 + 0.6)  # 0.8999999999999999
    assert state.config.keep_ratio == 0.9 and state.preset == "keep09"
    explorer = widgets.Explorer(state)
    explorer.keep_ratio.value = 0.8
    explorer.keep_ratio.value = 0.3 + 0.01 * 60
    assert state.provenance()["pruning_keep_ratio"] == 0.9


def test_a_prompt_that_cannot_be_scored_is_answered_in_a_sentence_and_the_choice_goes_back(source):
    explorer = widgets.Explorer(ExplorerState(source))
    before = explorer.text.value
    explorer.prompt.value = "empty"
    assert "0 elements" in explorer.message.value
    assert explorer.prompt.value == "short" and explorer.state.prompt == "short" and explorer.text.value == before
    assert "sdtp-stale" not in explorer.text._dom_classes


def test_ones_own_prompt_is_scored_shown_and_chosen(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.own.button.click()
    assert "empty" in explorer.message.value and explorer.prompt.value == "short"
    explorer.own.document.value = "A <b>document</b>."
    explorer.own.button.click()
    assert explorer.prompt.value == "my prompt" and explorer.message.value == ""
    assert not explorer.own.button.disabled


def test_a_text_file_fills_the_document(source):
    explorer = widgets.Explorer(ExplorerState(source))
    file = {"name": "a.txt", "type": "text/plain", "size": 5, "content": memoryview("Käse".encode())}
    explorer.own.file.value = ({**file, "last_modified": datetime.datetime(2026, 1, 1)},)
    assert explorer.own.document.value == "Käse"


def test_while_it_computes_the_picture_before_is_grey_and_a_bar_says_so(source, monkeypatch):
    explorer = widgets.Explorer(ExplorerState(source))
    seen = []
    scored = source.scored

    def slow(prompt, scorer):
        explorer.progress.tell("scoring <it>", 3, 12)
        seen.append((*explorer.text._dom_classes, explorer.progress.bar.value, explorer.progress.words.value))
        return scored(prompt, scorer)

    monkeypatch.setattr(source, "scored", slow)
    explorer.prompt.value = "nasty"
    assert seen[0][:2] == ("sdtp-stale", 3) and "scoring &lt;it&gt;" in seen[0][2]
    assert "sdtp-stale" not in explorer.text._dom_classes and explorer.progress.bar.layout.visibility == "hidden"


def test_another_model_brings_its_scorers_and_says_which_pruners_were_left_out(source):
    explorer = widgets.Explorer(ExplorerState(source))
    explorer.model.name.value = "none"
    explorer.model.button.click()
    assert "Cannot load" in explorer.message.value and explorer.model.name.value == "made-up"
    explorer.model.name.value = "other"
    explorer.model.button.click()
    assert explorer.scorer.options == ("recency",) and explorer.state.source.name == "other"
    assert "&lt;does&gt; not fit" in explorer.model.note.value


def test_protected_text_stays_and_is_framed(source):
    explorer = widgets.Explorer(ExplorerState(source, layers=(4,), keep_ratio=0.5))
    dropped = np.flatnonzero(explorer.state.fates.dropped_at == 4)[:2]
    explorer.protect.value = f"{dropped[0]}, {dropped[1]}"
    assert (explorer.state.fates.dropped_at[dropped] == LAYERS).all()
    assert "box-shadow" in explorer.picture.value
    explorer.prompt.value = "nasty"
    assert explorer.state.protect == () and explorer.protect.value == ""


def test_protected_text_is_found_by_its_words_or_its_numbers():
    tokens = ["The", " code", " is", " 4", "2", ".", " The", " end"]
    assert find_spans(tokens, "42") == [(3, 4)] and find_spans(tokens, "The") == [(0, 0), (6, 6)]
    assert parse_protected("1-2, 5", tokens) == (1, 2, 5) and parse_protected("", tokens) == ()
    assert parse_protected("code is", tokens) == (1, 2)
    assert parse_protected("3-3", tokens) == (3,)
    for text in ("5-", "-", "-5", "1-2-3"):
        with pytest.raises(ValueError, match=f"protect: '{text}' is neither a number such as 120 nor a span such as 1"):
            parse_protected(f"1, {text}", tokens)
    with pytest.raises(ValueError, match="protect: '20-10' runs backwards; give the smaller number first: 10-20"):
        parse_protected("20-10", tokens)
    with pytest.raises(ValueError, match="no token 8"):
        parse_protected("8", tokens)
    with pytest.raises(ValueError, match="'nowhere' is not in the prompt"):
        parse_protected("nowhere", tokens)


def test_every_control_has_its_words(source):
    explorer = widgets.Explorer(ExplorerState(source))
    for name in ("prompt", "scorer", "preset", "keep_ratio", "view", "against", "layers", "positions", "zoom", "token"):
        assert len(controls.HELP[getattr(explorer, name).description]) > 30, name


def test_views_of_two_ratios_do_not_overwrite_each_other(source, tmp_path):
    explorer = widgets.Explorer(ExplorerState(source), export_to=tmp_path)
    for ratio in (0.9, 0.8, 0.85):
        explorer.keep_ratio.value = ratio
        explorer.save.click()
    names = {path.name for path in tmp_path.glob("*.html")}
    words = {re.fullmatch(r"(.*)_[0-9a-f]{8}\.html", name)[1] for name in names}
    assert words == {f"short_learned_{ratio}_approximate" for ratio in ("0.8", "0.85", "0.9")}
    assert len(list(tmp_path.iterdir())) == 12
