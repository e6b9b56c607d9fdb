"""Prompts of which it is known, by how they are made, where their answer stands: labels without any pass of a model.

A sample here has ``evidence`` too, one number in [0, 1] per prompt token: 1 for what answers the question, less for
what may. In a record packed among others (`samples.pack_contexts`) it is the record's own context, its sentences
weighed by the words that they share with the answer; among planted facts, a table's rows and named sentences it is the
fact, the row with the table's head, the sentence. The question counts too: it may stand before the text. Training side
only. Recipes read it (`training.recipes`), other ways to train do not. Knows no model.

Example: of "The lift is on the left. The key of Anna is 4821. It rains.", asked for Anna's key, the tokens of the
second sentence have 1 and those of the others 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from sdtp_lib.data import tasks
from sdtp_lib.data.long_values import long_values
from sdtp_lib.data.lookups import table_lookups
from sdtp_lib.data.samples import (
    CONTEXT_CATEGORIES,
    chat_prompt,
    dolly_split,
    long_documents,
    pack_contexts,
    response_ids,
    stable_number,
    tokenise_prompt,
)

PARTS = {"packed": 10, "values": 2, "needles": 1, "table": 1, "quoted": 3}  # of seventeen prompts
_NEEDED = 0.8  # of the question, which may stand before the text, and of a table's head
_LEAST_OF_CONTEXT = 0.35  # of a sentence that shares no word with the answer
_RESPONSE_TOKENS = 64
_WORD = re.compile(r"[A-Za-z0-9]{4,}")
_TASKS = ("needle", "multi_key", "multi_doc_qa")
_ASKED_BY_WORDS = (
    "What does the text say about {}?", "Which sentence mentions {}?", "Find the passage on {} and repeat it.",
    "Quote what is written about {}.", "Where is {} mentioned? Give the sentence.", "{}?", "What is said of {}?",
)  # fmt: skip
_ASKED_BY_QUOTE = (
    'Which words come after "{}"?',
    'Go on from "{}".',
    'What follows "{}"?',
    'Complete the quotation: "{}',
)
Span = tuple[int, int, float]  # characters from and to, and their evidence


def evidence_prompts(
    tokenizer: Any,
    count: int,
    records: Sequence[dict[str, Any]],
    *,
    lengths: tuple[int, int] = (300, 1200),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``count`` samples with ``evidence``, kinds mixed as in `PARTS`; fewer if there are too few records.

    Parameters
    ----------
    tokenizer
        A fast tokenizer of transformers: it says which characters a token stands for.
    records
        Instruction records with contexts, of which the training side is used.
    lengths
        Tokens of a prompt, from and to.

    Raises
    ------
    ValueError
        For a tokenizer that cannot tell its tokens' places.
    """
    if count and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} does not say which characters a token stands for, and evidence is "
            "told by characters: load the fast tokenizer (AutoTokenizer with use_fast=True), or take a recipe without."
        )
    records = [record for record in records if record["context"] and dolly_split(record["id"]) == "train"]
    records = [record for record in records if record["category"] in CONTEXT_CATEGORIES] or records
    each = -(-count // sum(PARTS.values()))
    found = []
    for kind, parts in PARTS.items():
        made = _MAKERS[kind](tokenizer, each * parts, records, lengths, seed)
        found += [{**sample, "id": f"evidence-{kind}-{seed}-{sample['id']}"} for sample in made if sample is not None]
    random.Random(stable_number("evidence", seed)).shuffle(found)
    return found[:count]


def _told(tokenizer: Any, sample: dict[str, Any], spans: Sequence[Span]) -> dict[str, Any] | None:
    """``sample`` with its ``evidence``; None where its tokens are not those of its text, or nothing is evidence."""
    special = not getattr(tokenizer, "chat_template", None)  # as in `tokenise_prompt`
    read = tokenizer(sample["prompt"], add_special_tokens=special, return_offsets_mapping=True)
    if list(read["input_ids"]) != list(sample["prompt_ids"]):
        return None
    places = read["offset_mapping"]
    evidence = [max((much for a, b, much in spans if begin < b and end > a), default=0.0) for begin, end in places]
    return {**sample, "evidence": evidence} if any(evidence) else None


def _packed(tokenizer, count, records, lengths, seed) -> list[dict[str, Any] | None]:
    by_id = {record["id"]: record for record in records}
    made = pack_contexts(
        records,
        tokenizer,
        tokens=lengths,
        seed=seed,
        limit=count,
        response_tokens=_RESPONSE_TOKENS,
        asked_anywhere=True,
    )
    found = []
    for sample in made:
        record, prompt = by_id[sample["id"]], sample["prompt"]
        at = prompt.find(record["context"])
        if at < 0:
            continue
        answer = _words(record["response"])
        sentences = _sentences(record["context"], at)
        # Long sentences share more words with anything.
        words = [_words(prompt[a:b]) for a, b in sentences]
        shares = [len(own & answer) / (4 + len(own)) for own in words]
        most = max(shares) or 1
        spans = [
            (a, b, _LEAST_OF_CONTEXT + (1 - _LEAST_OF_CONTEXT) * share / most)
            for (a, b), share in zip(sentences, shares, strict=True)
        ]
        found.append(_told(tokenizer, sample, [*spans, *_where(prompt, record["instruction"])]))
    return found


def _values(tokenizer, count, records, lengths, seed) -> list[dict[str, Any] | None]:
    made = long_values(tokenizer, tokens=lengths, count=count, seed=seed + 100)
    about = ([span for value in sample["values"] for span in _around(sample["prompt"], value)] for sample in made)
    return [_told(tokenizer, sample, [*spans, *_where(sample["prompt"], sample["question"])])
            for sample, spans in zip(made, about, strict=True)]  # fmt: skip


def _needles(tokenizer, count, records, lengths, seed) -> list[dict[str, Any] | None]:
    found = []
    for number, name in enumerate(_TASKS):
        size = lengths[0] + (lengths[1] - lengths[0]) * (number + 1) // (len(_TASKS) + 1)
        wanted = len(range(number, count, len(_TASKS)))
        for record in tasks.synthetic_tasks(
            name, tokenizer=tokenizer, prompt_tokens=size, count=wanted, seed=seed + 100
        ):
            sample = tasks.as_sample(record, tokenizer)
            # The response repeats the fact, which no other sentence does; "red" stands in "hundred" too.
            fact = _around(sample["prompt"], sample["response"].rstrip("."))
            found.append(_told(tokenizer, sample, [*fact, *_where(sample["prompt"], record["input"])]))
    return found


def _tables(tokenizer, count, records, lengths, seed) -> list[dict[str, Any] | None]:
    found = []
    for sample in table_lookups(tokenizer, tokens=lengths, count=count, seed=seed + 100):
        prompt, question = sample["prompt"], _where(sample["prompt"], sample["question"])
        item = re.search(r"item ([A-Z]-\d{5})", sample["question"])[1]
        places = (place.start() for place in re.finditer(re.escape(item), prompt))
        rows = [_line(prompt, at) for at in places if not any(a <= at < b for a, b, _ in question)]
        # A row such as "B-46223,800.62,1999-10-01" cannot be read without the table's head.
        bare = any("item" not in prompt[a:b] for a, b, _ in rows)
        head = _where(prompt, sample["table_head"]) if bare else []
        found.append(_told(tokenizer, sample, [*rows, *head, *question]))
    return found


def _quoted(tokenizer, count, records, lengths, seed) -> list[dict[str, Any]]:
    """Questions that name one to three sentences of a text by rare words or by some words in a row."""
    pool = [record["context"] for record in records] or [document["text"] for document in long_documents("train")]
    made = (_quotation(tokenizer, pool, lengths, seed, number) for number in range(2 * count))
    found = []
    for sample in made:
        if len(found) == count:
            break
        found += [sample] if sample else []
    return found


def _quotation(tokenizer, pool, lengths, seed, number) -> dict[str, Any] | None:
    draw = random.Random(stable_number("quoted", seed, number))
    text = _text_of(tokenizer, draw.randint(*lengths) - 60, pool, draw)
    sentences = [(a, b) for a, b in _sentences(text, 0) if 40 < b - a < 400]
    several, by_quote = draw.choice((1, 1, 1, 2, 3)), draw.random() < 0.35
    if len(sentences) < 6:
        return None
    chosen = draw.sample(sentences, several)
    named = [_named(text, text[a:b], by_quote, draw) for a, b in chosen]
    if not all(named):
        return None
    question = draw.choice(_ASKED_BY_QUOTE if by_quote else _ASKED_BY_WORDS).format(" and ".join(named))
    first = draw.random() < 0.25
    prompt = chat_prompt(tokenizer, f"{question}\n\n{text}" if first else f"{text}\n\n{question}")
    at = prompt.find(text)
    if at < 0:  # a chat format that changes white space
        return None
    response = " ".join(text[a:b] for a, b in chosen)
    spans: list[Span] = [(at + a, at + b, 1.0) for a, b in chosen]
    sample = {
        "id": str(number), "prompt": prompt, "response": response, "source": "synthetic", "category": "quotation",
        "prompt_ids": tokenise_prompt(tokenizer, prompt, chat=True),
        "response_ids": response_ids(tokenizer, response, _RESPONSE_TOKENS),
    }  # fmt: skip
    return _told(tokenizer, sample, [*spans, *_where(prompt, question)])


def _text_of(tokenizer: Any, tokens: int, pool: Sequence[str], draw: random.Random) -> str:
    """About ``tokens`` of one address, or of records' contexts."""
    characters = 5 * tokens
    if draw.random() < 0.5:
        text = draw.choice(long_documents("train"))["text"]
        start = draw.randrange(max(1, len(text) - characters))
        text = text[start : start + characters].partition(" ")[2]
    else:
        text = ""
        while len(text) < characters:
            text += draw.choice(pool) + "\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: max(1, tokens)]
    return tokenizer.decode(ids).strip()


def _named(text: str, sentence: str, by_quote: bool, draw: random.Random) -> str | None:
    """What a question calls ``sentence``: some words of it in a row, or two or three that are rare in ``text``."""
    if by_quote:
        words, several = sentence.split(), draw.randint(4, 8)
        if len(words) < several + 4:
            return None
        start = draw.randrange(len(words) - several - 2)
        return " ".join(words[start : start + several])
    rare = [word for word in _WORD.findall(sentence) if len(word) > 4 and text.count(word) <= 2]
    return ", ".join(draw.sample(rare, draw.randint(2, 3))) if len(rare) >= 3 else None


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _sentences(text: str, base: int) -> list[tuple[int, int]]:
    """(from, to) of each sentence or line of ``text``, which begins at the character ``base``."""
    found, start = [], 0
    for gap in re.finditer(r"(?<=[.!?\n])\s+", text):
        found.append((start, gap.start()))
        start = gap.end()
    return [(base + a, base + b) for a, b in [*found, (start, len(text))] if text[a:b].strip()]


def _around(prompt: str, value: str) -> list[Span]:
    """The sentence, or the line, of each place where ``value`` stands."""
    spans: list[Span] = []
    for place in re.finditer(re.escape(value), prompt):
        stop = prompt.rfind(". ", 0, place.start())
        begin = max(stop + 2 if stop >= 0 else 0, prompt.rfind("\n", 0, place.start()) + 1)
        spans.append((begin, place.end() + 1, 1.0))
    return spans


def _line(prompt: str, at: int) -> Span:
    end = prompt.find("\n", at)
    return prompt.rfind("\n", 0, at) + 1, end if end > 0 else len(prompt), 1.0


def _where(prompt: str, text: str) -> list[Span]:
    """What is needed to read the evidence: the question, the head of a table."""
    at = prompt.find(text)
    return [(at, at + len(text), _NEEDED)] if at >= 0 else []


_MAKERS: dict[str, Callable[..., Sequence[dict[str, Any] | None]]] = {
    "packed": _packed, "values": _values, "needles": _needles, "table": _tables, "quoted": _quoted
}  # fmt: skip
