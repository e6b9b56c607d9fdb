"""The live page as text: what is in it, that it is one file, that its data are the engine's and the budget's."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.explorer import page
from sdtp_lib.explorer.export import view_payload
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.views.looks import ink
from tests.explorer.made_up import LAYERS, NASTY, MadeUpSource


@pytest.fixture
def state():
    one = ExplorerState(MadeUpSource(), prompt="nasty", keep_ratio=0.8)
    one.run()
    return one


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_is_one_file_that_names_no_other_host_and_keeps_prompts_as_data(state):
    text = page.live_page(view_payload(state, f"{NASTY} @data@ @script@"))
    assert NASTY not in text and text.count("<script") == 2
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    data = data_of(text)
    assert data["prompts"][0]["tokens"][0] == NASTY and data["title"].endswith("@data@ @script@")


def test_what_the_engine_kept_is_in_the_page_at_its_ratio(state):
    data = view_payload(state, "view")
    entry = data["prompts"][0]
    (at,) = entry["scorers"]["learned"]["exact"]
    assert data["ratios"][int(at)] == 0.8 and data["start"]["ratio"] == int(at)
    stages = np.frombuffer(base64.b64decode(entry["scorers"]["learned"]["exact"][at]["stages"]), "u1")
    assert (stages == state.outcome.fates.stage_of_token()).all()
    assert entry["full_answer"] == "the full answer"


def test_a_schedule_of_ones_own_has_its_place_on_the_slider():
    state = ExplorerState(MadeUpSource(), layers=(4, 7, 10), keep_ratio=(0.9, 0.8, 0.55))
    state.run()
    data = view_payload(state, "view")
    assert data["ratios"][data["start"]["ratio"]] == (0.9, 0.8, 0.55) and len(data["ratios"]) == 72
    json.dumps(data)


def test_costs_in_the_page_are_those_of_the_budget(state):
    data, config = view_payload(state, "view"), PruningConfig.preset("keep08", LAYERS)
    flops, kv = data["prompts"][0]["shares"][data["ratios"].index(0.8)]
    per_layer = budget.tokens_per_layer(config, LAYERS, 120)
    assert kv == pytest.approx(sum(per_layer) / (120 * LAYERS), abs=1e-4)
    full = budget.prefill_flops(state.source.shape, [120] * LAYERS)
    assert flops == pytest.approx(budget.prefill_flops(state.source.shape, per_layer) / full, abs=1e-4)


def test_of_equal_scores_the_later_token_ranks_first():
    assert page._ranks([0.5, 2.0, 0.5, np.nan]).tolist() == [2, 0, 1, 3]


def test_text_on_each_colour_is_readable():
    assert [ink(rgb) for rgb in ((246, 215, 70), (110, 12, 170), (0, 0, 0), (255, 255, 255))] == [
        "#000", "#fff", "#fff", "#000"
    ]  # fmt: skip
