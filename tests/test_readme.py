"""README does as it says: its snippets run as printed, from another folder; its YAML is planned; its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sweep

from sdtp_lib.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A snippet and, where a block of text comes next, what it prints.
SNIPPETS = re.findall(r"```python\n(.*?)```(?:\n\n[^\n`]*\n\n```text\n(.*?)```)?", README, re.S)
STUDY = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
SETS = re.findall(r"```yaml\n(.*?)```", README + STUDY, re.S)


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize(("program", "prints"), SNIPPETS, ids=[f"snippet {n}" for n, _ in enumerate(SNIPPETS)])
def test_a_snippet_runs_as_printed_from_another_folder(program, prints, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SDTP_PRUNERS": str(tmp_path / "none")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip(), "a snippet shows something"
    if prints:
        assert ended.stdout == prints


def test_the_first_snippet_is_told_what_it_prints():
    assert SNIPPETS[0][1].count("\n") == 2


@pytest.mark.parametrize("text", SETS, ids=[text.partition("\n")[0] for text in SETS])
def test_a_parameter_set_is_planned(text, tmp_path):
    (tmp_path / "set.yaml").write_text(text)
    jobs = sweep.plan(sweep.read_settings(tmp_path / "set.yaml"), ROOT)
    assert jobs and all(job.parameters["run_dir"].startswith(f"data/results/{text.split()[1]}") for job in jobs)


def test_every_command_is_shown_and_none_that_is_not_there():
    assert set(re.findall(r"python -m sdtp_lib (\w+)", README)) == set(COMMANDS)


def test_the_set_of_ones_own_model_has_six_lines_and_measures_with_what_it_trains(tmp_path):
    (text,) = [text for text in SETS if text.startswith("run: my-model")]
    assert len(text.splitlines()) == 6 and "a file of six lines" in README
    (tmp_path / "set.yaml").write_text(text)
    jobs = {job.notebook: job for job in sweep.plan(sweep.read_settings(tmp_path / "set.yaml"), ROOT)}
    for name in ("04_latency", "05_longbench"):
        assert jobs[name].builds_on == (jobs["02_training"].stamp,)
        assert jobs[name].parameters["pruners"] == "data/results/my-model/pruners"


@pytest.mark.parametrize(("preset", "percent"), [("keep09", 0), ("keep08", 1), ("keep07", 2)])
def test_what_the_presets_leave_for_the_last_layer_is_told_rightly(preset, percent):
    from sdtp_lib import PruningConfig, budget

    sentence = r"layer gets (\d+) % of a long prompt.s tokens; under `keep08` it is (\d+) %, under `keep07`\s(\d+) %"
    told = re.search(sentence, README)
    config = PruningConfig.preset(preset, 30)
    assert len(config.layers) == 9
    left = budget.tokens_per_layer(config, 30, 4096)[-1] / 4096
    assert int(told[percent + 1]) == int(100 * left)


def test_how_many_families_and_which_releases_are_those_of_the_sweeps_page():
    support = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    runs = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d.*", support, re.M)]
    newest, oldest = runs[0], runs[-1]
    works, total = int(newest[4]), sum(map(int, newest[2:]))
    release = lambda run: ".".join(run[0].split(".")[:2])  # noqa: E731
    (ours,) = [line for line in README.splitlines() if line.startswith("| this |")]
    assert f"| {works} of {total} |" in ours and f"transformers {release(oldest)} to {release(newest)} |" in ours
