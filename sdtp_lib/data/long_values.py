"""Facts with long values and questions about one or several of them: identifiers, long numbers, words, addresses.

What a pruner must keep here is a value to its last character, in running text, in a few sentences repeated over and
over, or among facts of the same kind. Four-digit codes (`tasks`) teach it to keep four tokens. Knows no model; nouns,
noise, names and texts of the held-out side are others than those of training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.samples import chat_prompt, response_ids, stable_number, tokenise_prompt

RESPONSE_TOKENS = 64
_NOUNS = {
    "train": ("tracking code", "registration number", "transfer key", "signature", "contact"),
    "heldout": ("activation code", "reference number", "device token", "fingerprint", "mailbox"),
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
# How many facts of the kind are asked for at once, and how many others stand beside them.
_ASKED = (1, 1, 1, 3)
_OTHERS = (0, 3, 6)


def long_values(
    tokenizer: Any, *, tokens: tuple[int, int], count: int, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``count`` samples of ``tokens`` (from, to), asked after the text or, three in ten, before it.

    Where several values are asked for, all belong to one name: "The contact of Anna is ..." stands there three times.
    """
    return [_sample(tokenizer, tokens, number, seed, split) for number in range(count)]


def _sample(tokenizer: Any, tokens: tuple[int, int], number: int, seed: int, split: str) -> dict[str, Any]:
    draw = random.Random(stable_number("long values", split, seed, tokens, number))
    side = "train" if split == "train" else "test"
    following = tasks.running_text(tasks.haystack(side), draw)
    words = _words(following)
    value = _VALUES[number % len(_VALUES)]
    asked = 1 if value is _identifier else draw.choice(_ASKED)
    noun, people = draw.choice(_NOUNS[split]), tasks.NAMES[side].split()
    name, *others = draw.sample(people, 1 + draw.choice(_OTHERS))
    values = [value(draw, words) for _ in range(asked)]
    facts = [f"The {noun} of {name} is {each}." for each in values]
    facts += [f"The {noun} of {other} is {value(draw, words)}." for other in others]
    draw.shuffle(facts)
    if asked == 1:
        question, answer = f"What is the {noun} of {name}?", f"The {noun} of {name} is {values[0]}."
    else:
        question = f"What are all values of the {noun} of {name}?"
        answer = f"The values of the {noun} of {name} are {', '.join(values[:-1])} and {values[-1]}."
    first, noisy = draw.random() < 0.3, draw.random() < 0.3
    noise = _NOISE[split]

    def build(filler: Sequence[str]) -> str:
        parts = list(filler)
        for place, fact in zip(places, facts, strict=True):
            parts.insert(round(place * len(parts)), fact)
        text = " ".join(parts)
        return chat_prompt(tokenizer, f"{question}\n\n{text}" if first else f"{text}\n\n{question}")

    places = [draw.random() for _ in facts]
    filler: list[str] = []
    room = draw.randint(*tokens) - len(tokenise_prompt(tokenizer, build([]), chat=True))
    while room > 0:
        sentence = noise[len(filler) % len(noise)] if noisy else following()
        room -= len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) + 1
        if room > 0:
            filler.append(sentence)
    prompt = build(filler)
    return {
        "id": f"long-value-{split}-{seed}-{tokens[0]}-{number}", "prompt": prompt, "source": "synthetic",
        "category": "long value", "response": answer,
        "prompt_ids": tokenise_prompt(tokenizer, prompt, chat=True),
        "response_ids": response_ids(tokenizer, answer, RESPONSE_TOKENS),
    }  # fmt: skip


def _words(following: Callable[[], str]) -> list[str]:
    """Words of five letters and more from the text that follows."""
    found = {word.lower() for _ in range(12) for word in following().split() if word.isalpha() and len(word) > 4}
    return sorted(found)
