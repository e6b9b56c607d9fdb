"""The pruners that travel with the library, found by name from any working directory. Knows no model and no torch."""

from __future__ import annotations

import os
from pathlib import Path

SHIPPED_FOLDER = Path(__file__).resolve().parent / "shipped_pruners"
# Name for `load_model` -> pruners that were trained for it.
_MADE_FOR = {"embedded": "smollm2-135m-instruct"}


def shipped_pruners() -> dict[str, Path]:
    """Name -> folder of every set of pruners that ships."""
    return {config.parent.name: config.parent for config in sorted(SHIPPED_FOLDER.glob("*/config.json"))}


def shipped_for(model: str) -> str | None:
    """The name of the pruners that ship for a model of this name; None if none do."""
    return _MADE_FOR.get(model)


def pruners_folder(name: str | os.PathLike[str] | None, base: str | os.PathLike[str] = "") -> Path | None:
    """The local folder of pruners that ``name`` means; None where there is none, as for a Hub id.

    Parameters
    ----------
    name
        A folder, absolute or below ``base``; else the name of pruners that ship.
    base
        What a relative folder is relative to; default the working directory.
    """
    if not name:
        return None
    folder = Path(base) / name
    return folder if (folder / "config.json").is_file() else shipped_pruners().get(os.fspath(name))
