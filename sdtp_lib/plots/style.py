"""The look of every figure, and the one way a figure is saved.

Knows matplotlib and seaborn; no frame, no model. Importing it changes nothing: `use_style` is called by whoever draws.
Colours are Okabe and Ito's, told apart with every common kind of colour blindness; each scorer and preset keeps its
colour, marker and dash in every figure, so that a figure also reads in grey.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sdtp_lib import records
from sdtp_lib.provenance import origin_line

PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#3B3B3B",
}
SEQUENTIAL = "mako_r"
KEPT = (0.83, 0.85, 0.87)  # tokens that reach the last layer: grey in text and map alike

_FIXED = {
    "full": ("black", "X"),
    "unpruned": ("black", "X"),
    "none": ("black", "X"),
    "learned": ("blue", "o"),
    "SDTP": ("blue", "o"),
    "pruners": ("blue", "o"),
    "oracle": ("purple", "*"),
    "removal": ("purple", "*"),
    "attention": ("orange", "s"),
    "attention, pooled": ("orange", "P", "--"),
    "attention_pooled": ("green", "P", ":"),
    "attention + recency": ("black", "h"),
    "paper's pruner": ("yellow", "d"),
    "recency": ("green", "^"),
    "random": ("vermillion", "v"),
    "hidden norm": ("sky", "D"),
    "keep09": ("blue", "o"),
    "keep08": ("orange", "s"),
    "keep07": ("vermillion", "v"),
    "paper-low": ("green", "^"),
    "fast": ("purple", "P"),
    "keep1.0": ("sky", "D"),
    "sdtp": ("blue", "o"),
    "sdtp-low": ("blue", "d", "--"),
    "sdtp-fast": ("blue", "P", ":"),
    "lazyllm": ("orange", "s"),
    "gemfilter": ("purple", "X"),
    "fastkv": ("purple", "P", "--"),
    "claa": ("sky", "P"),
    "sliminfer": ("vermillion", "v"),
    "uniprefill": ("sky", "D", "--"),
    "asl": ("black", "p", "--"),
    "pyramidinfer": ("orange", "^", "--"),
    "streamingllm": ("green", "^"),
    "snapkv": ("green", "D", "--"),
    "h2o": ("yellow", "D"),
    "specprefill": ("vermillion", "*", "--"),
    "earlier-scheme": ("yellow", "h", "--"),
    "one-layer filter": ("purple", "X", ":"),  # rows from before methods went by their papers' names
}
_ORDER = ("blue", "orange", "green", "vermillion", "purple", "sky", "black", "yellow")
_MARKERS = ("o", "s", "^", "v", "P", "D", "X", "h")

_SHEET = {
    "figure.figsize": (7.2, 4.0),
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


class _Style:
    """Handle that `use_style` returns: leaving it as a context puts the old settings back."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        self._before = before

    def __enter__(self) -> _Style:
        return self

    def __exit__(self, *exc_info: object) -> None:
        dict.update(matplotlib.rcParams, self._before)


def use_style(scale: float = 1.0) -> _Style:
    """Apply the study's style sheet; as ``with use_style():`` only inside the block.

    Parameters
    ----------
    scale
        Factor on all text, for figures that are shown small.
    """
    handle = _Style(dict(matplotlib.rcParams))
    sheet = sns.axes_style("whitegrid") | _SHEET
    for key in ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"):
        sheet[key] = sheet[key] * scale
    sheet["axes.prop_cycle"] = matplotlib.cycler(color=[PALETTE[name] for name in _ORDER])
    matplotlib.rcParams.update(sheet)
    return handle


def series_look(names: list[Any]) -> dict[Any, dict[str, str]]:
    """Colour and marker of each series by name: fixed for known scorers and presets, the next free one for others.

    A colour that comes a second time is dashed: more series than colours are still told apart.
    """
    look: dict[Any, dict[str, str]] = {}
    for name in names:
        fixed = _FIXED.get(str(name)) or _FIXED.get(str(name).replace("_", " "))  # as typed, as shown
        if fixed:
            look[name] = dict(zip(("color", "marker", "linestyle"), (PALETTE[fixed[0]], *fixed[1:]), strict=False))
    taken = {entry["color"] for entry in look.values()}
    once = [{"color": PALETTE[color], "marker": marker} for color, marker in zip(_ORDER, _MARKERS, strict=True)]
    again = [
        {"color": PALETTE[color], "marker": marker, "linestyle": "--"}
        for color, marker in zip(_ORDER, _MARKERS[3:] + _MARKERS[:3], strict=True)
    ]
    again.sort(key=lambda entry: entry["color"] not in taken)
    free = itertools.cycle([entry for entry in once if entry["color"] not in taken] + again)
    look |= {name: next(free) for name in names if name not in look}
    return {name: look[name] for name in names}


