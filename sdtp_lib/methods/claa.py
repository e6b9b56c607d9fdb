"""CLAA (arXiv 2602.16054): FastKV's cut, scored by several layers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sdtp_lib.methods.method import OneCut
from sdtp_lib.methods.votes import votes
from sdtp_lib.pruning.stage import LAYERS_AT_HAND, Stage


@dataclass(frozen=True, kw_only=True)
class CLAA(OneCut):
    """One cut half way; a token's score is its best over the last four layers, since single layers may misjudge.

    Attributes
    ----------
    cut_depth, keep, window, kernel
        As in FastKV; the cache is left as it is.
    """

    name: ClassVar[str] = "claa"
    paper: ClassVar[str] = "2602.16054"
    cut_depth: float = 16 / 32
    keep: float = 0.2
    window: int = 8
    kernel: int = 7

    def _score(self, stage: Stage) -> torch.Tensor:
        behind = range(max(0, stage.layer_index - LAYERS_AT_HAND), stage.layer_index)
        paid = stage.attention_paid(behind, self.window)
        return torch.stack([votes(each, self.kernel).sum(dim=1) for each in paid]).amax(dim=0)
