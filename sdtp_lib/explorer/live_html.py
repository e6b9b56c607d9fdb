"""The notebook's view in two parts, so that a moved slider sends kilobytes and not the whole text again.

`text_html` is sent once per prompt and scorer: a span for each token with its scores. `style_html` is sent at each
change: a style sheet that colours those spans by their identifiers, nothing else. The browser keeps the text, its
layout and its scroll position. ``live.js``, sent once, shows the scores of the token under the pointer and reports the
selected text. Strings only; no widget.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from sdtp_lib.explorer.state import ExplorerState, Outcome
from sdtp_lib.pruning.token_fates import TokenFates, stage_colours
from sdtp_lib.views import looks
from sdtp_lib.views.tokens import STYLE, token_info, token_text

_EXTRA = f"""<style>
.sdtp .block{{content-visibility:auto;contain-intrinsic-size:auto 140px}}
.sdtp .live .t{{{looks.KEPT}}}
.sdtp .live .t:hover::after{{content:none}}
.sdtp .onlya{{{looks.ONLY_FIRST}}}
.sdtp .onlyb{{{looks.ONLY_SECOND}}}
.sdtp .both{{{looks.KEPT}}}
.sdtp .gone{{{looks.GONE}}}
</style>"""


def script() -> str:
    """What the page needs once: pointing at a token fills the line above the text, selecting text names its tokens."""
    return (files("sdtp_lib.explorer") / "live.js").read_text("utf-8")


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
        f'<div class="sdtp" style="--remark:\'kept to the end\'">{STYLE}{_EXTRA}'
        '<div class="info">point at a token</div>'
        f'<div class="text live" data-prefix="{prefix}" tabindex="0" role="region" aria-label="prompt" '
        f'style="max-height:{int(max_height)}px">{blocks}</div></div>'
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


def style_html(fates: TokenFates, prefix: str, *, at_layer: int | None = None, protected: Sequence[int] = ()) -> str:
    """Colours of the tokens by the layer that drops them.

    With ``at_layer``, a stage: what that layer reads. Dropped just before it: its colour; dropped earlier: struck
    through; still read: as kept. ``protected`` tokens have a frame.
    """
    colours = stage_colours(len(fates.layers))
    rules = []
    for stage, layer in enumerate(fates.layers):
        remark = f';--remark:"dropped before layer {layer}"'
        # Never opacity: a layer of its own for each of thousands of spans costs 50 ms of painting.
        if at_layer is None or layer == at_layer:
            look = looks.dropped(colours[stage]) + remark
        else:
            look = (looks.GONE if layer < at_layer else looks.KEPT) + remark
        rules.append(_rule(prefix, fates.dropped_at == layer, look))
    frame = np.zeros(fates.tokens, bool)
    frame[list(protected)] = True
    rules.append(_rule(prefix, frame, "box-shadow:0 2px 0 0 currentColor,0 -2px 0 0 currentColor"))
    return f"<style>{''.join(rules)}</style>"


def compare_style_html(first: TokenFates, second: TokenFates, prefix: str, names: tuple[str, str]) -> str:
    """Colours where two scorers disagree about what the last layer sees: blue the first alone, orange the second."""
    end = first.num_layers
    has_a, has_b = first.dropped_at == end, second.dropped_at == end
    a, b = (_css_string(name) for name in names)
    rules = [
        _rule(prefix, has_a & ~has_b, f'{looks.ONLY_FIRST};--remark:"only {a} keeps it"'),
        _rule(prefix, has_b & ~has_a, f'{looks.ONLY_SECOND};--remark:"only {b} keeps it"'),
        _rule(prefix, ~has_a & ~has_b, f'{looks.GONE};--remark:"both dropped it"'),
    ]
    return f"<style>{''.join(rules)}</style>"


def compare_key(first: TokenFates, second: TokenFates, names: tuple[str, str]) -> str:
    """Legend of `compare_style_html` with counts."""
    end = first.num_layers
    has_a, has_b = first.dropped_at == end, second.dropped_at == end
    either, both = int((has_a | has_b).sum()), int((has_a & has_b).sum())
    a, b = (html.escape(name) for name in names)
    return (
        f'<span><i class="onlya"></i>only {a} keeps it: {int((has_a & ~has_b).sum())}</span>'
        f'<span><i class="onlyb"></i>only {b} keeps it: {int((has_b & ~has_a).sum())}</span>'
        f'<span><i class="both"></i>both keep it: {both}</span>'
        f'<span><span class="gone">both dropped it</span>: {int((~has_a & ~has_b).sum())}</span>'
        f"<span>they agree on {100 * both / max(either, 1):.0f} % of what either keeps</span>"
    )


def _rule(prefix: str, chosen: np.ndarray, look: str) -> str:
    at = np.flatnonzero(chosen)
    return f"{','.join([f'#{prefix}{p}' for p in at.tolist()])}{{{look}}}" if len(at) else ""


def _css_string(text: str) -> str:
    """``text`` for a CSS string inside a style element: no quote, backslash, line end or ``<`` survives."""
    return "".join(c if c.isalnum() or c in " ._-+()" else f"\\{ord(c):x} " for c in text)


def numbers_html(state: ExplorerState) -> str:
    """Tokens and shares of the unpruned cost of what is drawn, and whether it is exact."""
    numbers = state.numbers()
    flops = numbers.get("prefill_flops_share")
    parts = [
        f"<b>{numbers['kept_tokens']:,} of {numbers['prompt_tokens']:,}</b> tokens reach the last layer",
        *([f"<b>{100 * flops:.0f} %</b> of the prefill's FLOPs"] if flops is not None else []),
        f"<b>{100 * numbers['kv_share']:.0f} %</b> of the KV cache",
        "approximate" if state.fates.approximate else "what the engine did",
    ]
    return f'<div aria-live="polite">{" · ".join(parts)}</div>'


def token_html(tokens: Sequence[str], fates: TokenFates, position: int) -> str:
    """All that is known of one token, in one line."""
    info = token_info(TokenFates(*_one(fates, position)), [position])[0]
    text = html.escape(tokens[position].replace("\n", "↵"))
    return f'<div class="sdtp">token <code>{text}</code> · {fates.layer_label(position)} · {info}</div>'


def _one(fates: TokenFates, position: int) -> tuple[Any, ...]:
    only = slice(position, position + 1)
    return fates.dropped_at[only], fates.layers, fates.num_layers, fates.scores[:, only]


def savings_html(outcome: Outcome) -> str:
    """Seconds and bytes of a real run beside the unpruned one."""
    rows = (
        ("prefill", outcome.full_prefill_s, outcome.prefill_s, "s"),
        ("prefill and answer", outcome.full_total_s, outcome.total_s, "s"),
        ("KV cache", outcome.full_kv_bytes / 1e6, outcome.kv_bytes / 1e6, "MB"),
    )
    cells = "".join(
        f"<span>{name} <b>{full:.2f} → {pruned:.2f} {unit}</b> ({_saved(full, pruned)})</span>"
        for name, full, pruned, unit in rows
    )
    return f'<div class="sdtp"><div class="key">{cells}<span>one run each, not a benchmark</span></div></div>'


def _saved(full: float, pruned: float) -> str:
    if not full:
        return "unknown"
    share = 100 * (1 - pruned / full)
    return f"{share:.0f} % saved" if share >= 0 else f"{-share:.0f} % more"
