"""What the explorer shows as files that need nothing else: an HTML page, a PNG and an SVG picture, and a JSON that says
what made them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib import plots, records, views
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.extras import extra
from sdtp_lib.plots.style import save
from sdtp_lib.plots.tokens import layout
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.views.layer_map import layer_token_map_html
from sdtp_lib.views.tokens import answers_html

with extra("study"):
    from matplotlib.figure import Figure

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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{margin:24px auto;max-width:1100px;padding:0 16px;
font:15px/1.6 system-ui,sans-serif}}h1{{font-size:20px}}section{{margin:22px 0}}table{{font-size:13px;
border-collapse:collapse}}td{{padding:1px 10px 1px 0;vertical-align:top;overflow-wrap:anywhere}}
summary{{cursor:pointer}}</style></head><body><h1>{title}</h1>
{body}
<details><summary>What made this page</summary><table>{passport}</table></details>
</body></html>
"""


def standalone_page(title: str, fragments: Sequence[str], passport: Mapping[str, Any]) -> str:
    """``fragments`` of views as one HTML page that loads nothing; light or dark as the reader's system is."""
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in passport.items()
    )
    body = "\n".join(f"<section>{fragment}</section>" for fragment in fragments)
    return _PAGE.format(title=html.escape(title), body=body, passport=rows)


def export(
    path: str | Path,
    *,
    title: str,
    fragments: Sequence[str] = (),
    figure: Figure | None = None,
    passport: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a view beside ``path``: ``.html`` of the fragments, ``.png`` and ``.svg`` of the figure, and ``.json``.

    Returns
    -------
    list of Path
        What was written; each file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    passport = dict(passport or {})
    written = []
    if figure is not None:
        written += [save(figure, path, passport, svg=True), path.with_suffix(".svg")]
    if fragments:
        with records.atomic_write(path.with_suffix(".html")) as temporary:
            Path(temporary).write_text(standalone_page(title, fragments, passport), encoding="utf-8")
        written.append(path.with_suffix(".html"))
    records.write_json(path.with_suffix(".json"), {"title": title, "files": [p.name for p in written], **passport})
    return [*written, path.with_suffix(".json")]
