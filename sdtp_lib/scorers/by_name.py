"""Scores by their name on a command line: `SDTP`, `SDTP=DIR`, `recency`. Checked when read, loaded when used."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.scorers.simple import NAMED
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.shipped import pruners_folder

# What a name alone means, such as SDTP.
DEFAULT_PRUNERS = "smollm2-135m-instruct"


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
        """The scorer, on the model's device."""
        if self.folder is None:
            return NAMED[self.name]()
        return TokenPruners.from_pretrained(str(self.folder)).to(model.device).eval()

    def layers(self, scorer: Scorer, num_layers: int) -> list[int]:
        """The layers before which it can score: learned ones their own, simple ones any."""
        return list(getattr(scorer, "layers", None) or range(1, num_layers))


def scorer_named(text: str) -> NamedScorer:
    """For ``add_argument(type=...)``: a simple score's name, ``NAME=PRUNERS`` (a folder, or the name of pruners that
    ship), or a name alone for the shipped ones of the embedded model.

    Raises
    ------
    argparse.ArgumentTypeError
        If there are no such pruners.
    """
    name, _, folder = text.partition("=")
    if name in NAMED and not folder:
        return NamedScorer(name, None)
    path = pruners_folder(folder or DEFAULT_PRUNERS)
    if not name or path is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: no pruners in {folder}; give NAME=DIR with pruners of this model, or one of {', '.join(NAMED)}."
        )
    return NamedScorer(name, path)
