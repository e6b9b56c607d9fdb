"""README's support matrix as a view of a test run: which families and attention backends pass the reference tests.

python workflow/support.py        # runs tests/pruning/test_engine_reference.py, then rewrites README's block
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

import tables
from result_tables import Table

from sdtp_lib.records import passport, project_root, write_json

TESTS = "tests/pruning/test_engine_reference.py"
BACKENDS = ("sdpa", "eager")
CASE = re.compile(r"test_(?P<claim>\w+)\[(?:.*-)?(?P<family>\w+)-(?P<backend>\w+)\]")


def run_tests() -> list[tuple[str, bool]]:
    """Name and outcome of every reference test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, f"--junitxml={report}"]
        subprocess.run(command, cwd=project_root(), check=False)
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        return [(case.attrib["name"], not len(case)) for case in cases]


def matrix(outcomes: list[tuple[str, bool]]) -> Table:
    """One line a family: how many of the claims hold with each backend."""
    passed: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    total: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    claims = {}
    for name, holds in outcomes:
        if found := CASE.fullmatch(name):
            claims[found["claim"].replace("_", " ")] = None
            total[found["family"]][found["backend"]] += 1
            passed[found["family"]][found["backend"]] += holds
    body = tuple(
        (family, *(f"{passed[family][b]} of {counts[b]}" if counts[b] else "-" for b in BACKENDS))
        for family, counts in total.items()
    )
    versions = passport()
    note = (
        f"Tests passed on tiny random models ({TESTS}): {'; '.join(claims)}. "
        f"torch {versions['torch']}, transformers {versions['transformers']}, commit {versions['commit']}."
    )
    return Table("support", "Families", ("family", *BACKENDS), body, note)


def main() -> int:
    store = project_root() / tables.STORE
    kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    kept["support"] = matrix(run_tests()).to_dict()
    write_json(store, dict(sorted(kept.items())))
    return tables.main(["--render-only"])


if __name__ == "__main__":
    sys.exit(main())
