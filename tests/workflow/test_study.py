"""The whole way through snakemake: each job once, kills survived, failures told at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_notebook
import sweep
import yaml

from sdtp_lib.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflow"


def study(project: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, WORKFLOW / "study.py", *arguments],
        env={**os.environ, "SDTP_ROOT": str(project)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def write_set(project: Path, **settings) -> str:
    (project / "set.yaml").write_text(yaml.safe_dump(settings))
    return str(project / "set.yaml")


@pytest.mark.slow
def test_a_study_runs_once_and_then_only_what_is_stale(stand_in_project):
    project = stand_in_project("01_saliency", "04_latency", latency="repeats: int = 1  # times\n")
    settings = {"run": "r", "notebooks": {"01_saliency": {}, "04_latency": {"repeats": 2}}}
    first = study(project, "--params", write_set(project, **settings))
    assert first.returncode == 0, first.stderr
    assert "2 of 2 notebook runs to do" in first.stdout
    lines = [line for line in first.stdout.splitlines() if " ... " in line]
    assert [line.rpartition(" ... ")[0] for line in lines] == ["01_saliency  defaults", "04_latency  repeats=2"]
    said = first.stdout + first.stderr
    assert not first.stderr, "no banner"
    assert "SNAKEMAKE" not in said and "Building DAG" not in said and "04_latency row 2" not in said
    (log,) = (project / "data/results/r/executed").glob("04_latency-*.log")
    assert "04_latency row 2" in log.read_text()

    for path in project.rglob("*"):  # as a copy or a fresh clone would have it
        os.utime(path, (time.time(), time.time()))
    started = time.monotonic()
    assert "nothing to do: all 2" in study(project, "--params", write_set(project, **settings)).stdout
    assert time.monotonic() - started < 8

    settings["notebooks"]["04_latency"]["repeats"] = 3
    third = study(project, "--params", write_set(project, **settings))
    assert "1 of 2 notebook runs to do: 04_latency" in third.stdout and "01_saliency" not in third.stdout
    assert len(list((project / "data/results/r/executed").glob("04_latency-*.ipynb"))) == 1, "the stale copy is gone"


@pytest.mark.slow
def test_one_failure_lets_the_rest_go_on_and_is_told_at_the_end(stand_in_project):
    project = stand_in_project("04_latency")
    params = write_set(project, run="r", common={"fail_at": [1]}, sweep={"seed": [0, 1, 2]})
    ended = study(project, "--params", params)
    assert ended.returncode != 0
    tail = ended.stderr[ended.stderr.rindex("FAILED  04_latency") :]
    assert "cell 8" in tail and '"seed": 1' in tail and "2 of 3 done" in tail
    done = sorted(path.parent.name for path in project.rglob("*.done.json"))
    assert done == ["seed-0", "seed-2"]
    to_do = [
        job.cell for job in sweep.plan(sweep.read_settings(Path(params)), project) if not (project / job.stamp).exists()
    ]
    assert to_do == ["seed-1"]


@pytest.mark.slow
def test_a_study_killed_half_way_goes_on_where_it_stopped(stand_in_project):
    project = stand_in_project("04_latency")
    params = write_set(project, run="r", common={"pause_s": 2.0})
    rows = project / "data/results/r/04_latency.jsonl"
    running = subprocess.Popen(
        [sys.executable, WORKFLOW / "study.py", "--params", params],
        env={**os.environ, "SDTP_ROOT": str(project)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (rows.exists() and rows.read_text().count("\n") == 1):
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.05)
    # Snakemake and the study's door, but not the runner nor the kernel: those have to notice by themselves.
    os.kill(snakemake_below(running.pid), signal.SIGKILL)
    running.kill()
    running.wait()
    assert any((project / ".snakemake/locks").iterdir()), "the kill left snakemake's lock"
    first_row = read_rows(rows)[0]

    ended = study(project, "--params", write_set(project, run="r", common={"pause_s": 2.0}))
    assert ended.returncode == 0, ended.stderr
    kept = read_rows(rows)
    assert [row["key"] for row in kept] == ["0", "1", "2"] and kept[0] == first_row


@pytest.mark.slow
def test_seeds_come_in_the_order_of_their_list_from_a_path_with_blanks(stand_in_project):
    project = stand_in_project("04_latency")
    (project / "my sets").mkdir()
    params = project / "my sets" / "a b.yaml"
    params.write_text(yaml.safe_dump({"run": "r", "sweep": {"seed": [3, 1, 2]}}))
    dry = study(project, "--params", str(params), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    plan_lines = [f"to do 04_latency [seed-{seed}]  seed={seed}" for seed in (3, 1, 2)]
    assert dry.stdout.splitlines() == [*plan_lines, "3 of 3 notebook runs to do; nothing was run"]
    ended = study(project, "--params", str(params))
    assert ended.returncode == 0, ended.stderr
    lines = [line.rpartition(" ... ")[0] for line in ended.stdout.splitlines() if " ... " in line]
    assert lines == [line.removeprefix("to do ") for line in plan_lines]


def snakemake_below(pid: int) -> int:
    import psutil

    return next(child.pid for child in psutil.Process(pid).children() if "snakemake" in " ".join(child.cmdline()))


def test_an_unknown_set_is_refused_with_the_known_ones():
    ended = study(ROOT, "--params", "embeded")
    assert ended.returncode == 2
    assert "there is no parameter set embeded: did you mean embedded? There are embedded" in ended.stderr


def test_a_set_with_a_version_in_its_name_is_found_by_that_name():
    """What stands behind the dot of gpu-qwen2.5-7b was taken for a file's ending."""
    ended = study(ROOT, "--params", "gpu-qwen2.5-7b", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "to do 01_saliency  model_name=Qwen/Qwen2.5-7B-Instruct" in ended.stdout


def test_a_kernels_threads_wait_asleep_unless_the_user_says_how():
    """On a busy machine two spinning threads took minutes for a prefill of seconds."""
    unsaid, said = {}, {"OMP_WAIT_POLICY": "ACTIVE"}
    for environment in (unsaid, said):
        run_notebook._wait_asleep(environment)
    assert int(unsaid["GOMP_SPINCOUNT"]) <= 10_000 and said == {"OMP_WAIT_POLICY": "ACTIVE"}
