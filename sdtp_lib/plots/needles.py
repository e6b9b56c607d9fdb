"""The needle map: how often a fact is found, by where it stands and how long the prompt is.

Knows frames by their column names; draws on given axes or several on a figure of their own, never shows or saves.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp_lib.plots.style import SEQUENTIAL, axes_or_new, need_columns


def needle_map(frame: pd.DataFrame, ax: Axes | None = None, *, bins: int = 5, colorbar: bool = True) -> Axes:
    """Mean score [%] by depth of the needle (down) and prompt length (across); each cell says its number of items.

    Parameters
    ----------
    frame
        Rows of one variant: ``answer_depth`` (share of the prompt before the needle, 0 to 1; rows without one do not
        count), ``target_tokens`` and ``score`` (0 to 1).
    bins
        Into how many equal parts the depth is divided.

    Raises
    ------
    ValueError
        If a column is missing, or no row has a depth.
    """
    ax = axes_or_new(ax)
    need_columns(frame, "answer_depth", "target_tokens", "score", what="needle_map")
    frame = frame.dropna(subset=["answer_depth", "score"])
    if frame.empty:
        raise ValueError("needle_map: no row has an answer_depth; give rows of tasks with one needle.")
    depths = [f"{100 * low / bins:.0f}-{100 * (low + 1) / bins:.0f}" for low in range(bins)]
    place = np.minimum((frame.answer_depth.astype(float) * bins).astype(int), bins - 1)
    cells = frame.assign(depth=[depths[number] for number in place])
    table = cells.pivot_table(index="depth", columns="target_tokens", values="score", aggfunc=["mean", "count"])
    mean = 100 * table["mean"].reindex(depths)
    count = table["count"].reindex(depths)
    texts = [
        ["" if np.isnan(value) else f"{value:.0f}\nn={n:.0f}" for value, n in zip(*lines, strict=True)]
        for lines in zip(mean.to_numpy(), count.to_numpy(), strict=True)
    ]
    sns.heatmap(
        mean, ax=ax, vmin=0, vmax=100, cmap=SEQUENTIAL, annot=np.array(texts), fmt="", linewidths=1, cbar=colorbar,
        xticklabels=[f"{int(length):,}" for length in mean.columns], annot_kws={"fontsize": 9},
        cbar_kws={"label": "score [%]"} if colorbar else None,
    )  # fmt: skip
    ax.grid(False)  # a cell without an item is empty
    ax.set_xlabel("prompt length [tokens]")
    ax.set_ylabel("depth of the needle [% of the prompt]")
    ax.tick_params(axis="y", rotation=0)
    return ax


def needle_maps(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """A figure of `needle_map` side by side, title -> rows, on one scale of depth and colour."""
    lengths = max(frame.target_tokens.nunique() for frame in panels.values())
    size = ((1.5 + 0.9 * lengths) * len(panels) + 1, 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for number, (ax, (title, frame)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        needle_map(frame, ax, colorbar=number == len(panels) - 1)
        ax.set_title(title)
        if number:
            ax.set_ylabel("")
    return figure
