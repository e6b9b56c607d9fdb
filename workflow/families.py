"""Every causal LM of transformers, pruned and held against the truth: `make sweep`.

python workflow/families.py run          # all families and backends; goes on where it stopped
python workflow/families.py run llama    # some
python workflow/families.py run --quick  # the engine's checks only, for CI

One JSON line for each family, backend and check goes to data/support/<transformers version>.jsonl. Each family runs in
a process of its own, so an exception is a result and a hang is cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import sys
import time
import warnings
from pathlib import Path
from typing import Any

BACKENDS = ("sdpa", "eager")
LIMIT_S = 60
MOST_PARAMETERS = 20_000_000


def root() -> Path:
    return Path(__file__).resolve().parent.parent


def code_digest() -> str:
    """Changes whenever the library or the checks do: rows of other code are not looked at."""
    digest = hashlib.sha256()
    for file in sorted([*root().glob("sdtp_lib/**/*.py"), *root().glob("workflow/famil*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def run_one(family: str, backend: str, checks: list[str], file: Path, about: dict[str, Any]) -> None:
    """All checks of one family and backend, each appended to ``file`` as soon as it is known."""
    import family_checks
    import family_models

    def write(check: str, outcome: str, detail: str = "", **more: Any) -> None:
        line = {**about, "family": family, "backend": backend, "check": check, "outcome": outcome, "detail": detail}
        with file.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({**line, **more}) + "\n")

    start = time.perf_counter()
    try:
        if (count := family_models.parameter_count(family, backend)) > MOST_PARAMETERS:
            raise OverflowError(f"{count:,} parameters: nothing smaller is known")
        model = family_models.tiny_model(family, backend)
        subject = family_checks.Subject(model)
        try:
            plain = subject.plain(subject.tokens)
        except RuntimeError:  # a kernel without float64
            subject = family_checks.Subject(model.float())
            plain = subject.plain(subject.tokens)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        write("build", "not built", reason)
        with contextlib.suppress(Exception):  # what cannot run may still be refused on entry
            model = family_models.weightless_model(family, backend)
            result = family_checks.judged(family_checks.entry, family_checks.Subject(model))
            if result.outcome == family_checks.REFUSED:
                write("entry", result.outcome, result.detail)
        return
    write("build", "built", type(model).__name__, parameters=sum(p.numel() for p in model.parameters()),
          logits=list(plain.shape), seconds=round(time.perf_counter() - start, 2))  # fmt: skip
    for name in checks:
        start = time.perf_counter()
        result = family_checks.judged(family_checks.CHECKS[name], subject)
        if result is not None:
            write(name, result.outcome, result.detail[:400], difference=result.difference,
                  seconds=round(time.perf_counter() - start, 2))  # fmt: skip


def rows_of(file: Path, code: str | None = None) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if code in (None, row["code"])]


def run(names: list[str], checks: list[str], file: Path) -> None:
    import family_checks  # noqa: F401 - loaded before the fork, once for all
    import family_models
    import torch
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "code": code_digest()}
    done = {(row["family"], row["backend"]) for row in rows_of(file, about["code"]) if row["check"] == "end"}
    file.parent.mkdir(parents=True, exist_ok=True)
    forks = multiprocessing.get_context("fork")
    for family in names or family_models.families():
        for backend in BACKENDS:
            if (family, backend) in done:
                continue
            child = forks.Process(target=run_one, args=(family, backend, checks, file, about))
            child.start()
            child.join(LIMIT_S)
            end = {**about, "family": family, "backend": backend, "check": "end", "outcome": "end", "detail": ""}
            if child.is_alive():
                child.kill()
                child.join()
                end |= {"outcome": "raw error", "detail": f"cut off after {LIMIT_S} s"}
            elif child.exitcode:
                end |= {"outcome": "raw error", "detail": f"the process ended with {child.exitcode}"}
            with file.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(end) + "\n")
        print(family, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run",))
    parser.add_argument("families", nargs="*")
    parser.add_argument("--checks", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--file", type=Path)
    arguments = parser.parse_intermixed_args(argv)
    import family_checks
    import transformers

    checks = arguments.checks or list(family_checks.ENGINE if arguments.quick else family_checks.CHECKS)
    file = arguments.file or root() / f"data/support/{transformers.__version__}.jsonl"
    run(arguments.families, checks, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
