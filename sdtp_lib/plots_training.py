"""Figures of training: loss curves, and how well the pruners find the label's tokens on held-out data.

Knows frames by their column names; draws on given axes, never shows or saves.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sdtp_lib.plots_style import PALETTE, axes_or_new, lines_by, need_columns, series_look


def loss_curves(frame: pd.DataFrame, ax: Axes | None = None, *, smooth: int = 1, log: bool = False) -> Axes:
    """Loss over training steps.

    Parameters
    ----------
    frame
        Long (``step``, ``value``, ``term``) or wide: ``step`` and one column a term (``loss``, ``mse``, ``eval_loss``;
        what is not a number is left out). Terms that begin with ``eval`` are dashed with markers.
    smooth
        Window (in logged rows) of a running mean drawn over the pale raw curve.
    """
    ax = axes_or_new(ax)
    need_columns(frame, "step", what="loss_curves")
    if "term" not in frame.columns:
        skipped = {"step", "epoch", "seed", "learning_rate", "grad_norm"}
        terms = [c for c in frame.select_dtypes("number").columns if c not in skipped]
        frame = frame.melt(id_vars="step", value_vars=terms, var_name="term", value_name="value")
    frame = frame.dropna(subset=["value"])
    look = series_look(list(frame["term"].unique()))
    for term, part in frame.groupby("term", sort=False):
        part = part.groupby("step")["value"].mean()
        held_out = str(term).startswith("eval")
        style = {"color": look[term]["color"], "linestyle": "--" if held_out else "-"}
        style |= {"marker": look[term]["marker"]} if held_out or len(part) < 12 else {}
        if smooth > 1 and not held_out and len(part) > smooth:
            ax.plot(part.index, part, color=look[term]["color"], alpha=0.25, linewidth=1)
            part = part.rolling(smooth, min_periods=1).mean()
        ax.plot(part.index, part, label=str(term), **style)
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel("loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def recall_by_layer(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    value: str = "recall",
    hue: str = "scorer",
    chance: float | None = None,
    label: str | None = None,
) -> Axes:
    """Held-out agreement with the label at each pruned layer.

    Parameters
    ----------
    frame
        ``layer``, ``value`` and (optionally) ``hue``; several rows a layer are drawn as their median with quartiles.
    value
        ``"recall"`` (share of the label's top k that is found, 0 to 1) or e.g. ``"rank_correlation"`` (-1 to 1).
    chance
        What a random score reaches, drawn as a dotted line.
    """
    ax = axes_or_new(ax)
    need_columns(frame, "layer", value, what="recall_by_layer")
    keys = ["layer", *([hue] if hue in frame.columns else [])]
    spread = frame.groupby(keys, sort=False)[value].quantile([0.25, 0.5, 0.75]).unstack()
    spread.columns = ["_low", value, "_high"]
    lines_by(spread.reset_index(), ax, "layer", value, hue, low="_low", high="_high")
    if chance is not None:
        ax.axhline(chance, linestyle=":", color=PALETTE["black"], linewidth=1.5, label=f"chance ({chance:g})")
    correlation = "correlation" in value
    ax.set_ylim(min(-0.05, frame[value].min() - 0.05) if correlation else 0, 1.02)
    ax.set_xlabel("pruned layer")
    ax.set_ylabel(label or ("rank correlation with the label" if correlation else "recall of the label's top tokens"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax
