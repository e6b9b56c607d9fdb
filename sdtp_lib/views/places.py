"""Where something stands in a prompt's tokens: a text, a question, the place that its answer is read from."""

from __future__ import annotations

import re
from collections.abc import Sequence


def find_spans(tokens: Sequence[str], text: str) -> list[tuple[int, int]]:
    """First and last token of each occurrence of ``text`` in the joined ``tokens``.

    ``find_spans(["The", " code", " is", " 4", "2"], "42")`` is ``[(3, 4)]``.
    """
    if not text.strip():
        return []
    owner = [position for position, token in enumerate(tokens) for _ in token]
    joined = "".join(tokens)
    return [(owner[m.start()], owner[m.end() - 1]) for m in re.finditer(re.escape(text.strip()), joined)]


def places_of(tokens: Sequence[str], question: str, right_answer: str = "") -> dict[str, tuple[int, int]]:
    """Where a prompt asks, and where its answer is read from: names -> first and last token, of what is found."""
    places = {}
    asked = find_spans(tokens, question)
    if asked:
        places["question"] = asked[-1]
    told = [span for span in find_spans(tokens, right_answer) if not asked or span[1] < asked[-1][0]]
    if told:
        # An answer's word may stand in other passages too: the one beside most names of the question is meant.
        names = set(re.findall(r"\b[A-Z]\w+", question)[1:])
        near = ["".join(tokens[max(0, first - 40) : last + 40]) for first, last in told]
        places["answer"] = max(zip(told, near, strict=True), key=lambda one: sum(name in one[1] for name in names))[0]
    return places
