"""Where a number comes from: the commit, versions, model, device and settings that every result row repeats.

Knows no torch: a model's device and dtype are read off its attributes. Asks git once a run and changes nothing.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


@functools.cache
def project_root() -> Path:
    """The folder that relative paths of the study are relative to, whatever the working directory is.

    ``SDTP_ROOT`` if set; else the checkout that this package lies in; else (package installed elsewhere) the first
    folder upward from the working directory with a ``pyproject.toml``; else the working directory.
    """
    if named := os.environ.get("SDTP_ROOT"):
        return Path(named).resolve()
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    return Path.cwd()


def commit() -> str:
    """The commit of the code that runs; ``+changes`` when tracked files differ from it; ``unknown`` outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def passport(
    model: Any = None,
    *,
    model_name: str | None = None,
    config: Any = None,
    seed: int | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Where a number comes from, as flat fields that every row of a run repeats.

    Parameters
    ----------
    model
        A transformers model; device, dtype, name and attention implementation are read off it. None for pure counts.
    model_name
        What the run called the model (``"embedded"``, a folder, a Hub id); by default the model's own name.
    config
        A `PruningConfig`, whose fields become ``pruning_<field>``.
    seed
        The run's seed.
    weights
        A note on the weights, such as ``"Q4_1, dequantised"``.
    """
    own_config = getattr(model, "config", None)
    fields: dict[str, Any] = {
        "utc": _utc_now(),
        "commit": commit(),
        "host_cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version_of(name) for name in ("torch", "transformers")},
        "sdtp_lib": _version_of("sdtp-lib"),
        "model": model_name or getattr(own_config, "_name_or_path", None) or None,
        "model_type": getattr(own_config, "model_type", None),
        "weights": weights,
        "device": str(model.device) if model is not None else None,
        "dtype": str(model.dtype).removeprefix("torch.") if model is not None else None,
        "attn_implementation": getattr(own_config, "_attn_implementation", None),
        "seed": seed,
    }
    if config is not None:
        fields |= {f"pruning_{field}": value for field, value in config.to_dict().items()}
    return fields


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
