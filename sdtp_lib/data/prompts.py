"""A person's prompts out of a text or JSON-lines file, and their token ids in the model's chat format. Knows no model.

Of a JSON-lines file each line is a prompt, in any of these forms; an answer that stands there too is left out:

    {"prompt": ...}                                           or instruction, question, query, text
    {"instruction": ..., "context": ...}                      the context goes before what is asked
    {"messages": [{"role": ..., "content": ...}, ...]}        a chat, up to the last turn that is not an assistant's
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdtp_lib.data.record_fields import UnusableRecord, asked_in
from sdtp_lib.data.texts import json_lines

STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    name
        Where it is from: ``report.txt``, ``mine.jsonl:3``.
    turns
        Chat turns so far, ``{"role": ..., "content": ...}``; of a plain text one of the user.
    """

    name: str
    turns: tuple[Mapping[str, str], ...]

    @classmethod
    def of_text(cls, name: str, text: str) -> Prompt:
        """A plain text as one turn of the user."""
        if not text.strip():
            raise ValueError(f"{name} is empty: a prompt needs text.")
        return cls(name, ({"role": "user", "content": text.strip()},))

    def token_ids(self, tokenizer: Any, *, chat: bool = True) -> list[int]:
        """As it is fed to the model: in its chat format, or as bare text where it has none or ``chat`` is False.

        A text that has the format's own tokens in it already is taken as it is.
        """
        bare = "\n\n".join(turn["content"] for turn in self.turns)
        if len(self.turns) == 1 and any(token in bare for token in tokenizer.all_special_tokens if token):
            return tokenizer(bare, add_special_tokens=False)["input_ids"]
        if not chat or not getattr(tokenizer, "chat_template", None):
            return tokenizer(bare)["input_ids"]
        try:
            text = tokenizer.apply_chat_template(list(self.turns), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"{self.name}: the model's chat format refuses it ({str(error)[:80]}).") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompts_in(content: bytes, name: str) -> list[Prompt]:
    """The prompts of a file: JSON lines where its name ends so; else one text.

    What has no name (standard input) is JSON lines where it begins with an object.

    Raises
    ------
    ValueError
        Naming the line that holds no prompt, or saying that the file is empty or no text.
    """
    nameless = name == STANDARD_INPUT and content.lstrip().startswith(b'{"')
    if nameless or name.endswith((".jsonl", ".ndjson")):
        found = [
            _prompt(f"{name}:{number}", record) for number, record in enumerate(json_lines(content, name), start=1)
        ]
        if not found:
            raise ValueError(f"{name} is empty: give one object per line.")
        return found
    try:
        return [Prompt.of_text(name, content.decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: give a text or JSON-lines file.") from error


def _prompt(name: str, record: Mapping[str, Any]) -> Prompt:
    try:
        turns, context = asked_in(record)
    except UnusableRecord as error:
        raise ValueError(f"{name} has {error}.") from error
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError(f"{name}: messages need a turn to answer.")
    if len(turns) > 1 or turns[0]["role"] != "user":
        return Prompt(name, tuple(turns))
    return Prompt.of_text(name, "\n\n".join(part for part in (context, turns[0]["content"].strip()) if part))
