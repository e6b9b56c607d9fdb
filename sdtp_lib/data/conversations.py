"""Prompts of several turns made of instruction records, and samples with a second question after the first answer.

Knows no model. A response of two answers has ``loss_mask``, one boolean per response token: labels count only what is
True, the answers, and not the second question between them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sdtp_lib.data.samples import chat_prompt, fill_up, response_ids, stable_number, tokenise_prompt

RESPONSE_TOKENS = 128
_SHOWN = ("Here is a text. I will ask about it later.", "Please read this first.", "Keep this text in mind:")
_SEEN = ("I have read it.", "Thank you. What would you like to know?", "Understood.")


def chats(
    records: Sequence[dict[str, Any]], tokenizer: Any, *, tokens: tuple[int, int], count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """At most ``count`` conversations: a text in an early turn, other questions and answers, then one about the text.

    ``records`` have a context each, and are of one split; ``tokens``: length of a prompt, from and to.
    """
    found, costs = [], {}  # costs: tokens of each record's two turns
    for own in sorted(records, key=lambda record: stable_number("chat", seed, record["id"])):
        if len(found) >= count:
            break
        draw = random.Random(stable_number("chat", seed, own["id"]))
        target, shown, seen = draw.randint(*tokens), draw.choice(_SHOWN), draw.choice(_SEEN)
        opening = _turns(f"{shown}\n\n{own['context']}", seen)
        last = [{"role": "user", "content": own["instruction"]}]
        turns: list[dict[str, str]] = []
        length = _length(tokenizer, [*opening, *last])
        if length > target:
            continue
        for other in draw.sample(list(records), min(24, len(records))):
            more = _turns(f"{other['context']}\n\n{other['instruction']}", other["response"])
            if other["id"] not in costs:
                costs[other["id"]] = _length(tokenizer, more)
            if other["id"] != own["id"] and length + costs[other["id"]] <= target:
                turns = turns + more if draw.random() < 0.7 else more + turns
                length += costs[other["id"]]
        # The text comes early: before the others, or after the first of them.
        place = 0 if draw.random() < 0.5 else min(2, len(turns))
        prompt = chat_prompt(tokenizer, [*turns[:place], *opening, *turns[place:], *last])
        prompt_ids = tokenise_prompt(tokenizer, prompt, chat=True)
        if tokens[0] <= len(prompt_ids) <= target:
            found.append({
                "id": "chat-" + own["id"], "prompt": prompt, "response": own["response"], "source": "dolly-chat",
                "category": "chat", "prompt_ids": prompt_ids,
                "response_ids": response_ids(tokenizer, own["response"], RESPONSE_TOKENS),
            })  # fmt: skip
    return found


def second_questions(
    records: Sequence[dict[str, Any]], tokenizer: Any, *, tokens: tuple[int, int], count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """At most ``count`` prompts of several contexts and a question about one of them, whose response goes on.

    After the first answer a second turn asks about another of the contexts, and the response ends with that answer.
    ``records`` and ``tokens`` as for `chats`.
    """
    found: list[dict[str, Any]] = []
    order = sorted(records, key=lambda record: stable_number("second", seed, record["id"]))
    fillers = [record["context"] for record in records]
    lengths: dict[str, int] = {}
    for first, second in zip(order[0::2], order[1::2], strict=False):
        if len(found) >= count:
            break
        draw = random.Random(stable_number("second", seed, first["id"]))
        target, both = draw.randint(*tokens), [first["context"], second["context"]]
        draw.shuffle(both)
        if _length(tokenizer, [{"role": "user", "content": "\n\n".join([*both, first["instruction"]])}]) > target:
            continue

        def build(before: Sequence[str], after: Sequence[str], both: Any = both, first: Any = first) -> str:
            texts = [both[0], *before, both[1], *after]
            return chat_prompt(tokenizer, "\n\n".join([*texts, first["instruction"]]))

        prompt, prompt_ids = fill_up(build, fillers, tokenizer, target, draw, never=first["context"], lengths=lengths)
        found.append({
            "id": "second-" + first["id"], "prompt": prompt, "source": "dolly-packed", "category": "two questions",
            "prompt_ids": prompt_ids,
            **two_answers(tokenizer, first["response"], second["instruction"], second["response"]),
        })  # fmt: skip
    return found


def two_answers(tokenizer: Any, answer: str, question: str, second: str, most: int = RESPONSE_TOKENS) -> dict[str, Any]:
    """The response of a sample that goes on: an answer, a second question in the chat's format, its answer.

    Returns
    -------
    dict
        ``response``, ``response_ids`` and ``loss_mask``; each answer has at most ``most`` tokens.
    """
    answer = tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"][:most]).strip()
    between = f"\n\n{question}\n\n"
    if getattr(tokenizer, "chat_template", None):
        # What the format puts round a turn: the end of a first answer, the second question, the start of its answer.
        turns = [*_turns("Question?", "Answer."), {"role": "user", "content": question}]
        whole, start = chat_prompt(tokenizer, turns), chat_prompt(tokenizer, turns[:1]) + "Answer."
        between = whole[len(start) :] if whole.startswith(start) else between
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, between)]
    parts.append(response_ids(tokenizer, second, most))
    mask = [place != 1 for place, part in enumerate(parts) for _ in part]
    return {"response": answer + between + second, "response_ids": [*parts[0], *parts[1], *parts[2]], "loss_mask": mask}


def _turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _length(tokenizer: Any, turns: Sequence[dict[str, str]]) -> int:
    return len(tokenise_prompt(tokenizer, chat_prompt(tokenizer, turns), chat=True))
