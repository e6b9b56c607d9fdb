"""Every figure of the study under one name: ``from sdtp_lib import plots``.

Frames and arrays in, axes out. Functions draw on the axes they are given (or on those of a new figure), return them,
and never show or save; `use_style` is the one style sheet and `save` the one way to a file. Knows no model.
"""

from __future__ import annotations

from sdtp_lib.extras import extra

with extra("study"):
    import matplotlib  # noqa: F401
    import seaborn  # noqa: F401

from sdtp_lib.plots import readings
from sdtp_lib.plots.cost import memory_over_length, speedup_over_length, time_bars
from sdtp_lib.plots.leaderboard import quality_lost
from sdtp_lib.plots.needles import needle_map, needle_maps
from sdtp_lib.plots.results import (
    loss_curves,
    pareto,
    pareto_front,
    quality_over_flops,
    recall_by_layer,
    score_by_group,
    slope_chart,
)
from sdtp_lib.plots.style import PALETTE, SEQUENTIAL, one_legend, save, series_look, short, use_style
from sdtp_lib.plots.text import dropped_text, text_and_map
from sdtp_lib.plots.tokens import (
    kept_overlap,
    kept_share_by_position,
    saliency_heatmap,
    salient_share_by_layer,
    token_layer_map,
)

__all__ = [
    "PALETTE",
    "SEQUENTIAL",
    "dropped_text",
    "kept_overlap",
    "kept_share_by_position",
    "loss_curves",
    "memory_over_length",
    "needle_map",
    "needle_maps",
    "one_legend",
    "pareto",
    "pareto_front",
    "quality_lost",
    "quality_over_flops",
    "readings",
    "recall_by_layer",
    "saliency_heatmap",
    "salient_share_by_layer",
    "save",
    "score_by_group",
    "series_look",
    "short",
    "slope_chart",
    "speedup_over_length",
    "time_bars",
    "text_and_map",
    "token_layer_map",
    "use_style",
]
