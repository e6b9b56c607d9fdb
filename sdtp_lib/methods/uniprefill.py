"""UniPrefill (arXiv 2605.06221): at every full-attention layer, as many blocks as hold 99 % of the attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib.architectures.layers import describe
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method
from sdtp_lib.methods.votes import best_blocks, block_means, decided
from sdtp_lib.pruning.stage import Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class UniPrefill(Method):
    """Blocks sorted by the attention of the last 128 tokens stay until they hold the share ``mass`` of it; batch 1.

    `at_speedup` cannot know what scores will say: there the same blocks compete for one keep ratio.

    Attributes
    ----------
    mass
        Share of the blocks' mean attention that stays at each layer.
    block, window
        Tokens of a block; last tokens whose attention counts.
    ends
        The first and last tokens that always stay.
    layers_read
        Layers whose attention decides; None: all with full attention. Each takes effect from the next layer on.
    """

    name: ClassVar[str] = "uniprefill"
    paper: ClassVar[str] = "2605.06221"
    mass: float = 0.99
    block: int = 64
    window: int = 128
    ends: int = 128
    layers_read: tuple[int, ...] | None = None

    @property
    def differs_at_speedup(self) -> str:
        return (
            "at a wanted speed-up blocks compete for one keep ratio, the same at each layer; the paper's adaptive "
            f"rule, as many as hold {100 * self.mass:g} % of the attention, is not measured then"
        )

    def config(self, layers: int) -> PruningConfig:
        read = self.layers_read if self.layers_read is not None else range(layers - 1)
        how = {"keep_mass": 1.0} if self.speedup is None else {"keep_ratio": 0.9}
        return PruningConfig(
            tuple(layer + 1 for layer in read if layer + 1 < layers), sink_tokens=self.ends, local_ratio=0.0,
            min_local_tokens=self.ends, **how,
        )  # fmt: skip

    def budget_for(self, model: Any) -> Any:
        if self.layers_read is not None:
            return super().budget_for(model)
        architecture = describe(model)
        full = [n for n in range(len(architecture.layers)) if architecture.sliding_window(n) is None]
        return dataclasses.replace(self, layers_read=tuple(full)).budget_for(model)

    def scorer(self, _layers: int) -> Scorer:
        return self._score

    def _score(self, stage: Stage) -> torch.Tensor:
        means = block_means(stage.attention_just_paid(self.window).mean(dim=(1, 2)), stage.valid, self.block)
        if self.speedup is not None:
            return means
        stays = best_blocks(means, self.block, mass=self.mass)
        stays[:, : self.ends] = True
        stays[:, -self.ends :] = True
        return decided(stays)
