"""Tables made by seed and questions about one or two of their cells: long codes, and keys that differ by two digits.

What a pruner must keep here is one row among many that look alike, every character of it. Knows no model. Columns and
names of the held-out side are others than those of training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sdtp_lib.data.conversations import two_answers
from sdtp_lib.data.samples import chat_prompt, response_ids, stable_number, tokenise_prompt
from sdtp_lib.data.tasks import NAMES, identifier

RESPONSE_TOKENS = 64


def _key(draw: random.Random) -> str:
    return f"{draw.getrandbits(64):016x}"


def _price(draw: random.Random) -> str:
    return f"{draw.randrange(100, 99999) / 100:.2f}"


def _date(draw: random.Random) -> str:
    return f"{draw.randrange(1990, 2030)}-{draw.randrange(1, 13):02d}-{draw.randrange(1, 29):02d}"


# What stands in a column, by its head; names are drawn by the caller's split.
_COLUMNS: dict[str, dict[str, Callable[[random.Random], str]]] = {
    "train": {"serial number": identifier, "access key": _key, "price": _price, "shipping date": _date,
              "owner": lambda draw: draw.choice(NAMES["train"].split())},
    "heldout": {"licence code": identifier, "checksum": _key, "weight": _price, "delivery date": _date,
                "inspector": lambda draw: draw.choice(NAMES["test"].split())},
}  # fmt: skip
_FORMATS: tuple[Callable[[Sequence[str], Sequence[str]], str], ...] = (
    lambda heads, cells: ",".join(cells),
    lambda heads, cells: "| " + " | ".join(cells) + " |",
    lambda heads, cells: "; ".join(f"{head}: {cell}" for head, cell in zip(heads, cells, strict=True)),
    lambda heads, cells: "{" + ", ".join(f'"{h}": "{c}"' for h, c in zip(heads, cells, strict=True)) + "}",
)


def table_lookups(
    tokenizer: Any, *, tokens: tuple[int, int], count: int, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``count`` samples: a table of ``tokens`` (from, to) and a question about one cell, before it or after it.

    Every third sample asks a second question in a turn of its own, after the answer to the first: its response holds
    both answers, and ``loss_mask`` (one boolean per response token) is True at these only.
    """
    return [_lookup(tokenizer, tokens, number, seed, split) for number in range(count)]


def _lookup(tokenizer: Any, tokens: tuple[int, int], number: int, seed: int, split: str) -> dict[str, Any]:
    draw = random.Random(stable_number("lookup", split, seed, tokens, number))
    heads = ["item", *draw.sample(list(_COLUMNS[split]), 3)]
    row_of, first = draw.choice(_FORMATS), draw.random() < 0.3
    target, keys, rows = draw.randint(*tokens), _near_identical_keys(draw), {}

    def build(lines: Sequence[str], question: str) -> str:
        table = "\n".join([row_of(heads, heads), *lines])
        return chat_prompt(tokenizer, f"{question}\n\n{table}" if first else f"{table}\n\n{question}")

    def asked(item: str, head: str) -> tuple[str, str]:
        value = rows[item][heads.index(head)]
        return f"What is the {head} of item {item}?", f"The {head} of item {item} is {value}."

    lines: list[str] = []
    room = target - len(tokenise_prompt(tokenizer, build([], "What is the shipping date of item A-00000?"), chat=True))
    while room > 0:
        item = keys()
        cells = [item, *(_COLUMNS[split][head](draw) for head in heads[1:])]
        room -= len(tokenizer(row_of(heads, cells), add_special_tokens=False)["input_ids"]) + 1
        if room > 0 or not lines:
            rows[item] = cells
            lines.append(row_of(heads, cells))
    question, answer = asked(draw.choice(list(rows)), draw.choice(heads[1:]))
    prompt = build(lines, question)
    made = {
        "id": f"table-{split}-{seed}-{tokens[0]}-{number}", "prompt": prompt, "source": "synthetic",
        "question": question, "table_head": row_of(heads, heads),
        "prompt_ids": tokenise_prompt(tokenizer, prompt, chat=True),
    }  # fmt: skip
    if number % 3 < 2:
        ids = response_ids(tokenizer, answer, RESPONSE_TOKENS)
        return {**made, "category": "table", "response": answer, "response_ids": ids}
    second = asked(draw.choice(list(rows)), draw.choice(heads[1:]))
    return {**made, "category": "table, two questions", **two_answers(tokenizer, answer, *second)}


def _near_identical_keys(draw: random.Random) -> Callable[[], str]:
    """Keys such as ``K-48213``, never twice; half of them are an earlier one with two digits changed round."""
    letter, known = draw.choice("ABCDEFGHKLMNPRSTVWXZ"), []

    def key() -> str:
        while True:
            digits = list(draw.choice(known) if known and draw.random() < 0.5 else f"{draw.randrange(10**5):05d}")
            place = draw.randrange(4)
            digits[place], digits[place + 1] = digits[place + 1], digits[place]
            made = "".join(digits)
            if made not in known:
                known.append(made)
                return f"{letter}-{made}"

    return key
