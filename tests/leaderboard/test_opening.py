"""What README opens with is what the leaderboards' rows say, and follows them without a run of the study."""

from __future__ import annotations

import json

from sdtp_lib.leaderboard import blocks, committed, opening
from sdtp_lib.records import project_root
from tests.leaderboard.made_rows import ruler_rows


def notes(models: dict[str, list[dict]]) -> dict[str, str]:
    return {name: block["note"] for name, block in opening.every(models).items()}


def test_a_gpus_times_of_random_weights_stand_in_the_opening():
    shared = {
        "kind": "item", "model": "Big-7B, random weights", "device_name": "Chip", "dtype": "bfloat16", "sort": "time",
        "cell": "time", "length": 8192, "speedup": 2.0, "unpruned_prefill_ms": 90, "kv_bytes": 5,
        "unpruned_kv_bytes": 10, "flops_speedup": 2.0, "commit": "abc",
    }  # fmt: skip
    rows = [
        shared | {"method": method, "sample": f"{n}", "key": f"{method}{n}", "prefill_ms": ms}
        for n in range(3) for method, ms in (("sdtp", 50), ("lazyllm", 45))
    ]  # fmt: skip
    said = opening.on_a_gpu({"-big": rows})
    assert "Big-7B, random weights, bfloat16 on one Chip" in said and "**1.80x** after 8,192 (n = 3) tokens" in said
    assert "(docs/leaderboard-big.md)" in said and "(leaderboard-big.md)" in opening.on_a_gpu({"-big": rows}, "")
    assert notes({"-big": rows}) == {"gpu": f"**On a GPU:** {said}"}
    with_quality = [{**row, "sort": "kl"} for row in rows]
    assert opening.on_a_gpu({"-big": with_quality}) == "", "a model with quality has a page of its own"
    assert opening.every({"-big": with_quality}) == {}


def test_what_it_costs_stands_beside_the_best_other_method():
    shared = {
        "kind": "item", "model": "embedded", "sort": "kl", "length": 64, "speedup": 2.0, "scorer_id": "a",
        "utc": "2026-01-02T03:04:05+00:00", "device": "cpu", "unpruned_prefill_ms": 9.0,
    }  # fmt: skip
    rows = [
        shared | {"method": method, "cell": cell, "sample": f"{cell}{n}", "key": f"{method}{cell}{n}", "kl_nats": kl}
        for n in range(3)
        for method, text, needle in (("sdtp", 0.2, 0.5), ("lazyllm", 0.3, 0.4), ("asl", 0.4, 0.25),
                                     ("sdtp-fast", 0.1, 0.1))
        for cell, kl in (("text", text), ("needle", needle))
    ]  # fmt: skip
    assert opening.cost_beside_all_methods({}) == "" and opening.cost_beside_all_methods({"-big": rows}) == ""
    said = opening.cost_beside_all_methods({"": rows})
    assert "at 2x fewer prefill FLOPs and 64 tokens" in said
    assert "(docs/leaderboard.md): SmolLM2-135M-Instruct · CPU; measured 2026-01-02." in said
    assert said.endswith("another set of pruners than the one that ships now, which is not measured in full yet.")
    assert "text **0.200** (lazyllm 0.300, n = 3), needle **0.500** (asl 0.250, n = 3)." in said, "also where behind"
    assert notes({"": rows}) == {"costs": f"**What it costs:** {said}"}


def test_what_is_kept_of_ruler_is_of_all_items_of_ours_and_has_its_interval():
    both = ruler_rows({"sdtp": [1.0] * 4, "asl": [0.0] * 4}, [1.0] * 4)
    ours = ruler_rows({"sdtp": [0.0] * 4}, [1.0] * 4)
    ours = [row | {"sample": f"more {row['sample']}", "key": f"more {row['key']}"} for row in ours]
    said = opening.cost_beside_all_methods({"": [*both, *ours]})
    assert "RULER's score on the 8 items that the unpruned model solves **50 %** [" in said, "`asl` has four of them"


def test_the_documents_blocks_are_those_of_the_committed_rows():
    kept = json.loads((project_root() / "figures/tables.json").read_text(encoding="utf-8"))
    models = committed.every_committed()
    made = blocks.every(models[""]) | opening.every(models)
    assert set(made) == {"leaderboard", "standing", "gpu", "costs"}
    for name, block in made.items():
        assert kept[name] == json.loads(json.dumps(block)), "run `python benchmarks/leaderboard.py --report`"
