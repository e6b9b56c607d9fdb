"""One notebook run by the runner: refused in words, logged, its stale rows forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import run_notebook

from sdtp_lib.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflow"


def run_one(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, WORKFLOW / "run_notebook.py", "notebooks/04_latency.ipynb", *arguments],
        env={**os.environ, "SDTP_ROOT": str(project)}, cwd=project,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_the_runner_refuses_before_a_kernel_starts(stand_in_project):
    project = stand_in_project("04_latency")
    started = time.monotonic()
    ended = run_one(project, "-p", "sed", "3")
    assert ended.returncode == 2 and "REFUSED  sed is no parameter of 04_latency" in ended.stderr
    assert time.monotonic() - started < 5 and not (project / "data").exists()


def test_a_failing_cell_is_named_at_the_end_of_the_log(stand_in_project):
    project = stand_in_project("04_latency")
    ended = run_one(project, "-p", "seed", "7", "-p", "fail_at", "[7]", "-p", "run_dir", "data/results/x")
    *_, failed, begins, what, parameters, copy = ended.stderr.strip().splitlines()
    assert ended.returncode == 1
    # The injected parameters are a cell of their own, after the parameters cell.
    assert failed == "FAILED  04_latency, cell 8"
    assert "begins with: if seed in fail_at" in begins and what.strip() == "ValueError: seed 7 fails on purpose"
    assert json.loads(parameters.partition(": ")[2])["seed"] == 7
    executed = project / copy.partition(": ")[2]
    assert "fails on purpose" in executed.read_text()
    assert len(read_rows(project / "data/results/x/04_latency.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "seed", "{"], "seed='{' is not a value as YAML writes one"),
        (["--parameters", "{"], "is not JSON"),
        (["--parameters", "[1]"], "is not an object"),
    ],
)
def test_values_that_cannot_be_read_are_refused_in_one_sentence(stand_in_project, capsys, arguments, sentence):
    project = stand_in_project("04_latency")
    assert run_notebook.main([str(project / "notebooks/04_latency.ipynb"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("REFUSED  ") and sentence in told


def changed_notebook(project: Path, change) -> None:
    path = project / "notebooks/04_latency.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def test_a_cell_in_which_the_kernel_died_is_named(stand_in_project):
    project = stand_in_project("04_latency")
    dies = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    changed_notebook(project, lambda notebook: notebook.cells.insert(3, nbformat.v4.new_code_cell(dies)))
    ended = run_one(project, "-p", "run_dir", "data/results/x")
    assert ended.returncode == 1
    told = ended.stderr[ended.stderr.index("FAILED") :]
    assert "FAILED  04_latency, cell 5" in told and "begins with: import os, signal" in told
    assert "the kernel died in this cell" in told and "ran out of memory" in told


def test_a_notebook_saved_with_a_kernel_of_another_machine_runs_and_one_in_another_language_is_refused(
    stand_in_project,
):
    project = stand_in_project("04_latency")
    changed_notebook(project, lambda n: n.metadata.kernelspec.update(name="my-conda-env", display_name="mine"))
    ended = run_one(project, "-p", "run_dir", "data/results/x")
    assert ended.returncode == 0, ended.stderr
    changed_notebook(project, lambda n: n.metadata.kernelspec.update(name="ir", language="R"))
    ended = run_one(project, "-p", "run_dir", "data/results/y")
    assert ended.returncode == 2 and "REFUSED  04_latency.ipynb is written in r" in ended.stderr
    assert not (project / "data/results/y").exists()


def test_what_a_notebook_prints_is_shown_and_kept(stand_in_project):
    project = stand_in_project("04_latency")
    ended = run_one(project, "-p", "run_dir", "data/results/x")
    assert ended.returncode == 0, ended.stderr
    log = (project / "data/results/x/executed/04_latency.log").read_text()
    for line in ("04_latency row 0", "04_latency row 2"):
        assert line in ended.stdout and line in log
    assert (project / "data/results/x/04_latency.done.json").exists()


def test_rows_of_other_parameters_are_forgotten_and_rows_of_the_same_ones_kept(tmp_path):
    rows, picture = tmp_path / "04_latency.jsonl", tmp_path / "04_speedup.png"
    picture.write_text("of the same")
    (tmp_path / ".stamps").mkdir()
    (tmp_path / "05_longbench.jsonl").write_text("another notebook's")
    rows.write_text("of a run that was stopped")
    (tmp_path / ".stamps/04_latency.begun").write_text("04_latency-aaa.json")
    run_notebook._forget_stale(tmp_path, "04_latency", tmp_path / ".stamps/04_latency-aaa.json")
    assert rows.exists() and picture.exists()
    run_notebook._forget_stale(tmp_path, "04_latency", tmp_path / ".stamps/04_latency-bbb.json")
    assert not rows.exists() and not picture.exists() and (tmp_path / "05_longbench.jsonl").exists()
