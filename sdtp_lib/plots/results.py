"""Figures of result frames: quality against cost, scores by group, before and after; and of training: loss curves,
and how well the pruners find the label's tokens on held-out data.

Knows frames by their column names, each documented where it is drawn; draws on given axes, never shows or saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sdtp_lib.plots.style import (
    PALETTE,
    axes_or_new,
    legend_beside,
    lines_by,
    log_scale,
    need_columns,
    series_look,
    short,
)


def quality_over_flops(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str = "prefill_flops_share",
    y: str = "kl_nats",
    hue: str = "scorer",
    y_label: str | None = None,
    log: bool | None = None,
) -> Axes:
    """Quality against the share of prefill FLOPs that is left, one line per scorer, one marker per budget.

    ``frame`` has ``x`` (share of the unpruned FLOPs, 0 to 1), ``y`` and ``hue``; ``<y>_low`` and ``<y>_high`` give
    error bars. A y that names KL is drawn on a log scale unless ``log`` says otherwise.
    """
    ax = axes_or_new(ax)
    need_columns(frame, x, y, what="quality_over_flops")
    look = lines_by(frame, ax, x, y, hue)
    low, high = f"{y}_low", f"{y}_high"
    if {low, high} <= set(frame.columns):
        for name, part in frame.groupby(hue) if hue in frame.columns else [(None, frame)]:
            at = part.groupby(x)[[y, low, high]].median()
            reach = np.clip([at[y] - at[low], at[high] - at[y]], 0, None)
            ax.errorbar(at.index, at[y], yerr=reach, fmt="none", color=look[name]["color"], capsize=3, linewidth=1.2)
    kl = "kl" in y.lower()
    if log if log is not None else kl:
        log_scale(ax)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("prefill FLOPs, share of unpruned")
    ax.set_ylabel(
        y_label or ("KL to the unpruned model [nats/token]\n(lower is better)" if kl else y.replace("_", " "))
    )
    legend_beside(ax)
    return ax


def pareto(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str = "prefill_speedup",
    y: str = "kl_nats",
    hue: str = "method",
    family: str = "family",
    x_is_cost: bool | None = None,
    y_is_cost: bool | None = None,
    text: str | None = None,
) -> Axes:
    """All measured points, and the dashed line through those that no other point beats in both ``x`` and ``y``.

    Parameters
    ----------
    frame
        ``x``, ``y``, optionally ``hue``; where it has ``family``, points of one family share its look and are joined.
    x_is_cost, y_is_cost
        Lower is better on that axis; by default true for names that hold ``ms``, ``kl``, ``bytes``, ``flops`` or
        ``loss``. A KL is drawn on a log scale.
    text
        Column written beside each point.
    """
    ax = axes_or_new(ax)
    need_columns(frame, x, y, what="pareto")
    x_is_cost, y_is_cost = (_is_cost(n) if given is None else given for n, given in ((x, x_is_cost), (y, y_is_cost)))
    frame = frame.dropna(subset=[x, y])
    joined = family in frame.columns
    hue = family if joined else hue
    groups = list(frame.groupby(hue, sort=False)) if hue in frame.columns else [(None, frame)]
    look = series_look([name for name, _ in groups])
    for name, part in groups:
        part = part.sort_values(x)
        lines = {**look[name], "linewidth": 1.4, "zorder": 3} | ({} if joined else {"linestyle": "none"})
        ax.plot(part[x], part[y], label=None if name is None else str(name), **lines)
    if text:
        for _, point in frame.iterrows():
            at = (point[x], point[y])
            ax.annotate(str(point[text]), at, xytext=(6, 4), textcoords="offset points", fontsize=8.5)
    front = pareto_front(frame[x], frame[y], x_is_cost=x_is_cost, y_is_cost=y_is_cost)
    best = frame.iloc[front].sort_values(x)
    ax.plot(best[x], best[y], color=PALETTE["black"], linestyle="--", linewidth=1.2, zorder=2, label="best of all")
    if "kl" in y.lower() and (frame[y] > 0).all():
        log_scale(ax)
    ax.set_xlabel(_axis_name(x, x_is_cost))
    ax.set_ylabel(_axis_name(y, y_is_cost))
    legend_beside(ax)
    return ax


_NAMES = {
    "kl_nats": "KL to the unpruned model [nats/token]",
    "prefill_ms": "time to the first token [ms]",
    "prefill_speedup": "prefill speed-up [times]",
    "prefill_flops_share": "prefill FLOPs, share of unpruned",
}


def _axis_name(column: str, is_cost: bool) -> str:
    better = "lower" if is_cost else "higher"
    return f"{_NAMES.get(column, column.replace('_', ' '))}\n({better} is better)"


def _is_cost(name: str) -> bool:
    return bool({"ms", "s", "kl", "bytes", "mb", "flops", "tflops", "loss"} & set(name.lower().split("_")))


def pareto_front(x: Any, y: Any, *, x_is_cost: bool = False, y_is_cost: bool = False) -> list[int]:
    """Indices of the points that no other point equals or beats in both directions, strictly in one."""
    gains = np.stack([np.asarray(x, float) * (-1 if x_is_cost else 1), np.asarray(y, float) * (-1 if y_is_cost else 1)])
    return [
        i
        for i in range(gains.shape[1])
        if not ((gains >= gains[:, [i]]).all(axis=0) & (gains > gains[:, [i]]).any(axis=0)).any()
    ]


def score_by_group(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str = "group",
    y: str = "score",
    hue: str = "scorer",
    y_label: str = "score (higher is better)",
    log: bool = False,
) -> Axes:
    """Bars of ``y`` for each ``x`` (a task, a category), one colour per ``hue``, values written on top.

    Rows of one bar are averaged; ``<y>_low`` and ``<y>_high`` give error bars. On a ``log`` axis, which has no
    zero for a bar to stand on, points are drawn instead.
    """
    ax = axes_or_new(ax)
    need_columns(frame, x, y, what="score_by_group")
    groups = list(frame[x].unique())
    series = list(frame[hue].unique()) if hue in frame.columns else [None]
    look = series_look(series)
    width = 0.84 / len(series)
    for i, name in enumerate(series):
        part = frame if name is None else frame[frame[hue] == name]
        means = part.groupby(x).mean(numeric_only=True).reindex(groups)
        at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        label = None if name is None else str(name)
        bars = None
        if log:
            # Open where lines would be dashed: a second series of the same colour.
            open_face = {"markerfacecolor": "white"} if "linestyle" in look[name] else {}
            points = {"color": look[name]["color"], "marker": look[name]["marker"], "linestyle": "none", "zorder": 4}
            ax.plot(at, means[y], label=label, **points, **open_face)
        else:
            hatch = "//" if "linestyle" in look[name] else None
            bars = ax.bar(at, means[y], width * 0.92, label=label, color=look[name]["color"], hatch=hatch, zorder=2)
        if {f"{y}_low", f"{y}_high"} <= set(means.columns):
            reach = np.clip([means[y] - means[f"{y}_low"], means[f"{y}_high"] - means[y]], 0, None)
            ax.errorbar(at, means[y], yerr=reach, fmt="none", color="#666666", capsize=2, linewidth=1, zorder=3)
        elif bars is not None and len(groups) * len(series) <= 24:
            ax.bar_label(bars, fmt=short, fontsize=8, padding=2, rotation=90 if len(series) > 2 else 0)
    if log:
        log_scale(ax)
        for edge in np.arange(len(groups) - 1) + 0.5:
            ax.axvline(edge, color="#DDDDDD", linewidth=1, zorder=1)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_xticks(range(len(groups)), [str(name).replace("_", "\n") for name in groups])
    ax.set_ylabel(y_label)
    ax.grid(False, axis="x")
    if series != [None]:
        legend_beside(ax)
    return ax


def slope_chart(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    item: str = "item",
    before: str = "before",
    after: str = "after",
    labels: tuple[str, str] = ("unpruned", "pruned"),
    y_label: str = "score",
) -> Axes:
    """One line per ``item`` from its value ``before`` to its value ``after``; falling lines are vermillion.

    Items of the same values are one line with all their names.
    """
    ax = axes_or_new(ax)
    need_columns(frame, item, before, after, what="slope_chart")
    frame = frame.dropna(subset=[before, after]).groupby([before, after])[item].agg(", ".join).reset_index()
    frame = frame.sort_values(after)
    span = float(np.ptp(frame[[before, after]].to_numpy(float))) or 1.0
    placed = {0: -np.inf, 1: -np.inf}
    for row in frame.to_dict("records"):
        falls = row[after] < row[before]
        color = PALETTE["vermillion"] if falls else PALETTE["blue"]
        ax.plot([0, 1], [row[before], row[after]], color=color, marker="v" if falls else "o")
        # labels of close values are pushed apart upwards; the line itself stays true
        placed[1] = max(row[after], placed[1] + 0.06 * span)
        name = str(row[item]).replace("_", " ")
        ax.annotate(f"{row[after]:.3g}  {name}", (1.04, placed[1]), va="center", fontsize=9.5, color=color)
    for row in frame.sort_values(before).to_dict("records"):
        placed[0] = max(row[before], placed[0] + 0.06 * span)
        ax.annotate(f"{row[before]:.3g}", (-0.04, placed[0]), va="center", ha="right", fontsize=9.5)
    ax.set_xticks([0, 1], labels)
    ax.set_xlim(-0.25, 2.2)
    ax.set_ylim(top=max(ax.get_ylim()[1], *(height + 0.04 * span for height in placed.values())))
    ax.set_ylabel(y_label)
    ax.grid(False, axis="x")
    return ax


def loss_curves(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    terms: Sequence[str] | None = None,
    smooth: int = 1,
    log: bool = False,
) -> Axes:
    """Loss over training steps.

    Parameters
    ----------
    frame
        Long (``step``, ``value``, ``term``) or wide: ``step`` and one column per term (``loss``, ``mse_loss``,
        ``eval_loss``; what is not a number is left out). Terms that begin with ``eval`` are dashed with markers.
    terms
        The terms to draw, each of which must be there; default all of them.
    smooth
        Window (in logged rows) of a running mean drawn over the pale raw curve.
    """
    ax = axes_or_new(ax)
    need_columns(frame, "step", *(() if "term" in frame.columns else terms or ()), what="loss_curves")
    if "term" not in frame.columns:
        skipped = {"step", "epoch", "seed", "learning_rate", "grad_norm"}
        found = [c for c in frame.select_dtypes("number").columns if c not in skipped]
        frame = frame.melt(id_vars="step", value_vars=found, var_name="term", value_name="value")
    frame = frame.dropna(subset=["value"])
    if terms is not None:
        empty = sorted(set(terms) - set(frame["term"]))
        if empty:
            raise ValueError(f"loss_curves: no values of {', '.join(empty)} in the frame, which has "
                             f"{', '.join(frame['term'].unique())}: name terms that were logged.")  # fmt: skip
        frame = frame[frame["term"].isin(list(terms))]
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
        log_scale(ax)
    ax.set_xlabel("training step")
    ax.set_ylabel("loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_beside(ax)
    return ax


def recall_by_layer(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    y: str = "recall",
    hue: str = "scorer",
    chance: float | None = None,
    y_label: str | None = None,
) -> Axes:
    """Held-out agreement with the label at each pruned layer.

    Parameters
    ----------
    frame
        ``layer``, ``y`` and (optionally) ``hue``; several rows per layer are drawn as their median with quartiles.
    y
        ``"recall"`` (share of the label's top k that is found, 0 to 1) or e.g. ``"rank_correlation"`` (-1 to 1).
    chance
        What a random score reaches, drawn as a dotted line.
    """
    ax = axes_or_new(ax)
    need_columns(frame, "layer", y, what="recall_by_layer")
    keys = ["layer", *([hue] if hue in frame.columns else [])]
    spread = frame.groupby(keys, sort=False)[y].quantile([0.25, 0.5, 0.75]).unstack()
    spread.columns = ["_low", y, "_high"]
    lines_by(spread.reset_index(), ax, "layer", y, hue, low="_low", high="_high")
    if chance is not None:
        ax.axhline(chance, linestyle=":", color=PALETTE["black"], linewidth=1.5, label=f"chance ({chance:g})")
    correlation = "correlation" in y
    ax.set_ylim(min(-0.05, frame[y].min() - 0.05) if correlation else 0, 1.02)
    ax.set_xlabel("pruned layer")
    ax.set_ylabel(y_label or ("rank correlation with the label" if correlation else "recall of the label's top tokens"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_beside(ax)
    return ax
