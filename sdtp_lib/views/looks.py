"""How tokens look in every view, in one place: text, map and legend show the same thing in the same colour.

A coloured token brings its own text colour. A kept token is bold on the page's text colour, thinned, so that one rule
suits light and dark pages. What only one of two scorers keeps differs by line style too, not by colour alone. CSS
strings only.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT_SHARE = 0.2
KEPT = f"background:color-mix(in srgb,currentColor {100 * KEPT_SHARE:.0f}%,transparent);font-weight:700"
_PALE = "color-mix(in srgb,currentColor 55%,transparent)"
GONE = f"background:none;font-weight:400;color:{_PALE};text-decoration:line-through 1px"
# What only the first of two scorers keeps, and what only the second.
ONLY_FIRST = "font-weight:400;background:rgb(0 114 178);color:#fff;text-decoration:underline 2px"
ONLY_SECOND = "font-weight:400;background:rgb(230 159 0);color:#000;text-decoration:underline dashed 2px"


def dropped(rgb: Sequence[int]) -> str:
    """Text on a stage's colour: the colour of the map in full, and the text colour that reads best on it."""
    return "font-weight:400;background:rgb({} {} {});color:{}".format(*rgb, ink(rgb))


def ink(rgb: Sequence[int]) -> str:
    """``"#000"`` or ``"#fff"``: the text colour of higher contrast (WCAG) on ``rgb``, 0-255 per channel."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"
