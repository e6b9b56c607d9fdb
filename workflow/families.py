"""Every causal LM of transformers, pruned and held against the truth: `make sweep`.

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

import family_checks
import family_models
import family_report
import torch
import transformers
from family_subject import ERROR, REFUSED, RIGHT, UNBUILT, WRONG, Subject, judged

from sdtp_lib.records import project_root

LIMIT_S = 120
MOST_PARAMETERS = 20_000_000
# What the result depends on: rows of other code are not looked at.
_REACHED = ("architectures/*", "pruning/*", "scorers/*", "training/*", "budget", "config", "layer_shape", "model_shape")
_ASKED = ("checks", "labels", "models", "subject")
CODE = (*(f"sdtp_lib/{part}.py" for part in _REACHED), *(f"workflow/family_{part}.py" for part in _ASKED))


def code_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(file for pattern in CODE for file in project_root().glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def rows_of(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of this code and these versions; a half-written last line is left out."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if all(row.get(name) == value for name, value in about.items())]


def ask(family: str, backends: Sequence[str], checks: Sequence[str], file: Path, about: dict[str, Any]) -> None:
    """All checks of one family on each backend, appended to ``file`` as soon as they are known."""
    for backend in backends:
        here = {**about, "family": family, "backend": backend}
        _ask(family, backend, checks, file, here)
        append(file, here | {"check": "end", "outcome": "done", "detail": ""})


def _ask(family: str, backend: str, checks: Sequence[str], file: Path, about: dict[str, Any]) -> None:
    def write(check: str, outcome: str, detail: str = "", **more: Any) -> None:
        row = {**about, "check": check, "outcome": outcome, "detail": detail[:400], **more}
        append(file, row | {"seconds": round(time.perf_counter() - start, 2)})

    start = time.perf_counter()
    try:
        if (count := family_models.parameter_count(family, backend)) > MOST_PARAMETERS:
            raise OverflowError(f"{count:,} parameters, and nothing smaller is known")
        subject = Subject(family_models.tiny_model(family, backend))
        subject.plain(subject.tokens)
    except Exception as error:
        write("build", UNBUILT, f"{type(error).__name__}: {' '.join(str(error).split())}")
        with contextlib.suppress(Exception):  # what cannot run may still be refused for what it is
            weightless = Subject(family_models.weightless_model(family, backend))
            result = judged(family_checks.entry, weightless)
            if result.outcome == REFUSED:
                write("entry", result.outcome, result.detail)
        return
    kind = {"class": type(subject.model).__name__, "model_type": subject.model.config.model_type}
    write("build", RIGHT, **kind)
    for name in checks:
        start = time.perf_counter()
        if (result := judged(family_checks.CHECKS[name], subject)) is not None:
            write(name, result.outcome, result.detail, difference=result.difference)


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


def run(
    tasks: Mapping[str, Sequence[str]], checks: Sequence[str], file: Path, about: dict[str, Any], jobs: int
) -> None:
    """Ask every family of ``tasks`` on its backends, ``jobs`` at a time, each in a fork that ends after `LIMIT_S`."""
    forks = multiprocessing.get_context("fork")  # what takes long to import is there already
    waiting, running = dict(tasks), list[tuple[BaseProcess, str, float]]()
    backends = dict(tasks)
    while waiting or running:
        while waiting and len(running) < jobs:
            family = next(iter(waiting))
            child = forks.Process(target=ask, args=(family, waiting.pop(family), checks, file, about))
            child.start()
            running.append((child, family, time.monotonic()))
        time.sleep(0.02)
        for entry in list(running):
            child, family, begun = entry
            late = time.monotonic() - begun > LIMIT_S
            if child.is_alive() and not late:
                continue
            if late:
                child.kill()
            child.join()
            running.remove(entry)
            if late or child.exitcode:
                fault = f"cut off after {LIMIT_S} s" if late else f"the process ended with code {child.exitcode}"
                ended = {row["backend"] for row in rows_of(file, {**about, "family": family, "check": "end"})}
                backend, *rest = [backend for backend in backends[family] if backend not in ended]
                row = {**about, "family": family, "backend": backend, "check": "end", "outcome": ERROR}
                append(file, row | {"detail": fault})
                if rest:  # the fault may be one backend's alone
                    waiting[family] = rest
            if family not in waiting:
                print(family, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, or model_type:variant; default all")
    parser.add_argument("--checks", nargs="*", choices=list(family_checks.CHECKS))
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
    checks = options.checks or list(family_checks.QUICK if options.quick else family_checks.CHECKS)
    about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "code": code_digest()}
    name = transformers.__version__ + ("" if whole else "-part")
    file = options.file or project_root() / f"data/results/support/{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not whole:
        file.unlink(missing_ok=True)
    done = {(row["family"], row["backend"]) for row in rows_of(file, about) if row["check"] == "end"}
    tasks = {}
    for family in options.families or known:
        backends = (family_models.default_backend(family),) if options.quick else family_models.BACKENDS
        if asked := [backend for backend in backends if (family, backend) not in done]:
            tasks[family] = asked
    run(tasks, checks, file, about, options.jobs)
    report = family_report.Report(rows_of(file, about))
    if whole:
        report.write()
    print(report.summary())
    return 1 if report.count[WRONG] or report.count[ERROR] else 0


if __name__ == "__main__":
    sys.exit(main())
