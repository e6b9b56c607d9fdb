"""The leaderboard: what is measured when, rows of one item by all methods, rows that the repository keeps."""

from __future__ import annotations

import json

import pytest
import torch

from sdtp_lib.evaluation.items import Item
from sdtp_lib.leaderboard import committed, participants, plan, tables
from sdtp_lib.leaderboard.entrants import OURS, entrants
from sdtp_lib.leaderboard.measure import Measurement
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.pruning.stage import name_of
from sdtp_lib.records import RowWriter, read_rows

NAMES = ["lazyllm", "gemfilter", "snapkv", "attention_pooled", "asl", "specprefill"]


def draw(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(6, 120, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def a_sample(number: int = 0) -> dict:
    return {"id": f"s{number}", "prompt_ids": draw(120, number), "response_ids": draw(9, 100 + number)}


def an_item() -> Item:
    return Item("niah_single_1", "n0", draw(120, 7), 60, lambda text: float("th" in text), labels={"answers": ["th"]})


def measured(model, tokenizer, path, steps, names=NAMES):
    with RowWriter(path, {"seed": 0}) as writer:
        work = Measurement(model, tokenizer, entrants(model, names), writer, read_rows(path))
        for step, item in steps:
            work.run(step, item)
    return read_rows(path)


@pytest.fixture
def first_steps():
    return [
        (plan.Step(plan.KL, "text", 120, 0, 1.5), a_sample()),
        (plan.Step(plan.RULER, "niah_single_1", 120, 0, 1.5), an_item()),
        (plan.Step(plan.MEMORY, plan.MEMORY, 120, 0, 1.5), None),
    ]


def test_each_item_is_run_unpruned_once_and_then_by_every_method_that_can_be_so_fast(
    tiny_model, tiny_tokenizer, tmp_path, first_steps
):
    rows = measured(tiny_model(), tiny_tokenizer, tmp_path / "rows.jsonl", first_steps)
    reach = [row["method"] for row in rows if row["kind"] == "out of reach"]
    assert reach == ["snapkv"], "said once, not once per item"
    done = [row for row in rows if row["kind"] == "item"]
    for sort in (plan.KL, plan.RULER, plan.MEMORY):
        assert sorted(row["method"] for row in done if row["sort"] == sort) == sorted(
            {UNPRUNED, *NAMES} - {"snapkv"}), sort  # fmt: skip
    for row in done:
        if row["method"] != UNPRUNED and row["sort"] != plan.MEMORY:
            assert 1.5 <= row["flops_speedup"] < 1.5 * 1.06, row["method"]
            assert row["kv_bytes"] < row["unpruned_kv_bytes"]
            assert row["prefill_ms"] > 0 and row["unpruned_prefill_ms"] > 0
        if row["sort"] == plan.MEMORY:
            assert row["peak_bytes"] > 0
    assert all(row["kl_nats"] > 0 for row in done if row["sort"] == plan.KL and row["method"] != UNPRUNED)


def test_a_run_that_goes_on_measures_nothing_twice_and_asks_for_no_unpruned_answer_again(
    tiny_model, tiny_tokenizer, tmp_path, first_steps, monkeypatch
):
    model, path = tiny_model(), tmp_path / "rows.jsonl"
    before = measured(model, tiny_tokenizer, path, first_steps, ["lazyllm"])
    calls = []
    monkeypatch.setattr(Measurement, "_measured", lambda self, *given: calls.append(given[4]) or {"kl_nats": 1.0})
    assert measured(model, tiny_tokenizer, path, first_steps, ["lazyllm"]) == before and not calls
    faster = [(plan.Step(plan.RULER, "niah_single_1", 120, 0, 2.0), an_item())]
    after = measured(model, tiny_tokenizer, path, faster, ["lazyllm"])
    assert [each.name for each in calls] == ["lazyllm"]
    assert after[-1]["unpruned_score"] == next(r for r in before if r["sort"] == plan.RULER)["score"]


def test_generation_ends_with_the_answer_and_gives_wrong_ones_little_room(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        work = Measurement(model, tiny_tokenizer, [], writer, [])
        always = Item("vt", "a", draw(40), 60, lambda text: 1.0, labels={"answers": ["th"]})
        never = Item("vt", "b", draw(40), 60, lambda text: 0.0, labels={"answers": ["th an"]})
        answer = len(tiny_tokenizer("th an", add_special_tokens=False)["input_ids"])
        assert work._most_new_tokens(never) == -(-3 * answer // 2) + 8 < 60
        found, _ = work._generated(always.prompt_ids, Variant(UNPRUNED), most=60, right=lambda ids: len(ids) == 2)
        assert len(found["new_ids"]) <= 2


def test_the_method_that_is_first_after_the_unpruned_model_changes_with_the_item(tiny_model, tiny_tokenizer, tmp_path):
    steps = [(plan.Step(plan.KL, "text", 120, n, 1.5), a_sample(n)) for n in range(2)]
    rows = measured(tiny_model(), tiny_tokenizer, tmp_path / "rows.jsonl", steps, ["lazyllm", "gemfilter"])
    assert [row["method"] for row in rows] == [UNPRUNED, "lazyllm", "gemfilter", UNPRUNED, "gemfilter", "lazyllm"]


def test_steps_come_test_set_by_test_set_with_one_item_of_ruler_and_two_fold_first():
    steps = plan.steps([plan.Sizes(1024, 3, 2)], [2.0, 1.5], tasks=("A", "B"))
    assert [(s.test_set, s.number) for s in steps if s.speedup == 2.0 and s.sort != plan.MEMORY][:9] == [
        ("text", 0), ("needle", 0), ("instructions", 0), ("A", 0),
        ("text", 1), ("needle", 1), ("instructions", 1), ("B", 0), ("text", 2),
    ]  # fmt: skip
    last_twofold_of_the_first_pass = max(n for n, s in enumerate(steps) if s.speedup == 2.0 and s.sort == plan.KL)
    assert steps[last_twofold_of_the_first_pass + 2 + 1].speedup == 1.5, "instructions, A 1, then the next speed-up"
    assert len(set(steps)) == len(steps) == 2 * (9 + 4 + 1)


def test_every_method_takes_part_and_unknown_names_are_refused(tiny_model):
    from sdtp_lib import methods

    model = tiny_model(num_hidden_layers=30)
    found = {each.name: each for each in entrants(model)}
    assert set(found) == {*methods.names(), "attention_pooled"}
    scored_by = {name: name_of(each.scorer) for name, each in found.items()}
    assert scored_by[OURS] == scored_by["attention_pooled"], "no pruners are made for a random model"
    with pytest.raises(ValueError, match="lazyllm"):
        entrants(model, ["lazzyllm"])


def test_a_method_that_a_shallow_model_cannot_have_is_left_out_with_the_reason_or_refused_when_asked_for(tiny_model):
    model, left_out = tiny_model(num_hidden_layers=18), {}
    names = [each.name for each in entrants(model, left_out=left_out)]
    assert "sdtp" in names and "sdtp-low" not in names and "at least 25 layers" in left_out["sdtp-low"]
    with pytest.raises(ValueError, match="at least 25 layers"):
        entrants(model, ["sdtp-low"])


def test_a_method_that_renumbers_keeps_positions_where_the_model_cannot(tiny_model):
    from sdtp_lib import methods

    two_tables = tiny_model("gemma3_text", num_hidden_layers=12)
    found = {each.name: each.budget for each in entrants(two_tables, ["streamingllm", "gemfilter"])}
    for name, method in found.items():
        assert method.positions == "original" and "not renumbered" in method.remark
        assert methods.get(name).positions == "compact" and methods.get(name).that_runs_on(tiny_model()).remark == ""


def test_a_method_that_is_left_out_stands_in_the_rows_with_its_reason_once(tiny_model, tiny_tokenizer, tmp_path):
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        work = Measurement(tiny_model(), tiny_tokenizer, [], writer, [], left_out={"sdtp-low": "25 layers are needed"})
        for number in range(2):
            work.run(plan.Step(plan.KL, "text", 120, number, 1.5), a_sample(number))
    (row,) = [row for row in read_rows(tmp_path / "rows.jsonl") if row["kind"] == "out of reach"]
    assert (row["method"], row["error"], row["scorer_id"]) == ("sdtp-low", "25 layers are needed", None)
    assert tables.unreached(tables.frame_of(read_rows(tmp_path / "rows.jsonl")), 120, 1.5) == {
        "sdtp-low": "25 layers are needed"
    }


def test_rows_of_another_scorer_or_origin_do_not_stay_beside_new_ones():
    def row(key: str, method: str, scorer: str, device: str = "cpu") -> dict:
        return {"key": key, "method": method, "scorer_id": scorer, "model": "m", "device": device}

    kept = [
        row("a", "sdtp", "old"),
        row("b", "lazyllm", "x"),
        row("c", "asl", "y"),
        row("d", "lazyllm", "x", "cuda:0") | {"prefill_ms": 2.0},
    ]
    new = [row("e", "sdtp", "new"), row("b", "lazyllm", "x") | {"kl_nats": 1.0}]
    assert committed.joined(kept, new) == [new[1], kept[2], new[0]]
    assert committed.joined([], new) == new


def test_a_beginning_with_other_pruners_does_not_take_the_place_of_many_committed_rows():
    def row(key: str, method: str, scorer: str) -> dict:
        return {"key": key, "method": method, "scorer_id": scorer, "model": "m", "device": "cpu"}

    kept = [row(key, "sdtp", "old") for key in "abc"] + [row("d", "lazyllm", "x"), row("e", "lazyllm", "x")]
    new = [row("a", "sdtp", "new"), row("d", "lazyllm", "x"), row("f", "asl", "y")]
    rows, begun = committed.without_beginnings(kept, new)
    assert rows == new[1:] and begun == {"sdtp": (1, 3)}
    assert [r["scorer_id"] for r in committed.joined(kept, rows) if r["method"] == "sdtp"] == ["old"] * 3
    whole = [row(key, "sdtp", "new") for key in "abc"]
    assert committed.without_beginnings(kept, whole) == (whole, {})
    elsewhere = [{**each, "model": "other"} for each in kept]
    assert committed.without_beginnings(elsewhere, new) == (new, {})


def test_rows_of_another_device_stay_where_they_tell_no_time_and_no_other_scorer():
    def row(key: str, method: str = "lazyllm", scorer: str = "x", **more) -> dict:
        return {"key": key, "method": method, "scorer_id": scorer, "model": "m", "device": "cpu", **more}

    gpu = {"device": "cuda:0", "device_name": "Big GPU", "torch": "2.9"}
    beside = [row("a", **gpu), row("b", **gpu, prefill_ms=3.0), row("c", **gpu), row("d", "sdtp", "old", **gpu),
              row("e", **gpu, seed=1)]  # fmt: skip
    rows = [row("c", prefill_ms=9.0), row("f", "sdtp", "new")]
    assert committed.joined(beside, rows) == [rows[0], rows[1], beside[0]]
    assert participants.measured_elsewhere(rows) == ""
    two_gpus = [row("g", **gpu, prefill_ms=1.0), row("h", **gpu | {"device": "cuda:1"}, prefill_ms=1.0)]
    assert committed.joined(two_gpus[1:], two_gpus[:1]) == two_gpus[::-1]
    assert participants.measured_elsewhere(two_gpus) == ""
    said = participants.measured_elsewhere([rows[0], beside[0], rows[1]])
    assert said.startswith("1 of 3 rows on Big GPU (torch 2.9") and said.endswith("without times")


def test_times_of_two_kinds_of_gpu_stand_in_no_table_together():
    def row(key: str, chip: str, **more) -> dict:
        return {"key": key, "method": "lazyllm", "model": "m", "device": "cuda:0", "device_name": chip, **more}

    new, other = [row("a", "Big GPU", prefill_ms=3.0)], row("b", "Small GPU", prefill_ms=9.0)
    assert committed.of_other_origin([other], new) == [other] and committed.joined([other], new) == new
    untimed = row("c", "Small GPU", kl_nats=0.1)
    assert committed.joined([untimed], new) == [*new, untimed] and committed.of_other_device(untimed, new[0])


def test_peak_memory_is_of_a_device_as_times_are():
    """A GPU's share of peak memory was averaged into a CPU's table, and --new-only left the CPU's unmeasured."""
    here = {"key": "a", "method": "lazyllm", "model": "m", "device": "cpu", "peak_bytes": 5}
    there = here | {"key": "b", "device": "cuda:0", "device_name": "Big GPU"}
    assert not committed.of_other_device(there, here) and committed.joined([there], [here]) == [here]
    assert committed.of_other_origin([there], [here]) == [there], "a report says so before it would go"


def test_committed_rows_may_hold_any_text_and_need_no_kind(tmp_path):
    """An answer with U+2028 in it, which ``str.splitlines`` takes for a line's end, made the file unreadable."""
    rows = [{"key": "1", "prediction": "a\u2028b\u0085c\x0b\x1cd"}, {"key": "2", "prediction": "\u2029 \U0001f600"}]
    committed.write_committed(tmp_path / "rows.jsonl", rows)
    assert committed.read_committed(tmp_path / "rows.jsonl") == rows
    content = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\r\n"))
    assert committed.read_committed(tmp_path / "rows.jsonl") == rows, "as an editor on Windows leaves it"


@pytest.mark.parametrize("line", [b"<<<<<<< HEAD", b'{"key": "1", "ki', b"[1]", b"\xff"])
def test_a_line_of_committed_rows_that_is_none_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"key": "0"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is no row: restore the file"):
        committed.read_committed(tmp_path / "rows.jsonl")


def test_a_committed_file_without_rows_is_no_model(tmp_path):
    """The report of another model ended in an IndexError."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "leaderboard-begun.jsonl").write_text("")
    committed.write_committed(committed.path_of("mine", tmp_path), [{"key": "1", "kind": "item"}])
    assert list(committed.every_committed(tmp_path)) == ["-mine"]


def test_every_model_has_a_file_of_its_own_name():
    """Names without a Latin letter all had the name ``-``; a folder called embedded had the embedded model's file."""
    names = ["embedded", "models/embedded", "Qwen/Qwen3-8B", "模型", "Модель", ".", "/"]
    found = [committed.suffix(name) for name in names]
    assert found[:3] == ["", "-embedded", "-qwen3-8b"] and len(set(found)) == len(names)
    assert all(len(each) == 9 for each in found[3:])


def test_committed_rows_come_back_whole_and_say_once_what_they_share(tmp_path):
    rows = [{"key": str(n), "kind": "item", "model": "m", "dtype": "float32", "kl_nats": n / 3} for n in range(3)]
    committed.write_committed(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_text().count("float32") == 1
    again = committed.read_committed(tmp_path / "rows.jsonl")
    assert [r | {"kl_nats": 0} for r in again] == [r | {"kl_nats": 0} for r in rows]
    assert [r["kl_nats"] for r in again] == pytest.approx([0, 1 / 3, 2 / 3], rel=1e-5)
    assert committed.read_committed(tmp_path / "none.jsonl") == []
    two = [rows[0] | {"device": "cpu"}, rows[1] | {"device": "cuda"}, rows[2] | {"device": "cuda"}]
    committed.write_committed(tmp_path / "two.jsonl", two)
    assert (tmp_path / "two.jsonl").read_text().count("cuda") == 1
    assert [(row["key"], row["device"]) for row in committed.read_committed(tmp_path / "two.jsonl")] == [
        ("0", "cpu"), ("1", "cuda"), ("2", "cuda")
    ]  # fmt: skip
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])["key"] == "0"
