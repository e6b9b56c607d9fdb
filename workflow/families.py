"""Every causal LM of transformers, pruned and compared with an independent slow reference: `make sweep`.

python workflow/families.py                 # all families and backends, goes on where it stopped, writes the matrix
python workflow/families.py llama doge      # some families; prints their counts, writes no matrix
python workflow/families.py --quick         # all families, the engine's main checks on one backend each, for CI

One JSON line for each family, backend and check goes to data/results/support/<transformers version>.jsonl. Each family
runs in a process of its own, so a crash is a result and a hang is cut off. Ends with 1 if anything was silently wrong
or ended in a raw error. The matrix and the list that ships hold every version whose rows are there and complete.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import family_models
import family_report
import torch
import transformers
from family_checks import CHECKS, QUICK, entry
from family_labels import LABEL_NAMES
from family_subject import ERROR, REFUSED, RIGHT, UNBUILT, WRONG, Subject, judged

from sdtp_lib.records import project_root

Part = tuple[str, str]  # a backend and a group of checks
About = Mapping[str, Mapping[str, Any]]  # what a group's rows say of versions and code
LIMIT_S = 120
MOST_PARAMETERS = 20_000_000
# What is asked together, and the files that its result depends on: rows of other code are not looked at.
_DOOR = ("sdtp_lib/architectures/*", "sdtp_lib/config", "sdtp_lib/layer_shape", "sdtp_lib/pruning/masked_reference",
         "workflow/family_models", "workflow/family_subject")  # fmt: skip
REACHED = {
    "engine": (*_DOOR, "sdtp_lib/pruning/*", "sdtp_lib/scorers/*", "workflow/family_checks"),
    "labels": (*_DOOR, "sdtp_lib/training/*", "workflow/family_labels"),
    "flops": (*_DOOR, "sdtp_lib/budget", "sdtp_lib/model_shape", "workflow/family_checks"),
}
GROUP_OF = {name: "labels" if name in LABEL_NAMES else "flops" if name == "flops" else "engine" for name in CHECKS}


def code_of(group: str) -> str:
    """A digest of the files that a group of checks reaches."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in REACHED[group] for file in project_root().glob(f"{pattern}.py")}):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def rows_of(file: Path, about: About, check: str | None = None) -> list[dict[str, Any]]:
    """The rows of this code and these versions; a half-written last line is left out."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    rows = [row for row in rows if check in (None, row["check"])]
    return [row for row in rows if row.get("group") in about and about[row["group"]].items() <= row.items()]


def ask(family: str, parts: Sequence[Part], checks: Sequence[str], file: Path, about: About) -> None:
    """The checks of one family, backend by backend and group by group, appended to ``file`` as they are known."""
    for backend, some in itertools.groupby(parts, key=lambda part: part[0]):
        groups = [group for _, group in some]
        here = {group: {**about[group], "family": family, "backend": backend} for group in groups}
        subject, rows = _built(family, backend)
        for group in groups:
            for row in rows:
                append(file, here[group] | row)
            for name in checks if subject else ():
                start = time.perf_counter()
                if GROUP_OF[name] == group and (result := judged(CHECKS[name], subject)) is not None:
                    row = _row(name, result.outcome, result.detail, start, difference=result.difference)
                    append(file, here[group] | row)
            append(file, here[group] | {"check": "end", "outcome": "done", "detail": ""})


def _built(family: str, backend: str) -> tuple[Subject | None, list[dict[str, Any]]]:
    """The model that is asked, None where it cannot be built and run, and the rows that say so."""
    start = time.perf_counter()
    try:
        if (count := family_models.parameter_count(family, backend)) > MOST_PARAMETERS:
            raise OverflowError(f"{count:,} parameters, and nothing smaller is known")
        subject = Subject(family_models.tiny_model(family, backend))
        subject.plain(subject.tokens)
    except Exception as error:
        rows = [_row("build", UNBUILT, f"{type(error).__name__}: {' '.join(str(error).split())}", start)]
        with contextlib.suppress(Exception):  # what cannot run may still be refused for what it is
            weightless = Subject(family_models.weightless_model(family, backend))
            if (result := judged(entry, weightless)).outcome == REFUSED:
                rows.append(_row("entry", REFUSED, result.detail, start))
        return None, rows
    kind = {"class": type(subject.model).__name__, "model_type": subject.model.config.model_type}
    return subject, [_row("build", RIGHT, "", start, **kind)]


def _row(check: str, outcome: str, detail: str, start: float, **more: Any) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 2)
    return {"check": check, "outcome": outcome, "detail": detail[:400], **more, "seconds": seconds}


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


def run(tasks: Mapping[str, Sequence[Part]], checks: Sequence[str], file: Path, about: About, jobs: int) -> None:
    """Ask every family of ``tasks`` its parts, ``jobs`` at a time, each in a fork that ends after `LIMIT_S`."""
    forks = multiprocessing.get_context("fork")  # what takes long to import is there already
    waiting, running = dict(tasks), list[tuple[BaseProcess, str, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            family = next(iter(waiting))
            child = forks.Process(target=ask, args=(family, waiting.pop(family), checks, file, about))
            child.start()
            running.append((child, family, time.monotonic()))
        time.sleep(0.02)
        for asked in list(running):
            child, family, begun = asked
            late = time.monotonic() - begun > LIMIT_S
            if child.is_alive() and not late:
                continue
            if late:
                child.kill()
            child.join()
            running.remove(asked)
            if late or child.exitcode:
                fault = f"cut off after {LIMIT_S} s" if late else f"the process ended with code {child.exitcode}"
                ended = {(row["family"], row["backend"], row["group"]) for row in rows_of(file, about, "end")}
                missing = [part for part in tasks[family] if (family, *part) not in ended]
                for backend, group in missing[:1]:
                    row = {**about[group], "family": family, "backend": backend, "check": "end", "outcome": ERROR}
                    append(file, row | {"detail": fault})
                if missing[1:]:  # the fault may be the first one's alone
                    waiting[family] = missing[1:]
            if family not in waiting:
                print(family, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, or model_type:variant; default all")
    parser.add_argument("--checks", nargs="*", choices=list(CHECKS))
    parser.add_argument("--quick", action="store_true", help="the engine's main checks on one backend of each family")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families asked at a time")
    parser.add_argument("--file", type=Path, help="where rows go")
    options = parser.parse_intermixed_args(argv)
    known = family_models.families()
    if unknown := set(options.families) - set(known):
        parser.error(f"unknown families {sorted(unknown)}: model types of transformers' causal-LM mapping are known")
    if not options.quick:
        import datasets  # noqa: F401 - labels need it, and its import takes longer than they do
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    whole = not (options.families or options.checks or options.quick)
    checks = options.checks or list(QUICK if options.quick else CHECKS)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    groups = dict.fromkeys(GROUP_OF[name] for name in checks)
    about = {group: {**versions, "group": group, "code": code_of(group)} for group in groups}
    name = transformers.__version__ + ("" if whole else "-part")
    file = options.file or project_root() / f"data/results/support/{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not whole:
        file.unlink(missing_ok=True)
    done = {(row["family"], row["backend"], row["group"]) for row in rows_of(file, about, "end")}
    tasks = {}
    for family in options.families or known:
        backends = (family_models.default_backend(family),) if options.quick else family_models.BACKENDS
        parts = itertools.product(backends, groups)
        if missing := [part for part in parts if (family, *part) not in done]:
            tasks[family] = missing
    run(tasks, checks, file, about, options.jobs)
    report = family_report.Report(rows_of(file, about))
    if whole:
        report.write()
    print(report.summary())
    return 1 if report.count[WRONG] or report.count[ERROR] else 0


if __name__ == "__main__":
    sys.exit(main())
