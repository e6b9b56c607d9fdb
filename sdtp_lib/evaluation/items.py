"""`Item`: a tokenised prompt with its rules and a scoring function; made here from the records of every benchmark.

Items are made one by one, since a prompt of 131,072 tokens is a megabyte. Knows no model; a tokenizer is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=ids,
            max_new_tokens=rules.max_new_tokens,
            score=lambda prediction, record=record: longbench.score(record, prediction),
            stop_ids=tuple(newline) if rules.stop_at_newline else (),
            cut=cut,
        )


def longbench2_items(records: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_tokens: int) -> Iterator[Item]:
    """Items of LongBench v2 (see `longbench2`), by domain."""
    for record in records:
        ids, cut = longbench2.build_prompt(record, tokenizer, max_tokens)
        yield Item(
            dataset=f"LongBench v2 {record['domain']}",
            identifier=record["_id"],
            prompt_ids=ids,
            max_new_tokens=longbench2.MAX_NEW_TOKENS,
            score=lambda prediction, record=record: longbench2.score(record, prediction),
            cut=cut,
            labels={"difficulty": record["difficulty"]},
        )


def synthetic_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of the synthetic tasks (see `tasks`)."""
    for record in records:
        chat = record["dataset"] not in tasks.UNCHATTED
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=tokenise_prompt(tokenizer, tasks.as_prompt(record, tokenizer), chat=chat),
            max_new_tokens=tasks.MOST_NEW_TOKENS[record["dataset"]],
            score=lambda prediction, record=record: tasks.score(record, prediction),
        )


def ruler_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of RULER (see `ruler`)."""
    for record in records:
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=ruler.build_prompt(record, tokenizer),
            max_new_tokens=ruler.task(record["dataset"]).max_new_tokens,
            score=lambda prediction, record=record: ruler.score(record, prediction),
            labels={"target_tokens": record["length"]}
            | {name: record[name] for name in ("answers", "answer_depth", "text_source", "chat")},
        )


def copying_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Item]:
    """Items of the copies and second questions (see `copying`)."""
    for record in records:
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=copying.build_prompt(record, tokenizer),
            max_new_tokens=record["max_new_tokens"],
            score=lambda prediction, record=record: copying.score(record, prediction),
            follow_up_ids=tuple(copying.follow_up_ids(record, tokenizer)),
            first_score=_first_score(record),
            labels={"target_tokens": record["length"], "answers": record["answers"], "text_source": "embedded"}
            | {"answer_depth": record["answer_depth"], "chat": bool(getattr(tokenizer, "chat_template", None))},
        )


def _first_score(record: Mapping[str, Any]) -> Callable[[str], float] | None:
    answers = record.get("first_answers")
    return None if answers is None else lambda prediction: copying.score({**record, "answers": answers}, prediction)
