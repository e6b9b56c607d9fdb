"""What an earlier reproduction of SDTP does: a pruned pass without a cache, then a prefill of the shortened prompt."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.sdtp import SDTP
from sdtp_lib.pruning.engine import two_passes
from sdtp_lib.pruning.second_pass import TwoPasses
from sdtp_lib.pruning.trace import PruningTrace


@dataclass(frozen=True, kw_only=True)
class EarlierScheme(SDTP):
    """SDTP's stages in a first pass over all layers, then all layers on the kept tokens, renumbered.

    Kept tokens are computed twice: this method is here to be measured, not to be used.
    """

    name: ClassVar[str] = "earlier-scheme"

    def passes(self, config: PruningConfig, layers: int, prompt_tokens: int) -> list[list[int]]:
        first = budget.tokens_per_layer(config, layers, prompt_tokens)
        return [first, [first[-1]] * layers]

    def around(self, model: Any, _trace: PruningTrace) -> contextlib.AbstractContextManager:
        return two_passes(model, TwoPasses(renumber=True, stop=False))
