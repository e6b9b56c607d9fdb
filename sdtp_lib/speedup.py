"""`SpeedupBudget`: a wanted prefill speed-up by FLOPs, turned into keep ratios for each prompt's length.

Pure arithmetic over `sdtp_lib.budget`, as that module: no torch, no model in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdtp_lib.budget import LOWEST_RATIO, largest_ratio, speedup_limit, tokens_per_layer
from sdtp_lib.model_shape import ModelShape

if TYPE_CHECKING:
    from sdtp_lib.config import PruningConfig

_HIGHEST_POWER = 64.0  # of a ratio per stage: 0.9 to this power is 0.001


class SpeedupOutOfReach(ValueError):
    """No budget reaches the wanted prefill speed-up; the message has the highest that can be had."""


@dataclass(frozen=True)
class SpeedupBudget:
    """A wanted prefill speed-up by FLOPs, scoring left out: for each prompt length the keep ratio that reaches it.

    Stands for a `PruningConfig` whose ``keep_ratio`` is not fixed yet; each length is solved once. Where ``config`` has
    a ratio per stage, their shape is kept: ratios 0.5 and 0.8 become 0.5^p and 0.8^p. With ``as_far_as_possible`` a
    prompt that only its few tokens keep from the speed-up is pruned to what must stay.
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
        most = self._at(LOWEST_RATIO)
        counts = tokens_per_layer(most, self.shape.num_layers, tokens)
        if counts[-1] == tokens:
            return self.config.replace(keep_ratio=1.0)
        highest = self._limit(most, tokens)
        if highest < self.speedup:
            if self.as_far_as_possible and self._only_short(tokens):
                return most
            raise SpeedupOutOfReach(
                f"budget='{self.speedup:g}x': a prompt of {tokens} tokens can be prefilled at most {highest:.2f}x as "
                f"fast with layers={list(self.config.layers)} and the protected tokens (sink_tokens="
                f"{self.config.sink_tokens}, local_ratio={self.config.local_ratio}, min_local_tokens="
                f"{self.config.min_local_tokens}): ask for less, prune earlier or protect less."
            )
        return self._at(largest_ratio(lambda dial: self._limit(self._at(dial), tokens) >= self.speedup))

    def _at(self, dial: float) -> PruningConfig:
        """``config`` between `LOWEST_RATIO` and 1: with this ratio, or with its own raised to one power."""
        ratios = self.config.keep_ratio
        if not isinstance(ratios, tuple):
            return self.config.replace(keep_ratio=dial)
        power = _HIGHEST_POWER * math.log(dial) / math.log(LOWEST_RATIO)
        return self.config.replace(keep_ratio=tuple(max(LOWEST_RATIO, ratio**power) for ratio in ratios))

    def _limit(self, config: PruningConfig, tokens: int) -> float:
        return speedup_limit(self.shape, config, tokens, pruner_width=0)

    def _only_short(self, tokens: int) -> bool:
        """Whether it would be reached if the first and the last few tokens were not protected."""
        bare = self._at(LOWEST_RATIO).replace(sink_tokens=0, min_local_tokens=1)
        return self._limit(bare, tokens) >= self.speedup
