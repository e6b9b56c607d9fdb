"""Two things side by side as HTML: what two scorers keep, and what an answer lost by pruning.

All text is escaped; differences are marked by colour and by line style, so that they do not hang on colour alone.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Sequence

import numpy as np

from sdtp_lib.fates import TokenFates
from sdtp_lib.views import STYLE, text_block, token_text

_COMPARE_CSS = """<style>
.sdtp .onlya{background:rgb(0 114 178/.5);border-bottom:2px solid rgb(0 114 178)}
.sdtp .onlyb{background:rgb(230 159 0/.55);border-bottom:2px dashed rgb(180 110 0)}
.sdtp .gone{opacity:.42}
.sdtp .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:12px}
.sdtp .lost{background:rgb(213 94 0/.4);text-decoration:line-through}
.sdtp .new{background:rgb(0 158 115/.4);text-decoration:underline}
</style>"""


def scorers_html(
    tokens: Sequence[str],
    first: TokenFates,
    second: TokenFates,
    names: tuple[str, str],
    *,
    layer: int | None = None,
    max_height: int = 340,
) -> str:
    """Where two scorers disagree: tokens that only one of them still keeps when ``layer`` runs (the last by default).

    Blue, solid line: only the first keeps it; orange, dashed: only the second; pale: both dropped it; plain: both keep.
    """
    if not len(tokens) == first.tokens == second.tokens:
        raise ValueError(f"different prompts: {len(tokens)} tokens, fates of {first.tokens} and {second.tokens}.")
    layer = first.num_layers - 1 if layer is None else layer
    has_a, has_b = first.dropped_at > layer, second.dropped_at > layer
    kinds = np.where(has_a & has_b, "", np.where(has_a, "onlya", np.where(has_b, "onlyb", "gone")))
    spans = [
        f'<span class="t {kind}" data-i="position {p} · {html.escape(names[0])}: {first.layer_label(p)} · '
        f'{html.escape(names[1])}: {second.layer_label(p)}">{token_text(text)}</span>'
        for p, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
    ]
    a, b = (html.escape(name) for name in names)
    either = int((has_a | has_b).sum())
    both = int((has_a & has_b).sum())
    key = (
        f'<span><i class="onlya"></i>only {a}: {int((kinds == "onlya").sum())}</span>'
        f'<span><i class="onlyb"></i>only {b}: {int((kinds == "onlyb").sum())}</span>'
        f"<span><i></i>both keep: {both}</span><span class=gone>both dropped: {int((kinds == 'gone').sum())}</span>"
        f"<span>agreement {100 * both / max(either, 1):.0f} % of what either keeps</span>"
    )
    title = f"{names[0]} against {names[1]}, tokens that layer {layer} still sees"
    return text_block(spans, title=title, key=key, max_height=max_height, extra_css=_COMPARE_CSS)


def answers_html(full: str, pruned: str, *, names: tuple[str, str] = ("unpruned", "pruned")) -> str:
    """Two answers side by side, word by word: struck through what the second lost, underlined what it has instead."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (full, pruned))
    sides: tuple[list[str], list[str]] = ([], [])
    # autojunk would call frequent words junk in long answers and mark them wrongly
    for action, a0, a1, b0, b1 in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, words, kind in ((sides[0], left[a0:a1], "lost"), (sides[1], right[b0:b1], "new")):
            text = html.escape("".join(words))
            side.append(text if action == "equal" or not text else f'<span class="{kind}">{text}</span>')
    same = "the same answer" if full == pruned else "where the answers differ is marked"
    columns = "".join(
        f'<div><div class="head">{html.escape(name)}</div>'
        f'<div class="text">{"".join(side) or "<i>(empty)</i>"}</div></div>'
        for name, side in zip(names, sides, strict=True)
    )
    pair = f'<div class="pair">{columns}</div><div class="info">{same}</div>'
    return f'<div class="sdtp">{STYLE}{_COMPARE_CSS}{pair}</div>'
