"""SnapKV (arXiv 2404.14469): a full prefill, then a cache of what the last tokens attended to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib import scorers
from sdtp_lib.budget import SpeedupOutOfReach
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.fastkv import head_votes
from sdtp_lib.methods.method import Method
from sdtp_lib.pruning.engine import kv_budget
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.stage import Scorer, Stage
from sdtp_lib.pruning.trace import PruningTrace


@dataclass(frozen=True, kw_only=True)
class CacheOnly(Method):
    """A method that shortens the cache and not the prefill: a stage that keeps everything, and a KV budget.

    What would score that stage decides nothing (rows know it as recency); the trace has the method's name.
    """

    ranks: ClassVar[bool] = False

    def config(self, layers: int) -> PruningConfig:
        return PruningConfig((1,), 1.0, sink_tokens=0, local_ratio=0.0, min_local_tokens=1)

    def scorer(self, _layers: int) -> Scorer:
        return scorers.recency()

    def at_speedup(self, speedup: float) -> Method:
        raise SpeedupOutOfReach(
            f"speedup={speedup}: {self.name} shortens the cache only, its prefill is the whole one."
        )

    def budget_for(self, model: Any) -> Any:
        return super().budget_for(model) if self.speedup is None else self.at_speedup(self.speedup)

    def kv_budget(self) -> KVBudget:
        """What each layer keeps."""
        raise NotImplementedError

    def around(self, model: Any, trace: PruningTrace) -> contextlib.AbstractContextManager:
        trace.scorer = self.name
        return kv_budget(model, self.kv_budget())


@dataclass(frozen=True, kw_only=True)
class SnapKV(CacheOnly):
    """Each key-value head keeps the keys that the last 32 tokens attended to, pooled over neighbours.

    Differs from the paper's code: heads that share keys choose together, so that keys need not be repeated. Pooling is
    the average over 5, that code's default (kvpress averages too); its experiments take the maximum over 7.

    Attributes
    ----------
    tokens
        Keys that each layer keeps, the window included.
    window, kernel
        Last tokens whose attention counts, and neighbours that it is averaged over.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"
    tokens: int = 1024
    window: int = 32
    kernel: int = 5

    def kv_budget(self) -> KVBudget:
        return KVBudget(lambda _held, _layer, _prompt: self.tokens, self._score, last_tokens=self.window)

    def _score(self, stage: Stage) -> torch.Tensor:
        return head_votes(stage, self.window, self.kernel)
