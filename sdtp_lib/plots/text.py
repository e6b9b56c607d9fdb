"""A prompt as a picture: each token on the colour of the layer that dropped it, the question and the answer's place
framed (the sibling of `views.dropped_tokens_html`), alone or above the layer x token map.

Knows strings and `TokenFates`; no model, no tokenizer. A prompt that is too long is shown in excerpts: its beginning,
its end and the lines around the framed places; notes say how many tokens are left out between them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sdtp_lib.plots.style import KEPT, axes_or_new, use_style
from sdtp_lib.plots.tokens import token_layer_map
from sdtp_lib.pruning.token_fates import TokenFates, stage_colours

_COLUMNS, _LINES = 100, 40
_MARGIN = 10  # columns at the right for the names of places
_MARK = "#000000"


def text_and_map(
    tokens: Sequence[str],
    fates: TokenFates,
    title: str = "",
    *,
    places: Mapping[str, tuple[int, int]] | None = None,
    max_lines: int = _LINES,
) -> Figure:
    """One figure: the coloured text above the layer x token map. Not registered with pyplot, so nothing shows it."""
    rows = excerpt(tokens, _COLUMNS, max_lines, places or {})
    text_in, map_in = 0.175 * len(rows), 3.1
    height = text_in + map_in + 0.4
    with use_style():
        # placed by hand: the text must be as wide as the figure, whatever room the map's labels take
        figure = Figure(figsize=(9, height), layout="none")
        above = figure.add_axes((0.01, (map_in + 0.1) / height, 0.98, text_in / height))
        below = figure.add_axes((0.065, 0.5 / height, 0.68, (map_in - 0.6) / height))
        dropped_text(tokens, fates, ax=above, places=places, columns=_COLUMNS, max_lines=max_lines)
        token_layer_map(fates, ax=below)
        if title:
            figure.text(0.01, 1 - 0.2 / height, title, fontsize=10.5, weight="bold")
    return figure


def dropped_text(
    tokens: Sequence[str],
    fates: TokenFates,
    *,
    ax: Axes | None = None,
    places: Mapping[str, tuple[int, int]] | None = None,
    columns: int = _COLUMNS,
    max_lines: int = 24,
) -> Axes:
    """The text with each token on its stage's colour; kept tokens are bold on grey. Fits axes as wide as the figure.

    Parameters
    ----------
    tokens
        T token texts.
    places
        Name -> first and last token of a place that is framed, named at the line's end and never left out.
    columns
        Characters per line; wide (East Asian) characters count as two.
    max_lines
        Lines of text that are shown at most (see `excerpt`).
    """
    if len(tokens) != fates.tokens:
        raise ValueError(f"{len(tokens)} token texts, but fates of {fates.tokens} tokens: give both of one prompt.")
    ax = axes_or_new(ax)
    width = columns + (_MARGIN if places else 0)
    # 0.602 em: the advance of matplotlib's own fixed-width face, DejaVu Sans Mono
    font = {"fontsize": 0.97 * 72 * ax.figure.get_figwidth() / width / 0.602, "va": "center"}
    colours = [*(tuple(channel / 255 for channel in rgb) for rgb in stage_colours(len(fates.layers))), KEPT]
    stages = fates.stage_of_token()
    rows = excerpt(tokens, columns, max_lines, places or {})
    for line, row in enumerate(rows):
        if isinstance(row, int):
            ax.text(0, line + 0.5, f"… {row:,} tokens left out …", style="italic", color="#555555", **font)
            continue
        for position, column, piece in row:
            kept = stages[position] == len(fates.layers)
            colour = colours[stages[position]]
            ax.add_patch(Rectangle((column, line + 0.06), cells(piece), 0.88, color=colour, linewidth=0))
            look = {"weight": "bold" if kept else "normal", "color": "black" if kept else ink(colour)}
            ax.text(column, line + 0.5, piece.replace("$", r"\$"), family="monospace", **look, **font)
    for name, place in (places or {}).items():
        _frame(ax, rows, name, place, columns, font)
    ax.set_xlim(0, width)
    ax.set_ylim(max(len(rows), 1), 0)
    ax.axis("off")
    return ax


def _frame(ax: Axes, rows: list, name: str, place: tuple[int, int], columns: int, font: dict) -> None:
    first, last = place
    named = False
    for line, row in enumerate(rows):
        inside = [] if isinstance(row, int) else [piece for piece in row if first <= piece[0] <= last]
        if inside:
            left, right = inside[0][1], inside[-1][1] + cells(inside[-1][2])
            look = {"fill": False, "edgecolor": _MARK, "linewidth": 1.6, "zorder": 4, "clip_on": False}
            ax.add_patch(Rectangle((left, line + 0.02), right - left, 0.96, **look))
            if not named:
                ax.text(columns + 0.8, line + 0.5, name, weight="bold", color=_MARK, **font)
            named = True


def excerpt(
    tokens: Sequence[str], columns: int, max_lines: int, places: Mapping[str, tuple[int, int]]
) -> list[list[tuple[int, int, str]] | int]:
    """The lines that are shown: each a list of (token, column, text), or the number of tokens left out there.

    Of a longer text: first and last line, the lines of ``places``, and as many around these as fit into ``max_lines``.
    """
    lines: list[list[tuple[int, int, str]]] = []
    for position, line, column, piece in layout(tokens, columns):
        lines += [[] for _ in range(line + 1 - len(lines))]
        lines[line].append((position, column, piece))
    if len(lines) <= max_lines:
        return lines
    marked = [i for i, line in enumerate(lines) for p, _, _ in line if any(a <= p <= b for a, b in places.values())]
    anchors = sorted({*marked, 0, len(lines) - 1})

    def preference(line: int) -> tuple[int, bool, int]:
        return min(abs(line - anchor) for anchor in anchors), line not in marked, line

    chosen = set(sorted(range(len(lines)), key=preference)[:max_lines])
    shown = {position for line in chosen for position, _, _ in lines[line]}
    rows: list[list[tuple[int, int, str]] | int] = []
    left_out: set[int] = set()
    for number, line in enumerate(lines):
        if number not in chosen:
            left_out |= {position for position, _, _ in line} - shown
            continue
        if left_out:
            rows.append(len(left_out))
            left_out = set()
        rows.append(line)
    return rows + ([len(left_out)] if left_out else [])


def layout(tokens: Sequence[str], columns: int) -> list[tuple[int, int, int, str]]:
    """(token, line, column, text) of each piece: wrapped at ``columns``, broken at line ends (blank lines once)."""
    pieces = []
    line = column = 0
    for position, token in enumerate(tokens):
        for i, part in enumerate(token.replace("\t", "  ").split("\n")):
            if i and column:
                line, column = line + 1, 0
            while part:
                if column and column + cells(part) > columns:
                    line, column = line + 1, 0
                fits = part
                while cells(fits) > columns:
                    fits = fits[:-1]
                pieces.append((position, line, column, fits))
                column += cells(fits)
                part = part[len(fits) :]
    return pieces


def cells(text: str) -> int:
    """Columns that ``text`` takes in a fixed-width face."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def ink(colour: Sequence[float]) -> str:
    """Black or white: the text colour of higher contrast (WCAG) on ``colour``, 0-1 per channel."""
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"
