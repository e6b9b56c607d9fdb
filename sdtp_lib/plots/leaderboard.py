"""The leaderboard's picture: quality lost over prefill speed-up, one line per method.

Knows frames by their column names; draws on given axes, never shows or saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from sdtp_lib.plots.style import lines_by, log_scale, need_columns


def quality_lost(frame: pd.DataFrame, axes: Sequence[Axes], *, ours: str) -> Sequence[Axes]:
    """KL (left, log scale) and RULER points lost (right) over the measured speed-up to the first token.

    Parameters
    ----------
    frame
        One row per method and budget: ``method, measured`` (speed-up), ``kl_nats, kl_items, lost, lost_items``.
    axes
        Two, side by side; the second has the legend of both beside it, or in its place where there is nothing of it.
    ours
        The method whose line is drawn last and thickest.

    Raises
    ------
    ValueError
        If a column is missing.
    """
    need_columns(frame, "method", "measured", "kl_nats", "kl_items", "lost", "lost_items", what="quality_lost")
    frame = pd.concat([frame[frame.method != ours], frame[frame.method == ours]])
    panels = (
        ("kl_nats", "kl_items", "KL to the unpruned model [nats/token]", "Mean of text, needle, instructions",
         "per test set"),
        ("lost", "lost_items", "points lost [of 100]", "RULER, items solved unpruned", "items"),
    )  # fmt: skip
    for ax, (column, counted, label, title, of_what) in zip(axes, panels, strict=True):
        part = frame.dropna(subset=[column, "measured"]).astype({column: float, "measured": float})
        lines_by(part, ax, "measured", column, "method", linewidth=1.4, markersize=6)
        for line in ax.get_lines():
            if line.get_label() == ours:
                line.set(linewidth=3, markersize=9)
        if len(part):
            low, high = int(part[counted].min()), int(part[counted].max())
            title += f" (n = {low if low == high else f'{low} to {high}'} {of_what})"
        ax.set_title(title, fontsize=11)
        ax.set_ylabel(f"{label}\n(lower is better)")
        ax.set_xlabel("measured prefill speed-up, scoring included")
        ax.xaxis.set_major_formatter(lambda value, _place: f"{value:g}x")
        if part.empty:
            ax.set_axis_off()  # of a panel without a point there is nothing to see; the legend has its place
            ax.set_title("")
    if frame.kl_nats.notna().any():
        log_scale(axes[0])
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(min(-5, low), max(105, high))
    entries = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    beside = 1.02 if axes[1].axison else 0.0
    axes[1].legend(entries.values(), entries, loc="upper left", bbox_to_anchor=(beside, 1.0), borderaxespad=0)
    return axes
