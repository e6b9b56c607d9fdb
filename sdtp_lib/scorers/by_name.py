"""Scores by their name on a command line: `SDTP`, `SDTP=DIR`, `recency`. Checked when read, loaded when used."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.scorers.simple import NAMED
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.shipped import pruners_folder, shipped_pruners

# What SDTP alone means.
SDTP, DEFAULT_PRUNERS = "SDTP", "smollm2-135m-instruct"


@dataclass(frozen=True)
class NamedScorer:
    """A score to be loaded.

    Attributes
    ----------
    name
        What tables call it.
    folder
        Where its pruners are; None for a simple score.
    """

    name: str
    folder: Path | None

    def load(self, model: Any) -> Scorer:
        """The scorer, on the model's device.

        Raises
        ------
        ValueError, PruningNotSupported
            For pruners of a model of other sizes, or that need attention which cannot be read (`TokenPruners.check`).
        """
        if self.folder is None:
            return NAMED[self.name]()
        pruners = TokenPruners.from_pretrained(str(self.folder)).to(model.device).eval()
        pruners.check(model, PruningConfig(pruners.layers))
        return pruners

    def layers(self, scorer: Scorer, num_layers: int) -> list[int]:
        """The layers before which it can score: learned ones their own, simple ones any."""
        return list(getattr(scorer, "layers", None) or range(1, num_layers))


def scorer_named(text: str) -> NamedScorer:
    """For ``add_argument(type=...)``: a simple score's name, ``SDTP`` for the pruners that ship for the embedded model,
    ``NAME=PRUNERS`` (a folder, or the name of pruners that ship), or such pruners alone, called as their folder is.

    Raises
    ------
    argparse.ArgumentTypeError
        For a name that nothing has, pruners that are not there, and pruners under a simple score's name.
    """
    name, given, folder = text.partition("=")
    if not given and name in NAMED:
        return NamedScorer(name, None)
    path = pruners_folder(folder if given else DEFAULT_PRUNERS if name == SDTP else text)
    known = f"{SDTP}, {', '.join(shipped_pruners())}, {', '.join(NAMED)}"
    if path is None and not given:
        raise argparse.ArgumentTypeError(f"{text!r} is no score and no pruners' folder: choose among {known}, or give "
                                         "NAME=DIR with pruners of this model.")  # fmt: skip
    if path is None or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: no pruners in {folder or 'no folder'}; give NAME=DIR with pruners "
                                         f"of this model, or one of {known}.")  # fmt: skip
    name = name if given or name == SDTP else path.resolve().name
    if name in NAMED:
        raise argparse.ArgumentTypeError(f"{text!r}: {name} is the name of a score without training: give these "
                                         "pruners another one, NAME=DIR.")  # fmt: skip
    return NamedScorer(name, path)


def loaded(named: Sequence[NamedScorer], model: Any) -> dict[str, Scorer]:
    """Name -> scorer of each, on the model's device.

    Raises
    ------
    ValueError
        Before any is loaded: two that differ have one name, and rows could not tell them apart.
    """
    each = list(dict.fromkeys(named))
    names = [one.name for one in each]
    if twice := [name for name in names if names.count(name) > 1]:
        folders = ", ".join(str(one.folder) for one in each if one.name == twice[0])
        raise ValueError(f"{twice[0]} names several scores ({folders}): give each a name of its own, NAME=DIR.")
    return {one.name: one.load(model) for one in each}
