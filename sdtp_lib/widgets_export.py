"""What the explorer shows as files: a page of its own, a picture, and what made them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sdtp_lib import plots, views
from sdtp_lib.fates import TokenFates
from sdtp_lib.plots_text import layout
from sdtp_lib.views_compare import answers_html
from sdtp_lib.views_export import export
from sdtp_lib.views_map import layer_token_map_html
from sdtp_lib.widgets_state import ExplorerState

_COLUMNS, _LINES = 110, 40


def export_state(state: ExplorerState, folder: str | Path, name: str | None = None) -> list[Path]:
    """Write the view of ``state`` as HTML, PNG, SVG and JSON into ``folder``; the files, in that order of kinds.

    The default name holds prompt, scorer and ratio, so that views do not overwrite each other.
    """
    tokens, fates = state.scored.tokens, state.fates
    ratio = state.config.keep_ratio
    kind = "approximate" if fates.approximate else "engine"
    name = name or re.sub(r"[^\w.-]+", "-", f"{state.prompt}_{state.scorer}_{ratio}_{kind}")[:120]
    title = f"{state.prompt}: tokens dropped by layer, scorer {state.scorer}, keep ratio {ratio}"
    fragments = [layer_token_map_html(fates, tokens), views.dropped_tokens_html(tokens, fates, max_height=700)]
    if state.outcome:
        fragments.append(answers_html(state.outcome.full_answer, state.outcome.answer))
    return export(
        Path(folder) / name,
        title=title,
        fragments=fragments,
        figure=text_and_map(tokens, fates, title),
        passport=state.passport(),
    )


def text_and_map(tokens: Sequence[str], fates: TokenFates, title: str = "", *, max_lines: int = _LINES) -> Figure:
    """One figure: the coloured text above the layer x token map. Not registered with pyplot, so nothing shows it."""
    lines = min(max_lines + 1, 1 + layout(tokens, _COLUMNS)[-1][1])
    text_in, map_in = 0.165 * lines, 2.9
    height = text_in + map_in + 0.4
    with plots.use_style():
        # placed by hand: the text must be as wide as the figure, whatever room the map's labels take
        figure = Figure(figsize=(9, height), layout="none")
        above = figure.add_axes((0.01, (map_in + 0.1) / height, 0.98, text_in / height))
        below = figure.add_axes((0.065, 0.5 / height, 0.765, (map_in - 0.6) / height))
        plots.dropped_text(tokens, fates, ax=above, columns=_COLUMNS, max_lines=max_lines)
        plots.token_layer_map(fates, ax=below)
        if title:
            figure.text(0.01, 1 - 0.2 / height, title, fontsize=10, weight="bold")
    return figure
