"""`SpeedupBudget`: a wanted prefill speed-up by FLOPs, turned into a keep ratio for each prompt's length.

Pure arithmetic over `sdtp_lib.budget`, as that module: no torch, no model in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdtp_lib.budget import find_keep_ratio, speedup_limit, tokens_per_layer
from sdtp_lib.model_shape import ModelShape

if TYPE_CHECKING:
    from sdtp_lib.config import PruningConfig


class SpeedupOutOfReach(ValueError):
    """No budget reaches the wanted prefill speed-up; the message has the highest that can be had."""


@dataclass(frozen=True)
class SpeedupBudget:
    """A wanted prefill speed-up by FLOPs, scoring left out: for each prompt length the keep ratio that reaches it.

    Stands for a `PruningConfig` whose ``keep_ratio`` is not fixed yet; each length is solved once. With
    ``as_far_as_possible`` a prompt that only its few tokens keep from the speed-up is pruned to what must stay.
    """

    config: PruningConfig
    speedup: float
    shape: ModelShape
    as_far_as_possible: bool = False
    _solved: dict[int, PruningConfig] = field(default_factory=dict, repr=False, compare=False)

    def for_prompt(self, tokens: int) -> PruningConfig:
        """The configuration for a prompt of ``tokens``; one that is all protected is left whole. `SpeedupOutOfReach`
        if the protected tokens forbid the speed-up."""
        if tokens not in self._solved:
            self._solved[tokens] = self._solve(tokens)
        return self._solved[tokens]

    def _solve(self, tokens: int) -> PruningConfig:
        most = self.config.replace(keep_ratio=1e-6)
        counts = tokens_per_layer(most, self.shape.num_layers, tokens)
        if counts[-1] == tokens:
            return self.config.replace(keep_ratio=1.0)
        highest = speedup_limit(self.shape, most, tokens, pruner_width=0)
        if highest < self.speedup:
            if self.as_far_as_possible and self._only_short(tokens):
                return most
            raise SpeedupOutOfReach(
                f"budget='{self.speedup:g}x': a prompt of {tokens} tokens can be prefilled at most {highest:.2f}x as "
                f"fast with layers={list(self.config.layers)} and the protected tokens (sink_tokens="
                f"{self.config.sink_tokens}, local_ratio={self.config.local_ratio}, min_local_tokens="
                f"{self.config.min_local_tokens}): ask for less, prune earlier or protect less."
            )
        ratio = find_keep_ratio(self.shape, self.config, tokens, speedup=self.speedup, pruner_width=0)
        return self.config.replace(keep_ratio=ratio)

    def _only_short(self, tokens: int) -> bool:
        """Whether it would be reached if the first and the last few tokens were not protected."""
        bare = self.config.replace(keep_ratio=1e-6, sink_tokens=0, min_local_tokens=1)
        return speedup_limit(self.shape, bare, tokens, pruner_width=0) >= self.speedup
