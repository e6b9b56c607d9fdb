"""A user's records in any of the usual forms, as samples; says how many were left out and why. Knows no model.

Accepted, one object per line (or a list of them):

    {"instruction": ..., "context": ..., "response": ...}     Dolly's fields; the context may be missing
    {"instruction": ..., "input": ..., "output": ...}         Alpaca's
    {"prompt": ..., "response": ...}                          or question / answer, prompt / completion
    {"messages": [{"role": ..., "content": ...}, ...]}        a chat whose last turn is the answer; or "conversations"
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtp_lib.data.record_fields import ANSWERED, CHATS, UnusableRecord, asked_in, first_of
from sdtp_lib.data.samples import chat_prompt, fill_up, response_ids, stable_number, tokenise_prompt
from sdtp_lib.data.texts import json_lines

SHORT_TOKENS = 256  # a shorter prompt has next to nothing to prune: it is put among other texts


@dataclass
class OwnSamples:
    """Samples of a user's records.

    Attributes
    ----------
    samples
        As in `sdtp_lib.data`; ``source`` is ``"own"``.
    read
        How many records there were.
    left_out, changed
        Reason -> how many records were not used, or were used in another form.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """One sentence for a person: how many were used, and what happened to the others."""
        parts = [f"{len(self.samples)} of {self.read} records used"]
        parts += [f"{count} left out: {reason}" for reason, count in self.left_out.most_common()]
        parts += [f"{count} {how}" for how, count in self.changed.most_common()]
        return "; ".join(parts)


def own_samples(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    fillers: Sequence[str],
    tokens: tuple[int, int],
    most_tokens: int = 4096,
    response_tokens: int = 256,
    seed: int = 0,
) -> OwnSamples:
    """Samples of a JSON-lines file or of records.

    Parameters
    ----------
    fillers
        Texts among which prompts below `SHORT_TOKENS` are put, up to a length drawn from ``tokens``.
    most_tokens
        Of longer prompts the middle is left out.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        For a line that is no JSON object, or if no record can be used: the reasons are in the message.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if not path.is_file():
            raise OSError(f"No such file: {os.fspath(source)!r}; give a JSON-lines file, one record per line.")
        source = json_lines(path.read_bytes(), path.name)
    found, seen = OwnSamples(), set()
    for record in source:
        found.read += 1
        try:
            turns, context, response = _turns(record)
            identifier = f"{stable_number('own', turns, context, response):016x}"
            if identifier in seen:
                raise UnusableRecord("the same as an earlier one")
            prompt_ids, how = _prompt_ids(
                tokenizer, turns, context, fillers, tokens, random.Random(stable_number("own", seed, identifier))
            )
        except UnusableRecord as reason:
            found.left_out[str(reason)] += 1
            continue
        seen.add(identifier)
        if how:
            found.changed[how] += 1
        if len(prompt_ids) > most_tokens:
            half = most_tokens // 2
            prompt_ids = prompt_ids[:half] + prompt_ids[-half:]
            found.changed[f"longer than {most_tokens} tokens, used without their middle"] += 1
        found.samples.append(
            {
                "id": f"own-{identifier}",
                "prompt": tokenizer.decode(prompt_ids),
                "response": response,
                "source": "own",
                "category": "own",
                "prompt_ids": prompt_ids,
                "response_ids": response_ids(tokenizer, response, response_tokens),
            }
        )
    if not found.samples:
        raise ValueError(
            f"no record can be used ({found}); each needs a prompt and a response: see `data.own_records`."
        )
    return found


def _turns(record: Any) -> tuple[list[dict[str, str]], str, str]:
    """(turns up to the one to answer, context or "", response) of a record in any of the forms."""
    if not isinstance(record, Mapping):
        raise UnusableRecord("not an object with fields by name")
    turns, context = asked_in(record)
    if first_of(record, CHATS) is not None:
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if len(turns) < 2:
            raise UnusableRecord("a chat without an answer")
        return turns[:-1], "", turns[-1]["content"]
    answered = first_of(record, ANSWERED)
    answer = record[answered] if answered else ""
    if isinstance(answer, list):
        answer = answer[-1]["content"] if isinstance(answer[-1], Mapping) else answer[0]
    if not str(answer).strip():
        raise UnusableRecord("no response")
    return turns, context, str(answer).strip()


def _prompt_ids(
    tokenizer: Any,
    turns: list[dict[str, str]],
    context: str,
    fillers: Sequence[str],
    tokens: tuple[int, int],
    draw: random.Random,
) -> tuple[list[int], str]:
    """Token ids of the prompt, and in which other form than its own it is used, if it is."""
    asked = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
    if asked is None:
        raise UnusableRecord("a chat without a user's turn")

    text = turns[asked]["content"]
    if len(turns) == 1 and any(token in text for token in tokenizer.all_special_tokens):  # formatted already
        return tokenizer(text, add_special_tokens=False)["input_ids"], ""

    def build(before: Sequence[str], after: Sequence[str]) -> str:
        content = "\n\n".join([*before, *([context] if context else []), *after, text])
        try:
            return chat_prompt(tokenizer, [*turns[:asked], {"role": "user", "content": content}, *turns[asked + 1 :]])
        except Exception as error:  # templates raise what they like
            raise UnusableRecord(f"the model's chat format refuses it ({str(error)[:80]})") from error

    bare = tokenise_prompt(tokenizer, build([], []), chat=True)
    if len(bare) >= SHORT_TOKENS or not fillers:
        return bare, ""
    _, filled = fill_up(build, fillers, tokenizer, draw.randint(*tokens), draw)
    return filled, f"shorter than {SHORT_TOKENS} tokens, put among other texts" if len(filled) > len(bare) else ""
