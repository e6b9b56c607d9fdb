"""A prompt as a picture: its text in a fixed-width face, each token on the colour of the layer that dropped it.

The paper and README sibling of `views.dropped_tokens_html`. Knows strings and `TokenFates`; wraps by counting columns.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sdtp_lib.fates import TokenFates, stage_colours
from sdtp_lib.plots_style import axes_or_new

_TINT = 0.5


def dropped_text(
    tokens: Sequence[str],
    fates: TokenFates,
    *,
    ax: Axes | None = None,
    columns: int = 100,
    max_lines: int = 24,
) -> Axes:
    """The text with each token on its stage's colour; kept tokens are plain and bold. Fits axes as wide as the figure.

    Parameters
    ----------
    tokens
        T token texts.
    columns
        Characters a line; wide (East Asian) characters count as two.
    max_lines
        More lines are left out; an ellipsis says how many tokens.
    """
    if len(tokens) != fates.tokens:
        raise ValueError(f"{len(tokens)} tokens, but the fates of {fates.tokens}.")
    ax = axes_or_new(ax)
    # 0.602 em: the advance of matplotlib's own fixed-width face, DejaVu Sans Mono
    font_size = 0.97 * 72 * ax.figure.get_figwidth() / columns / 0.602
    colours = [tuple(channel / 255 for channel in rgb) for rgb in stage_colours(len(fates.layers))]
    stages = fates.stage_of_token()
    lines = 0
    for position, line, column, piece in layout(tokens, columns):
        if line >= max_lines:
            note = f"… {len(tokens) - position} more tokens"
            ax.text(0, max_lines + 0.5, note, fontsize=font_size, va="center", style="italic")
            lines = max_lines + 1
            break
        lines = line + 1
        kept = stages[position] == len(fates.layers)
        if not kept:
            box = (column, line + 0.06)
            ax.add_patch(Rectangle(box, cells(piece), 0.88, color=colours[stages[position]], alpha=_TINT, linewidth=0))
        ax.text(
            column,
            line + 0.5,
            piece.replace("$", r"\$"),
            fontsize=font_size,
            family="monospace",
            va="center",
            weight="bold" if kept else "normal",
            color="black",
        )
    ax.set_xlim(0, columns)
    ax.set_ylim(max(lines, 1), 0)
    ax.axis("off")
    return ax


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
