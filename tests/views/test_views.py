"""HTML and SVG of tokens: escaped whatever the prompt says, one span per token, the right classes and numbers."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from sdtp_lib import views
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.views import layer_map

NASTY = ['<script>alert("x")</script>', "</span>", "a&b", "' onmouseover='x", "\n", "<!--"]


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.spans, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append(dict(attrs))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def tokens(self):
        return [span for span in self.spans if "t" in (span.get("class") or "").split()]


@pytest.fixture
def fates():
    scores = np.array([[0.5, 0.1, 0.7, 0.9, 0.2, 0.8], [0.4, np.nan, 0.3, 0.6, np.nan, 0.9]])
    return TokenFates(np.array([4, 1, 2, 4, 1, 4]), (1, 2), 4, scores)


def _fragments(fates):
    other = TokenFates(np.array([4, 4, 1, 4, 1, 2]), (1, 2), 4, fates.scores)
    return {
        "saliency": views.tokens_html(NASTY, np.arange(6.0), title=NASTY[0], value_name=NASTY[1]),
        "dropped": views.dropped_tokens_html(NASTY, fates, title=NASTY[0]),
        "scorers": views.scorers_html(NASTY, fates, other, (NASTY[0], NASTY[1])),
        "answers": views.answers_html(NASTY[0] + " one", NASTY[1] + " two", names=(NASTY[0], NASTY[5])),
        "map": layer_map.layer_token_map_svg(fates, NASTY, title=NASTY[0]),
    }


def test_importing_views_loads_no_torch():
    code = "import sys, sdtp_lib.views.tokens, sdtp_lib.views.layer_map; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["saliency", "dropped", "scorers", "answers", "map"])
def test_no_token_text_title_or_name_becomes_markup(fates, name):
    text = _fragments(fates)[name]
    page = Page(text)
    assert "script" not in page.tags
    assert not any("onmouseover" in span for span in page.spans)
    shown = "".join(page.words)
    assert NASTY[0] in shown or "alert" in shown
    # every opened block is closed, so that nothing leaks into the page around it
    assert text.count("<div") == text.count("</div") and text.count("<span") == text.count("</span")


def test_each_token_is_one_span_in_the_prompts_order(fates):
    page = Page(views.dropped_tokens_html(NASTY, fates))
    assert [span["class"] for span in page.tokens] == ["t s2", "t s0", "t s1", "t s2", "t s0", "t s2"]


def test_hovering_tells_position_scores_and_where_it_was_dropped(fates):
    info = [span["data-i"] for span in Page(views.dropped_tokens_html(NASTY, fates)).tokens]
    assert info[0] == "position 0 · score before layer 1: 0.5, layer 2: 0.4 · kept to the end"
    assert info[1] == "position 1 · score before layer 1: 0.1 · dropped before layer 1"


def test_the_legend_counts_what_each_stage_dropped(fates):
    text = "".join(Page(views.dropped_tokens_html(NASTY, fates)).words)
    for part in ("before layer 1: 2", "before layer 2: 1", "kept to the end: 3 of 6"):
        assert part in text


def test_an_approximate_picture_says_so(fates):
    import dataclasses

    rough = dataclasses.replace(fates, approximate=True)
    assert "(approximate)" in views.dropped_tokens_html(NASTY, rough, title="cut")
    assert "(approximate)" not in views.dropped_tokens_html(NASTY, fates, title="cut")


def test_the_most_salient_token_has_the_deepest_colour_and_nan_none():
    page = Page(views.tokens_html(["a", "b", "c"], [1.0, 4.0, np.nan]))
    alpha = [float(re.search(r"/([\d.]+)\)", span["style"])[1]) for span in page.tokens]
    assert alpha == [0.35, 0.7, 0.0]


def test_all_zero_saliency_colours_nothing():
    page = Page(views.tokens_html(["a", "b"], [0.0, 0.0]))
    assert all("/0.00)" in span["style"] for span in page.tokens)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="'tokens': 2, 'values': 1"):
        views.tokens_html(["a", "b"], [1.0])


def test_line_ends_stay_visible_and_break_the_line():
    assert views.token_text("a\n") == "a↵\n"


def test_a_character_of_several_tokens_stands_at_its_first_token():
    class ByteTokenizer:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

        def convert_ids_to_tokens(self, ids):
            return [f"<{i}>" for i in ids]

    ids = list("aé😀b".encode())
    assert views.display_tokens(ByteTokenizer(), ids) == ["a", "é", "▫", "😀", "▫", "▫", "▫", "b"]
    assert views.display_tokens(ByteTokenizer(), [0xF0, 0x9F]) == ["�", "�"]


def test_sentencepiece_words_keep_their_space():
    class Pieces:
        def decode(self, ids, **_):
            return {1: "Hello", 2: "world"}[ids[0]]

        def convert_ids_to_tokens(self, ids):
            return [{1: "▁Hello", 2: "world"}[i] for i in ids]

    assert views.display_tokens(Pieces(), [1, 2]) == [" Hello", "world"]


def test_the_map_is_well_formed_svg_that_stands_alone(fates):
    root = ElementTree.fromstring(layer_map.layer_token_map_svg(fates, NASTY))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert f"{NASTY[0]} · position 0 · kept to the end" in titles


def test_neighbouring_columns_of_one_stage_are_one_rectangle():
    fates = TokenFates(np.array([4, 1, 1, 2, 4, 4]), (1, 2), 4, np.zeros((2, 6)))
    assert layer_map.stage_paths(fates, 0, 6) == ["M1 0h2v1h-2z", "M3 0h1v2h-1z", "M0 0h1v4h-1zM4 0h2v4h-2z"]
    assert layer_map.stage_paths(fates, 2, 4) == ["M0 0h1v1h-1z", "M1 0h1v2h-1z", ""]


def test_the_cells_of_the_map_cover_each_token_down_to_its_last_layer(fates):
    area = 0
    for path in layer_map.stage_paths(fates, 0, fates.tokens):
        area += sum(int(w) * int(h) for w, h in re.findall(r"h(\d+)v(\d+)", path))
    assert area == sum(fates.tokens_per_layer())


def test_the_map_of_4096_tokens_stays_small():
    rng = np.random.default_rng(0)
    layers = tuple(range(4, 30, 3))
    dropped_at = rng.choice([*layers, 30], 4096)
    fates = TokenFates(dropped_at, layers, 30, np.zeros((len(layers), 4096)))
    assert len(layer_map.layer_token_map_svg(fates)) < 90_000


def test_a_window_outside_the_prompt_is_refused(fates):
    with pytest.raises(ValueError, match=r"window=\(7, 9\)"):
        layer_map.layer_token_map_svg(fates, window=(7, 9))


def test_scorers_are_compared_by_what_each_still_keeps(fates):
    other = TokenFates(np.array([4, 4, 1, 4, 1, 2]), (1, 2), 4, fates.scores)
    text = views.scorers_html(list("abcdef"), fates, other, ("A", "B"))
    page = Page(text)
    assert [span["class"].split()[1:] for span in page.tokens] == [
        ["both"],
        ["onlyb"],
        ["gone"],
        ["both"],
        ["gone"],
        ["onlya"],
    ]
    words = "".join(page.words)
    assert "only A: 1" in words and "only B: 1" in words and "both keep: 2" in words and "agreement 50 %" in words


def test_what_the_answer_lost_is_struck_through():
    text = views.answers_html("The code is 4711.", "The code is unknown.")
    assert '<span class="lost">4711</span>' in text and '<span class="new">unknown</span>' in text
    assert "the same answer" in views.answers_html("Paris", "Paris")
