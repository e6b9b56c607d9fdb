"""Figures of tokens against layers: saliency heat map, share of salient tokens, which layer still reads which token,
and how many tokens two scorers both keep.

Knows arrays, frames and strings; no model, no tokenizer. Axis letters: L layers shown, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator

from sdtp_lib.plots.style import KEPT, SEQUENTIAL, axes_or_new, legend_beside, need_columns, series_look
from sdtp_lib.pruning.token_fates import TokenFates, stage_colours


def as_layer_token_matrix(values: Any, column: str = "saliency") -> tuple[np.ndarray, list[int]]:
    """``values`` as an (L, T) float array and its layer numbers.

    Takes an (L, T) array, a mapping ``{layer: (T,)}`` or a frame with the columns ``layer``, ``position`` and
    ``column``; cells without a value are NaN.
    """
    if isinstance(values, pd.DataFrame):
        need_columns(values, "layer", "position", column, what="a layer x token figure")
        table = values.pivot_table(index="layer", columns="position", values=column)
        return table.to_numpy(float), [int(layer) for layer in table.index]
    if isinstance(values, dict):
        layers = sorted(values)
        return np.stack([np.asarray(values[layer], float).reshape(-1) for layer in layers]), layers
    matrix = np.atleast_2d(np.asarray(values, float))
    return matrix, list(range(len(matrix)))


def saliency_heatmap(
    values: Any,
    tokens: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    layers: Sequence[int] | None = None,
    max_columns: int = 256,
    gamma: float = 0.5,
    colorbar: bool = True,
) -> Axes:
    """Saliency of each token at each layer (the paper's Figure 1), as a share of the layer's largest value.

    Parameters
    ----------
    values
        (L, T) array, ``{layer: (T,)}`` or frame with ``layer``, ``position``, ``saliency``.
    tokens
        T token texts, written under the columns while there are at most 60.
    layers
        Layer numbers of the rows of an array.
    max_columns
        Longer prompts are pooled by their maximum to this many columns, so that single salient tokens stay visible.
    gamma
        Exponent of the colour scale; 0.5 opens up the low end, where most tokens are.
    """
    ax = axes_or_new(ax)
    matrix, found = as_layer_token_matrix(values)
    layers = list(layers) if layers is not None else found
    tokens_total = matrix.shape[1]
    peak = np.nanmax(np.abs(matrix), axis=1, keepdims=True)
    share = np.abs(matrix) / np.where(peak > 0, peak, 1.0)
    pooled = max(1, -(-tokens_total // max_columns))
    if pooled > 1:
        starts = np.arange(0, tokens_total, pooled)
        share = np.fmax.reduceat(share, starts, axis=1)
    image = ax.imshow(
        share,
        aspect="auto",
        interpolation="nearest",
        cmap=SEQUENTIAL,
        norm=PowerNorm(gamma, 0, 1),
        extent=(-0.5, tokens_total - 0.5, len(layers) - 0.5, -0.5),
    )
    step = max(1, -(-len(layers) // 12))
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_ylabel("layer")
    ax.set_xlabel("token position" + (f" (each column: maximum of {pooled})" if pooled > 1 else ""))
    if tokens is not None and len(tokens) <= 60:
        names = [token if len(token) <= 14 else token[:13] + "…" for token in tokens]
        # matplotlib would read a pair of dollar signs in a prompt as a formula
        ax.set_xticks(range(len(names)), [name.replace("$", r"\$") for name in names], rotation=90, fontsize=8)
        ax.set_xlabel("token")
    ax.grid(False)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.set_label("saliency, share of the layer's maximum")
        bar.outline.set_visible(False)
    return ax


def salient_share_by_layer(
    values: Any, *, ax: Axes | None = None, threshold: float = 0.1, layers: Sequence[int] | None = None
) -> Axes:
    """Share of tokens above ``threshold`` of their layer's largest saliency (the paper's Figure 2).

    ``values`` as in `saliency_heatmap`, or ``{name: values}`` for one line each, or a frame with ``layer`` and
    ``share`` (and ``label``) that holds the shares already.
    """
    ax = axes_or_new(ax)
    lines: dict[str, tuple[Sequence[int], np.ndarray]] = {}
    if isinstance(values, pd.DataFrame) and "share" in values.columns:
        groups = values.groupby("label") if "label" in values.columns else [("", values)]
        for name, part in groups:
            mean = part.groupby("layer")["share"].mean()
            lines[str(name)] = ([int(layer) for layer in mean.index], mean.to_numpy())
    else:
        named = isinstance(values, dict) and all(isinstance(key, str) for key in values)
        for name, one in values.items() if named else [("", values)]:
            matrix, found = as_layer_token_matrix(one)
            peak = np.nanmax(np.abs(matrix), axis=1, keepdims=True)
            # NaN means "not scored at this layer": such a token counts neither above nor below
            share = np.nanmean(np.where(np.isnan(matrix), np.nan, np.abs(matrix) > threshold * peak), axis=1)
            lines[name] = (list(layers) if layers is not None else found, share)
    look = series_look(list(lines))
    for name, (at, share) in lines.items():
        ax.plot(at, 100 * share, label=name or None, **look[name])
    ax.set_xlabel("layer")
    ax.set_ylabel(f"tokens above {threshold:g} of\nthe layer's maximum [%]")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(lines):
        legend_beside(ax)
    return ax


def token_layer_map(trace_data: Any, *, ax: Axes | None = None, row: int = 0, legend: bool = True) -> Axes:
    """Which token is computed in which layer: a column ends where its token was dropped, and has that stage's colour.

    Parameters
    ----------
    trace_data
        `TokenFates`, or a ``PruningTrace`` (then ``row`` says which prompt of the batch).
    """
    ax = axes_or_new(ax)
    fates = trace_data if isinstance(trace_data, TokenFates) else TokenFates.from_trace(trace_data, row=row)
    stages = len(fates.layers)
    kept = np.arange(fates.num_layers)[:, None] < fates.dropped_at[None, :]
    image = np.where(kept, fates.stage_of_token()[None, :], -1)
    dropped = [tuple(c / 255 for c in rgb) for rgb in stage_colours(stages)]
    cmap = ListedColormap([(1, 1, 1, 0), *dropped, KEPT])
    ax.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        cmap=cmap,
        norm=BoundaryNorm(np.arange(-1.5, stages + 1), cmap.N),
        extent=(-0.5, fates.tokens - 0.5, fates.num_layers - 0.5, -0.5),
    )
    ax.set_xlabel("token position in the prompt")
    ax.set_ylabel("layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    if legend:
        counts = fates.dropped_per_stage()
        handles = [
            ax.plot([], [], "s", color=cmap(i + 1), label=f"before layer {layer}: {count:,} tokens")[0]
            for i, (layer, count) in enumerate(zip(fates.layers, counts, strict=True))
        ]
        kept = f"kept to the end: {fates.kept_count:,} tokens"
        handles.append(ax.plot([], [], "s", color=cmap(stages + 1), label=kept)[0])
        ax.legend(handles=handles, title="dropped", alignment="left", loc="upper left", bbox_to_anchor=(1.0, 1.04))
    return ax


def kept_overlap(fates: Mapping[str, TokenFates], *, ax: Axes | None = None) -> Axes:
    """Of the tokens that the first of ``fates`` keeps after each stage, the share that each other keeps as well [%]."""
    ax = axes_or_new(ax)
    (first, reference), *others = fates.items()
    look = series_look(list(fates))
    for name, other in others:
        kept = [(reference.dropped_at > layer, other.dropped_at > layer) for layer in reference.layers]
        share = [100 * (mine & theirs).sum() / mine.sum() for mine, theirs in kept]
        ax.plot(reference.layers, share, label=name, **look[name])
    ax.set_xlabel("stage (layer)")
    ax.set_ylabel(f"tokens of “{first}”\nkept by the other too [%]")
    ax.set_ylim(0, 102)
    legend_beside(ax)
    return ax


def kept_share_by_position(fates: Mapping[str, TokenFates], *, ax: Axes | None = None, bins: int = 20) -> Axes:
    """Share of tokens that reach the last layer, in ``bins`` equal parts of the prompt [%]."""
    ax = axes_or_new(ax)
    look = series_look(list(fates))
    for name, one in fates.items():
        parts = np.array_split(one.dropped_at == one.num_layers, min(bins, one.tokens))
        share = [100 * part.mean() for part in parts]
        middle = (np.arange(len(parts)) + 0.5) * 100 / len(parts)
        ax.plot(middle, share, label=name, **look[name])
    ax.set_xlabel("place in the prompt [%]")
    ax.set_ylabel("tokens that reach\nthe last layer [%]")
    ax.set_ylim(0, 102)
    legend_beside(ax)
    return ax
