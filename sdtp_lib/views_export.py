"""A view as files that need nothing else: an HTML page, a PNG and an SVG picture, a JSON that says what made them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sdtp_lib import records
from sdtp_lib.plots_style import save

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
