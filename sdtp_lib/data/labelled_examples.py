"""Few-shot prompts: labelled examples in many forms, and one more that lacks its label.

What a pruner must keep here stands in every line: which labels there are, and examples of the one that is wanted. The
text is short made-up messages (words of `tasks`), or what Dolly's records ask for, labelled with their category. Forms,
words and records of the held-out side are others than those of training. No chat format. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.samples import stable_number, tokenise_prompt

RESPONSE_TOKENS = 16

# What stands before a text, between it and its label, and after the label.
_FORMS = {
    "train": (
        ("Message: ", "\nTopic:", "\n"), ("Text: ", "\nLabel:", "\n\n"), ("Q: ", "\nA:", "\n\n"), ("", " =>", "\n"),
        ("- ", " [", "]\n"), ("Input: ", " Output:", "\n"), ("Sentence: ", "\nThis is about", ".\n"),
    ),
    "heldout": (("Message: ", "\nTopic:", "\n"), ("Review: ", "\nKind:", "\n\n"), ("* ", " ->", "\n")),
}  # fmt: skip
_INTRODUCTIONS = {
    "train": ("", "", "Give each of these a label.\n\n", "Examples:\n"),
    "heldout": ("", "Sort what follows.\n\n"),
}
_FEWEST_RECORDS = 24  # below that, examples would repeat within one prompt


def labelled_examples(
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    tokens: tuple[int, int],
    count: int,
    seed: int = 0,
    split: str = "train",
) -> list[dict[str, Any]]:
    """``count`` samples of ``tokens`` (from, to); every third is made of ``records`` where there are enough of them."""
    asked = [(record["instruction"], record["category"]) for record in records if len(record["instruction"]) < 240]
    return [_sample(tokenizer, asked, tokens, number, seed, split) for number in range(count)]


def _sample(
    tokenizer: Any, asked: Sequence[tuple[str, str]], tokens: tuple[int, int], number: int, seed: int, split: str
) -> dict[str, Any]:
    draw = random.Random(stable_number("labelled examples", split, seed, tokens, number))
    before, between, after = draw.choice(_FORMS[split])
    introduction = draw.choice(_INTRODUCTIONS[split])
    space = "" if between.endswith("[") else " "
    of_records = number % 3 == 2 and len(asked) >= _FEWEST_RECORDS
    example = _records(asked, draw) if of_records else _messages(split, draw)

    text, label = example()
    question, response = f"{before}{text}{between}", f"{space}{label}{after}"
    lines = [introduction]
    room = draw.randint(*tokens) - len(_ids(tokenizer, introduction + question))
    while True:
        text, label = example()
        line = f"{before}{text}{between}{space}{label}{after}"
        room -= len(_ids(tokenizer, line))
        if room < 0:
            break
        lines.append(line)
    prompt = "".join(lines) + question
    return {
        "id": f"labelled-{split}-{seed}-{tokens[0]}-{number}", "prompt": prompt, "source": "synthetic",
        "category": "labelled examples", "response": response,
        "prompt_ids": tokenise_prompt(tokenizer, prompt, chat=False),
        "response_ids": _ids(tokenizer, response)[:RESPONSE_TOKENS],
    }  # fmt: skip


def _messages(split: str, draw: random.Random) -> Callable[[], tuple[str, str]]:
    """Sentences of two words each of a topic; two topics and more of all that there are."""
    side = "train" if split == "train" else "test"
    words = {topic: text.split() for topic, text in tasks.CLASSES[side].items()}
    topics = draw.sample(sorted(words), draw.randint(2, len(words)))

    def example() -> tuple[str, str]:
        topic = draw.choice(topics)
        return draw.choice(tasks.FRAMES[side]).format(*draw.sample(words[topic], 2)), topic

    return example


def _records(asked: Sequence[tuple[str, str]], draw: random.Random) -> Callable[[], tuple[str, str]]:
    """What records ask for, and their category in words; none twice before all have come."""
    left: list[tuple[str, str]] = []

    def example() -> tuple[str, str]:
        if not left:
            left.extend(draw.sample(asked, len(asked)))
        text, category = left.pop()
        return " ".join(text.split()), category.replace("_", " ")

    return example


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
