"""H2O (arXiv 2306.14048): a full prefill, then a cache of heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sdtp_lib.methods.snapkv import CacheOnly
from sdtp_lib.methods.votes import by_group
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.stage import Stage


@dataclass(frozen=True, kw_only=True)
class H2O(CacheOnly):
    """Half of the budget goes to the most recent tokens, half to those that all tokens attended to most in sum.

    Differs from the paper: the cut happens once, after the prefill (there, one token leaves at every step), and heads
    that share keys choose together. Reading every query's attention costs about a second attention pass.

    Attributes
    ----------
    keep
        Share of the prompt's keys that each layer keeps.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    keep: float = 0.2

    def kv_budget(self) -> KVBudget:
        return KVBudget(lambda _held, _layer, prompt: int(self.keep * prompt + 1e-9), self._score)

    def _score(self, stage: Stage) -> torch.Tensor:
        paid = stage.attention_received()
        heavy = paid.mean(dim=1, keepdim=True) if stage.keys is None else by_group(paid, stage.keys.shape[1])
        recent = (self.keep * stage.prompt_lengths.double() + 1e-9).long() // 2
        latest = stage.positions >= (stage.prompt_lengths - recent)[:, None]
        return heavy.masked_fill(latest[:, None], torch.inf)
