"""PyramidInfer (arXiv 2405.12532): a few tokens are dropped before every layer, more in deeper layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method, MethodBudget
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.stage import Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(Method):
    """The last fifth of the prompt stays; of the rest, before layer l + 1, the share ``decay`` (by a cosine from 1).

    Scores are the attention of that last fifth, the later the more it counts. Differs from the paper's code: the
    attention is that of the layer to come (there, of the one that has just run), and decode drops nothing more.

    Attributes
    ----------
    recent
        Share of the prompt, from its end, that always stays and whose attention counts.
    decay
        Share of the rest that the last layer leaves.
    rise
        Weight of the last token's attention beside the first's of the recent ones.
    least
        Context tokens below which nothing goes.
    sinks
        The first tokens, which always stay.
    """

    name: ClassVar[str] = "pyramidinfer"
    paper: ClassVar[str] = "2405.12532"
    recent: float = 0.2
    decay: float = 0.9
    rise: float = 1.2
    least: int = 64
    sinks: int = 4

    def config(self, layers: int) -> PruningConfig:
        return PruningConfig(tuple(range(1, layers)), sink_tokens=self.sinks, local_ratio=0.0, min_local_tokens=1)

    def config_for(self, layers: int, prompt_tokens: int, power: float = 1.0) -> PruningConfig:
        recent = int(self.recent * prompt_tokens) + 1
        least = min(self.least, prompt_tokens - recent)
        context, kept = prompt_tokens - recent, []
        for layer in range(layers - 1):
            share = ((1 - self.decay) * (math.cos(math.pi * layer / layers) + 1) / 2 + self.decay) ** power
            context = fewer if (fewer := int(context * share)) > least else context
            kept.append(context + recent)
        return self.config(layers).replace(keep_tokens=tuple(kept), min_local_tokens=recent)

    def scaled(self, config: PruningConfig, prompt_tokens: int, power: float) -> PruningConfig:
        return self.config_for(len(config.layers) + 1, prompt_tokens, power)

    def budget_for(self, model: Any) -> MethodBudget:
        shape = ModelShape.from_model(model)
        return MethodBudget(self.config(shape.num_layers), self.speedup, shape, method=self)

    def scorer(self, _layers: int) -> Scorer:
        return self._score

    def _score(self, stage: Stage) -> torch.Tensor:
        recent = [int(self.recent * tokens) + 1 for tokens in stage.prompt_lengths.tolist()]
        return stage.attention_received(recent, self.rise).mean(dim=1)
