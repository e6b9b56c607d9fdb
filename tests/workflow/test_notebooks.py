"""The notebooks are thin, clean and alike; each runs headless with the quick parameters and refuses impossible ones."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import sweep
from notebook_parameters import check, code_lines, parameters_of, source_of, tags_of

from sdtp_lib.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETER_SETS = sorted((ROOT / "workflow" / "params").glob("*.yaml"))
LONGEST_CELL = 25
# What belongs into the library: training, timing, hooks.
LOOPS_OVER = re.compile(r"\.backward\(|\.step\(|zero_grad|perf_counter|time\.time\(|synchronize\(|register_\w*hook")
WIDGETS = re.compile(r"\b(ipywidgets|sdtp_lib\.explorer\.widgets|interact|widgets\.\w+\()")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def trees(path: Path) -> list[ast.Module]:
    return [ast.parse(code_lines(source_of(cell))) for cell in code_cells(path)]


def test_the_five_notebooks_of_the_study_are_there():
    names = {path.stem for path in NOTEBOOKS}
    assert {"01_saliency", "02_training", "03_pruning", "04_latency", "05_longbench"} <= names


@each_notebook
def test_a_notebook_is_valid_and_names_a_kernel_that_everybody_has(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_a_notebook_is_committed_without_outputs(path):
    assert not [cell for cell in code_cells(path) if cell["outputs"] or cell["execution_count"]]
    command = [sys.executable, "-m", "nbstripout", "--keep-id", "--verify", str(path)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, f"run nbstripout {path.name}: {verified.stdout}"


def test_cells_pass_the_linter():
    linted = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "notebooks"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout


@each_notebook
def test_a_notebook_opens_with_its_question(path):
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown" and source_of(first).startswith("# ")


@each_notebook
def test_cells_are_short(path):
    long = [
        source_of(cell).splitlines()[0] for cell in code_cells(path) if len(source_of(cell).splitlines()) > LONGEST_CELL
    ]
    assert not long, f"over {LONGEST_CELL} lines: {long}"


@each_notebook
def test_a_notebook_holds_no_class_and_few_small_functions(path):
    nodes = [node for tree in trees(path) for node in ast.walk(tree)]
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert all(node.end_lineno - node.lineno < 15 for node in functions)
    headless = [cell for cell in code_cells(path) if "skip-execution" not in tags_of(cell)]
    assert sum(source_of(cell).count("def ") for cell in headless) <= 2, "move them into the library"


@each_notebook
def test_no_loop_trains_or_times(path):
    for tree in trees(path):
        for loop in (node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))):
            assert not LOOPS_OVER.search(ast.unparse(loop)), ast.unparse(loop)


@each_notebook
def test_every_parameter_is_annotated_and_explained_and_its_default_possible(path):
    parameters = parameters_of(path)
    assert {"run_dir", "seed", "model_name"} <= set(parameters)
    unexplained = [name for name, parameter in parameters.items() if len(parameter.help) < 5]
    assert not unexplained, f"no comment on {unexplained}"
    assert not parameters["run_dir"].default.startswith("/")
    check(path, {})
    check(path, {name: parameter.default for name, parameter in parameters.items()})


@each_notebook
def test_widgets_are_the_last_cells_and_left_out_of_a_headless_run(path):
    cells = code_cells(path)
    skipped = [index for index, cell in enumerate(cells) if "skip-execution" in tags_of(cell)]
    assert skipped == list(range(len(cells) - len(skipped), len(cells))), "tagged cells come last"
    for index, cell in enumerate(cells):
        if index not in skipped:
            shown = [line for line in source_of(cell).splitlines() if WIDGETS.search(line)]
            assert not [line for line in shown if "import" not in line], f"widgets outside the tagged cells: {shown}"


@each_notebook
def test_no_path_of_one_machine_and_no_install_in_a_cell(path):
    text = "\n".join(source_of(cell) for cell in code_cells(path))
    assert not re.search(r"""["'](/home|/root|/work|/Users|[A-Z]:\\)""", text)
    assert not re.search(r"^\s*[!%]\s*(pip|conda)", text, re.M)


@each_notebook
def test_a_notebook_asserts_what_must_hold(path):
    assert [node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", PARAMETER_SETS, ids=lambda path: path.stem)
def test_every_parameter_set_fits_the_notebooks(path):
    jobs = sweep.plan(sweep.read_settings(path), ROOT)
    assert jobs and len({job.stamp for job in jobs}) == len(jobs)


def test_the_large_sets_are_of_todays_models_and_of_the_papers():
    large = {path.stem: sweep.read_settings(path) for path in PARAMETER_SETS if path.stem.startswith("gpu-")}
    assert all(name == settings["run"] for name, settings in large.items())
    assert {settings["common"]["model_name"] for settings in large.values()} == {
        "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2-7B-Instruct",
        "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-hf", "bigscience/bloom-7b1",
    }  # fmt: skip


def test_the_default_set_runs_every_notebook_once():
    jobs = sweep.plan(sweep.read_settings(ROOT / "workflow/params/embedded.yaml"), ROOT)
    assert [job.notebook for job in jobs] == [path.stem for path in NOTEBOOKS]


# --- executed ------------------------------------------------------------------------------------------------------


def tree_state() -> str:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return status.stdout


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(1500)
def test_every_notebook_runs_with_the_quick_parameters():
    run = "quick-test"
    folder = ROOT / "data" / "results" / run
    shutil.rmtree(folder, ignore_errors=True)
    before = tree_state()
    ended = subprocess.run(
        [sys.executable, "workflow/study.py", "--params", "quick", "--run", run],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    for path in NOTEBOOKS:
        (executed,) = folder.rglob(f"executed/{path.stem}-*.ipynb")
        outputs = [output for cell in code_cells(executed) for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"]
        kinds = {kind for output in outputs for kind in output.get("data", {})}
        assert kinds & {"image/png", "image/svg+xml"}, f"{path.stem} shows no picture"
        rows = read_rows(next(folder.rglob(f"{path.stem}.jsonl")))
        assert rows and {"schema_version", "key", "kind", "commit", "device", "model", "seed"} <= set(rows[0])
    assert tree_state() == before, "a run leaves the work tree as it was"


def impossible_value(path: Path) -> dict[str, str] | None:
    parameters = parameters_of(path)
    for name, wrong in (("keep_ratio", "0"), ("keep_ratios", "[0.0]"), ("preset", "keep06"), ("presets", "[keep06]")):
        if name in parameters:
            return {name: wrong}
    return None


@pytest.mark.slow
@each_notebook
def test_bare_papermill_also_fails_on_an_impossible_value_before_the_model_is_loaded(path, tmp_path):
    wrong = impossible_value(path)
    if wrong is None:
        pytest.skip("no pruning parameter")
    (name, value), executed = next(iter(wrong.items())), tmp_path / "executed.ipynb"
    ended = subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(executed), "-y", f"{{{name}: {value}}}",
         "-p", "run_dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"},
    )  # fmt: skip
    assert ended.returncode != 0
    assert "ValueError" in ended.stderr, ended.stderr[-1500:]
    run_cells = [cell for cell in code_cells(executed) if cell["execution_count"]]
    assert not [cell for cell in run_cells[:-1] if "load_model(" in source_of(cell)], "checked too late"
