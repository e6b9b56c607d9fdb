"""SDTP (arXiv 2504.04514): learned scores by stages; the first 4 tokens and the last tenth always stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method
from sdtp_lib.pruning.stage import Scorer


@dataclass(frozen=True, kw_only=True)
class SDTP(Method):
    """Before every third layer from layer 4 on (0-based) a tenth of the tokens goes (the paper's S = 10 on 32 layers).

    Attributes
    ----------
    preset
        Of `PruningConfig`: where and how much.
    pruners
        The scorer; None: those that `token_pruning` finds for the model, else its training-free default.
    """

    name: ClassVar[str] = "sdtp"
    paper: ClassVar[str] = "2504.04514"
    preset: str = "keep09"
    pruners: Scorer | None = None

    def config(self, layers: int) -> PruningConfig:
        return PruningConfig.preset(self.preset, layers)

    def scorer(self, _layers: int) -> Scorer | None:
        return self.pruners


@dataclass(frozen=True, kw_only=True)
class SDTPLow(SDTP):
    """The paper's SDTP-low: five stages, every fifth layer."""

    name: ClassVar[str] = "sdtp-low"
    preset: str = "paper-low"


@dataclass(frozen=True, kw_only=True)
class SDTPFast(SDTP):
    """This project's schedule: four stages that drop early, the last layers nothing (preset ``fast``).

    At 1,024 tokens better on text, long values, news and the language reference, level on needles, instructions,
    several documents and RULER; at 4,096 worse on needles (LOG.md, "Few stages that drop early").
    """

    name: ClassVar[str] = "sdtp-fast"
    preset: str = "fast"

    @property
    def differs(self) -> str:
        """As `Method.differs`."""
        return "this project's own schedule, not the paper's"
