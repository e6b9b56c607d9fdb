"""The explorer's page in two parts, so that a moved slider sends kilobytes and not the whole text again.

`text_html` is sent once per prompt and scorer: a span a token with its scores. `style_html` is sent at each change: a
style sheet that colours those spans by their identifiers, nothing else. The browser keeps the text, its layout and its
scroll position. Strings only; no widget.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from sdtp_lib.pruning.token_fates import TokenFates, stage_colours
from sdtp_lib.views.tokens import STYLE, token_info, token_text

_TINT = 0.5
_PALE = "color:color-mix(in srgb,currentColor 60%,transparent)"
_EXTRA = """<style>
.sdtp .block{content-visibility:auto;contain-intrinsic-size:auto 140px}
.sdtp .gone{opacity:.42}
.sdtp .onlya{background:rgb(0 114 178/.5);border-bottom:2px solid rgb(0 114 178)}
.sdtp .onlyb{background:rgb(230 159 0/.55);border-bottom:2px dashed rgb(180 110 0)}
</style>"""


def text_html(tokens: Sequence[str], scored: TokenFates, prefix: str, *, max_height: int = 300) -> str:
    """The text, uncoloured: token p has the identifier ``<prefix>p`` and its scores for hovering.

    ``scored`` holds the scores of an unpruned run (nothing dropped), so that each token shows all of them.
    """
    info = token_info(scored)
    spans = [
        f'<span class=t id={prefix}{p} data-i="{i}">{token_text(t)}</span>'
        for p, (t, i) in enumerate(zip(tokens, info, strict=True))
    ]
    ends = [*block_ends(tokens), len(tokens)]
    blocks = "".join(
        f"<div class=block>{''.join(spans[start:end])}</div>" for start, end in zip([0, *ends], ends, strict=False)
    )
    return (
        f'<div class="sdtp" style="--info-top:0;--fate:\' · kept\'">{STYLE}{_EXTRA}'
        '<div class="info">hover a token</div>'
        f'<div class="text" tabindex="0" role="region" aria-label="prompt" style="max-height:{int(max_height)}px">'
        f"{blocks}</div></div>"
    )


def block_ends(tokens: Sequence[str], at_least: int = 96, at_most: int = 320) -> list[int]:
    """Where the text is cut into blocks that the browser may leave alone while they are out of sight.

    After a line end once a block has ``at_least`` tokens, else (a line break that is not in the prompt) at ``at_most``.
    """
    ends, start = [], 0
    for position, text in enumerate(tokens, start=1):
        if position - start >= at_most or (position - start >= at_least and "\n" in text):
            ends.append(position)
            start = position
    return [end for end in ends if end < len(tokens)]


def style_html(fates: TokenFates, prefix: str, *, at_layer: int | None = None) -> str:
    """Colours of the tokens by the layer that drops them; tokens that ``at_layer`` does not see any more are pale."""
    colours = stage_colours(len(fates.layers))
    rules = []
    for stage, layer in enumerate(fates.layers):
        gone = at_layer is not None and layer <= at_layer
        r, g, b = colours[stage]
        look = f'background:rgb({r} {g} {b}/{_TINT});--fate:" · dropped before layer {layer}"'
        # Never opacity: a layer of its own for each of thousands of spans costs 50 ms of painting.
        rules.append(_rule(prefix, fates.dropped_at == layer, look + (f";{_PALE}" if gone else "")))
    return f"<style>{''.join(rules)}</style>"


def compare_style_html(first: TokenFates, second: TokenFates, prefix: str, names: tuple[str, str]) -> str:
    """Colours where two scorers disagree about what the last layer sees: blue the first alone, orange the second."""
    end = first.num_layers
    has_a, has_b = first.dropped_at == end, second.dropped_at == end
    a, b = (_css_string(name) for name in names)
    rules = [
        _rule(prefix, has_a & ~has_b, f'background:rgb(0 114 178/.5);border-bottom:2px solid;--fate:" · only {a}"'),
        _rule(prefix, has_b & ~has_a, f'background:rgb(230 159 0/.55);border-bottom:2px dashed;--fate:" · only {b}"'),
        _rule(prefix, ~has_a & ~has_b, f'{_PALE};--fate:" · both dropped it"'),
    ]
    return f"<style>{''.join(rules)}</style>"


def compare_key(first: TokenFates, second: TokenFates, names: tuple[str, str]) -> str:
    """Legend of `compare_style_html` with counts."""
    end = first.num_layers
    has_a, has_b = first.dropped_at == end, second.dropped_at == end
    either, both = int((has_a | has_b).sum()), int((has_a & has_b).sum())
    a, b = (html.escape(name) for name in names)
    return (
        f'<span><i class="onlya"></i>only {a}: {int((has_a & ~has_b).sum())}</span>'
        f'<span><i class="onlyb"></i>only {b}: {int((has_b & ~has_a).sum())}</span>'
        f'<span><i></i>both keep: {both}</span><span class="gone">both dropped: {int((~has_a & ~has_b).sum())}</span>'
        f"<span>agreement {100 * both / max(either, 1):.0f} % of what either keeps</span>"
    )


def _rule(prefix: str, chosen: np.ndarray, look: str) -> str:
    at = np.flatnonzero(chosen)
    return f"{','.join([f'#{prefix}{p}' for p in at.tolist()])}{{{look}}}" if len(at) else ""


def _css_string(text: str) -> str:
    """``text`` for a CSS string inside a style element: no quote, backslash, line end or ``<`` survives."""
    return "".join(c if c.isalnum() or c in " ._-+()" else f"\\{ord(c):x} " for c in text)
