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
        If a part is neither a position nor a span that runs upward, a position lies outside the prompt, or the text is
        not in it.
    """
    if re.fullmatch(r"[\d\s,-]*", text):
        spans = [_span("protect", part, part, "120-131") for part in text.replace(",", " ").split()]
        beyond = [last for _, last in spans if last >= len(tokens)]
        if beyond:
            raise ValueError(f"protect: there is no token {beyond[0]}, the prompt has 0 to {len(tokens) - 1}.")
    else:
        spans = find_spans(tokens, text)
        if not spans:
            raise ValueError(f"protect: {text!r} is not in the prompt; select text, or give tokens such as 120-131.")
    return tuple(sorted({p for first, last in spans for p in range(first, last + 1)}))


def parse_layers(text: str) -> tuple[int, ...]:
    """``"4, 7 10"`` as (4, 7, 10); ``"4-25:3"`` as every third layer from 4 to 25.

    Raises
    ------
    ValueError
        If a part is neither a layer nor a span that runs upward, in steps of 1 or more.
    """
    layers: list[int] = []
    for part in text.replace(",", " ").split():
        # A step belongs to a span: of "4:3" and "4-25:" the whole is refused.
        stepped = re.fullmatch(r"(\d+-\d+):0*([1-9]\d*)", part)
        first, last = _span("layers", stepped[1] if stepped else part, part, "4-25:3")
        layers += range(first, last + 1, int(stepped[2]) if stepped else 1)
    return tuple(layers)


def _span(field: str, span: str, typed: str, such_as: str) -> tuple[int, int]:
    """First and last of ``"120-131"``, or of ``"120"``; ``typed`` is what an error quotes."""
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
    if numbers is None:
        single = such_as.partition("-")[0]
        raise ValueError(f"{field}: {typed!r} is neither a number such as {single} nor a span such as {such_as}.")
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if first > last:
        raise ValueError(f"{field}: {typed!r} runs backwards; give the smaller number first: {last}-{first}.")
    return first, last


def said_spans(positions: Sequence[int]) -> str:
    """``(4, 5, 6, 9)`` as ``"4-6, 9"``."""
    runs = [[p for _, p in run] for _, run in itertools.groupby(enumerate(positions), lambda one: one[1] - one[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
