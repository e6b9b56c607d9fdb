"""The LongBench command, end to end on a tiny model: its protocol, resuming, processes that share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sdtp_lib.records import RowWriter, project_root, read_rows
from tests.benchmarks.commands import command


@pytest.fixture
def trec_arguments(model_folder, tmp_path):
    """Arguments of a LongBench run over three items of one data set, rows in ``run``."""
    record = {
        "input": "Question: where?\nType:",
        "answers": ["Place"],
        "length": 9,
        "dataset": "trec",
        "language": "en",
    }
    lines = [
        json.dumps(record | {"context": f"Question: who?\nType: Person {n}", "all_classes": ["Place"], "_id": f"id{n}"})
        for n in range(3)
    ]
    (tmp_path / "trec.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--model", str(model_folder), "--data", str(tmp_path), "--datasets", "trec", "--presets", "keep09"]
    return [*arguments, "--scorers", "recency", "--run-dir", str(tmp_path / "run")]


def test_longbench_runs_by_its_protocol_and_goes_on_where_it_stopped(trec_arguments, tmp_path, capsys):
    arguments = trec_arguments
    command("longbench")([*arguments, "--limit", "2"])
    first = read_rows(tmp_path / "run" / "longbench.jsonl")
    assert [(row["item"], row["variant"]) for row in first] == [
        (item, variant) for item in ("id0", "id1") for variant in ("full", "recency keep09")
    ]
    command("longbench")(arguments)
    rows = read_rows(tmp_path / "run" / "longbench.jsonl")
    assert rows[:4] == first and len(rows) == 6
    assert "| trec | recency keep09 | 3 |" in capsys.readouterr().out
    with RowWriter(tmp_path / "run" / "longbench.jsonl", {}), pytest.raises(RuntimeError, match="is being written by"):
        command("longbench")(arguments)


def test_two_processes_share_a_longbench_run_and_their_rows_end_in_one_file(trec_arguments, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", str(project_root() / "benchmarks" / "longbench.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project_root())}
    ended = subprocess.run([*launch, *trec_arguments], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    path = tmp_path / "run" / "longbench.jsonl"
    together = {row["key"]: row for row in read_rows(path)}
    assert len(together) == 6 and [file.name for file in path.parent.glob("*.jsonl*")] == ["longbench.jsonl"]
    assert ended.stdout.count("| trec | full | 3 |") == 1, "one process prints"
    path.unlink()
    command("longbench")(trec_arguments)
    alone = {row["key"]: row for row in read_rows(path)}
    assert {key: row["prediction"] for key, row in alone.items()} == {
        key: row["prediction"] for key, row in together.items()
    }


def test_what_a_killed_shared_run_left_counts_as_done(trec_arguments, tmp_path):
    path = tmp_path / "run" / "longbench.jsonl"
    command("longbench")([*trec_arguments, "--limit", "2"])
    rows = read_rows(path)
    path.rename(path.with_name("longbench.share1.jsonl"))
    with RowWriter(path.with_name("longbench.share1.jsonl"), {}), pytest.raises(RuntimeError, match="share1"):
        command("longbench")(trec_arguments)
    command("longbench")(trec_arguments)
    assert read_rows(path)[:4] == rows and len(read_rows(path)) == 6
    assert not list(path.parent.glob("*share*"))


def test_the_rows_of_multi_news_that_are_kept_give_the_figures_that_the_documents_quote(capsys):
    command("longbench")(["--tables", "--run-dir", str(project_root() / "benchmarks" / "rows" / "multi_news-keep09")])
    printed = capsys.readouterr().out
    assert "| multi_news | SDTP keep09 | 196 | 16.80 | -1.03 | -1.70 | -0.37 |" in printed
    documents = [(project_root() / name).read_text(encoding="utf-8") for name in ("LOG.md", "docs/results.md")]
    assert "-1.03 [-1.70, -0.37]" in documents[0] and "1.0 of 17.8 points [0.4, 1.7] (n = 196)" in documents[1]
