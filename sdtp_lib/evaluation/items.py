"""`Item`: a tokenised prompt with its rules and a scoring function; made here from the records of every benchmark.

Items are made one by one, since a prompt of 131,072 tokens is a megabyte. Knows no model; a tokenizer is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sdtp_lib.data import copying, longbench, longbench2, ruler, tasks
from sdtp_lib.data.samples import tokenise_prompt


@dataclass(frozen=True)
class Item:
    """A prompt to answer.

    Attributes
    ----------
    dataset, identifier
        Together they name the item in rows.
    prompt_ids
        The prompt as it is fed to the model.
    max_new_tokens, stop_ids
        Decoding ends there, besides at the model's own end tokens.
    score
        From the generated text to 0 .. 1.
    cut
        Whether the middle of the prompt was cut out to fit.
    follow_up_ids
        A second turn, appended to the first answer on the same cache; then the second answer is the one that counts.
    first_score
        Scores the first answer where there is a second turn.
    labels
        What else rows say of the item: ``target_tokens, text_source, answer_depth`` and the like.
    """

    dataset: str
    identifier: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    score: Callable[[str], float]
    stop_ids: tuple[int, ...] = ()
    cut: bool = False
    follow_up_ids: tuple[int, ...] = ()
    first_score: Callable[[str], float] | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)


def longbench_items(records: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_tokens: int) -> Iterator[Item]:
    """Items by the official protocol (see `longbench`)."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    for record in records:
        rules = longbench.task(record["dataset"])
        ids, cut = longbench.build_prompt(record, tokenizer, max_tokens)
        stop_ids = tuple(newline) if rules.stop_at_newline else ()
        yield _item(record, longbench.score, ids, rules.max_new_tokens, stop_ids=stop_ids, cut=cut)


def longbench2_items(records: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_tokens: int) -> Iterator[Item]:
    """Items of LongBench v2 (see `longbench2`), by domain."""
    for record in records:
        ids, cut = longbench2.build_prompt(record, tokenizer, max_tokens)
        named = {**record, "dataset": f"LongBench v2 {record['domain']}"}
        labels = {"difficulty": record["difficulty"]}
        yield _item(named, longbench2.score, ids, longbench2.MAX_NEW_TOKENS, cut=cut, labels=labels)


def synthetic_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of the synthetic tasks (see `tasks`)."""
    for record in records:
        chat = record["dataset"] not in tasks.UNCHATTED
        ids = tokenise_prompt(tokenizer, tasks.as_prompt(record, tokenizer), chat=chat)
        yield _item(record, tasks.score, ids, tasks.MOST_NEW_TOKENS[record["dataset"]])


def ruler_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of RULER (see `ruler`)."""
    for record in records:
        labels = {name: record[name] for name in ("answers", "answer_depth", "text_source", "chat")}
        yield _item(
            record, ruler.score, ruler.build_prompt(record, tokenizer), ruler.task(record["dataset"]).max_new_tokens,
            labels={"target_tokens": record["length"], **labels},
        )  # fmt: skip


def copying_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of the copies and second questions (see `copying`)."""
    for record in records:
        answers = record.get("first_answers")
        yield _item(
            record, copying.score, copying.build_prompt(record, tokenizer), record["max_new_tokens"],
            follow_up_ids=tuple(copying.follow_up_ids(record, tokenizer)),
            first_score=None if answers is None else partial(copying.score, {**record, "answers": answers}),
            labels={"target_tokens": record["length"], "answers": record["answers"], "text_source": "embedded",
                    "answer_depth": record["answer_depth"], "chat": bool(getattr(tokenizer, "chat_template", None))},
        )  # fmt: skip


def _item(
    record: Mapping[str, Any],
    score: Callable[[Mapping[str, Any], str], float],
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    **more: Any,
) -> Item:
    return Item(record["dataset"], record["_id"], prompt_ids, max_new_tokens, partial(score, record), **more)
