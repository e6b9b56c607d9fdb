"""LazyLLM (arXiv 2407.14057): at several stages, the tokens that the last token attends to most stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method, depths
from sdtp_lib.pruning.stage import Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class LazyLLM(Method):
    """After some layers the tokens stay that the last one attends to most there, a share that falls with the depth.

    Here a dropped token is gone: the paper keeps its hidden state in an extra cache and may revive it in decode. The
    paper publishes no one schedule; depths and shares are settings of the kind that it describes.

    Attributes
    ----------
    stages
        Depths as shares of L; the attention is that of the layer in front.
    keep
        Share of the *prompt* left after each stage.
    """

    name: ClassVar[str] = "lazyllm"
    paper: ClassVar[str] = "2407.14057"
    stages: tuple[float, ...] = (0.3, 0.6, 0.9)
    keep: tuple[float, ...] = (0.7, 0.5, 0.3)

    def config(self, layers: int) -> PruningConfig:
        at = depths(self.stages, layers)
        left = (1.0, *self.keep[-len(at) :])
        ratios = tuple(after / before for before, after in zip(left, left[1:], strict=False))
        return PruningConfig(at, ratios, sink_tokens=0, local_ratio=0.0, min_local_tokens=1)

    def scorer(self, _layers: int) -> Scorer:
        return attention_of_the_last_token


def attention_of_the_last_token(stage: Stage) -> torch.Tensor:
    """(B, N): attention paid by the last token in the layer that has just run, mean over heads."""
    return stage.attention_just_paid(1).mean(dim=(1, 2))
