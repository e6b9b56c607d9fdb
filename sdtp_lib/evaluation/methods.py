"""What pruners are compared with: the scores that need no training, and published methods."""

from __future__ import annotations

from collections.abc import Sequence

from sdtp_lib import methods, scorers
from sdtp_lib.methods.variant import Variant
from sdtp_lib.scorers.simple import NAMED


def baseline_methods(*, recency_weight: float = 0.5) -> list[Variant]:
    """The scores that need no training, at the same budget, and published methods at the same prefill FLOPs.

    Scores prune at the common stages, thus compute equal tokens in each layer.
    """
    mixed = scorers.weighted([(scorers.attention(8), 1.0), (scorers.recency(), recency_weight)])
    return [
        Variant("random", scorer=NAMED["random"]()),
        Variant("recency", scorer=NAMED["recency"]()),
        Variant("hidden norm", scorer=NAMED["hidden_norm"]()),
        Variant("attention", scorer=NAMED["attention"]()),
        Variant("attention, pooled", scorer=NAMED["attention_pooled"]()),
        *published_methods(("lazyllm", "gemfilter", "fastkv")),
        Variant("attention + recency", scorer=mixed),
    ]


def published_methods(names: Sequence[str]) -> list[Variant]:
    """Entries of `sdtp_lib.methods`; a comparison scales each to the prefill FLOPs of the common config.

    Where a method cannot reach that few FLOPs, its row says so (kind ``out of reach``).
    """
    return [Variant(name, methods.get(name)) for name in names]
