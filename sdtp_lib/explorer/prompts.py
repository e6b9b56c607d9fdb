"""Prompts that the explorer can show: a typed one (document, question, chat format or not) and the synthetic tasks.

A `Prompt` is token ids with what a reader wants to find in them: the question, and the place of the answer where it is
known. Needs a tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib.data.samples import chat_prompt, tokenise_prompt
from sdtp_lib.data.tasks import as_sample, synthetic_tasks
from sdtp_lib.explorer.state import Prompt
from sdtp_lib.views.places import places_of
from sdtp_lib.views.tokens import display_tokens

# Task of `data.tasks` -> the name that a reader chooses by.
EXAMPLES = {
    "needle": "one fact in a long text",
    "multi_doc_qa": "one of many passages",
    "multi_key": "one fact among eight",
}


def typed_prompt(tokenizer: Any, document: str, question: str = "", *, chat: bool = True) -> Prompt:
    """What a person typed, as a prompt: the document, an empty line, the question, in the chat format unless told.

    Raises
    ------
    ValueError
        If both fields are empty, or hold a single token: there is nothing to drop then.
    """
    document, question = document.strip("\n"), question.strip()
    text = "\n\n".join(part for part in (document, question) if part)
    if not text.strip():
        raise ValueError("The prompt is empty: type a document, a question, or both.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("This model has no chat format: take the tick away from “chat format”.")
    ids = tokenise_prompt(tokenizer, chat_prompt(tokenizer, text) if chat else text, chat=chat)
    check_length(ids)
    return _with_places(tokenizer, ids, question)


def check_length(ids: Sequence[int]) -> None:
    """Refuse a prompt of which nothing can be dropped, in a sentence for the person who chose it."""
    if len(ids) < 2:
        raise ValueError(f"This prompt has {len(ids)} token(s), and pruning needs at least 2: choose a longer one.")


def example_prompts(tokenizer: Any, prompt_tokens: int, *, seed: int = 0) -> dict[str, Prompt]:
    """One held-out synthetic prompt for each of `EXAMPLES`, by the name that the explorer shows."""
    prompts = {}
    for task, name in EXAMPLES.items():
        sizes = {"prompt_tokens": prompt_tokens, "count": 1, "seed": seed, "split": "test"}
        (record,) = synthetic_tasks(task, tokenizer=tokenizer, **sizes)
        prompts[name] = task_prompt(record, tokenizer)
    return prompts


def task_prompt(record: Mapping[str, Any], tokenizer: Any) -> Prompt:
    """A record of `data.tasks` with its question, its right answer and the places of both."""
    ids = as_sample(dict(record), tokenizer)["prompt_ids"]
    return _with_places(tokenizer, ids, record["input"], record["answers"][0])


def _with_places(tokenizer: Any, ids: Sequence[int], question: str, right_answer: str = "") -> Prompt:
    places = places_of(display_tokens(tokenizer, ids), question, right_answer)
    return Prompt(tuple(int(i) for i in ids), question, right_answer, places)
