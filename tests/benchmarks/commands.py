"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys

from sdtp_lib.records import project_root

sys.path.insert(0, str(project_root() / "benchmarks"))  # as a command has it: scripts import one another


def script(name):
    """One script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", project_root() / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(name):
    """The ``main`` of one script of benchmarks/."""
    return script(name).main


# Of each script arguments for a run of seconds, but for model and folder.
RUNS = {
    "latency": ["run", "--lengths", "64", "--new-tokens", "2", "--presets", "keep09", "--repeats", "1"],
    "scorers": ["--prompts", "1", "--oracle-prompts", "0", "--lengths", "128", "--test-sets", "text",
                "--settings", "r=0.9", "--recency-weight", "1"],
    "labels": ["--test-sets", "text", "--samples", "1", "--prompt-tokens", "64", "--layers", "4",
               "--labels", "removal"],
    "schedules": ["first", "--scorer", "attention", "--test-sets", "text", "--samples", "1", "--prompt-tokens", "128",
                  "--ratios", "0.8"],
}  # fmt: skip
