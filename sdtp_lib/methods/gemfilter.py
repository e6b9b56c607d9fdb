"""GemFilter (arXiv 2409.17422): early layers choose the tokens, then the model starts again on those alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method, depth
from sdtp_lib.pruning.engine import two_passes
from sdtp_lib.pruning.second_pass import TwoPasses
from sdtp_lib.pruning.stage import Scorer, Stage
from sdtp_lib.scorers.blend import average_of_neighbours


@dataclass(frozen=True, kw_only=True)
class GemFilter(Method):
    """The last token's query against the keys of one layer, summed over heads and pooled, picks ``tokens`` tokens.

    Differs from the paper: the last token always stays, since its logits are the answer; and pooling at the two ends
    averages over the tokens that are there.

    Attributes
    ----------
    filter_depth
        The filter layer, a share of L (layer 13 of 32); layers before it run in the first pass.
    tokens
        How many are chosen.
    kernel
        Neighbours that the products are averaged over.
    positions
        ``"compact"`` renumbers the chosen tokens, as the paper does (one row at a time); ``"original"`` does not.
    """

    name: ClassVar[str] = "gemfilter"
    paper: ClassVar[str] = "2409.17422"
    filter_depth: float = 13 / 32
    tokens: int = 1024
    kernel: int = 5
    positions: str = "compact"

    def config(self, layers: int) -> PruningConfig:
        return PruningConfig(
            (depth(self.filter_depth, layers),), keep_tokens=self.tokens, sink_tokens=0, local_ratio=0.0,
            min_local_tokens=1,
        )  # fmt: skip

    def scorer(self, _layers: int) -> Scorer:
        return self._score

    def _score(self, stage: Stage) -> torch.Tensor:
        # The logarithm of an attention weight is the scaled product less one number per head: the same order.
        paid = stage.attention_from_last(1)[:, :, 0]
        products = paid.clamp_min(torch.finfo(paid.dtype).tiny).log().sum(dim=1)
        return average_of_neighbours(products, stage.valid, self.kernel)

    def passes(self, config: PruningConfig, layers: int, prompt_tokens: int) -> list[list[int]]:
        first = config.layers[-1]
        kept = budget.tokens_per_layer(config, layers, prompt_tokens)[-1]
        return [[prompt_tokens] * first + [0] * (layers - first), [kept] * layers]

    def around(self, model: Any, _trace: Any) -> contextlib.AbstractContextManager:
        return two_passes(model, TwoPasses(renumber=self.positions == "compact"))
