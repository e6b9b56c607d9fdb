"""Text to train and measure on, as plain dictionaries; knows nothing of models (a tokenizer is passed in).

A *record* is instruction data in Dolly's fields plus ``id``: ``id, instruction, context, response, category``. A
*document* is ``id, text``. A *sample* is what is fed to a model: ``id, prompt, response, source, category`` as text,
``prompt_ids, response_ids`` as token lists; the prompt is pruned, the response never. Everything is deterministic:
choices depend on a seed and on the item's id, never on the order of the file, and train and held-out items are told
apart by a stable hash of the id.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data.texts import (
    SPLITS,
    code_documents,
    embedded_instructions,
    hub_records,
    json_lines,
    long_documents,
    reference_documents,
    stable_number,
)

HELDOUT_OF_TEN = 2
DOLLY = "databricks/databricks-dolly-15k"
__all__ = [
    "CONTEXT_CATEGORIES", "DOLLY", "SPLITS", "chat_prompt", "code_documents", "dolly_split", "load_instructions",
    "long_documents", "pack_contexts", "record_id", "reference_documents", "stable_number", "text_windows",
    "tokenise_prompt",
]  # fmt: skip
CONTEXT_CATEGORIES = ("closed_qa", "information_extraction", "summarization")


def record_id(record: dict[str, Any]) -> str:
    """A record's id: 16 hexadecimal digits of a hash of its instruction, context and response."""
    return f"{stable_number(*(record.get(field, '') for field in ('instruction', 'context', 'response'))):016x}"


def dolly_split(identifier: str) -> str:
    """``"heldout"`` for two ids in ten, else ``"train"``; pruners are trained on the one and measured on the other."""
    return "heldout" if stable_number("dolly-split", identifier) % 10 < HELDOUT_OF_TEN else "train"


