"""`Method`: one line of a comparison; and the scores that need no training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdtp_lib import budget, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.model_shape import ModelShape


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes
    ----------
    name
        As rows and legends show it.
    scorer
        A scorer; or, with ``from_sample``, a function of (model, sample, layers) that returns one.
    config_for
        Turns the common config and the prompt's tokens into this method's own at equal cost; None: the common one.
    block
        ``"deployable"``, or ``"oracle"`` for scores that have seen the response.
    around
        Makes a context for its runs: what else this method does to the model (KV-cache compression, say).
    """

    name: str
    scorer: Any
    config_for: Callable[[PruningConfig, int], PruningConfig] | None = None
    block: str = "deployable"
    from_sample: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def baseline_methods(shape: ModelShape, *, recency_weight: float = 0.5) -> list[Method]:
    """The scores that need no training, at the same budget.

    The one-layer filter (GemFilter, FastKV) drops once, before a quarter of the layers, down to as many tokens as give
    the same causal prefill FLOPs; all others prune at the common stages, thus compute equal tokens in each layer.
    """
    mixed = scorers.weighted([(scorers.attention(8), 1.0), (scorers.recency(), recency_weight)])
    return [
        Method("random", scorers.random(0)),
        Method("recency", scorers.recency()),
        Method("hidden norm", scorers.hidden_norm()),
        Method("attention", scorers.attention(8)),
        Method("attention, pooled", scorers.attention(8, kernel=7)),
        Method("one-layer filter", scorers.attention(8, kernel=7), config_for=one_layer_config(shape)),
        Method("attention + recency", mixed),
    ]


def one_layer_config(shape: ModelShape, layer: int | None = None) -> Callable[[PruningConfig, int], PruningConfig]:
    """Configs with one stage, by default before a quarter of the layers, at the causal prefill FLOPs of another."""

    def config_for(config: PruningConfig, prompt_tokens: int) -> PruningConfig:
        single = config.replace(layers=(layer or max(1, shape.num_layers // 4),), keep_ratio=1.0)
        wanted = budget.speedup_limit(shape, config, prompt_tokens)
        return single.replace(keep_ratio=budget.find_keep_ratio(shape, single, prompt_tokens, speedup=wanted))

    return config_for
