"""The layer x token map as SVG: a column for each token, ending at the layer before which the token was dropped.

One path per stage, with neighbouring columns of one stage merged, so that 4,096 tokens are tens of kilobytes and not
thousands of elements. `layer_token_map_html` adds zoom in the browser (wheel, drag, keys).
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

import numpy as np

from sdtp_lib.pruning.token_fates import TokenFates, stage_colours
from sdtp_lib.views.looks import KEPT_SHARE

_LEFT, _TOP, _BOTTOM = 46, 6, 34


def layer_token_map_svg(
    fates: TokenFates,
    tokens: Sequence[str] | None = None,
    *,
    window: tuple[int, int] | None = None,
    width: int = 1000,
    height: int = 240,
    title: str = "layer x token map",
) -> str:
    """The map as one ``<svg>`` string that works alone and inside a page.

    Parameters
    ----------
    tokens
        T texts; while at most 200 tokens are shown, hovering a column names its token (escaped).
    window
        First and one past the last token shown; the whole prompt if left out.
    width, height
        Size in CSS pixels; the picture shrinks with its page.
    """
    first, stop = window if window is not None else (0, fates.tokens)
    first, stop = max(0, int(first)), min(fates.tokens, int(stop))
    if first >= stop:
        raise ValueError(f"window={window} shows no token of {fates.tokens}.")
    shown = stop - first
    inner_w, inner_h = width - _LEFT - 8, height - _TOP - _BOTTOM
    columns = stage_paths(fates, first, stop)
    # kept columns have the look of kept text: the page's own text colour, thinned
    fills = [*(f'fill="rgb({r},{g},{b})"' for r, g, b in stage_colours(len(fates.layers)))]
    fills.append(f'fill="currentColor" fill-opacity="{KEPT_SHARE}"')
    paths = "".join(f'<path {fill} d="{d}"/>' for d, fill in zip(columns, fills, strict=True) if d)
    names = ""
    if tokens is not None and shown <= 200:
        names = "".join(
            f'<rect x="{p - first}" width="1" height="{fates.num_layers}" fill="transparent">'
            f"<title>{html.escape(tokens[p])!s} · position {p} · {fates.layer_label(p)}</title></rect>"
            for p in range(first, stop)
        )
    # the lines between stages let the eye read a column's end as a layer
    grid = "".join(f'<path d="M0 {layer}H{shown}" class="g"/>' for layer in fates.layers)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sdtp-map" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{html.escape(title, quote=True)}" '
        'style="width:100%;max-width:1100px;height:auto;color:inherit" font-family="system-ui,sans-serif" '
        'font-size="12">'
        f"<title>{html.escape(title)}</title>"
        "<style>.sdtp-map .g{stroke:currentColor;stroke-opacity:.18;stroke-width:1;vector-effect:non-scaling-stroke}"
        ".sdtp-map text{fill:currentColor}</style>"
        f'<svg class="cells" x="{_LEFT}" y="{_TOP}" width="{inner_w}" height="{inner_h}" '
        f'viewBox="0 0 {shown} {fates.num_layers}" data-first="{first}" preserveAspectRatio="none">'
        f"{paths}{grid}{names}</svg>"
        f"{_axes(fates, first, stop, width, height)}</svg>"
    )


def stage_paths(fates: TokenFates, first: int, stop: int) -> list[str]:
    """SVG path data of the columns ``first .. stop - 1``, one string per stage and one for kept tokens."""
    stages = fates.stage_of_token()[first:stop]
    ends = [*fates.layers, fates.num_layers]
    edges = np.flatnonzero(np.diff(stages)) + 1
    starts = np.concatenate([[0], edges])
    widths = np.diff(np.concatenate([starts, [len(stages)]]))
    paths: list[list[str]] = [[] for _ in ends]
    for start, wide in zip(starts.tolist(), widths.tolist(), strict=True):
        stage = int(stages[start])
        paths[stage].append(f"M{start} 0h{wide}v{ends[stage]}h-{wide}z")
    return ["".join(parts) for parts in paths]


def _axes(fates: TokenFates, first: int, stop: int, width: int, height: int) -> str:
    inner_w, inner_h = width - _LEFT - 8, height - _TOP - _BOTTOM
    parts = [
        f'<text x="{_LEFT - 6}" y="{_TOP + inner_h * layer / fates.num_layers + 4:.1f}" text-anchor="end">'
        f"{layer}</text>"
        for layer in _thinned([0, *fates.layers, fates.num_layers], inner_h / fates.num_layers)
    ]
    layer_labels = "".join(parts)
    parts = []
    step = _round_step((stop - first) / 8)
    for position in itertools.takewhile(lambda p: p < stop, itertools.count(-(-first // step) * step, step)):
        x = _LEFT + inner_w * (position - first) / (stop - first)
        # a number that would stick out of the picture ends at its edge
        anchor = "end" if x + 3.5 * len(str(position)) > width else "middle"
        x = min(x, width - 1) if anchor == "end" else x
        parts.append(f'<text x="{x:.1f}" y="{_TOP + inner_h + 14}" text-anchor="{anchor}">{position}</text>')
    names = (
        f'<text x="{_LEFT + inner_w / 2}" y="{height - 4}" text-anchor="middle">token position</text>'
        f'<text transform="translate(11 {_TOP + inner_h / 2}) rotate(-90)" text-anchor="middle">layer</text>'
    )
    return f'<g class="axes">{layer_labels}{names}<g class="positions">{"".join(parts)}</g></g>'


def _thinned(layers: list[int], pixels_per_layer: float) -> list[int]:
    """The layers to write out: those at least a line of text apart, the last one always."""
    chosen = [layers[-1]]
    for layer in reversed(layers[:-1]):
        if (chosen[-1] - layer) * pixels_per_layer >= 13:
            chosen.append(layer)
    return chosen


def _round_step(rough: float) -> int:
    step = 1
    for factor in itertools.cycle((2, 2.5, 2)):
        if step >= rough:
            return step
        step = int(step * factor)
    raise AssertionError("an endless cycle ended")


_ZOOM = """<script>(() => {
const root = document.currentScript.previousElementSibling, map = root.querySelector('.sdtp-map');
const cells = map.querySelector('.cells'), axes = map.querySelector('.positions'), full = cells.viewBox.baseVal.width;
const layers = cells.viewBox.baseVal.height, note = root.querySelector('.zoom');
let x = 0, w = full;
const show = (nx, nw) => {
  w = Math.min(full, Math.max(20, nw)); x = Math.min(full - w, Math.max(0, nx));
  cells.setAttribute('viewBox', `${x} 0 ${w} ${layers}`);
  axes.style.visibility = w < full ? 'hidden' : 'visible';
  note.textContent = w < full ? `tokens ${first + Math.round(x)} to ${first + Math.round(x + w) - 1}` : 'all tokens';
};
const first = +cells.dataset.first;
const at = e => x + w * Math.min(1, Math.max(0, (e.clientX - cells.getBoundingClientRect().left) /
  cells.getBoundingClientRect().width));
map.addEventListener('wheel', e => { if (!e.ctrlKey && !root.contains(document.activeElement)) return;
  e.preventDefault(); const p = at(e), k = e.deltaY > 0 ? 1.25 : .8; show(p - (p - x) * k, w * k); }, {passive: false});
let from = null;
map.addEventListener('pointerdown', e => { from = at(e); root.focus(); });
map.addEventListener('pointermove', e => {
  if (from !== null && e.buttons) show(x + from - at(e), w); else from = null; });
map.addEventListener('dblclick', () => show(0, full));
root.addEventListener('keydown', e => { const move = {'+': [.1, .8], '=': [.1, .8], '-': [-.125, 1.25],
  ArrowRight: [.2, 1], ArrowLeft: [-.2, 1], '0': [-1e9, 1e9]}[e.key];
  if (move) { e.preventDefault(); show(x + move[0] * w, w * move[1]); } });
})()</script>"""


def layer_token_map_html(fates: TokenFates, tokens: Sequence[str] | None = None, **options: object) -> str:
    """The map with zoom: click it, then wheel or ``+`` ``-`` zoom, drag or arrows move, double click or ``0`` resets.

    Options as in `layer_token_map_svg`. In a notebook it needs a trusted cell, as any output that was just computed is.
    """
    svg = layer_token_map_svg(fates, tokens, **options)
    return (
        f'<div class="sdtp" tabindex="0" role="group" aria-label="zoomable map; plus, minus and arrow keys">{svg}'
        '<div style="font-size:12px;opacity:.75"><span class="zoom">all tokens</span> '
        "· click, then wheel or + − zoom, drag or arrows move, 0 resets</div></div>"
        f"{_ZOOM}"
    )