def load_instructions(
    source: str | os.PathLike[str] = "embedded", *, limit: int | None = None, seed: int = 0, split: str | None = None
) -> list[dict[str, Any]]:
    """Instruction records with ids, duplicates dropped.

    Parameters
    ----------
    source
        ``"embedded"`` (questions about installed texts, made here), a JSON-lines file in Dolly's fields, or a Hub data
        set in Dolly's fields such as ``"databricks/databricks-dolly-15k"``.
    limit
        At most so many, chosen by ``seed`` and id; all all of them, in the source's order, by default.
    split
        Only ``"train"`` or only ``"heldout"`` records (`dolly_split`); both by default.

    Raises
    ------
    ValueError
        For an unknown split, or a line that is not JSON or lacks ``instruction`` or ``response``.
    OSError
        If the file or the Hub data set cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}, or None for both.")
    source = os.fspath(source)
    if source == "embedded":
        raw: Iterable[dict[str, Any]] = embedded_instructions()
    elif Path(source).is_file():
        raw = json_lines(Path(source).read_bytes(), Path(source).name, ("instruction", "response"))
    elif source.endswith((".jsonl", ".json")) or source.count("/") != 1:
        raise OSError(
            f"No such file: {source!r}; give a JSON-lines file, a Hub data set such as {DOLLY}, or 'embedded'."
        )
    else:
        raw = hub_records(source)
    records: dict[str, dict[str, Any]] = {}
    for item in raw:
        record = {
            "instruction": str(item["instruction"]).strip(),
            "context": str(item.get("context") or "").strip(),
            "response": str(item["response"]).strip(),
        }
        record = {"id": record_id(record), **record, "category": str(item.get("category") or "instruction")}
        if record["instruction"] and record["response"]:
            records.setdefault(record["id"], record)
    chosen = [r for r in records.values() if split is None or dolly_split(r["id"]) == split]
    return chosen if limit is None else _shuffled(chosen, seed)[:limit]


def pack_contexts(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    tokens: tuple[int, int] = (512, 1024),
    seed: int = 0,
    limit: int | None = None,
    response_tokens: int = 128,
    asked_anywhere: bool = False,
) -> list[dict[str, Any]]:
    """Long prompts from short records: each record's own context among other records', then its instruction.

    ``asked_anywhere``: the instruction stands first in a quarter of the prompts and in the middle in another one.

    The prompt's length is drawn from ``tokens`` (inclusive, chat format counted); where the own context stands among
    the others is drawn too. Records without a context, or with one that does not fit, are left out. Pass records of one
    split only: the fillers come from the same list. The response ends with the end-of-turn token if it is not cut.

    Returns
    -------
    list of samples, ``category`` being the record's.
    """
    low, high = tokens
    if not 0 < low <= high:
        raise ValueError(f"tokens={tokens} is not a range of prompt lengths, such as (512, 1024).")
    pool = [record for record in records if record["context"]]
    contexts = [record["context"] for record in pool]
    lengths: dict[str, int] = {}
    samples = []
    for record in _shuffled(pool, seed):
        if limit is not None and len(samples) >= limit:
            break
        draw = random.Random(stable_number("pack", seed, record["id"]))
        target = draw.randint(low, high)
        place = random.Random(stable_number("asked", seed, record["id"])).choice((0.0, 0.5, 1.0, 1.0))
        place = place if asked_anywhere else 1.0
        bare = _packed_prompt(tokenizer, [record["context"]], record["instruction"])
        if len(_prompt_ids(tokenizer, bare)) > target:
            continue
        own, asked = record["context"], record["instruction"]

        def build(
            before: Sequence[str], after: Sequence[str], own: str = own, asked: str = asked, place: float = place
        ) -> str:
            return _packed_prompt(tokenizer, [*before, own, *after], asked, place)

        prompt, prompt_ids = fill_up(build, contexts, tokenizer, target, draw, never=own, lengths=lengths)
        ids_of_response = response_ids(tokenizer, record["response"], response_tokens)
        samples.append(
            _sample(
                record["id"],
                prompt,
                record["response"],
                "dolly-packed",
                record["category"],
                prompt_ids,
                ids_of_response,
            )
        )
    return samples


def fill_up(
    build: Callable[[Sequence[str], Sequence[str]], str],
    fillers: Sequence[str],
    tokenizer: Any,
    target: int,
    draw: random.Random,
    *,
    never: str = "",
    lengths: dict[str, int] | None = None,
) -> tuple[str, list[int]]:
    """A prompt and its token ids, made longer by ``fillers`` before and after what it asks about, ``target`` at most.

    Parameters
    ----------
    build
        Makes the prompt of the texts before and the texts after.
    never
        A text that is not drawn: what the prompt asks about.
    lengths
        Text -> tokens, filled here, for callers with many prompts.
    """
    lengths = {} if lengths is None else lengths

    def length_of(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return lengths[text]

    before: list[str] = []
    after: list[str] = []
    prompt = build(before, after)
    prompt_ids = _prompt_ids(tokenizer, prompt)
    room = target - len(prompt_ids)
    while room > 8 and any(text != never for text in fillers):
        filler = draw.choice(fillers)
        if filler == never:
            continue
        if length_of(filler) + 3 > room:
            filler = _first_tokens(tokenizer, filler, room - 3)
        (before if draw.random() < 0.5 else after).append(filler)
        room -= length_of(filler) + 3
    prompt = build(before, after)
    prompt_ids = _prompt_ids(tokenizer, prompt)
    while len(prompt_ids) > target and (before or after):  # joins can add a token or two
        side = before or after
        side[0] = _first_tokens(tokenizer, side[0], length_of(side[0]) - (len(prompt_ids) - target) - 1)
        side[:] = [text for text in side if text]
        prompt = build(before, after)
        prompt_ids = _prompt_ids(tokenizer, prompt)
    return prompt, prompt_ids


def text_windows(
    documents: Sequence[dict[str, str]],
    tokenizer: Any,
    *,
    prompt_tokens: int,
    continuation_tokens: int,
    limit: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``limit`` windows of running text, no chat format: ``prompt_tokens`` to read, ``continuation_tokens`` to predict.

    The first windows come from different documents; only when those run out does one give a second, disjoint window.
    Fewer come back if the documents hold fewer.
    """
    prefix = tokenizer("")["input_ids"]  # a beginning-of-text token where the tokenizer adds one
    width = prompt_tokens - len(prefix) + continuation_tokens
    order = _shuffled(documents, seed)
    ids_of: dict[str, list[int]] = {}
    samples: list[dict[str, Any]] = []
    for turn in range(10**6):
        found = False
        for document in order:
            if len(samples) >= limit:
                return samples
            if document["id"] not in ids_of:
                ids_of[document["id"]] = tokenizer(document["text"], add_special_tokens=False)["input_ids"]
            ids = ids_of[document["id"]]
            windows = len(ids) // width
            if turn >= windows:
                continue
            found = True
            places = list(range(windows))
            random.Random(stable_number("window", seed, document["id"])).shuffle(places)
            start = places[turn] * width
            cut = start + prompt_tokens - len(prefix)
            prompt_ids, response_ids = prefix + ids[start:cut], ids[cut : start + width]
            prompt, response = tokenizer.decode(prompt_ids), tokenizer.decode(response_ids)
            identifier = f"{document['id']}@{start}"
            samples.append(_sample(identifier, prompt, response, "text", "text", prompt_ids, response_ids))
        if not found:
            return samples
    return samples


def chat_prompt(tokenizer: Any, text: str | Sequence[dict[str, str]]) -> str:
    """A user's turn, or all turns so far, in the tokenizer's chat format, ready for the answer.

    Where it has no format: the turns' texts, with an empty line between them.
    """
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(turn["content"] for turn in turns)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def tokenise_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt; a chat format already holds its special tokens, so none are added a second time."""
    return tokenizer(prompt, add_special_tokens=not (chat and getattr(tokenizer, "chat_template", None)))["input_ids"]


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    return tokenise_prompt(tokenizer, prompt, chat=True)


def response_ids(tokenizer: Any, response: str, most: int) -> list[int]:
    """At most ``most`` tokens of a response, the end-of-turn token counted where it is not cut."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return (ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id])[:most]


def _packed_prompt(tokenizer: Any, contexts: Sequence[str], instruction: str, place: float = 1.0) -> str:
    """``place``: where the instruction stands among the contexts, 0 first, 1 last."""
    parts = list(contexts)
    parts.insert(round(place * len(parts)), instruction)
    return chat_prompt(tokenizer, "\n\n".join(parts))


def _first_tokens(tokenizer: Any, text: str, most: int) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: max(0, most)]).strip()


def _sample(
    identifier: str,
    prompt: str,
    response: str,
    source: str,
    category: str,
    prompt_ids: list[int],
    response_ids: list[int],
) -> dict[str, Any]:
    return {
        "id": identifier,
        "prompt": prompt,
        "response": response,
        "source": source,
        "category": category,
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
    }


def _shuffled(items: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """An order that depends on the seed and the ids only."""
    return sorted(items, key=lambda item: stable_number("order", seed, item["id"]))
