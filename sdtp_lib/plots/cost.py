"""Figures of measured cost: speed-up beside its limit, time to the first token, memory over length.

Knows frames by their column names; the defaults are those of the latency rows. Draws on given axes, never shows or
saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from sdtp_lib.plots.style import PALETTE, axes_or_new, legend_beside, lines_by, need_columns, short


def length_axis(ax: Axes, lengths: Sequence[float]) -> None:
    """Make the x axis of ``ax`` one of prompt lengths: log base 2, each measured length written out."""
    lengths = sorted({float(n) for n in lengths})
    if len(lengths) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(lengths)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("prompt length [tokens]")


def speedup_over_length(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str = "prompt_tokens",
    y: str = "prefill_speedup",
    limit: str | None = None,
    hue: str = "method",
    y_label: str | None = None,
) -> Axes:
    """Measured speed-up (marked lines) and the limit its FLOPs allow (dashes in the same colour) over prompt length.

    Parameters
    ----------
    frame
        ``x``, ``y`` and optionally ``hue``; ``<y>_q1`` and ``<y>_q3`` give a band. Rows of equal length are drawn as
        their median.
    limit
        Column of the limit; by default that of ``y`` with ``limit`` for ``speedup``, if the frame has it.
    """
    ax = axes_or_new(ax)
    need_columns(frame, x, y, what="speedup_over_length")
    limit = limit or y.replace("speedup", "limit")
    look = lines_by(frame, ax, x, y, hue, low=f"{y}_q1", high=f"{y}_q3")
    if limit != y and limit in frame.columns and frame[limit].notna().any():
        for name, part in frame.groupby(hue, sort=False) if hue in frame.columns else [(None, frame)]:
            middle = part.dropna(subset=[limit]).groupby(x)[limit].median()
            ax.plot(middle.index, middle, "--", color=look[name]["color"], linewidth=1.4, alpha=0.9)
        ax.plot([], [], "--", color=PALETTE["black"], linewidth=1.4, label="limit")
    ax.axhline(1, color=PALETTE["black"], linewidth=1, linestyle=":")
    length_axis(ax, frame[x])
    ax.set_ylabel(y_label or f"{y.removesuffix('_speedup').replace('_', ' ')} speed-up [times]")
    # A ratio's axis starts at 1; lower only where something is slower than unpruned.
    lowest = float(frame[y].min())
    ax.set_ylim(bottom=1 if lowest >= 1 else 0.95 * lowest)
    legend_beside(ax)
    return ax


def time_bars(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    method: str = "method",
    value: str = "prefill_ms",
    x_label: str = "time to the first token [ms]",
) -> Axes:
    """One horizontal bar per ``method``: the median of ``value`` over its rows, written at its end."""
    ax = axes_or_new(ax)
    need_columns(frame, method, value, what="time_bars")
    sns.barplot(frame, x=value, y=method, estimator="median", errorbar=None, color=PALETTE["blue"], ax=ax)
    ax.bar_label(ax.containers[0], fmt=short, padding=4, fontsize=9.5)
    ax.margins(x=0.14)
    ax.set(xlabel=x_label, ylabel="")
    ax.grid(False, axis="y")
    return ax


def memory_over_length(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    x: str = "prompt_tokens",
    hue: str = "method",
    peak: str | None = "peak_memory_mb",
    kv: str | None = "kv_bytes",
) -> Axes:
    """Peak memory (solid) and the KV cache in it (dashed) over prompt length, in MB; GB where more than 2,000 MB.

    ``frame`` has ``x``, ``hue`` and at least one of ``peak`` (MB) and ``kv`` (bytes); a column that is missing or None
    is left out.
    """
    ax = axes_or_new(ax)
    shown = {
        label: frame[column] / scale
        for label, column, scale in (("peak memory", peak, 1.0), ("KV cache", kv, 1e6))
        if column in frame.columns and frame[column].notna().any()
    }
    if not shown:
        raise ValueError(f"memory_over_length needs {peak!r} or {kv!r}: the frame has {list(frame.columns)}.")
    big = max(values.max() for values in shown.values()) > 2000
    for label, values in shown.items():
        dashes = "--" if label == "KV cache" and len(shown) > 1 else "-"
        scaled = frame.assign(_mb=values / (1000 if big else 1))
        lines_by(scaled, ax, x, "_mb", hue, linestyle=dashes, **({"label": None} if dashes == "--" else {}))
    if len(shown) > 1:
        ax.plot([], [], "--", color=PALETTE["black"], label="KV cache alone")
    length_axis(ax, frame[x])
    ax.set_ylabel(f"{next(iter(shown))} [{'GB' if big else 'MB'}]")
    ax.set_ylim(bottom=0)
    legend_beside(ax)
    return ax
