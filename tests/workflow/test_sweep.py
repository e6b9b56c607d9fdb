"""The plan of a sweep, and fingerprints: what is stale, and what is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
import sweep
from notebook_parameters import ParameterError

ROOT = Path(__file__).resolve().parents[2]


def plan(project: Path, **settings) -> list[sweep.Job]:
    return sweep.plan({"run": "r", **settings}, project)


LONGBENCH = 'keep_ratio: float = 0.9  # share kept\npruners: str = ""  # folder\n'


def sweep_project(stand_in_project) -> Path:
    return stand_in_project("01_saliency", "02_training", "05_longbench", longbench=LONGBENCH)


def test_an_axis_counts_only_where_it_matters(stand_in_project):
    jobs = plan(sweep_project(stand_in_project), sweep={"seed": [0, 1], "keep_ratio": [0.9, 0.8, 0.7]})
    assert [sum(job.notebook == name for job in jobs) for name in ("01_saliency", "02_training", "05_longbench")] == [
        2,
        2,
        6,
    ]
    assert len({job.folder for job in jobs}) == 2 + 6
    assert all(job.parameters["run_dir"] == job.folder for job in jobs)


def test_what_a_notebooks_own_values_fix_no_axis_changes(stand_in_project):
    project = stand_in_project(
        "01_saliency", "02_training", "05_longbench", training=LONGBENCH.splitlines()[0] + "\n", longbench=LONGBENCH
    )
    jobs = plan(
        project,
        notebooks={"02_training": {"keep_ratio": 0.9}, "05_longbench": {"pruners": "{02_training}/pruners"}},
        sweep={"seed": [0, 1], "keep_ratio": [0.9, 0.8, 0.7]},
    )
    assert [job.parameters["keep_ratio"] for job in jobs if job.notebook == "02_training"] == [0.9, 0.9]
    assert sorted(job.parameters["keep_ratio"] for job in jobs if job.notebook == "05_longbench") == [
        0.7, 0.7, 0.8, 0.8, 0.9, 0.9,
    ]  # fmt: skip
    with pytest.raises(ParameterError, match="sweep: keep_ratio is fixed by each notebook that has it"):
        plan(project, notebooks={"02_training": {"keep_ratio": 0.9}}, sweep={"keep_ratio": [0.9, 0.8]})


def test_the_sweep_of_readme_trains_twice_and_measures_six_times(tmp_path):
    (text,) = re.findall(r"```yaml\n(run: my-sweep\n.*?)```", (ROOT / "docs" / "study.md").read_text(), re.S)
    (tmp_path / "mine.yaml").write_text(text)
    jobs = sweep.plan(sweep.read_settings(tmp_path / "mine.yaml"), ROOT)
    assert [sum(job.notebook == name for job in jobs) for name in ("02_training", "05_longbench")] == [2, 6]


def test_a_link_leads_into_the_folder_of_the_job_with_the_same_seed(stand_in_project):
    jobs = plan(
        sweep_project(stand_in_project),
        notebooks={"02_training": None, "05_longbench": {"pruners": "{02_training}/pruners"}},
        sweep={"seed": [0, 1], "keep_ratio": [0.9, 0.8]},
    )
    trained = {job.parameters["seed"]: job for job in jobs if job.notebook == "02_training"}
    for job in (job for job in jobs if job.notebook == "05_longbench"):
        source = trained[job.parameters["seed"]]
        assert job.parameters["pruners"] == f"{source.folder}/pruners" and job.builds_on == (source.stamp,)


def test_an_axis_upstream_separates_what_builds_on_it(stand_in_project):
    project = stand_in_project(
        "02_training", "05_longbench", training="epochs: int = 1  # epochs\n", longbench=LONGBENCH
    )
    jobs = plan(
        project,
        notebooks={"02_training": None, "05_longbench": {"pruners": "{02_training}/pruners"}},
        sweep={"epochs": [1, 2]},
    )
    assert len({job.folder for job in jobs if job.notebook == "05_longbench"}) == 2


def test_one_option_of_an_axis_may_set_several_parameters(stand_in_project):
    jobs = plan(
        sweep_project(stand_in_project),
        sweep={"case": {"a/b": {"seed": 1, "keep_ratio": 0.5}, "c": {"seed": 2, "keep_ratio": 0.6}}},
    )
    ours = [job for job in jobs if job.notebook == "05_longbench"]
    assert [(job.cell, job.parameters["keep_ratio"]) for job in ours] == [("case-a-b", 0.5), ("case-c", 0.6)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"common": {"sed": 1}}, "common: sed is no parameter of any notebook"),
        ({"sweep": {"keep_rato": [1]}}, "sweep: keep_rato is no parameter"),
        ({"notebooks": {"06_more": {}}}, "there is no notebook 06_more"),
        ({"notebooks": {"05_longbnech": {}}}, "there is no notebook 05_longbnech: did you mean 05_longbench[?]"),
        ({"sweep": {"keep_rato": [1]}}, "did you mean keep_ratio[?]"),
        ({"notebooks": {"05_longbench": {"sed": 1}}}, "05_longbench: sed is no parameter"),
        ({"sweep": {"keep_ratio": [0.9, 0.0]}}, r"05_longbench \[keep_ratio-0.0\]: keep_ratio=0.0 is outside"),
        ({"notebooks": {"05_longbench": {"pruners": "{02_training}/p"}}}, "builds on 02_training, which does not run"),
        ({"sweep": {"seed": 3}}, "give a list of values"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(stand_in_project, settings, sentence):
    with pytest.raises(ParameterError, match=sentence):
        plan(sweep_project(stand_in_project), **settings)


def test_an_unknown_section_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("sweeps: {}\n")
    with pytest.raises(ParameterError, match="unknown section.*sweeps"):
        sweep.read_settings(tmp_path / "a.yaml")


def test_a_run_is_a_plain_folder_name(tmp_path):
    (tmp_path / "a.yaml").write_text("run: ../elsewhere\n")
    with pytest.raises(ParameterError, match="not a folder name"):
        sweep.read_settings(tmp_path / "a.yaml")


def fingerprint(project: Path, **settings) -> str:
    for cached in (sweep._module_imports, sweep._module_hash, sweep._file_hash):
        cached.cache_clear()
    return plan(project, **settings)[-1].fingerprint


def edit(path: Path, cell: int, old: str, new: str) -> None:
    notebook = nbformat.read(path, 4)
    assert old in notebook.cells[cell].source
    notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)
    nbformat.write(notebook, path)


def test_a_fingerprint_follows_code_parameters_and_inputs(stand_in_project):
    project = stand_in_project("05_longbench", longbench=LONGBENCH)
    path = project / "notebooks/05_longbench.ipynb"
    (project / "data").mkdir()
    (project / "data/pruners.bin").write_text("one")
    settings = {"notebooks": {"05_longbench": {"pruners": "data/pruners.bin"}}}
    seen = [fingerprint(project, **settings)]
    (project / "data/pruners.bin").write_text("two")
    seen.append(fingerprint(project, **settings))
    edit(path, 4, "range(3)", "range(4)")
    seen.append(fingerprint(project, **settings))
    settings["common"] = {"seed": 5}
    seen.append(fingerprint(project, **settings))
    assert len(set(seen)) == 4


def test_a_fingerprint_follows_what_another_run_has_written_and_not_what_this_one_writes(stand_in_project):
    """All of data/results was left out: a study stayed "done" when the rows that it shows came or changed."""
    project = stand_in_project("05_longbench", longbench=LONGBENCH)
    rows = {"05_longbench": {"pruners": "data/results/mine/pruners.bin"}}
    seen = [fingerprint(project, notebooks=rows)]
    (project / "data/results/mine").mkdir(parents=True)
    for content in ("one", "two"):
        (project / "data/results/mine/pruners.bin").write_text(content)
        seen.append(fingerprint(project, notebooks=rows))
    assert len(set(seen)) == 3
    assert len({fingerprint(project, run="mine", notebooks=rows), seen[0]}) == 1, "its own results name no job"


def test_a_fingerprint_ignores_comments_widgets_file_times_and_the_runs_name(stand_in_project):
    project = stand_in_project("05_longbench")
    path = project / "notebooks/05_longbench.ipynb"
    before = fingerprint(project)
    edit(path, 1, "NAME", "# a remark\nNAME")
    edit(path, -1, "raise SystemExit", "show_sliders()")
    os.utime(path, (1, 1))
    assert fingerprint(project) == before == fingerprint(project, run="other")


def test_a_fingerprint_follows_the_parts_of_the_library_that_are_reached(stand_in_project):
    project = stand_in_project("05_longbench")
    library = project / "sdtp_lib"
    library.mkdir()
    (library / "records.py").write_text("from sdtp_lib import deep\n")
    (library / "deep.py").write_text('"""Says."""\nVALUE = 1\n')
    (library / "apart.py").write_text("VALUE = 1\n")
    before = fingerprint(project)
    (library / "apart.py").write_text("VALUE = 2\n")
    (library / "deep.py").write_text('"""Says more."""\nVALUE = 1  # remark\n')
    assert fingerprint(project) == before
    (library / "deep.py").write_text('"""Says."""\nVALUE = 2\n')
    assert fingerprint(project) != before


def test_a_folder_of_the_library_is_reached_as_a_whole(stand_in_project):
    project = stand_in_project("05_longbench")
    for folder, name, code in (
        ("", "records", "def f():\n    from sdtp_lib.near import one\n"),
        ("near", "one", "VALUE = 1\n"),
        ("near", "other", "import sdtp_lib.far.away\n"),
        ("far", "__init__", "VALUE = 1\n"),
        ("far", "away", "VALUE = 1\n"),
        ("apart", "away", "VALUE = 1\n"),
    ):
        (project / "sdtp_lib" / folder).mkdir(parents=True, exist_ok=True)
        (project / "sdtp_lib" / folder / f"{name}.py").write_text(code)
    reached = sweep.reached(project / "notebooks/05_longbench.ipynb", project)
    assert set(reached) == {"records", "near.one", "near.other", "far.__init__", "far.away"}


def test_a_public_name_of_the_library_is_reached_where_it_is_defined(stand_in_project):
    reached = sweep.reached(ROOT / "notebooks/01_saliency.ipynb", ROOT)
    assert {"training.saliency", "pruning.engine", "models", "plots.style"} <= set(reached)
    assert not {name for name in reached if name.startswith(("latency", "explorer"))}


def test_what_builds_on_a_stale_job_is_stale(stand_in_project):
    project = sweep_project(stand_in_project)
    settings = {"notebooks": {"02_training": {}, "05_longbench": {"pruners": "{02_training}/pruners"}}}
    before = {job.notebook: job.fingerprint for job in plan(project, **settings)}
    edit(project / "notebooks/02_training.ipynb", 4, "range(3)", "range(4)")
    after = {job.notebook: job.fingerprint for job in plan(project, **settings)}
    assert all(before[name] != after[name] for name in before)
