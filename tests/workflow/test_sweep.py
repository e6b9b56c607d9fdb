"""Parameters are checked before a kernel starts; a sweep runs each job once, survives kills, and says what failed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import notebook_parameters
import papermill
import pytest
import run_notebook
import study as front_door
import sweep
import yaml
from notebook_parameters import ParameterError, check, matches, parameters_of

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


def plan(project: Path, **settings) -> list[sweep.Job]:
    return sweep.plan({"run": "r", **settings}, project)


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (1, "int", True),
        (True, "int", False),
        (1.5, "int", False),
        (1, "float", True),
        ("1", "float", False),
        (True, "float", False),
        ("x", "str", True),
        (None, "str", False),
        (None, "str | None", True),
        (True, "bool", True),
        (0, "bool", False),
        ([1, 2], "list[int]", True),
        ([1, "2"], "list[int]", False),
        ([1, 2], "tuple[int, ...]", True),
        ([1, 2, 3], "tuple[int, int]", False),
        (3, "list[int]", False),
        ("a", "Literal['a', 'b']", True),
        ("c", "Literal['a', 'b']", False),
        ({"a": 1}, "dict[str, float]", True),
        ({"a": "b"}, "dict[str, float]", False),
        ([0.9, [0.8]], "list[float | list[float]]", True),
    ],
)
def test_a_value_is_held_against_its_annotation(value, annotation, fits):
    assert matches(value, annotation) is fits


def test_parameters_have_type_default_and_help(stand_in_project):
    project = stand_in_project("04_latency", latency="layers: tuple[int, ...] = (4, 7)  # pruned before these\n")
    layers = parameters_of(project / "notebooks" / "04_latency.ipynb")["layers"]
    assert (layers.annotation, layers.default, layers.help) == ("tuple[int, ...]", (4, 7), "pruned before these")


def test_our_reading_of_a_parameters_cell_is_papermills(stand_in_project):
    path = (
        stand_in_project("04_latency", latency="keep_ratio: float = 0.9  # share kept\n") / "notebooks/04_latency.ipynb"
    )
    theirs = papermill.inspect_notebook(path)
    ours = parameters_of(path)
    assert list(theirs) == list(ours)
    assert theirs["keep_ratio"]["inferred_type_name"] == ours["keep_ratio"].annotation == "float"
    assert theirs["keep_ratio"]["help"] == ours["keep_ratio"].help


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("derived: int = 2 * seed", "only literals"),
        ("seed = 1", "not `name: type = value`"),
        ("import os", "not `name"),
    ],
)
def test_a_parameters_cell_holds_annotated_literals_only(stand_in_project, line, reason):
    path = stand_in_project("04_latency", latency=line + "\n") / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError, match=reason):
        parameters_of(path)


PRUNING = (
    "keep_ratio: float = 0.9  # share kept\n"
    "layers: tuple[int, ...] = (4, 7)  # pruned before these\n"
    "preset: str = 'keep09'  # named setting\n"
    "model_name: str = 'embedded'  # model\n"
    "tasks: list[str] = ['needle']  # tasks\n"
    "label: str = 'removal'  # label\n"
    "pruners: str = ''  # pruners\n"
    "dtype: str = 'default'  # dtype\n"
    "recipe: str = 'sdtp'  # recipe\n"
)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keep_rato": 0.8}, "keep_rato is no parameter of 04_latency: did you mean keep_ratio[?] It has run_dir"),
        ({"keep_ratio": "much"}, "keep_ratio='much' is not of type float"),
        ({"seed": 1.5}, "seed=1.5 is not of type int"),
        ({"keep_ratio": 0}, r"keep_ratio=0 is outside \(0, 1\]"),
        ({"keep_ratio": 1.2}, r"keep_ratio=1.2 is outside"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan is not a finite number"),
        ({"layers": [0, 3]}, "layer 0"),
        ({"layers": [7, 4]}, "ascending"),
        ({"layers": [4, 30]}, "the model has 30 decoder layers"),
        ({"preset": "keep06"}, "preset='keep06' is unknown: did you mean keep09[?] Choose one of keep09"),
        ({"dtype": "flaot32"}, "dtype='flaot32' is unknown: did you mean float32[?]"),
        ({"recipe": "spdt"}, "recipe='spdt' is unknown: did you mean sdtp[?] Choose among sdtp, paper"),
        ({"pause_s": -1.0}, "pause_s=-1.0 is negative"),
        ({"tasks": ["needel"]}, "tasks='needel' is unknown: did you mean needle[?] Choose among needle, multi_key"),
        ({"label": "removals"}, "label='removals' is unknown: did you mean removal[?]"),
        ({"model_name": "./not-there"}, "model_name='./not-there': there is no such file or folder"),
        ({"pruners": "pruners/mine"}, "pruners='pruners/mine': there is no such .* smollm2-135m-instruct"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_sentence(stand_in_project, given, sentence):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError, match=sentence):
        check(path, given)


def test_training_parameters_are_checked_by_the_librarys_own_config(stand_in_project):
    lines = "learning_rate: float = 1e-3  # of AdamW\nepochs: float = 2.0  # passes\n"
    path = stand_in_project("02_training", training=lines) / "notebooks/02_training.ipynb"
    check(path, {"learning_rate": 1e-4})
    with pytest.raises(ParameterError, match="learning_rate"):
        check(path, {"learning_rate": 0.0})


def test_the_number_of_passes_alone_tells_that_a_notebook_trains(stand_in_project):
    path = stand_in_project("02_training", training="epochs: float = 2.0  # passes\n") / "notebooks/02_training.ipynb"
    with pytest.raises(ParameterError, match="epochs=0"):
        check(path, {"epochs": 0})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-3", 0.001),  # text, to YAML 1.1
        ("rate", "0.5", 0.5),
        ("rates", "[1e-3, 2e5]", [0.001, 200000.0]),
        ("mixed", "[0.9, [8e-1]]", [0.9, [0.8]]),
        ("word", "123", "123"),
        ("word", "no", "no"),
        ("word", "1e-3", "1e-3"),
        ("word", "", ""),
        ("seed", "7", 7),
    ],
)
def test_a_value_of_the_command_line_is_read_as_its_annotation_means_it(stand_in_project, name, text, value):
    lines = (
        "rate: float = 0.1  # a number\nrates: list[float] = [0.1]  # numbers\nword: str = ''  # a text\n"
        "mixed: list[float | list[float]] = [0.9]  # numbers of stages\n"
    )
    path = stand_in_project("04_latency", latency=lines) / "notebooks/04_latency.ipynb"
    assert check(path, {name: notebook_parameters.read_value(path, name, text)})[name] == value


def test_a_sweep_writes_small_numbers_as_everybody_does(stand_in_project):
    project = stand_in_project("04_latency", latency="rate: float = 0.1  # a number\n")
    (project / "set.yaml").write_text("run: r\nnotebooks:\n  04_latency:\n    rate: 1e-3\n")
    (job,) = sweep.plan(sweep.read_settings(project / "set.yaml"), project)
    assert job.parameters["rate"] == 0.001


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("run: [", "is not YAML"),
        ("- a\n", "holds no sections"),
        ("3: a\n", "unknown section.*'3'"),
        ("common: 3\n", "common holds 3: give names with values"),
        ("sweep: [seed]\n", r"sweep holds \['seed'\]: give names"),
        ("notebooks: [04_latency]\n", "notebooks holds .*: give names"),
        ("notebooks: {04_latency: 5}\n", "04_latency holds 5: give names"),
    ],
)
def test_a_parameter_set_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "set.yaml").write_text(content)
    with pytest.raises(ParameterError, match=f"set.yaml:? {sentence}") as caught:
        sweep.read_settings(tmp_path / "set.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "sentence"), [("cores: [", "config.yaml is not YAML"), ("- a", "mine holds no")])
def test_a_profile_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(content)
    with pytest.raises(ParameterError, match=sentence):
        front_door.on_slurm(str(tmp_path / "mine"))


def test_every_fault_is_named_at_once(stand_in_project):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError) as error:
        check(path, {"keep_rato": 1, "seed": "x"})
    assert "keep_rato" in str(error.value) and "seed" in str(error.value)


def test_a_local_models_layers_are_read_from_its_folder(stand_in_project, tmp_path):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    with pytest.raises(ParameterError, match="the model has 6 decoder layers"):
        check(path, {"model_name": str(tmp_path)})


@pytest.mark.embedded
def test_the_embedded_models_layers_are_known_rightly(embedded):
    model, _ = embedded
    assert {"embedded": model.config.num_hidden_layers} == notebook_parameters.KNOWN_LAYERS


def test_describe_lists_every_parameter_with_its_help(stand_in_project):
    project = stand_in_project("04_latency", latency=PRUNING)
    text = notebook_parameters.describe([project / "notebooks/04_latency.ipynb"])
    assert "04_latency" in text and "tuple[int, ...]  (4, 7)" in text and "share kept" in text


# --- the plan of a sweep --------------------------------------------------------------------------------------------

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


# --- fingerprints ---------------------------------------------------------------------------------------------------


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


# --- the runner -----------------------------------------------------------------------------------------------------


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


# --- the whole way through snakemake --------------------------------------------------------------------------------


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


def test_a_kernels_threads_wait_asleep_unless_the_user_says_how():
    """On a busy machine two spinning threads took minutes for a prefill of seconds."""
    unsaid, said = {}, {"OMP_WAIT_POLICY": "ACTIVE"}
    for environment in (unsaid, said):
        run_notebook._wait_asleep(environment)
    assert int(unsaid["GOMP_SPINCOUNT"]) <= 10_000 and said == {"OMP_WAIT_POLICY": "ACTIVE"}