def legend_beside(ax: Axes, **options: Any) -> None:
    """A legend to the right of ``ax``: it never lies on what is drawn. Nothing where nothing has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, **options)


def one_legend(axes: Iterable[Axes], *, columns: int = 5) -> None:
    """One legend under the figure for all of ``axes``, each name once, in place of their own."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
        if ax.get_legend():
            ax.get_legend().remove()
        figure = ax.figure
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(columns, len(entries)))


def short(value: float) -> str:
    """Three digits or more and no exponent: ``10,780``, ``236``, ``3.5``, ``0.042``."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def log_scale(ax: Axes) -> None:
    """Make the y axis of ``ax`` logarithmic, its ticks at 1, 2 and 5 written out: 0.02, not 2 x 10^-2."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _place: short(value))
    ax.yaxis.set_minor_formatter(NullFormatter())


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes to draw on: the given ones, or those of a new figure."""
    return ax if ax is not None else plt.subplots()[1]


def need_columns(frame: Any, *columns: str, what: str) -> None:
    """Refuse a frame without the columns a figure needs, naming what is there."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{what} needs column(s) {missing}: the frame has {list(frame.columns)}.")


def lines_by(
    frame: pd.DataFrame,
    ax: Axes,
    x: str,
    y: str,
    hue: str | None,
    *,
    low: str | None = None,
    high: str | None = None,
    **style: Any,
) -> dict[Any, dict[str, str]]:
    """One marked line per value of ``hue``: the median over rows of equal ``x``; a band where ``low``/``high`` exist.

    Returns the look of each series.
    """
    groups = list(frame.groupby(hue, sort=False)) if hue and hue in frame.columns else [(None, frame)]
    look = series_look([name for name, _ in groups])
    for name, part in groups:
        part = part.dropna(subset=[y])
        middle = part.groupby(x)[y].median()
        ax.plot(middle.index, middle, **{"label": name if name is None else str(name), **look[name], **style})
        if low and high and {low, high} <= set(part.columns):
            band = part.groupby(x)[[low, high]].median()
            ax.fill_between(band.index, band[low], band[high], color=look[name]["color"], alpha=0.15, linewidth=0)
    return look


def save(fig: Figure, path: str | Path, provenance: Mapping[str, Any] | None = None, *, svg: bool = False) -> Path:
    """Write ``fig`` as PNG (and SVG) with a JSON of the same name that says what made it; each file at once or not.

    Where ``provenance`` names a model, a small line under the picture says it, with device and commit.

    Parameters
    ----------
    fig
        The figure; it stays open.
    path
        File to write; its ending is replaced by ``.png``, ``.svg`` and ``.json``.
    provenance
        What made the picture: commit, versions, model, config, seed, the rows it was drawn from.

    Returns
    -------
    Path
        The PNG.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _name_origin(fig, provenance or {})
    written = []
    for kind in ("png", "svg") if svg else ("png",):
        target = path.with_suffix(f".{kind}")
        # Without a date an unchanged SVG stays byte for byte the same.
        metadata = {"Date": None} if kind == "svg" else {"Software": "sdtp_lib.plots"}
        # A figure without a layout engine would come back from saving with that of rcParams, and move its axes.
        engineless = {"figure.constrained_layout.use": False, "figure.autolayout": False}
        with records.atomic_write(target) as temporary, matplotlib.rc_context(engineless), _as_laid_out(fig):
            fig.savefig(temporary, format=kind, metadata=metadata)
        written.append(target.name)
    records.write_json(path.with_suffix(".json"), {"pictures": written, **(provenance or {})})
    return path.with_suffix(".png")


@contextlib.contextmanager
def _as_laid_out(fig: Figure) -> Iterator[None]:
    """Keep axes and legends in their place while a picture is written that is larger than the figure, for being tight.

    A legend outside of all axes is placed by the edge: that of the picture, once there is one, on the line below.
    """
    fig.draw_without_rendering()
    engine, legends = fig.get_layout_engine(), [each for each in fig.legends if each.get_bbox_to_anchor() is fig.bbox]
    fig.set_layout_engine("none")
    for legend in legends:
        legend.set_bbox_to_anchor((0, 0, 1, 1), fig.transFigure)
    try:
        yield
    finally:
        fig.set_layout_engine(engine)
        for legend in legends:
            legend.set_bbox_to_anchor(None)


def _name_origin(fig: Figure, provenance: Mapping[str, Any]) -> None:
    """Write `origin_line` under the figure, once; below all that is drawn, legends outside of it too."""
    if provenance.get("model") and not [text for text in fig.texts if text.get_gid() == "origin"]:
        fig.draw_without_rendering()
        below = min(0.0, fig.get_tightbbox().y0) - 0.08  # inches
        words = origin_line(provenance)
        fig.text(0.01, below / fig.get_figheight(), words, va="top", fontsize=8.5, color="#555555", gid="origin")
