"""The study's front door (`make study`): one run of the Snakefile with a parameter set and a profile.

Keeps a second run of the same checkout out, clears what a killed one left locked, and says where the results are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import sweep
from notebook_parameters import ParameterError, meant
from run_notebook import failure_path

from sdtp_lib.files import locked
from sdtp_lib.records import project_root

HERE = Path(__file__).resolve().parent
BANNER = ("Using workflow specific profile", "Assuming unrestricted shared filesystem")


def command(params: Path, run: str | None, profile: str, extra: list[str]) -> list[str]:
    """The snakemake command line of a run."""
    # Quoted as YAML: a path may hold blanks.
    values = [f"params={json.dumps(str(params))}", *([f"run={json.dumps(run)}"] if run else [])]
    values += [] if on_slurm(profile) else ["in_order=true"]
    return [
        sys.executable, "-m", "snakemake",
        "--snakefile", str(HERE / "Snakefile"), "--directory", ".",
        "--workflow-profile", str(profile_folder(profile)),
        *(["--slurm-jobname-prefix", job_prefix()] if on_slurm(profile) else []),
        "--config", *values, *extra,
    ]  # fmt: skip


def profile_folder(profile: str) -> Path:
    """A folder with a ``config.yaml``, or one of workflow/profiles by its name."""
    given = Path(profile).resolve()
    return given if (given / "config.yaml").is_file() else HERE / "profiles" / profile


def on_slurm(profile: str) -> bool:
    """Whether a profile sends jobs to SLURM."""
    path = profile_folder(profile) / "config.yaml"
    settings = sweep.read_yaml(path)
    if not isinstance(settings, dict):
        raise ParameterError(f"{path.name} of the profile {path.parent.name} holds no settings, such as `cores: 2`.")
    return settings.get("executor") == "slurm"


def job_prefix() -> str:
    """How the names of this checkout's SLURM jobs begin."""
    return "sdtp-" + hashlib.sha256(str(project_root()).encode()).hexdigest()[:8]


def wait_for_leftovers() -> None:
    """Let the jobs of a killed study end: what they finish need not run again."""
    ours = ["squeue", "--me", "--noheader", "--format", "%i %j"]
    told = None
    while True:
        listed = subprocess.run(ours, capture_output=True, text=True, check=False, timeout=120).stdout.splitlines()
        left = [line.split()[0] for line in listed if line.split()[1:] and line.split()[1].startswith(job_prefix())]
        if not left:
            return
        if left != told:
            print(f"waiting for {len(left)} SLURM job(s) of an earlier study: {' '.join(left)}", flush=True)
            told = left
        time.sleep(5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", default="embedded", help="a set of workflow/params, or a YAML file")
    parser.add_argument("--run", help="folder under data/results (default: what the set says)")
    parser.add_argument("--profile", default="local", help="a folder of workflow/profiles, or any other")
    options, extra = parser.parse_known_args(arguments)
    root = project_root()
    os.chdir(root)
    options.profile = str(profile_folder(options.profile))
    if not (Path(options.profile) / "config.yaml").is_file():
        name, profiles = Path(options.profile).name, sorted(folder.name for folder in (HERE / "profiles").iterdir())
        print(f"REFUSED  there is no profile {name}: {meant(name, profiles)}", file=sys.stderr)
        return 2
    params = HERE / "params" / f"{options.params}.yaml"
    if Path(options.params).suffix and not params.is_file():  # a dot may also be of a version: gpu-qwen2.5-7b
        params = Path(options.params)
    if not params.is_file():
        sets = sorted(file.stem for file in (HERE / "params").glob("*.yaml"))
        print(f"REFUSED  there is no parameter set {options.params}: {meant(options.params, sets)}", file=sys.stderr)
        return 2
    try:
        sends_jobs = on_slurm(options.profile)
        settings = sweep.read_settings(params, options.run)
        jobs = sweep.plan(settings, root)
    except ParameterError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2

    state = Path(".snakemake")
    state.mkdir(exist_ok=True)
    with (state / "study.lock").open("a") as lock:
        if not locked(lock.fileno()):
            print("REFUSED  a study is running in this checkout already: wait for it or stop it.", file=sys.stderr)
            return 2
        if sends_jobs:
            wait_for_leftovers()
        for job in jobs:
            if not Path(job.done).exists():
                Path(job.stamp).unlink(missing_ok=True)  # results were removed by hand
        todo = [job for job in jobs if not Path(job.stamp).exists()]
        results = f"data/results/{settings['run']}"
        dry = bool({"-n", "--dry-run", "--dryrun"} & set(extra))
        if dry:
            return dry_run(jobs, todo, command(params, options.run, options.profile, extra))
        if not todo and not extra:
            print(f"nothing to do: all {len(jobs)} notebook runs of {params.stem} are done; results in {results}")
            return 0
        print(f"{len(todo)} of {len(jobs)} notebook runs to do: {', '.join(job.name for job in todo)}")
        print(f"what they print is kept in {results}/**/executed/*.log", flush=True)
        run = command(params, options.run, options.profile, extra)
        # We hold the study's lock, so whoever left these is gone. A stamp is written whole or not at all: none is ever
        # incomplete, and what a job of a killed study finished meanwhile counts.
        for left in [*state.glob("locks/*"), *state.glob("incomplete/*")]:
            left.unlink()
        # The lock goes on to snakemake: it is held as long as either of the two lives.
        code = run_quietly(run, lock.fileno())
        if code == 0:
            print(f"done; results in {results}, executed notebooks in its folder(s) executed/")
        elif not any(failure_path(Path(job.log)).exists() for job in todo):
            logs = sorted(state.glob("log/*.log"), key=lambda path: path.stat().st_mtime)
            print(f"snakemake itself stopped; its words: {logs[-1] if logs else 'none'}", file=sys.stderr)
        return code


def run_quietly(run: list[str], lock: int) -> int:
    """Run snakemake without the lines that it prints before it reads how quiet it is to be."""
    with subprocess.Popen(run, pass_fds=(lock,), stderr=subprocess.PIPE, text=True) as running:
        for line in running.stderr:
            if not line.startswith(BANNER):
                print(line, end="", file=sys.stderr, flush=True)
    return running.returncode


def dry_run(jobs: list[sweep.Job], todo: list[sweep.Job], run: list[str]) -> int:
    """One line per job, what snakemake refuses, and nothing done."""
    for job in jobs:
        print(f"{'to do' if job in todo else 'there':6}{job.line}")
    asked = subprocess.run(run, check=False, capture_output=True, text=True)
    if asked.returncode:
        print(asked.stderr, file=sys.stderr)
    print(f"{len(todo)} of {len(jobs)} notebook runs to do; nothing was run")
    return asked.returncode


if __name__ == "__main__":
    sys.exit(main())
