from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from sdtp_lib import provenance, records
from sdtp_lib.config import PruningConfig
from sdtp_lib.files import BeingWritten
from sdtp_lib.records import OtherProvenance, RowWriter, atomic_write, provenance_of, read_frame, read_rows, write_json


def test_a_row_holds_schema_key_kind_provenance_and_fields(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {"seed": 3}) as rows:
        rows.add("x", kind="latency", latency_ms=1.5)
    assert read_rows(tmp_path / "a.jsonl") == [
        {"schema_version": records.SCHEMA_VERSION, "key": "x", "kind": "latency", "seed": 3, "latency_ms": 1.5}
    ]


def test_a_stopped_run_goes_on_after_its_last_row(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    with RowWriter(path, {}) as rows:
        rows.add("one", value=1)
    with RowWriter(path, {}) as rows:
        assert rows.done("one") and not rows.done("two")
        rows.add("two", value=2)
        assert rows.done("two")
    assert [row["key"] for row in read_rows(path)] == ["one", "two"]


def test_a_key_is_written_once(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {}) as rows:
        rows.add("one")
        with pytest.raises(ValueError, match="'one' is already in a.jsonl"):
            rows.add("one")


def test_a_field_cannot_hide_the_provenance(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {"device": "cpu"}) as rows, pytest.raises(ValueError, match="device"):
        rows.add("one", device="cuda")


def test_a_half_written_last_line_is_dropped_with_a_warning(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "one"}\n{"key": "tw')
    with pytest.warns(UserWarning, match="last line is half-written"):
        assert read_rows(path) == [{"key": "one"}]


def test_appending_after_a_half_written_line_starts_on_a_fresh_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "one"}\n{"key": "tw')
    with pytest.warns(UserWarning, match="half-written"), RowWriter(path, {}) as rows:
        assert not rows.done("tw")
        rows.add("two")
    assert [row["key"] for row in read_rows(path)] == ["one", "two"]


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "one"}\n{"key": "two"}')
    with RowWriter(path, {}) as rows:
        assert rows.done("two")
        rows.add("three")
    assert [row["key"] for row in read_rows(path)] == ["one", "two", "three"]


@pytest.mark.parametrize("damage", ["{not json", "[1, 2]", "\x00\x00", "7"])
def test_a_damaged_line_is_left_out_and_named(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "one"}\n' + damage + '\n{"key": "three"}\n')
    with pytest.warns(UserWarning, match="a.jsonl, line 2 is damaged"):
        assert [row["key"] for row in read_rows(path)] == ["one", "three"]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    path = tmp_path / "a.jsonl"
    with RowWriter(path, {}), pytest.raises(BeingWritten, match=f"a.jsonl is being written by process {os.getpid()}"):
        RowWriter(path, {}).__enter__()
    with RowWriter(path, {}) as rows:
        rows.add("free again")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_killed_writer_leaves_its_rows_and_no_lock(tmp_path):
    path = tmp_path / "a.jsonl"
    program = textwrap.dedent("""
        import os, signal, sys
        from sdtp_lib.records import RowWriter
        with RowWriter(sys.argv[1], {}) as rows:
            rows.add("one")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    ended = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert records.lock_path(path).exists(), "the killed process had no chance to remove its lock file"
    with RowWriter(path, {}) as rows:
        assert rows.done("one")


def test_numpy_values_become_plain_ones_and_nan_becomes_null(tmp_path):
    path = tmp_path / "a.jsonl"
    with RowWriter(path, {}) as rows:
        rows.add("x", mean_nats=np.float32(0.5), kept=np.array([1, 2]), missing=float("nan"), count=np.int64(3))
    (row,) = read_rows(path)
    assert (row["mean_nats"], row["kept"], row["missing"], row["count"]) == (0.5, [1, 2], None, 3)
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(("value", "reason"), [(float("inf"), "finite"), (object(), "object"), ({1, 2}, "set")])
def test_a_value_that_json_cannot_hold_names_its_field(tmp_path, value, reason):
    path = tmp_path / "a.jsonl"
    with RowWriter(path, {}) as rows:
        with pytest.raises(ValueError, match=f"speedup.*{reason}"):
            rows.add("x", speedup=value)
        rows.add("x", speedup=2.0)
    assert len(read_rows(path)) == 1


def test_a_path_in_the_project_is_stored_relative_to_it(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {}) as rows:
        row = rows.add("x", picture=records.project_root() / "figures" / "one.png")
    assert row["picture"] == "figures/one.png"


def test_read_frame_has_a_column_for_each_field(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {"seed": 0}) as rows:
        rows.add("x", latency_ms=2.0)
        rows.add("y", latency_ms=4.0)
    frame = read_frame(tmp_path / "a.jsonl")
    assert frame["latency_ms"].mean() == 3.0 and list(frame["key"]) == ["x", "y"]


def test_the_provenance_says_what_made_a_number():
    model = types.SimpleNamespace(
        device="cpu",
        dtype="torch.float32",
        config=types.SimpleNamespace(_name_or_path="folder/tiny", model_type="llama", _attn_implementation="sdpa"),
    )
    config = PruningConfig(layers=(2, 4), keep_ratio=0.8)
    fields = provenance_of(model, config=config, seed=7, weights="Q4_1, dequantised")
    expected = {
        "model": "folder/tiny",
        "device": "cpu",
        "dtype": "float32",
        "weights": "Q4_1, dequantised",
        "pruning_layers": [2, 4],
        "pruning_keep_ratio": 0.8,
        "pruning_positions": "original",
        "seed": 7,
    }
    assert expected.items() <= fields.items()
    assert fields["utc"].endswith("+00:00")
    assert all(fields[name] for name in ("commit", "python", "torch", "transformers", "sdtp_lib"))


def test_the_provenance_is_flat_json():
    assert json.loads(json.dumps(provenance_of(seed=1)))["seed"] == 1


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() == "unknown"


def test_a_changed_tracked_file_shows_in_the_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "docs").mkdir()
    for name in ("a.txt", "README.md", "docs/index.html"):
        (tmp_path / name).write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    clean = records.commit()
    for name in ("README.md", "docs/index.html"):
        (tmp_path / name).write_text("what is made from rows is no change of the code that makes them")
    (tmp_path / "untracked.txt").write_text("results do not count as changes")
    assert len(clean) == 12 and records.commit() == clean
    (tmp_path / "a.txt").write_text("two")
    assert records.commit() == clean + "+changes"


def test_outputs_that_jupyterlab_saves_into_a_notebook_are_no_changes(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    file = tmp_path / "a.ipynb"

    def write(source: str, outputs: list) -> None:
        cell = {"cell_type": "code", "source": [source], "metadata": {}, "outputs": outputs}
        file.write_text(json.dumps({"cells": [cell], "metadata": {}}))

    write("1 + 1", [])
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a.ipynb"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    clean = records.commit()
    write("1 + 1", [{"output_type": "stream", "text": "2"}])
    assert records.commit() == clean
    write("1 + 2", [])
    assert records.commit() == clean + "+changes"


def test_atomic_write_keeps_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.png"]


def test_write_json_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "run" / "done.json"
    write_json(path, {"rows": np.int64(3), "nested": {"ratio": 0.9}})
    write_json(path, {"rows": 4})
    assert json.loads(path.read_text()) == {"rows": 4} and os.listdir(path.parent) == ["done.json"]


def test_importing_records_loads_no_torch():
    program = "import sys, sdtp_lib.records; sdtp_lib.records.provenance_of(); "
    program += "sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_project_root_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTP_ROOT", str(tmp_path))
    records.project_root.cache_clear()
    try:
        assert records.project_root() == tmp_path
    finally:
        records.project_root.cache_clear()


# --- whose rows count as done ----------------------------------------------------------------------------------------

ORIGIN = {
    "utc": "2026-01-01T00:00:00+00:00", "commit": "aaa", "torch": "2.13.0", "model": "embedded",
    "weights": "as published", "weights_fingerprint": "0123", "dtype": "float32", "device": "cuda:0",
    "device_name": "NVIDIA H100", "attn_implementation": "sdpa", "seed": 0, "threads": 2, "pruning_keep_ratio": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "Qwen/Qwen3-8B"),
        ("weights", "Q4_1, dequantised"),
        ("weights_fingerprint", "4567"),
        ("dtype", "bfloat16"),
        ("device", "cpu"),
        ("device_name", "NVIDIA A100"),
        ("attn_implementation", "eager"),
        ("seed", 1),
        ("threads", 4),
    ],
)
def test_a_file_of_another_provenance_is_refused_by_name_with_both_values_and_the_remedy(tmp_path, field, value):
    """Row keys held no model: a second model's run measured nothing and reported the first one's times."""
    path = tmp_path / "latency.jsonl"
    with RowWriter(path, ORIGIN) as rows:
        rows.add("1024+128/unpruned/0", prefill_ms=1.0)
    before = path.read_bytes()
    with pytest.raises(OtherProvenance) as caught, RowWriter(path, ORIGIN | {field: value}):
        pass
    told = str(caught.value)
    assert told.startswith(f"latency.jsonl holds rows made with {field}={ORIGIN[field]!r}".replace("cuda:0", "cuda"))
    assert f"(this run: {value!r})" in told and "give this run a folder of its own, or move the file away" in told
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["latency.jsonl"], "no lock is left"


@pytest.mark.parametrize(
    ("field", "value"),
    [("utc", "later"), ("commit", "bbb"), ("torch", "2.14.1"), ("device", "cuda:3"), ("pruning_keep_ratio", 0.7)],
)
def test_a_run_goes_on_at_another_time_with_other_versions_and_on_the_next_gpu(tmp_path, field, value):
    with RowWriter(tmp_path / "a.jsonl", ORIGIN) as rows:
        rows.add("one")
    with RowWriter(tmp_path / "a.jsonl", ORIGIN | {field: value}) as rows:
        assert rows.done("one")


def test_rows_of_an_older_version_are_refused_since_nobody_can_tell_whose_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"schema_version": 1, "key": "one", "model": "embedded", "seed": 0}\n')
    with pytest.raises(OtherProvenance, match=r"a.jsonl holds rows that do not say their weights_fingerprint, .*older"):
        RowWriter(path, {"model": "embedded", "seed": 0, "weights_fingerprint": "0123"}).__enter__()
    assert read_rows(path)[0]["key"] == "one", "reports can still read them"


def test_scorers_of_one_name_are_told_apart_by_what_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    from sdtp_lib import TokenPruners, scorers

    torch.manual_seed(0)
    first, second = TokenPruners(16, (2,)), TokenPruners(16, (2,))
    mixed = {w: scorers.weighted([(scorers.attention(8), 1.0), (scorers.recency(), w)]) for w in (0.5, 1.0)}
    for own, other in ((first, second), (first, TokenPruners(16, (2,), blend={"recency": 1.0})), (first, None),
                       (scorers.random(0), scorers.random(1)), (mixed[0.5], mixed[1.0])):  # fmt: skip
        path = tmp_path / "a.jsonl"
        path.unlink(missing_ok=True)
        with RowWriter(path, {}) as rows:
            ids = rows.scored_by({"SDTP": own, "full": None})
            rows.add("one", scorer="SDTP", scorer_id=ids["SDTP"])
        with RowWriter(path, {}) as rows:
            assert rows.scored_by({"SDTP": own, "another": other})["SDTP"] == ids["SDTP"]
            with pytest.raises(OtherProvenance, match="a.jsonl holds rows of 'SDTP' that were made by .*: give this"):
                rows.scored_by({"SDTP": other})


def test_a_row_is_done_only_for_what_it_was_made_from(tmp_path):
    with RowWriter(tmp_path / "a.jsonl", {}) as rows:
        rows.add("needle-0", sample_hash="aa", config_hash="bb")
        assert rows.done("needle-0", sample_hash="aa", config_hash="bb") and not rows.done("needle-1", sample_hash="aa")
        with pytest.raises(OtherProvenance, match=r"a.jsonl, row 'needle-0': holds rows made with sample_hash='aa'"):
            rows.done("needle-0", sample_hash="cc", config_hash="bb")


@pytest.mark.parametrize("failure", [{"kind": "failure", "error": "E"}, {"kind": "latency", "status": "out of memory"}])
def test_what_failed_is_tried_again_by_the_next_run_and_its_success_replaces_the_failure(tmp_path, failure):
    path = tmp_path / "a.jsonl"
    with RowWriter(path, {}) as rows:
        rows.add("one", kind="item", score=1.0)
        rows.add("two", **failure)
        assert rows.done("two") and rows.failed("two"), "not again in the same run"
    with RowWriter(path, {}) as rows:
        assert rows.done("one") and not rows.done("two") and not rows.failed("two")
        rows.add("two", **failure)
    assert [row["key"] for row in read_rows(path)] == ["one", "two"], "one row per key, the last"
    with RowWriter(path, {}) as rows:
        rows.add("two", kind="item", score=0.5)
    assert [(row["key"], row.get("score")) for row in read_rows(path)] == [("one", 1.0), ("two", 0.5)]


def test_rows_of_shares_are_held_to_the_runs_provenance_before_they_are_joined(tmp_path):
    path, share = tmp_path / "a.jsonl", tmp_path / "a.share0.jsonl"
    with RowWriter(share, {"seed": 1}) as rows:
        rows.add("one")
    with pytest.raises(OtherProvenance, match=r"a.share0.jsonl holds rows made with seed=1 \(this run: 0\)"):
        records.join_rows(path, [share], {"seed": 0})
    assert share.exists() and read_rows(path) == []
    records.join_rows(path, [share], {"seed": 1})
    assert not share.exists() and [row["key"] for row in read_rows(path)] == ["one"]
    with pytest.raises(OtherProvenance, match=r"a.jsonl holds rows made with seed=1"):
        RowWriter(tmp_path / "a.share1.jsonl", {"seed": 0}, beside=path).__enter__()
    with RowWriter(tmp_path / "a.share1.jsonl", {"seed": 1}, beside=path) as rows:
        assert rows.done("one")


def test_a_byte_order_mark_in_front_of_the_rows_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"key": "one"}\n')
    with RowWriter(path, {}) as rows:
        assert rows.done("one")


def test_the_provenance_tells_models_of_one_name_apart_by_their_weights(tiny_model):
    model = tiny_model()
    before = provenance_of(model, model_name="same", seed=0)
    assert before["weights"] == "as published" and before["device_name"] is None
    assert provenance_of(model, model_name="same", seed=0)["weights_fingerprint"] == before["weights_fingerprint"]
    model.model.layers[3].mlp.up_proj.weight.data.add_(0.5)
    assert provenance_of(model, model_name="same", seed=0)["weights_fingerprint"] != before["weights_fingerprint"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for the old name
def test_the_provenance_tells_a_model_with_its_adapters_from_the_same_with_them_off(tiny_model):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), options)
    on = provenance_of(model, model_name="same")
    with model.disable_adapter():
        off = provenance_of(model, model_name="same")
    assert on["adapters"] is not None and off["adapters"] is None
    assert on["weights_fingerprint"] == off["weights_fingerprint"], "the numbers are all there either way"


def test_equal_content_has_an_equal_hash_in_every_process():
    program = "from sdtp_lib.provenance import *; import functools; print(content_id([1, 'a', {'b': 2.5}], None), "
    program += "scorer_id(functools.partial(print, sep='')), scorer_id(lambda stage: 0))"
    told = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            for _ in range(2)}  # fmt: skip
    assert len(told) == 1 and "0x" not in told.pop()
