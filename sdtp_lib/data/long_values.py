"""Facts with long values and questions about one or several of them: identifiers, long numbers, words, addresses.

What a pruner must keep here is a value to its last character, in running text, in a few sentences repeated over and
over, or among dozens of facts of the same kind. Four-digit codes (`tasks`) teach it to keep four tokens. Half of the
prompts end in the beginning of the answer, "The contact of Anna is", as a user's own may: what is asked for then
stands in the last tokens in other words. Knows no model; nouns, wordings, noise, names and texts of the held-out side
are others than those of training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.samples import chat_prompt, response_ids, stable_number, tokenise_prompt

RESPONSE_TOKENS = 64


@dataclass(frozen=True)
class Wording:
    """How a fact, the question about it and the beginning of the answer read, with places for noun, key and value."""

    fact: str
    question: str
    answer: str


_NOUNS = {
    "train": ("tracking code", "registration number", "transfer key", "signature", "contact"),
    "heldout": ("activation code", "reference number", "device token", "fingerprint", "mailbox"),
}
_WORDINGS = {
    "train": (
        Wording("The {noun} of {key} is {value}.", "What is the {noun} of {key}?", "The {noun} of {key} is"),
        Wording("{key} was given the {noun} {value}.", "Which {noun} was given to {key}?",
                "{key} was given the {noun}"),
        Wording("Note the {noun} for {key}: {value}.", "Look up the {noun} for {key} in the notes.",
                "The {noun} noted for {key} is"),
        Wording("{noun} ({key}) = {value}.", "Give me the {noun} ({key}), nothing else.", "{noun} ({key}) ="),
    ),
    "heldout": (
        Wording("The {noun} of {key} is {value}.", "What is the {noun} of {key}?", "The {noun} of {key} is"),
        Wording("One {noun} that belongs to {key} reads: {value}.", "Tell me the {noun} that belongs to {key}.",
                "The {noun} that belongs to {key} reads:"),
    ),
}  # fmt: skip
_INTRODUCTIONS = {
    "train": ("Somewhere in what follows a {noun} is named. You will be asked for it.", "Read this carefully."),
    "heldout": ("There is a {noun} in the text below. Keep it in mind.", "Here are my papers."),
}
_NOISE = {
    "train": ("The kettle is on.", "Rain fell in the night.", "The train was late again.", "Nobody minded much.",
              "A dog barked across the road."),
    "heldout": ("The lamp is lit.", "Snow lay on the hills.", "The ferry left on time.", "Everyone went home.",
                "A bell rang somewhere."),
}  # fmt: skip


def _identifier(draw: random.Random, _words: Sequence[str]) -> str:
    return tasks.identifier(draw)


def _number(draw: random.Random, _words: Sequence[str]) -> str:
    return str(draw.randrange(10**6, 10 ** draw.randint(7, 10)))


def _two_words(draw: random.Random, words: Sequence[str]) -> str:
    return "-".join(draw.sample(words, 2))


def _address(draw: random.Random, words: Sequence[str]) -> str:
    return f"{draw.choice(words)}.{draw.choice(words)}{draw.randrange(100)}@{draw.choice(words)}.example"


_VALUES: tuple[Callable[[random.Random, Sequence[str]], str], ...] = (_identifier, _number, _two_words, _address)
# How many values are asked for at once, and how many facts about others stand beside them.
_ASKED = (1, 1, 1, 3)
_OTHERS = (0, 3, 6)
_SURROUNDINGS = ("text", "text", "noise", "facts")


def long_values(
    tokenizer: Any, *, tokens: tuple[int, int], count: int, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``count`` samples of ``tokens`` (from, to), asked after the text or, three in ten, before it.

    Where several values are asked for, they belong to one name ("The contact of Anna is ..." stands there three times)
    or to one name each.
    """
    return [_sample(tokenizer, tokens, number, seed, split) for number in range(count)]


