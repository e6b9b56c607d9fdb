"""What people type into the explorer's boxes, read and written: layers, tokens to protect. Knows strings only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from sdtp_lib.views.places import find_spans


def parse_protected(text: str, tokens: Sequence[str]) -> tuple[int, ...]:
    """Token positions out of ``"120-131, 300"``, or of every place where ``text`` stands in the prompt.

    Raises
    ------
    ValueError
        If a position lies outside the prompt, or the text is not in it.
    """
    if re.fullmatch(r"[\d\s,-]*", text):
        spans = [tuple(int(end) for end in part.split("-")) for part in text.replace(",", " ").split()]
        spans = [(span[0], span[-1]) for span in spans]
        beyond = [last for _, last in spans if last >= len(tokens)]
        if beyond:
            raise ValueError(f"protect: there is no token {beyond[0]}, the prompt has 0 to {len(tokens) - 1}.")
    else:
        spans = find_spans(tokens, text)
        if not spans:
            raise ValueError(f"protect: {text!r} is not in the prompt; select text, or give tokens such as 120-131.")
    return tuple(sorted({p for first, last in spans for p in range(first, last + 1)}))


def parse_layers(text: str) -> tuple[int, ...]:
    """``"4, 7 10"`` as (4, 7, 10); ``"4-25:3"`` as every third layer from 4 to 25."""
    layers: list[int] = []
    for part in text.replace(",", " ").split():
        try:
            span, _, step = part.partition(":")
            first, dash, last = span.partition("-")
            layers += range(int(first), int(last) + 1, int(step or 1)) if dash else [int(part)]
        except ValueError:
            raise ValueError(f"layers: {part!r} is neither a number such as 4 nor a span such as 4-25:3.") from None
    return tuple(layers)


def said_spans(positions: Sequence[int]) -> str:
    """``(4, 5, 6, 9)`` as ``"4-6, 9"``."""
    runs = [[p for _, p in run] for _, run in itertools.groupby(enumerate(positions), lambda one: one[1] - one[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
