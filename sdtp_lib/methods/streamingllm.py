"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent; what recency alone is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdtp_lib import scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method
from sdtp_lib.pruning.stage import Scorer


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """4 sinks and the most recent of ``tokens``, renumbered as their places in the cache.

    Differs from the paper: one cut before layer 1 (layer 0 sees all), and what decode adds is not rolled over.

    Attributes
    ----------
    tokens
        How many stay, sinks included.
    sinks
        The first tokens, which always stay.
    positions
        ``"compact"`` as in the paper (one row at a time, one rotary table), or ``"original"``.
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "2309.17453"
    tokens: int = 1024
    sinks: int = 4
    positions: str = "compact"

    def config(self, _layers: int) -> PruningConfig:
        return PruningConfig(
            (1,), keep_tokens=self.tokens, sink_tokens=self.sinks, local_ratio=0.0, min_local_tokens=1,
            positions=self.positions,
        )  # fmt: skip

    def scorer(self, _layers: int) -> Scorer:
        return scorers.recency()
