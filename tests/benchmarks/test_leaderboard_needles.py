"""The leaderboard's needle map: the same needles in every panel, and no picture where there are none."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import leaderboard_needles

pytest.importorskip("seaborn")


def row(method, sample, score, depth=0.3, speedup=2.0, **more):
    return {
        "kind": "item", "method": method, "sort": "ruler", "cell": "niah_single_1", "length": 1024, "sample": sample,
        "speedup": speedup, "score": score, "answer_depth": depth, "model": "embedded", **more,
    }  # fmt: skip


def test_a_needle_is_shown_in_all_panels_or_in_none(tmp_path):
    rows = [row("unpruned", name, 1.0, speedup=1.0) for name in "abc"]
    rows += [row("sdtp", name, 0.5) for name in "abc"] + [row("streamingllm", name, 0.0) for name in "ab"]
    rows += [row("sdtp", "c", 0.0, speedup=3.0), row("lazyllm", "c", 0.0)]
    rows += [row(method, "d", 1.0, depth=None) for method in ("sdtp", "streamingllm")]
    found = leaderboard_needles.needles(rows)
    assert sorted(zip(found.method, found["sample"], strict=True)) == [
        (method, name) for method in ("sdtp", "streamingllm", "unpruned") for name in "ab"
    ]
    saved = leaderboard_needles.draw_needles(rows, tmp_path / "map.png", {"commit": "abc"})
    assert leaderboard_needles.draw_needles([], tmp_path / "none.png", {}) is None
    assert saved.is_file() and '"items": 2' in (tmp_path / "map.json").read_text()
    assert leaderboard_needles.draw_needles([row("sdtp", "a", 1.0, depth=None)], tmp_path / "no.png", {}) is None
    assert not (tmp_path / "no.png").exists()
