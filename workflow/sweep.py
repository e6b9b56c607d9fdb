"""A sweep as a list of jobs: which notebook runs with which parameters, in which folder, after which others.

A parameter set (workflow/params/*.yaml) names a run, values for all notebooks (`common`), values for one (`notebooks`)
and axes (`sweep`). An axis counts for a notebook that has such a parameter and whose own values do not fix it, and for
every notebook that builds on one: ``02_training: {layers: [4, 10]}`` trains once under a sweep over layers.
``"{02_training}/pruners"`` is a path in the folder of the job built on.

Every job has a fingerprint of what its results follow from: the notebook's code, its parameters, the parts of the
library that it reaches, the files that it reads, the fingerprints that it builds on. A part is a folder of the library,
or a module beside the folders; a part is reached as a whole. Staleness is a question of fingerprints,
never of file times.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from notebook_parameters import (
    ParameterError,
    check,
    code_lines,
    load_notebook,
    meant,
    parameters_of,
    source_of,
    tags_of,
    words,
)

from sdtp_lib.shipped import shipped_pruners

LINK = re.compile(r"\{(\d\d_\w+)\}")
# The files of a job. Snakemake wants the same wildcards in outputs and logs, so these hold the fingerprint.
DONE = "{folder}/{notebook}.done.json"
STAMP = "{folder}/.stamps/{notebook}-{fingerprint}.json"
EXECUTED = "{folder}/executed/{notebook}-{fingerprint}.ipynb"
SECTIONS = {"run", "common", "notebooks", "sweep"}
# What a notebook needs of another one's run folder without naming it in a parameter.
BUILDS_ON = {"02_training": ("01_saliency",)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One execution of one notebook."""

    notebook: str
    cell: str  # which combination of the axes, "" where there is one only
    folder: str  # relative to the root; the notebook's `run_dir`
    parameters: dict[str, Any]  # what is injected, `run_dir` included
    builds_on: tuple[str, ...]  # stamps
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.notebook} [{self.cell}]" if self.cell else self.notebook

    @property
    def line(self) -> str:
        """Name and parameters, as a person reads them."""
        given = {name: value for name, value in self.parameters.items() if name != "run_dir"}
        return f"{self.name}  {words(given)}"

    @property
    def rule(self) -> str:
        """The notebook's name without its number: ``latency`` for ``04_latency``."""
        return self.notebook.partition("_")[2]

    @property
    def parameters_json(self) -> str:
        """The injected parameters as the runner takes them."""
        return json.dumps(self.parameters)

    @property
    def done(self) -> str:
        """The notebook's own summary, which it writes last."""
        return DONE.format(folder=self.folder, notebook=self.notebook)

    @property
    def stamp(self) -> str:
        """Written by the runner after success; its name holds the fingerprint, so that stale results have none."""
        return STAMP.format(folder=self.folder, notebook=self.notebook, fingerprint=self.fingerprint)

    @property
    def executed(self) -> str:
        """The executed copy, kept when a cell fails."""
        return EXECUTED.format(folder=self.folder, notebook=self.notebook, fingerprint=self.fingerprint)

    @property
    def log(self) -> str:
        """What the notebook printed."""
        return self.executed.removesuffix(".ipynb") + ".log"


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, {} where it is empty; one that is none is refused in one sentence."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path.name} is not YAML: {' '.join(str(error).split())}.") from None


def read_settings(path: Path, run: str | None = None) -> dict[str, Any]:
    """A parameter set; an unknown section is refused by name."""
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ParameterError(f"{path.name} holds no sections: known are {sorted(SECTIONS)}.")
    unknown = sorted(set(map(str, settings)) - SECTIONS)
    if unknown:
        raise ParameterError(f"{path.name}: unknown section(s) {unknown}: {meant(unknown[0], sorted(SECTIONS))}")
    for section in sorted(SECTIONS - {"run"}):
        _refuse_other_than_names(settings.get(section), f"{path.name}: {section}")
    for notebook, values in (settings.get("notebooks") or {}).items():
        _refuse_other_than_names(values, f"{path.name}: {notebook}")
    settings["run"] = str(run or settings.get("run") or path.stem)
    if not re.fullmatch(r"[\w.=-]+", settings["run"]):
        raise ParameterError(f"run={settings['run']!r} is not a folder name: letters, digits, - _ . = only.")
    return settings


