"""What the fields of a user's records may be called, to train on (`own_records`) and to ask with (`prompts`).

Knows names and forms, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED = ("prompt", "instruction", "question", "query", "text", "input")
CONTEXT = ("context", "document", "passage", "input")
ANSWERED = ("response", "completion", "output", "answer", "answers", "summary")
CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class UnusableRecord(ValueError):
    """Why a record makes no prompt."""


def first_of(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of ``names`` under which a record holds something."""
    return next((name for name in names if record.get(name)), None)


def asked_in(record: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """The chat so far and the context ("" where there is none) of a record; what it answers is left out.

    Raises
    ------
    UnusableRecord
        For a record without a prompt, or with a chat of another form.
    """
    if (chat := first_of(record, CHATS)) is not None:
        return chat_turns(record[chat]), ""
    asked = first_of(record, ASKED)
    if asked is None:
        raise UnusableRecord(f"no prompt (fields: {', '.join(sorted(map(str, record))) or 'none'}): give "
                             f"{', '.join(ASKED[:3])} or messages")  # fmt: skip
    if isinstance(record[asked], list):
        return chat_turns(record[asked]), ""
    context = first_of(record, tuple(name for name in CONTEXT if name != asked))
    return [{"role": "user", "content": str(record[asked])}], str(record[context]).strip() if context else ""


def chat_turns(chat: Any) -> list[dict[str, str]]:
    """A chat's turns as ``{"role", "content"}``; ``{"from", "value"}`` is read too."""
    if not isinstance(chat, list) or not all(isinstance(turn, Mapping) for turn in chat):
        raise UnusableRecord("a chat that is not a list of turns with role and content")
    found = []
    for turn in chat:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise UnusableRecord("a chat with a turn that is not text")
        found.append({"role": _ROLES.get(str(role), str(role)), "content": content})
    return found
