"""Prompts as HTML: each token a span, coloured by its saliency or by the layer at which it was dropped; and two things
side by side: what two scorers keep, and what an answer lost by pruning.

Strings in, one HTML fragment out, with its own small style sheet; nothing is displayed or saved. Token text is always
escaped: prompts come from anywhere and end up in notebooks, Voila pages and reports. A coloured token brings its own
text colour, all else takes the page's, so a fragment works on light and on dark pages; text and map have the same
colours. Differences are marked by line style too, so that they do not hang on colour alone. Hovering a token shows its
numbers in the line above the text. Knows no model, no torch; of a tokenizer only `decode` and `convert_ids_to_tokens`.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sdtp_lib.pruning.token_fates import TokenFates, stage_colours
from sdtp_lib.views import looks

STYLE = """<style>
.sdtp{position:relative;font:14px/1.7 system-ui,sans-serif;color:inherit;max-width:1100px}
.sdtp .head{font-weight:600}
.sdtp .info{min-height:1.7em;opacity:.75;font-size:13px}
.sdtp .text{font:13px/1.75 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere;
overflow:auto;border:1px solid rgb(128 128 128/.35);border-radius:4px;padding:6px 9px;resize:vertical}
.sdtp .over{position:relative}
.sdtp .t{border-radius:2px;padding:1px 0}
.sdtp .t:hover{outline:2px solid currentColor}
.sdtp .t:hover::after{content:attr(data-i) var(--remark,"");position:absolute;left:0;top:0;
right:0;font:13px/1.7 system-ui,sans-serif;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;
background:var(--jp-layout-color0,Canvas);color:inherit;pointer-events:none}
.sdtp .key{display:inline-flex;flex-wrap:wrap;gap:2px 14px;font-size:13px}
.sdtp .key i{display:inline-block;width:14px;height:14px;margin-right:5px;vertical-align:-2px;border-radius:2px;
border:1px solid rgb(128 128 128/.5)}
</style>"""


def display_tokens(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token as a reader sees it, one string per id (special tokens too).

    Bytes that are part of one character: the character stands at its first token, ``▫`` at the others.
    """
    ids = [int(i) for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    texts: list[str] = []
    pending: list[int] = []
    for token_id, piece in zip(ids, pieces, strict=True):
        if pending:
            together = _decode(tokenizer, [*pending, token_id])
            if "\ufffd" not in together:
                texts += [together, *["▫"] * len(pending)]
                pending = []
                continue
            if len(pending) < 3:  # a character has at most four bytes
                pending.append(token_id)
                continue
            texts += ["�"] * len(pending)
            pending = []
        text = _decode(tokenizer, [token_id])
        if "\ufffd" in text:
            pending = [token_id]
            continue
        # sentencepiece decoders drop the space that begins a word
        texts.append(" " + text if str(piece).startswith("▁") and not text.startswith(" ") else text)
    return texts + ["�"] * len(pending)


def tokens_html(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    title: str = "",
    value_name: str = "saliency",
    positions: Sequence[int] | None = None,
    max_height: int = 340,
    gamma: float = 0.5,
) -> str:
    """The text with each token coloured by its value (share of the largest; blue is high).

    Parameters
    ----------
    tokens, values
        T texts and T numbers; NaN leaves a token uncoloured.
    title
        Heading above the text; escaped.
    positions
        Positions to show instead of 0..T-1.
    gamma
        Exponent on the share; 0.5 opens up the low end, where most tokens are.
    """
    values = np.asarray(values, float)
    _same_length(tokens=tokens, values=values)
    size = np.abs(values)
    peak = np.nanmax(size) if np.isfinite(size).any() else 0.0
    depth = np.nan_to_num((size / (peak or 1.0)) ** gamma, nan=0.0)
    at = positions if positions is not None else range(len(tokens))
    spans = [
        f'<span class="t" style="background:rgb(0 114 178/{0.7 * d:.2f})"'
        f' data-i="position {p} · {html.escape(value_name)} {v:.3g}">{token_text(t)}</span>'
        for t, v, d, p in zip(tokens, values, depth, at, strict=True)
    ]
    return text_block(spans, title=title, max_height=max_height)


def dropped_tokens_html(
    tokens: Sequence[str],
    fates: TokenFates,
    *,
    title: str = "",
    positions: Sequence[int] | None = None,
    max_height: int = 340,
) -> str:
    """The text with each token on the colour of the layer before which it was dropped; kept tokens are grey.

    Hovering shows position, scores by layer and the layer that dropped it. Parameters as in `tokens_html`.
    """
    _same_length(tokens=tokens, fates=fates.dropped_at)
    info = token_info(fates, positions)
    stages = fates.stage_of_token()
    spans = [
        f'<span class="t s{s}" data-i="{i} · {fates.layer_label(p)}">{token_text(t)}</span>'
        for p, (t, s, i) in enumerate(zip(tokens, stages, info, strict=True))
    ]
    title = title + (" (approximate)" if fates.approximate else "")
    return text_block(spans, title=title, key=stage_key(fates), max_height=max_height, extra_css=stage_css(fates))


def token_info(fates: TokenFates, positions: Sequence[int] | None = None) -> list[str]:
    """What hovering a token tells: its position and its score at each stage it reached."""
    at = positions if positions is not None else range(fates.tokens)
    columns = fates.scores.T
    names = [f"layer {layer}: " for layer in fates.layers]
    told = ([f"{n}{x:.3g}" for n, x in zip(names, column, strict=True) if x == x] for column in columns.tolist())
    return [
        f"position {p}" + (f" · score before {', '.join(parts)}" if parts else "")
        for p, parts in zip(at, told, strict=True)
    ]


def stage_css(fates: TokenFates) -> str:
    """Style of the classes ``s0`` .. ``sS``: one background per stage; the last, kept, is grey on any page."""
    rules = [f".sdtp .s{i}{{{looks.dropped(rgb)}}}" for i, rgb in enumerate(stage_colours(len(fates.layers)))]
    return f"<style>{''.join(rules)}.sdtp .s{len(fates.layers)}{{{looks.KEPT}}}</style>"


def stage_key(fates: TokenFates) -> str:
    """The legend: a swatch and a count for each stage, and for what was kept."""
    entries = [
        f'<span><i class="s{i}"></i>before layer {layer}: {count}</span>'
        for i, (layer, count) in enumerate(zip(fates.layers, fates.dropped_per_stage(), strict=True))
    ]
    kept = f'<span><i class="s{len(fates.layers)}"></i>kept to the end: {fates.kept_count} of {fates.tokens}</span>'
    return f"{''.join(entries)}{kept}"


def text_block(
    spans: Iterable[str], *, title: str = "", key: str = "", max_height: int = 340, extra_css: str = ""
) -> str:
    """Finished token spans in a scrolling box: a heading above, a line for the hovered token, the legend below."""
    head = f'<div class="head">{html.escape(title)}</div>' if title else ""
    return (
        f'<div class="sdtp">{STYLE}{extra_css}{head}<div class="over"><div class="info">hover a token</div>'
        f'<div class="text" tabindex="0" role="region" aria-label="prompt" style="max-height:{int(max_height)}px">'
        f"{''.join(spans)}</div></div>{f'<div class=key>{key}</div>' if key else ''}</div>"
    )


def token_text(text: str) -> str:
    """One token's text for HTML: escaped, line ends made visible."""
    return html.escape(text).replace("\r", "␍").replace("\n", "↵\n")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _same_length(**lists: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"these belong together but differ in length: {lengths}.")


_COMPARE_CSS = f"""<style>
.sdtp .onlya{{{looks.ONLY_FIRST}}}
.sdtp .onlyb{{{looks.ONLY_SECOND}}}
.sdtp .gone{{{looks.GONE}}}
.sdtp .both{{{looks.KEPT}}}
</style>"""
_ANSWERS_CSS = """<style>
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

    Blue, solid line: only the first keeps it; orange, dashed: only the second; struck: neither; bold on grey: both.
    """
    if not len(tokens) == first.tokens == second.tokens:
        raise ValueError(
            f"{len(tokens)} token texts, fates of {first.tokens} and {second.tokens} tokens: give those of one prompt."
        )
    layer = first.num_layers - 1 if layer is None else layer
    has_a, has_b = first.dropped_at > layer, second.dropped_at > layer
    kinds = np.where(has_a & has_b, "both", np.where(has_a, "onlya", np.where(has_b, "onlyb", "gone")))
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
        f'<span><i class="both"></i>both keep: {both}</span>'
        f"<span><span class=gone>both dropped</span>: {int((kinds == 'gone').sum())}</span>"
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
    return f'<div class="sdtp">{STYLE}{_ANSWERS_CSS}{pair}</div>'
