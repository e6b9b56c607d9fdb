"""Pruners from a folder, by the name of a set that ships, or from the Hub: whole, or an error that says what is wrong.

Knows file names and causes of failure, not what is in the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download

from sdtp_lib import load_failures
from sdtp_lib.shipped import pruners_folder

Loaded = TypeVar("Loaded")
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def loaded_whole(load: Callable[..., Loaded], where: str | os.PathLike[str], options: Mapping[str, Any]) -> Loaded:
    """What ``load(name, strict=True, **options)`` gives; ``where`` is a folder, a shipped set's name, or a Hub id.

    Raises
    ------
    OSError
        If there is no such folder, a file of it is missing or damaged, the weights lack a stage that its config names,
        or the Hub cannot give it.
    """
    name = os.fspath(pruners_folder(where) or where)
    folder = Path(name)
    local = folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1
    lacking = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
    if local and lacking:
        what = f"it lacks {' and '.join(lacking)}" if folder.is_dir() else "there is no such folder"
        raise OSError(f"Cannot load pruners from {name!r}: {what}; give one of save_pretrained's, or a Hub id.")
    try:
        if not local:  # the mixin goes on without a config that it cannot fetch
            hf_hub_download(name, "config.json", **{key: options[key] for key in HUB_OPTIONS if key in options})
        # Not strict, it would leave the random numbers of a new network where the weights lack a stage.
        return load(name, strict=True, **options)
    except RuntimeError as error:
        stages = ", ".join(dict.fromkeys(re.findall(r"stages\.(\d+)\.", str(error))))
        where = "its word_table" if not stages and "word_table" in str(error) else f"stage(s) {stages or 'unknown'}"
        raise OSError(
            f"Cannot load pruners from {name!r}: model.safetensors does not fit config.json at {where}; "
            "write both again with save_pretrained."
        ) from error
    except Exception as error:
        if type(error) is ValueError and load_failures.cause_of(error) is None:
            raise  # a field of the config that the constructor refuses
        remedy = "write it again with save_pretrained" if local else "give a folder that save_pretrained wrote"
        raise OSError(f"Cannot load pruners from {name!r} {load_failures.sentence(error, remedy)}") from error


def weights_file(name: str, options: Mapping[str, Any]) -> str:
    """The safetensors file of a folder, or of a Hub id under the Hub's ``options``."""
    local = Path(name) / "model.safetensors"
    return str(local) if local.parent.is_dir() else hf_hub_download(name, local.name, **options)
