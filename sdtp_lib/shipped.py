"""Where pruners are: those that travel with the library, and those that a person trained. Knows no model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

SHIPPED_FOLDER = Path(__file__).resolve().parent / "shipped_pruners"
# Name for `load_model` -> pruners that were trained for it.
_MADE_FOR = {"embedded": "smollm2-135m-instruct"}


def shipped_pruners() -> dict[str, Path]:
    """Name -> folder of every set of pruners that ships."""
    return {config.parent.name: config.parent for config in sorted(SHIPPED_FOLDER.glob("*/config.json"))}


def shipped_for(model: str) -> str | None:
    """The name of the pruners that ship for a model of this name; None if none do."""
    return _MADE_FOR.get(model)


def about(folder: Path) -> dict[str, Any]:
    """What the pruners of a folder say of themselves; {} where that cannot be read (half-written, or not pruners)."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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


def user_folder() -> Path:
    """Where trained pruners go when nobody says where: ``$SDTP_PRUNERS``, else ``sdtp/pruners`` of the user's data."""
    if own := os.environ.get("SDTP_PRUNERS"):
        return Path(own).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "sdtp" / "pruners"


def folder_for(model_name: str | os.PathLike[str], fingerprint: str) -> Path:
    """The user's folder for pruners of a model: ``<last part of its name>-<fingerprint of its weights>``."""
    name = re.sub(r"[^\w.-]+", "-", Path(os.fspath(model_name)).name).strip("-.").lower() or "model"
    return user_folder() / f"{name}-{fingerprint}"


def pruner_folders() -> list[Path]:
    """Every folder of pruners at hand, the user's own before those that ship, and the last written of them first."""
    # A name with a dot in front is a set that is being written.
    own = [config for config in user_folder().glob("*/config.json") if not config.parent.name.startswith(".")]
    own.sort(key=lambda config: config.stat().st_mtime, reverse=True)
    return [*(config.parent for config in own), *shipped_pruners().values()]
