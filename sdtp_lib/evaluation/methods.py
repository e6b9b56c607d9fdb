"""`Compared`: one line of a comparison; scores that need no training, and published methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib import budget, methods, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.scorers.simple import NAMED


@dataclass(frozen=True)
class Compared:
    """One line of a comparison.

    Attributes
    ----------
    name
        As rows and legends show it.
    scorer
        A scorer; or, with ``from_sample``, a function of (model, sample, layers) that returns one; or an entry of
        `sdtp_lib.methods`.
    config_for
        Turns the common config and the prompt's tokens into this line's own at equal cost, a config or an entry of
        `sdtp_lib.methods`; None: the common one.
    block
        ``"deployable"``, or ``"oracle"`` for scores that have seen the response.
    around
        Makes a context for its runs: what else this method does to the model (KV-cache compression, say).
    """

    name: str
    scorer: Any
    config_for: Callable[[PruningConfig, int], PruningConfig | methods.Method] | None = None
    block: str = "deployable"
    from_sample: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def baseline_methods(shape: ModelShape, *, recency_weight: float = 0.5) -> list[Compared]:
    """The scores that need no training, at the same budget, and published methods at the same prefill FLOPs.

    Scores prune at the common stages, thus compute equal tokens in each layer.
    """
    mixed = scorers.weighted([(scorers.attention(8), 1.0), (scorers.recency(), recency_weight)])
    return [
        Compared("random", NAMED["random"]()),
        Compared("recency", NAMED["recency"]()),
        Compared("hidden norm", NAMED["hidden_norm"]()),
        Compared("attention", NAMED["attention"]()),
        Compared("attention, pooled", NAMED["attention_pooled"]()),
        *published_methods(shape, ("lazyllm", "gemfilter", "fastkv")),
        Compared("attention + recency", mixed),
    ]


def published_methods(shape: ModelShape, names: Sequence[str]) -> list[Compared]:
    """Entries of `sdtp_lib.methods`, each scaled to the causal prefill FLOPs of the common config.

    Where a method cannot reach that few FLOPs, its row says so (kind ``out of reach``).
    """

    def compared(name: str) -> Compared:
        method = methods.get(name)

        def config_for(config: PruningConfig, prompt_tokens: int) -> methods.Method:
            return method.at_speedup(budget.speedup_limit(shape, config, prompt_tokens))

        return Compared(name, method, config_for=config_for)

    return [compared(name) for name in names]
