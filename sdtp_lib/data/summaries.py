"""Texts and a demand for a summary of them all: with Dolly's own summaries, or for the model to answer itself.

What is asked for here needs something of every part of the prompt, and the answers are as long as a summary. Knows no
model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from sdtp_lib.data.samples import (
    chat_prompt,
    code_documents,
    long_documents,
    response_ids,
    stable_number,
    tokenise_prompt,
)

DIGEST_TOKENS = 384  # of Dolly's summaries of all texts, one after the other
OWN_TOKENS = 256  # of what the model writes itself
_ASKED = (
    "Write a summary of all the texts above.",
    "Summarise the passages above, one after the other.",
    "What do the texts above say? Give the main points of each.",
    "Now, write a one-page summary of all of the above.",
)


def summaries(
    tokenizer: Any,
    count: int,
    records: Sequence[dict[str, Any]],
    split: str,
    lengths: tuple[int, int],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``count`` samples, every other one with Dolly's summaries as far as they go; the model's own words for the rest.

    ``records`` are of ``split``. A sample without response has ``own_tokens``: the model answers it with so many.
    """
    digests = _digests(tokenizer, records, lengths, seed)
    texts = _several_texts(tokenizer, records, split, lengths, seed)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        sample = next(digests, None) if len(found) % 2 == 0 else None
        found.append(sample or next(texts))
    return found


def _digests(tokenizer, records, lengths, seed) -> Iterator[dict[str, Any]]:
    """Texts that Dolly has summaries of, packed, and these summaries in order."""
    pool = [record for record in records if record["category"] == "summarization"]
    pool.sort(key=lambda record: stable_number("digest", seed, record["id"]))
    while pool:
        draw = random.Random(stable_number("digest", seed, pool[0]["id"]))
        target, demand, taken, prompt_ids = draw.randint(*lengths), _demand(draw), [], []
        for record in list(pool[:12]):
            tried = _prompt(tokenizer, [r["context"] for r in [*taken, record]], demand)
            if len(tried[1]) <= target:
                taken.append(record)
                prompt, prompt_ids = tried
                pool.remove(record)
        if not taken:
            pool.pop(0)
        elif len(taken) > 1 and len(prompt_ids) > target // 2:
            share = DIGEST_TOKENS // len(taken)  # so that what is cut is never the last texts' part
            parts = [tokenizer(r["response"], add_special_tokens=False)["input_ids"][:share] for r in taken]
            response = "\n\n".join(tokenizer.decode(part).strip() for part in parts)
            yield {
                "id": "digest-" + taken[0]["id"], "prompt": prompt, "response": response, "source": "dolly-packed",
                "category": "digest", "prompt_ids": prompt_ids,
                "response_ids": response_ids(tokenizer, response, DIGEST_TOKENS),
            }  # fmt: skip


def _several_texts(tokenizer, records, split, lengths, seed) -> Iterator[dict[str, Any]]:
    """Passages of one to four sources and a demand for a summary, for the model to answer."""
    sources = [document["text"] for document in (*long_documents(split), *code_documents(split)[::4])]
    contexts = [record["context"] for record in records if len(record["context"]) > 300]
    for number in itertools.count():
        draw = random.Random(stable_number("summary", split, seed, lengths, number))
        target, parts, demand = draw.randint(*lengths), draw.randint(1, 4), _demand(draw)
        room = target - len(_prompt(tokenizer, [""] * parts, demand)[1]) - 4 * parts
        passages: list[str] = []
        for part in range(parts):
            text = draw.choice(contexts) if contexts and draw.random() < 0.5 else draw.choice(sources)
            start = draw.randrange(max(1, len(text) - 8 * room))
            ids = tokenizer(text[start : start + 8 * room], add_special_tokens=False)["input_ids"]
            ids = ids[: room // (parts - part)]
            passages.append(tokenizer.decode(ids).strip())
            room -= len(ids)
        prompt, prompt_ids = _prompt(tokenizer, passages, demand)
        yield {
            "id": f"summary-{split}-{seed}-{lengths[0]}-{number}", "prompt": prompt, "source": "own words",
            "category": "summary", "prompt_ids": prompt_ids, "own_tokens": OWN_TOKENS,
        }  # fmt: skip


def _demand(draw: random.Random) -> tuple[list[str], str]:
    """What stands before and after the passages: sometimes a demand before them too, or a start of the answer."""
    before = ["You are given several texts. Write a summary of all of them."] if draw.random() < 0.5 else []
    return before, draw.choice(_ASKED) + ("\n\nSummary:" if draw.random() < 0.5 else "")


def _prompt(tokenizer, passages: Sequence[str], demand: tuple[list[str], str]) -> tuple[str, list[int]]:
    prompt = chat_prompt(tokenizer, "\n\n".join([*demand[0], *passages, demand[1]]))
    return prompt, tokenise_prompt(tokenizer, prompt, chat=True)
