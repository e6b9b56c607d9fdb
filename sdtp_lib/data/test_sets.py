"""The test sets of the benchmarks: which samples a comparison runs on, by name (``cell`` in rows) and prompt length.

``text`` (held-out documents), ``reference`` (Python's language reference, a domain that training never sees), the five
synthetic tasks (test split), ``long_values`` (identifiers and the like under names of the held-out side),
``instructions`` (held-out Dolly items that have a context, packed; without the file the embedded records),
``multi_news`` (real LongBench, where its file is at hand).
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data.long_values import long_values
from sdtp_lib.data.longbench import as_sample as longbench_sample
from sdtp_lib.data.longbench import read_records
from sdtp_lib.data.samples import (
    CONTEXT_CATEGORIES,
    load_instructions,
    long_documents,
    pack_contexts,
    reference_documents,
    stable_number,
    text_windows,
)
from sdtp_lib.data.tasks import TASKS, as_sample, synthetic_tasks
from sdtp_lib.records import project_root

TEST_SETS = ("text", "reference", *TASKS, "long_values", "instructions", "multi_news")
CONTINUATION_TOKENS = 128


def shared_data() -> Path:
    """The folder of data sets beside the repository, or what ``SDTP_SHARED_DATA`` names; it need not exist."""
    return Path(os.environ.get("SDTP_SHARED_DATA") or project_root().parent / "shared" / "data")


def samples_of(
    test_set: str, tokenizer: Any, *, prompt_tokens: int, count: int, seed: int = 0, split: str = "heldout"
) -> list[dict[str, Any]]:
    """At most ``count`` samples of a test set, prompts of about (text: exactly) ``prompt_tokens``.

    ``split="train"`` gives the other side of every split, for tuning a weight without looking at what is measured.
    An empty list where its data are not at hand.

    Raises
    ------
    ValueError
        For an unknown test set.
    """
    if test_set not in TEST_SETS:
        raise ValueError(f"test_set={test_set!r} is no test set: choose among {', '.join(TEST_SETS)}.")
    if test_set in ("text", "reference"):
        unseen = reference_documents() if split == "heldout" else []
        return text_windows(
            long_documents(split) if test_set == "text" else unseen,
            tokenizer,
            prompt_tokens=prompt_tokens,
            continuation_tokens=CONTINUATION_TOKENS,
            limit=count,
            seed=seed,
        )
    if test_set in TASKS:
        side = "test" if split == "heldout" else "train"
        records = synthetic_tasks(
            test_set, tokenizer=tokenizer, prompt_tokens=prompt_tokens, count=count, seed=seed, split=side
        )
        return [as_sample(record, tokenizer) for record in records]
    if test_set == "long_values":
        lengths = (prompt_tokens - prompt_tokens // 16, prompt_tokens)
        return long_values(tokenizer, tokens=lengths, count=count, seed=seed, split=split)
    if test_set == "instructions":
        dolly = shared_data() / "dolly-15k.jsonl"
        if not dolly.is_file():
            warnings.warn(
                f"instructions are made of the embedded records, for there is no {dolly.name} (SDTP_SHARED_DATA names "
                "its folder): other prompts than those of Dolly-15k, not to be put into one mean with them.",
                stacklevel=2,
            )
        records = load_instructions(dolly if dolly.is_file() else "embedded", split=split)
        records = [record for record in records if record["category"] in CONTEXT_CATEGORIES]
        lengths = (prompt_tokens - prompt_tokens // 16, prompt_tokens)
        return pack_contexts(
            records, tokenizer, tokens=lengths, seed=seed, limit=count, response_tokens=CONTINUATION_TOKENS
        )
    folder = shared_data() / "longbench"
    if split != "heldout" or not (folder / "multi_news.jsonl").is_file():
        return []
    records = sorted(read_records(folder, "multi_news"), key=lambda r: stable_number("multi_news", seed, r["_id"]))
    return [
        longbench_sample(record, tokenizer, max_tokens=prompt_tokens, response_tokens=CONTINUATION_TOKENS)
        for record in records[:count]
    ]


def samples_in_turn(test_sets: Sequence[str], tokenizer: Any, **sizes: Any) -> list[tuple[str, dict[str, Any]]]:
    """(test set, sample) of several test sets, in turn: a run that is stopped has some of each. As `samples_of`."""
    found = ([(name, sample) for sample in samples_of(name, tokenizer, **sizes)] for name in test_sets)
    turns = itertools.zip_longest(*found)
    return [item for turn in turns for item in turn if item is not None]
