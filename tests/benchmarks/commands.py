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
