"""FastKV (arXiv 2502.01068): one cut half way, and a KV budget of its own for every layer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib.methods.method import OneCut
from sdtp_lib.methods.votes import by_group, votes
from sdtp_lib.pruning.engine import kv_budget
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.stage import Stage


@dataclass(frozen=True, kw_only=True)
class FastKV(OneCut):
    """After layer 15 of 32 a fifth of the tokens goes on, by the pooled attention of the last 8 there.

    Attributes
    ----------
    cut_depth
        Before this share of L.
    keep
        Share of the tokens that go on.
    kv
        Share of the *prompt's* keys that every layer keeps, per key-value head, by the same score; None: all.
    window, kernel
        Last tokens whose attention counts (they always stay), and neighbours that it is averaged over.
    """

    name: ClassVar[str] = "fastkv"
    paper: ClassVar[str] = "2502.01068"
    cut_depth: float = 16 / 32
    keep: float = 0.2
    kv: float | None = 0.1
    window: int = 8
    kernel: int = 7

    @property
    def differs_at_speedup(self) -> str:
        if self.kv is None:
            return ""
        return (
            "at a wanted speed-up its cut is scaled and its own KV budget is not: KL and answers are read from "
            f"{100 * self.kv:g} % of the prompt's keys per layer"
        )

    def _score(self, stage: Stage) -> torch.Tensor:
        return votes(stage.attention_just_paid(self.window), self.kernel).sum(dim=1)

    def around(self, model: Any, _trace: Any) -> contextlib.AbstractContextManager:
        if self.kv is None:
            return contextlib.nullcontext()
        return kv_budget(
            model, KVBudget(lambda _held, _layer, prompt: int(self.kv * prompt + 1e-9), self._score_keys,
                            last_tokens=self.window)
        )  # fmt: skip

    def _score_keys(self, stage: Stage) -> torch.Tensor:
        return head_votes(stage, self.window, self.kernel)


def head_votes(stage: Stage, window: int, kernel: int) -> torch.Tensor:
    """(B, G, N): pooled attention of the last ``window`` tokens, summed over the heads of each key-value head."""
    scores = votes(stage.attention_from_last(window), kernel)
    return scores.mean(dim=1) if stage.keys is None else by_group(scores, stage.keys.shape[1])
