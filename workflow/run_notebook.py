"""Run one notebook headless: check its parameters first, show progress, keep the executed copy, say what failed.

    python workflow/run_notebook.py notebooks/04_latency.ipynb -p repeats 3 -p run_dir data/results/mine
    python workflow/run_notebook.py --list                  # every notebook's parameters

papermill does the execution; this adds what it does not have: unknown names, wrong types and impossible values are
refused before a kernel starts, stale rows of other parameters or code are removed, rows of the same ones are resumed,
and a run whose parent was killed does not go on alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, TextIO

from notebook_parameters import (
    ParameterError,
    check,
    describe,
    language_of,
    load_notebook,
    read_value,
    source_of,
    words,
)

from sdtp_lib.files import locked, shown_path
from sdtp_lib.records import commit, project_root, write_json

ORPHANED = 3
# What a notebook leaves in its folder beside files that begin with its number.
ALSO_WRITES = {"02_training": ("pruners", "checkpoints")}
WAIT_FOR_PREDECESSOR_S = 60


class Tee:
    """Writes to the terminal and to a file."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


def run(
    notebook: Path,
    parameters: dict[str, Any],
    *,
    executed: Path,
    log: Path | None = None,
    done: Path | None = None,
    stamp: Path | None = None,
    shown: bool = True,
) -> None:
    """Execute a notebook from the project's root.

    Parameters
    ----------
    executed
        Where the executed copy goes, also when a cell fails.
    log
        What the notebook printed, as text.
    done
        The summary that the notebook must have written at its end.
    stamp
        Written after success. Its name says which code and parameters the results belong to.
    shown
        Whether the terminal sees what the notebook prints, or the log alone.

    Raises
    ------
    ParameterError
        Before anything starts.
    papermill.PapermillExecutionError
        A cell failed; `report_failure` says where.
    """
    values = check(notebook, parameters)
    parameters = {name: values[name] for name in parameters}
    if (language := language_of(load_notebook(notebook))) != "python":
        raise ParameterError(f"{notebook.name} is written in {language}: this runs Python notebooks only.")
    folder = project_root() / parameters.get("run_dir", executed.parent)
    log = log or executed.with_suffix(".log")
    for path in (executed, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    failure_path(log).unlink(missing_ok=True)
    with _alone(folder / ".stamps" / f"{notebook.stem}.lock"):
        if stamp is not None and stamp.exists():
            print(f"{notebook.stem}: done meanwhile by an earlier run")
            return
        if stamp is not None:
            _forget_stale(folder, notebook.stem, stamp)
        if done is not None:
            done.unlink(missing_ok=True)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            out, err = (Tee(stream, file) if shown else Tee(file) for stream in (sys.stdout, sys.stderr))
            _execute(notebook, parameters, executed, out, err, shown)
        if done is not None and not done.exists():
            raise FileNotFoundError(f"{notebook.stem} ended without writing {done.name}, its summary.")
        if stamp is not None:
            write_json(
                stamp,
                {
                    "notebook": notebook.stem,
                    "parameters": parameters,
                    "seconds": round(time.monotonic() - started, 1),
                    "ended_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "commit": commit(),
                    "executed": executed,
                },
            )


def _execute(notebook: Path, parameters: dict[str, Any], executed: Path, out: Tee, err: Tee, shown: bool) -> None:
    # Figures belong into the executed copy: a non-interactive backend forced from outside would leave them out.
    os.environ.pop("MPLBACKEND", None)
    # The kernel of this environment, whatever else a user's Jupyter knows under the same name.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    _wait_asleep(os.environ)
    import papermill

    print(f"--- {notebook.stem}: {json.dumps(parameters, default=str)}", file=out)
    papermill.execute_notebook(
        notebook,
        executed,
        parameters=parameters,
        cwd=project_root(),
        # A notebook names the kernel that it was last saved with, on whatever machine; this one has its own.
        kernel_name="python3",
        language="python",
        progress_bar=shown and {"desc": notebook.stem, "bar_format": "{desc}: cell {n_fmt}/{total_fmt} [{elapsed}]\n"},
        # What a kernel says about itself (its transport, its shutdown) is not what the notebook says.
        extra_arguments=["--IPKernelApp.log_level=50"],
        stdout_file=out,
        stderr_file=err,
    )


def _wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let a kernel's threads spin for a tenth of a millisecond and then sleep, unless the user has said how they wait.

    By default libgomp spins for milliseconds whenever threads wait for each other. Beside other work a prefill of
    seconds took minutes so: the thread that is waited for has no core, since the waiting one is busy on it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        environment["GOMP_SPINCOUNT"] = "2000"


def _forget_stale(folder: Path, name: str, stamp: Path) -> None:
    """Remove what other code or parameters wrote, so that no old row counts as done; keep what this run can resume."""
    current = folder / ".stamps" / f"{name}.begun"
    if current.exists() and current.read_text() == stamp.name:
        return
    # Whatever a notebook writes into its folder begins with its number.
    leftovers = [*folder.glob(f"{name[:3]}*"), *(folder / extra for extra in ALSO_WRITES.get(name, ()))]
    for path in [*leftovers, *folder.glob(f".stamps/{name}-*.json"), *folder.glob(f"executed/{name}-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    current.write_text(stamp.name)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One run of a notebook in a folder at a time; the kernel of a killed predecessor gets a moment to end."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        deadline = time.monotonic() + WAIT_FOR_PREDECESSOR_S
        while not locked(file.fileno()):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{lock.stem} is running in {lock.parent.parent.name} already: wait, or name another run."
                )
            time.sleep(0.5)
        yield


def failure_path(log: Path) -> Path:
    """Where the summary of a failure is kept for the end of the whole run's log."""
    return log.with_suffix(".failed.json")


def report_failure(
    notebook: Path, parameters: dict[str, Any], executed: Path, log: Path | None, error: Exception
) -> str:
    """Notebook, cell and parameter set of a failure, in a few lines; kept beside the log as well."""
    where, source = getattr(error, "cell_index", None), getattr(error, "source", "")
    what = f"{error.ename}: {error.evalue}" if where is not None else f"{type(error).__name__}: {error}"
    if type(error).__name__ == "DeadKernelError":
        where, source = _last_begun(executed)
        what = "the kernel died in this cell: most often the machine, or the job's limit, ran out of memory"
    lines = [f"FAILED  {notebook.stem}" + (f", cell {where + 1}" if where is not None else "")]
    if where is not None:
        first = next((line for line in source.splitlines() if line.strip()), "")
        lines.append(f"  the cell begins with: {first.strip()}")
    lines += [f"  {what.strip()}", f"  parameters: {json.dumps(parameters, default=str)}"]
    if executed.exists():
        lines.append(f"  executed copy: {shown_path(executed)}")
    text = "\n".join(lines)
    if log is not None:
        write_json(failure_path(log), {"notebook": notebook.stem, "text": text})
    return text


def _last_begun(executed: Path) -> tuple[int | None, str]:
    """Index and text of the last cell that began to run; papermill knows no cell of a kernel that died."""
    cells = load_notebook(executed)["cells"] if executed.exists() else []
    begun = [index for index, cell in enumerate(cells) if cell["metadata"].get("papermill", {}).get("start_time")]
    return (begun[-1], source_of(cells[begun[-1]])) if begun else (None, "")


def end_with_parent() -> None:
    """End this process and its kernel within a second of its parent's death: a killed study leaves nothing running."""
    parent = os.getppid()

    def watch() -> None:
        import psutil

        while os.getppid() == parent:
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True).start()


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ParameterError(f"--parameters {text!r} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ParameterError(f'--parameters {text!r} is not an object such as {{"seed": 1}}.')
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path)
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter, as YAML"
    )
    parser.add_argument("--parameters", default="{}", help="several parameters, as one JSON object")
    parser.add_argument("--executed", type=Path, help="the executed copy (default: <run_dir>/executed/<name>.ipynb)")
    parser.add_argument("--log", type=Path, help="what the notebook prints (default: beside the executed copy)")
    parser.add_argument("--done", type=Path, help="a file that the notebook must write")
    parser.add_argument("--stamp", type=Path, help="written after success")
    parser.add_argument("--brief", metavar="NAME", help="print one line: NAME, the parameters and the time it took")
    parser.add_argument("--list", action="store_true", help="print every notebook's parameters and end")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print(describe(sorted((project_root() / "notebooks").glob("[0-9]*.ipynb"))))
            return 0
        if options.notebook is None:
            parser.error("name a notebook, or --list")
        parameters = _json_object(options.parameters)
        parameters |= {name: read_value(options.notebook, name, text) for name, text in options.p}
        values = check(options.notebook, parameters)
    except ParameterError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2
    folder = project_root() / values.get("run_dir", "data/results/local")
    executed = options.executed or folder / "executed" / f"{options.notebook.stem}.ipynb"
    log = options.log or executed.with_suffix(".log")
    end_with_parent()
    started, shown = time.monotonic(), options.brief is None
    if options.brief:
        given = {name: value for name, value in parameters.items() if name != "run_dir"}
        print(f"{options.brief}  {words(given)}", end=" ... ", flush=True)
    try:
        kept = {"executed": executed, "log": log, "done": options.done, "stamp": options.stamp}
        run(options.notebook, parameters, **kept, shown=shown)
    except ParameterError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2
    except Exception as error:
        failure = report_failure(options.notebook, parameters, executed, log, error)
        print(f"failed after {time.monotonic() - started:.0f} s" if options.brief else failure, file=sys.stderr)
        return 1
    if options.brief:
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
