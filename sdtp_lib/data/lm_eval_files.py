"""lm-eval's task files as they are installed: settings from its YAML, functions from private copies of its modules.

The package itself is not imported, since its modules look for the network when they are: what a task's code does on
import happens here only as far as the caller wants it, and a name that is replaced is replaced in the copy alone.
"""

from __future__ import annotations

import ast
import importlib.util
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def task_folder(group: str) -> Path:
    """The folder of a group of lm-eval's tasks.

    Raises
    ------
    OSError
        If lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        raise OSError(f"{group}'s prompts and metrics come from lm_eval: pip install 'sdtp-lib[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks" / group


def settings(path: Path) -> dict[str, Any]:
    """A task's settings with those of the files that it includes; a ``!function`` is the text ``module.function``."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads lm-eval's files without running the functions they name."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)
    own = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = own.pop("include", None)
    return own if included is None else settings(path.parent / included) | own


def private_module(path: Path, given: Mapping[str, Any], *, without: Collection[str] = ()) -> types.ModuleType:
    """A copy of one of lm-eval's modules, known to nobody else.

    Parameters
    ----------
    given
        Names that the copy uses instead of its own and instead of what it would import from lm_eval.
    without
        Functions that it calls on import and that are not called here.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    tree.body = [node for node in tree.body if not _left_out(node, given, without)]
    module = types.ModuleType(f"sdtp_lm_eval_{path.stem}")
    vars(module).update(given)
    exec(compile(tree, str(path), "exec"), vars(module))
    vars(module).update(given)  # its own definitions of these names came after
    return module


def _left_out(node: ast.stmt, given: Mapping[str, Any], without: Collection[str]) -> bool:
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_eval."):
        return all(alias.name in given for alias in node.names)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", None) in without
    return False