def _sample(tokenizer: Any, tokens: tuple[int, int], number: int, seed: int, split: str) -> dict[str, Any]:
    draw = random.Random(stable_number("long values", split, seed, tokens, number))
    side = "train" if split == "train" else "test"
    following = tasks.running_text(tasks.haystack(side), draw)
    words = _words(following)
    value = _VALUES[number % len(_VALUES)]
    wording, noun = draw.choice(_WORDINGS[split]), draw.choice(_NOUNS[split])
    around, before, begun = draw.choice(_SURROUNDINGS), draw.random() < 0.3, draw.random() < 0.5
    introduction = draw.choice(("", *_INTRODUCTIONS[split])).format(noun=noun)

    key = _keys(draw, words, tasks.NAMES[side].split())
    asked = 1 if value is _identifier else draw.choice(_ASKED)
    keys = [key()] * asked if draw.random() < 0.5 else [key() for _ in range(asked)]
    values = [value(draw, words) for _ in keys]

    def fact(of: str, its: str) -> str:
        return wording.fact.format(noun=noun, key=of, value=its)

    wanted = [fact(*pair) for pair in zip(keys, values, strict=True)]
    others = [fact(key(), value(draw, words)) for _ in range(draw.choice(_OTHERS))]
    facts = wanted + others
    draw.shuffle(facts)
    names = _listed(list(dict.fromkeys(keys)))
    question = wording.question.format(noun=noun, key=names) + (" Name them all." if asked > 1 else "")
    opening, answer = wording.answer.format(noun=noun, key=names), f" {_listed(values)}."

    def build(filler: Sequence[str]) -> str:
        parts = list(filler)
        for place, each in zip(places, facts, strict=True):
            parts.insert(round(place * len(parts)), each)
        text = f"{introduction} " * bool(introduction) + " ".join(parts)
        prompt = chat_prompt(tokenizer, f"{question}\n\n{text}" if before else f"{text}\n\n{question}")
        return prompt + opening if begun else prompt

    places = [draw.random() for _ in facts]
    filler: list[str] = []
    most = draw.randint(*tokens)
    while (room := most - len(tokenise_prompt(tokenizer, build([]), chat=True))) < 0 and others:
        gone = facts.index(others.pop())
        del facts[gone], places[gone]
    while room > 0:
        noise = _NOISE[split][len(filler) % len(_NOISE[split])]
        sentence = {"text": following, "noise": lambda noise=noise: noise,
                    "facts": lambda: fact(key(), value(draw, words))}[around]()  # fmt: skip
        room -= len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) + 1
        if room > 0:
            filler.append(sentence)
    prompt, response = build(filler), answer if begun else opening + answer
    return {
        "id": f"long-value-{split}-{seed}-{tokens[0]}-{number}", "prompt": prompt, "source": "synthetic",
        "category": "long value", "response": response, "values": values, "question": question,
        "prompt_ids": tokenise_prompt(tokenizer, prompt, chat=True),
        "response_ids": response_ids(tokenizer, response, RESPONSE_TOKENS),
    }  # fmt: skip


def _keys(draw: random.Random, words: Sequence[str], names: Sequence[str]) -> Callable[[], str]:
    """Names; when they have run out, or from the start, pairs of words or identifiers. None comes twice."""
    kind, left, known = draw.choice(("names", "words", "identifiers")), draw.sample(names, len(names)), set()

    def key() -> str:
        if kind == "names" and left:
            return left.pop()
        while True:
            made = tasks.identifier(draw) if kind == "identifiers" else "-".join(draw.sample(words, 2))
            if made not in known:
                known.add(made)
                return made

    return key


def _listed(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _words(following: Callable[[], str]) -> list[str]:
    """Words of five letters and more from the text that follows."""
    found = {word.lower() for _ in range(12) for word in following().split() if word.isalpha() and len(word) > 4}
    return sorted(found)
