"""SlimInfer (arXiv 2508.06447): blocks of tokens, three cuts to absolute numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method, depths
from sdtp_lib.methods.votes import block_means
from sdtp_lib.pruning.stage import Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class SlimInfer(Method):
    """Before layers 10, 20 and 30 of 32 the blocks stay that the last tokens attend to most: 8K, 4K, 2K tokens.

    Differs from the paper: what is dropped is gone, where SlimInfer moves keys and values to host memory, from which
    they may return. Blocks are counted among the kept tokens, and the last block always stays.

    Attributes
    ----------
    stages
        Depths as shares of L (of 28 layers: 9, 18, 26).
    tokens
        How many stay at each (Qwen2.5-7B: 12K, 6K, 4K).
    block, window
        Tokens of a block; last tokens whose attention counts.
    """

    name: ClassVar[str] = "sliminfer"
    paper: ClassVar[str] = "2508.06447"
    stages: tuple[float, ...] = (10 / 32, 20 / 32, 30 / 32)
    tokens: tuple[int, ...] = (8192, 4096, 2048)
    block: int = 64
    window: int = 64

    def config(self, layers: int) -> PruningConfig:
        at = depths(self.stages, layers)
        return PruningConfig(
            at, keep_tokens=self.tokens[-len(at) :], sink_tokens=0, local_ratio=0.0, min_local_tokens=self.block
        )

    def scorer(self, _layers: int) -> Scorer:
        return self._score

    def _score(self, stage: Stage) -> torch.Tensor:
        paid = stage.attention_from_last(self.window).mean(dim=(1, 2))
        return block_means(paid, stage.valid, self.block)
