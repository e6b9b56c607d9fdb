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
from sdtp_lib.records import RowWriter, atomic_write, passport, read_frame, read_rows, write_json


def test_a_row_holds_schema_key_kind_passport_and_fields(tmp_path):
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


def test_a_field_cannot_hide_the_passport(tmp_path):
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
    with RowWriter(path, {}), pytest.raises(RuntimeError, match=f"a.jsonl is being written by process {os.getpid()}"):
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


def test_the_passport_says_what_made_a_number():
    model = types.SimpleNamespace(
        device="cpu",
        dtype="torch.float32",
        config=types.SimpleNamespace(_name_or_path="folder/tiny", model_type="llama", _attn_implementation="sdpa"),
    )
    fields = passport(model, config=PruningConfig(layers=(2, 4), keep_ratio=0.8), seed=7, weights="Q4_1, dequantised")
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


def test_the_passport_is_flat_json():
    assert json.loads(json.dumps(passport(seed=1)))["seed"] == 1


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() == "unknown"


def test_a_changed_tracked_file_shows_in_the_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.txt").write_text("one")
    subprocess.run([*git, "add", "a.txt"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    clean = records.commit()
    (tmp_path / "untracked.txt").write_text("results do not count as changes")
    assert len(clean) == 12 and records.commit() == clean
    (tmp_path / "a.txt").write_text("two")
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
    program = "import sys, sdtp_lib.records as r; r.passport(); sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_project_root_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTP_ROOT", str(tmp_path))
    records.project_root.cache_clear()
    try:
        assert records.project_root() == tmp_path
    finally:
        records.project_root.cache_clear()