def _refuse_other_than_names(values: Any, what: str) -> None:
    if values is not None and not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
        raise ParameterError(f"{what} holds {values!r}: give names with values, one `name: value` per line.")


def plan(settings: Mapping[str, Any], root: Path) -> list[Job]:
    """The jobs of a sweep, each after those that it builds on.

    Parameters
    ----------
    settings
        As `read_settings` returns them.
    root
        The folder with ``notebooks`` in it; paths in parameters are relative to it.

    Raises
    ------
    ParameterError
        Everything that is wrong with names, types and values, before anything runs.
    """
    paths = {path.stem: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    given = {name: values or {} for name, values in (settings.get("notebooks") or dict.fromkeys(paths)).items()}
    missing = sorted(set(given) - set(paths))
    if missing:
        raise ParameterError(f"there is no notebook {', '.join(missing)}: {meant(missing[0], paths)}")
    known = {name: set(parameters_of(paths[name])) for name in given}
    axes = _axes(settings.get("sweep") or {})
    open_to_axes = {name: known[name] - set(given[name]) for name in given}
    _refuse_unused(settings, axes, known, open_to_axes)

    jobs: dict[tuple[str, str], Job] = {}
    reach: dict[str, list[str]] = {}  # the axes that a notebook's jobs differ in
    for name in sorted(given):
        own = {key: value for key, value in (settings.get("common") or {}).items() if key in known[name]} | given[name]
        sources = sorted({*BUILDS_ON.get(name, ()), *LINK.findall(json.dumps(own))} & set(given))
        reach[name] = [
            axis for axis in axes if _counts(axes[axis], open_to_axes[name]) or any(axis in reach[s] for s in sources)
        ]
        for choice in itertools.product(*(axes[axis] for axis in reach[name])):
            chosen = dict(zip(reach[name], choice, strict=True))
            values = dict(own)
            for axis, option in chosen.items():
                values |= {key: value for key, value in axes[axis][option].items() if key in open_to_axes[name]}
            upstream = {source: jobs[source, _cell(chosen, reach[source], axes)] for source in sources}
            job = _job(name, _cell(chosen, reach[name], axes), values, upstream, settings["run"], root)
            jobs[name, job.cell] = job
    return list(jobs.values())


def _axes(sweep: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """axis -> option's name -> parameters; a plain list of values is an axis over the parameter of its name."""
    axes = {}
    for axis, options in sweep.items():
        if isinstance(options, list):
            options = {_slug(value): {axis: value} for value in options}
        if not isinstance(options, dict) or not options or not all(isinstance(o, dict) for o in options.values()):
            raise ParameterError(f"sweep axis {axis!r}: give a list of values, or names with parameters each.")
        axes[axis] = {_slug(option): values for option, values in options.items()}
    return axes


def _slug(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "none"


def _counts(options: Mapping[str, Mapping[str, Any]], parameters: set[str]) -> bool:
    return any(parameters & set(values) for values in options.values())


def _cell(chosen: Mapping[str, str], reach: list[str], axes: Mapping[str, Any]) -> str:
    # Neither commas nor equal signs: snakemake writes wildcards as NAME=VALUE,NAME=VALUE when it sends a job away.
    return "__".join(f"{axis}-{chosen[axis]}" for axis in reach if len(axes[axis]) > 1)


def _refuse_unused(
    settings: Mapping[str, Any],
    axes: Mapping[str, Any],
    known: Mapping[str, set[str]],
    open_to_axes: Mapping[str, set[str]],
) -> None:
    anywhere = set().union(*known.values())
    swept = {name for options in axes.values() for values in options.values() for name in values}
    for section, names in (("common", set(settings.get("common") or {})), ("sweep", swept)):
        if names - anywhere:
            strange = sorted(names - anywhere)
            told = meant(strange[0], sorted(anywhere))
            raise ParameterError(f"{section}: {', '.join(strange)} is no parameter of any notebook that runs: {told}")
    if fixed := swept - set().union(*open_to_axes.values()):
        raise ParameterError(
            f"sweep: {', '.join(sorted(fixed))} is fixed by each notebook that has it: leave it out there or here."
        )


def _job(name: str, cell: str, values: dict[str, Any], upstream: dict[str, Job], run: str, root: Path) -> Job:
    folder = f"data/results/{run}" + (f"/{cell}" if cell else "")

    def linked(value: Any) -> Any:
        if isinstance(value, str):
            try:
                return LINK.sub(lambda match: upstream[match[1]].folder, value)
            except KeyError as missing:
                raise ParameterError(f"{name}: {value!r} builds on {missing.args[0]}, which does not run.") from None
        return [linked(item) for item in value] if isinstance(value, list) else value

    path = root / "notebooks" / f"{name}.ipynb"
    values = {key: linked(value) for key, value in values.items()}
    if "run_dir" in parameters_of(path):
        values["run_dir"] = folder
    try:
        everything = check(path, values)
        values = {name: everything[name] for name in values}
    except ParameterError as error:
        raise ParameterError(f"{name}{f' [{cell}]' if cell else ''}: {error}") from None
    content = {
        "code": code_of(path),
        "parameters": {key: value for key, value in everything.items() if key != "run_dir"},
        "library": {module: _module_hash(file) for module, file in sorted(reached(path, root).items())},
        "files": dict(_files_read(everything, root, f"data/results/{run}")),
        "builds on": {source: job.fingerprint for source, job in upstream.items()},
        "versions": [importlib.metadata.version(package).partition("+")[0] for package in ("torch", "transformers")],
    }
    return Job(name, cell, folder, values, tuple(job.stamp for job in upstream.values()), _digest(content))


def code_of(path: Path) -> list[str]:
    """What a notebook computes: its code cells without comments, and without those that a headless run leaves out."""
    cells = [cell for cell in load_notebook(path)["cells"] if cell["cell_type"] == "code"]
    return [_normal(source_of(cell)) for cell in cells if not {"skip-execution", "parameters"} & set(tags_of(cell))]


def _normal(source: str) -> str:
    return ast.dump(ast.parse(code_lines(source)))


def reached(path: Path, root: Path) -> dict[str, Path]:
    """The library's modules that a notebook's results hang on, by their dotted names.

    All modules of a folder as soon as one of them is imported, by the notebook or by a module that is reached, in
    functions too: who changes ``evaluation/`` makes stale what imports anything of it.
    """
    parts: dict[str, dict[str, Path]] = {}
    for file in (root / "sdtp_lib").rglob("*.py"):
        name = file.relative_to(root / "sdtp_lib").with_suffix("").parts
        parts.setdefault(name[0], {})[".".join(name)] = file
    parts.pop("__init__", None)
    pending = set().union(*(_imports(ast.parse(source)) for source in _importing(path)))
    done: set[str] = set()
    found: dict[str, Path] = {}
    while pending := (pending - done) & set(parts):
        part = pending.pop()
        done.add(part)
        found |= parts[part]
        pending |= set().union(*(_module_imports(file) for file in parts[part].values()))
    return found


def _importing(path: Path) -> Iterator[str]:
    for cell in load_notebook(path)["cells"]:
        if cell["cell_type"] == "code" and "skip-execution" not in tags_of(cell):
            yield code_lines(source_of(cell))


def _imports(tree: ast.AST) -> set[str]:
    """The parts of the library that are imported: ``sdtp_lib.data.tasks`` is of the part ``data``."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        found.update(_homes().get(rest[0], rest[0]) for first, *rest in names if first == "sdtp_lib" and rest)
    return found


@functools.cache
def _homes() -> dict[str, str]:
    """Which part a name of the lazy package comes from."""
    import sdtp_lib

    return {name: home.partition(".")[0] for name, home in sdtp_lib._HOME_OF.items()}


@functools.cache
def _module_imports(file: Path) -> set[str]:
    return _imports(ast.parse(file.read_text(encoding="utf-8")))


@functools.cache
def _module_hash(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        # Docstrings say; they do not compute.
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return _digest(ast.dump(tree))


def _files_read(values: Mapping[str, Any], root: Path, own: str) -> Iterator[tuple[str, str]]:
    """Files and folders that a parameter names, with a hash of what is in them; what this run writes (``own``) is not
    among them: it hangs on the jobs that write it."""
    for name, value in values.items():
        if not isinstance(value, str) or not value or name == "run_dir" or Path(value).is_relative_to(own):
            continue
        target = shipped_pruners().get(value, root / value)
        if target.is_file() or target.is_dir():
            files = [target] if target.is_file() else sorted(file for file in target.rglob("*") if file.is_file())
            yield value, _digest([(file.relative_to(target).as_posix(), _file_hash(file)) for file in files[:500]])


@functools.cache
def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
