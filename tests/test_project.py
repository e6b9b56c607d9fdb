"""The project's own files agree with each other: versions, requirements, constraints, README's commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import constraints
import newest
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sdtp_lib
from sdtp_lib import methods

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, or an empty list where there is no git."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--", *patterns], capture_output=True, text=True, check=False
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^([a-z][a-z -]*):", text, re.M) for name in line.split()}


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sdtp_lib.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sdtp_lib.__version__)


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sdtp_lib.__version__
    assert citation["license"] == PROJECT["project"]["license"].split(" AND ") == ["Apache-2.0", "CC-BY-SA-3.0"]
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2504.04514") and paper["authors"][0]["family-names"] == "Tao"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text


@pytest.mark.parametrize("requirement", constraints.roots(), ids=str)
def test_every_requirement_holds_for_the_tested_version_and_has_a_ceiling(requirement: Requirement):
    tested = Version(CONSTRAINTS[canonicalize_name(requirement.name)])
    assert tested in requirement.specifier
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}


def test_the_constraints_are_what_the_requirements_lead_to():
    installed = constraints.closure()
    assert {**installed, **constraints.APART} == CONSTRAINTS, "run `make constraints`"


def test_the_core_is_what_pruning_needs_and_no_more():
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert names == {"huggingface-hub", "numpy", "safetensors", "torch", "transformers"}


def test_the_lowest_versions_that_are_promised_are_those_that_the_floor_runs_on():
    floor = dict(
        line.split("==") for line in (ROOT / "constraints-floor.txt").read_text().splitlines() if line[0] != "#"
    )
    extras = PROJECT["project"]["optional-dependencies"]
    for line in (*PROJECT["project"]["dependencies"], *extras["train"], *extras["embedded"]):
        requirement = Requirement(line)
        (lowest,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert Version(floor[requirement.name]) == Version(lowest), requirement.name


@pytest.mark.parametrize("answer", [None, "1.0.0"], ids=["no index", "an old mirror"])
def test_without_an_index_the_newest_releases_are_not_tested_and_that_is_said(answer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(newest.venv, "create", lambda *args, **kwargs: None)
    monkeypatch.setattr(newest, "newest_found", lambda pip, name: answer)
    monkeypatch.setattr(newest.subprocess, "run", lambda *args, **kwargs: pytest.fail("something was installed or run"))
    assert newest.main(tmp_path, ["tests"]) == 0
    assert "NOT tested" in capsys.readouterr().err


def test_a_newest_release_that_breaks_a_test_or_cannot_be_installed_fails(tmp_path, monkeypatch):
    def run(command, **kwargs):
        fails = "pytest" in command and "install" not in command
        return subprocess.CompletedProcess(command, 1 if fails else 0, stdout="transformers==99.0.0")

    monkeypatch.setattr(newest.venv, "create", lambda *args, **kwargs: None)
    monkeypatch.setattr(newest, "newest_found", lambda pip, name: "99.0.0")
    monkeypatch.setattr(newest.subprocess, "run", run)
    assert newest.main(tmp_path, ["tests"]) == 1
    assert (tmp_path / "torch.txt").read_text() == f"torch=={CONSTRAINTS['torch']}\n"

    def cannot_install(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(newest.subprocess, "run", cannot_install)
    with pytest.raises(subprocess.CalledProcessError):
        newest.main(tmp_path, ["tests"])


def test_no_constraint_names_a_local_build():
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert not [version for version in CONSTRAINTS.values() if "+" in version]


def test_conda_users_get_what_make_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[0] == "-c constraints.txt"
    (installed,) = re.findall(r"-c constraints\.txt -e '(.*?)'", makefile)
    assert pip[1] == f"-e {installed}"
    assert set(re.search(r"\[(.*)\]", installed)[1].split(",")) == set(PROJECT["project"]["optional-dependencies"])
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    wanted = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert Version(python.removeprefix("python=")) in wanted


def test_the_embedded_model_is_pinned_alike_everywhere():
    name, version = next(iter(constraints.APART.items()))
    places = {
        path.name: re.findall(rf"{name}==([\d.]+)", path.read_text())
        for path in (ROOT / "Makefile", ROOT / "environment.yml", ROOT / "constraints.txt", *tracked("sdtp_lib/**.py"))
    }
    assert all(found == version for versions in places.values() for found in versions)
    assert places["Makefile"] and places["environment.yml"]
    assert not [root for root in constraints.roots() if root.name == name], "it would build what is not used"


def test_every_make_target_is_listed_by_help():
    if shutil.which("make") is None:
        pytest.skip("no make here")
    listed = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    hidden = {name for name in make_targets() if not re.search(rf"make {name}\b", listed)}
    assert hidden <= {"help"}, f"give {sorted(hidden)} a `## ...` description"


def test_help_lists_the_leaderboards_sets_and_each_of_them_is_reported():
    if shutil.which("make") is None:
        pytest.skip("no make here")

    def said(*arguments: str) -> str:
        command = ["make", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (listed,) = re.findall(r"PARAMS of leaderboard: (.*?), or", said("help"))
    names = sorted(path.stem for path in (ROOT / "benchmarks" / "params").glob("*.yaml"))
    assert sorted(listed.split()) == names and len(names) > 1
    for name in names:
        planned = said("-n", "-o", ".venv/.ready", "leaderboard", f"PARAMS={name}")
        assert f'--params "{name}" --report-after' in planned


def test_the_commands_of_the_documents_exist():
    targets = make_targets()
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "study.md"):
        text = document.read_text()
        named = set(re.findall(r"^\s*make ([a-z][a-z-]*)", text, re.M)) | set(re.findall(r"`make ([a-z][a-z-]*)", text))
        assert named, f"{document.name} names no make target"
        assert named <= targets, f"{document.name}: no such target {sorted(named - targets)}"


def test_the_links_of_the_documents_lead_somewhere():
    for document in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_a_word_means_the_same_to_contributors_and_to_users():
    def glossary(document: str) -> dict[str, str]:
        words = (ROOT / document).read_text().split("## Words")[1].split("\n## ")[0]
        return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", words, re.M))

    ours, theirs = glossary("CONTRIBUTING.md"), glossary("docs/method.md")
    both = (ours.keys() & theirs.keys()) - {"word"}
    assert {"stage", "keep ratio", "limit"} <= both and len(ours) <= 11  # ten words and the heading
    assert {word: ours[word] for word in both} == {word: theirs[word] for word in both}


def test_a_rate_says_per():
    what = r"(nats|FLOPs|bytes|one (row|line|number|score|span|file)|prompts|samples|items)"
    rate = re.compile(rf"\b{what} an? (token|layer|second|row|prompt|sample|item|task|method|cell|test set)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked("*.py", "*.md")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if rate.search(line)
    ]
    assert not found, "nats per token, one row per prompt"


def test_the_tree_names_every_folder_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("## What is where") :].split("```")[1]
    lines = [re.match(r"( *)([\w.-]+/?) +\S", line) for line in tree.strip().splitlines()]
    assert all(lines), "each line of the tree says what is there"
    named = {("sdtp_lib/" if line[1] else "") + line[2] for line in lines}
    files = [path.relative_to(ROOT) for path in tracked("*")]
    if files:
        top = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1 and not path.parts[0].startswith(".")}
        library = {"/".join(path.parts[:2]) + "/" for path in files if path.parts[0] == "sdtp_lib" and path.parts[2:]}
        assert {name for name in named if name.endswith("/")} == top | library
    assert all((ROOT / name).exists() for name in named)
    beside = re.search(r"beside its folders: ([\w, ]+)", tree)[1].split(", ")
    modules = {path.stem for path in (ROOT / "sdtp_lib").glob("*.py")} - {"__init__"}
    assert set(beside) == modules


def test_the_map_in_the_library_names_every_folder_and_module_and_no_other():
    """It lacked the leaderboard and five modules."""
    named = set(re.findall(r"(?:^    |  )([a-z_]+/?) {2,}\S", sdtp_lib.__doc__, re.M))
    there = [path for path in (ROOT / "sdtp_lib").iterdir() if not path.name.startswith(("__pycache__", "__init__"))]
    folders = {f"{path.name}/" for path in there if path.is_dir() and any(path.iterdir())}
    assert named == folders | {path.stem for path in there if path.suffix == ".py"}


def test_a_methods_file_is_as_short_as_contributors_are_told():
    said = re.search(r"one file in `sdtp_lib/methods/`(.*?)Ten minutes", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[
        1
    ]
    most, longer = int(re.search(r"less than (\d+) lines", said)[1]), set(re.findall(r"`(\w+\.py)`", said))
    files = {Path(sys.modules[type(methods.get(name)).__module__].__file__) for name in methods.names()}
    lines = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name for name, count in lines.items() if count >= most} == longer


def test_every_folder_of_the_library_is_packaged():
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "sdtp_lib").rglob("*.py")}
    assert found == {".".join(folder.parts) for folder in folders}


def test_no_tracked_file_holds_an_absolute_path():
    mine = Path(__file__)
    allowed = ("/usr", "/bin", "/dev", "/etc", "/proc", "/sys", "/tmp", "/var", "/run", "/nonexistent", "/sbin")
    found = []
    for path in tracked("*.py", "*.md", "*.ipynb", "*.toml", "*.yml", "*.yaml", "*.cff", "*.json", "Makefile", ".ci/*",
                        "workflow/*"):  # fmt: skip
        if path == mine:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            for hit in re.findall(r"(?<![\w.:/>})\]*-])/[a-z]+/[\w.-]+", re.sub(r"https?://\S+", "", line)):
                if not hit.startswith(allowed):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {hit}")
    assert not found


def test_continuous_integration_runs_lint_and_tests_and_closes_with_them():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    steps = [line.split() for line in script.read_text().splitlines() if re.match(r"(make|beside|met)\b(?!\()", line)]
    targets = {word for how, *words in steps for word in words if how in ("make", "beside")}
    assert {"lint", "sweep", "QUICK=1", "test-wheel", "test-floor", "test-newest", "test-ui"} <= targets
    assert steps[-1][:2] == ["make", "test"]  # flags may follow
    waited = [how for how, *_ in steps if how != "make"]
    assert waited and waited == ["beside", "met"] * (len(waited) // 2), "what runs beside decides too"


def test_results_and_environments_are_never_tracked():
    assert not tracked("data/results", ".venv", "*.egg-info", "*.ckpt", "*.pt", "*.pth", "*.bin", "*.pkl")
