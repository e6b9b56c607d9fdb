"""The frame of docs/'s pages: navigation, one style sheet for light and dark, footer; Markdown and executed notebooks
as HTML through nbconvert. Knows neither rows nor models; what it writes loads nothing from another host.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat

# A table with more columns than this is set small.
MANY_COLUMNS = 12
# What the study's pages and a run's report share: colours for light and dark, tables of numbers, notes, code.
BASE_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent);
  --soft: color-mix(in srgb, currentColor 6%, transparent); --link: light-dark(#0b5cad, #7db8f0); }
* { box-sizing: border-box; } a { color: var(--link); }
table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; border: 0; margin: .6rem 0; }
th, td { padding: .25rem .6rem; border: 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } .note, footer { opacity: .75; font-size: .9em; }
.wide { overflow-x: auto; max-width: 100%; } img, svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .85em; }
"""
STYLE = f"""{BASE_STYLE}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem;
  overflow-wrap: break-word; }}
.words th, .words td {{ text-align: left; vertical-align: top; }}
.many table {{ font-size: .76em; }} .many th, .many td {{ padding: .25rem .3rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem .9rem; padding: .8rem 0; border-bottom: 1px solid var(--line); }}
nav a {{ text-decoration: none; }} nav a[aria-current] {{ font-weight: 700; color: inherit; }}
p, li {{ max-width: 60rem; }} img {{ background: white; border-radius: 6px; padding: 4px; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; }} h2 {{ font-size: 1.3rem; margin-top: 2rem; }}
.output_area, .output_subarea, .text_cell_render {{ overflow-x: auto; max-width: 100%; }}
pre {{ background: var(--soft); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
code {{ font-size: .92em; }} p code, li code {{ background: var(--soft); padding: 0 .25em; border-radius: 3px; }}
pre code {{ font-size: 1em; background: none; padding: 0; }}
.highlight pre {{ margin: .4rem 0; }} .prompt, .jp-InputPrompt, .jp-OutputPrompt, .anchor-link {{ display: none; }}
footer {{ border-top: 1px solid var(--line); margin-top: 3rem; padding-top: .6rem; }}
"""


def head(title: str, style: str) -> str:
    """The head of a page of one file: its title, and a style sheet that loads nothing."""
    return (
        f'<head><meta charset="utf-8"><title>{html.escape(title)}</title><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><style>{style}</style></head>'
    )


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all pages share: (file, title) of the navigation, and what made them."""

    navigation: Sequence[tuple[str, str]]
    made: str

    def page(self, name: str, title: str, body: str) -> str:
        """One whole page."""
        links = "".join(
            f'<a href="{file}"{" aria-current=page" if file == name else ""}>{html.escape(text)}</a>'
            for file, text in self.navigation
        )
        return (
            f'<!doctype html>\n<html lang="en">{head(title, STYLE + code_colours())}<body>'
            f"<nav>{links}</nav><main>{body}</main>\n<footer>Rendered by <code>make docs</code> from "
            f"{html.escape(self.made)}.</footer></body></html>\n"
        )


def code_colours() -> str:
    """Pygments' style sheets for light and dark pages."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    plain = ".highlight { background: none !important; }"
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{plain}"


def markdown_html(text: str, *, explorer: bool = False) -> str:
    """GitHub's Markdown as HTML; links between documents lead to their pages."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    body = link_pages(markdown2html_mistune(text), explorer=explorer)
    return re.sub(r"<table>.*?</table>", _in_a_box, body, flags=re.S)


def _in_a_box(table: re.Match[str]) -> str:
    """A table that scrolls by itself where it must; one of many columns is small, and its heads break after a ``_``.

    One of words is set left, one of numbers right.
    """
    if table[0].count("<th>") <= MANY_COLUMNS:
        kind = '"wide words"' if _is_of_words(table[0]) else "wide"
        return f"<div class={kind}>{table[0]}</div>"
    heads = re.sub(r"<th>.*?</th>", lambda head: head[0].replace("_", "_<wbr>"), table[0])
    return f'<div class="wide many">{heads}</div>'


def _is_of_words(table: str) -> bool:
    """Whether fewer than half of the cells behind the first column begin with a number."""
    rows = [re.findall(r"<td[^>]*>(?:<[^>]+>)*([^<]*)", row)[1:] for row in table.split("<tr>")]
    cells = [cell for row in rows for cell in row]
    return 2 * sum(bool(re.match(r"[-+]?\d", cell)) for cell in cells) < len(cells)


def notebook_html(path: Path, *, explorer: bool = False) -> str:
    """An executed notebook with its outputs, without progress bars and the widgets, which need a kernel.

    ``explorer``: whether there is an explorer.html beside the page, to which its links may lead.
    """
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(nbformat.read(path, as_version=4))
    notebook.metadata.pop("widgets", None)
    kept = []
    for cell in notebook.cells:
        if "skip-execution" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_widgets, cell.outputs) if output is not None]
        kept.append(cell)
    notebook.cells = kept
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    return link_pages(body, explorer=explorer)


def _without_widgets(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream" and output.name == "stderr":
        return None  # progress bars
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    return output


def link_pages(body: str, *, explorer: bool = False) -> str:
    """Links to notebooks and documents lead to their pages; links to other files of the repository become names."""

    def page(match: re.Match[str]) -> str:
        target, text = match["target"], match["text"]
        file, hash_sign, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not file:
            return match[0]
        if file.endswith("explore.ipynb"):
            return f'<a href="explorer.html">{text}</a>' if explorer else text
        name = re.sub(r"\.(ipynb|md)$", ".html", file.rpartition("/")[2])
        outside = file.startswith("../") and not file.startswith("../notebooks/")
        if outside or not name.endswith((".html", ".png")):
            return text
        return f'<a href="{name}{hash_sign}{anchor}">{text}</a>'

    return re.sub(r'<a href="(?P<target>[^"]+)"[^>]*>(?P<text>.*?)</a>', page, body, flags=re.S)
