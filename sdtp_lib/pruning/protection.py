"""Which tokens of a prompt are never dropped, from what a person can name: characters of a text, roles of a chat.

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    protect = protected_tokens_of(tokenizer, messages, roles=("system", "last_user"))
    with token_pruning(model, "2x", protect=protect):
        model.generate(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))

Knows tokenizers, not models. The result is what ``token_pruning(protect=...)`` takes: booleans (1, T).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

ROLES = ("system", "user", "assistant", "tool", "last_user")


def protected_tokens_of(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    spans: Iterable[tuple[int, int]] = (),
    roles: Iterable[str] = (),
    add_special_tokens: bool | None = None,
) -> torch.Tensor:
    """Booleans (1, T), True for the tokens of ``prompt`` that ``spans`` or ``roles`` name.

    Parameters
    ----------
    tokenizer
        A fast tokenizer, which knows the characters of each token.
    prompt
        A text; or chat messages, which its chat template turns into one (with the generation prompt).
    spans
        ``(start, end)`` characters of the text, end excluded. A token that touches one is protected.
    roles
        Of chat messages: any of `ROLES`; ``"last_user"`` is the last message of the user.
    add_special_tokens
        As the prompt is tokenized; default: for a text yes, for chat messages no (the template has them).

    Raises
    ------
    ValueError
        For a span outside the text, a role that no message has, roles of a plain text, or a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is slow and does not say which characters a token has: load it with "
            "use_fast=True, or give protect as booleans (B, T)."
        )
    roles, chat = tuple(roles), not isinstance(prompt, str)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
    if roles and not chat:
        raise ValueError(f"roles={roles} of a plain text: give the chat messages, [{{'role': ..., 'content': ...}}].")
    wanted = [*_checked_spans(spans, text), *(_spans_of_roles(text, prompt, roles) if roles else ())]
    special = (not chat) if add_special_tokens is None else add_special_tokens
    offsets = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    touched = [any(first < end and last > start for start, end in wanted) for first, last in offsets]
    return torch.tensor([touched], dtype=torch.bool)


def _checked_spans(spans: Iterable[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    checked = []
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise ValueError(f"spans has ({start}, {end}), which is outside the text of {len(text)} characters.")
        checked.append((int(start), int(end)))
    return checked


def _spans_of_roles(text: str, messages: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[tuple[int, int]]:
    """Where the contents of the wanted messages stand in the rendered ``text``, in order."""
    if unknown := [role for role in roles if role not in ROLES]:
        raise ValueError(f"roles={tuple(roles)} has {unknown}: choose among {', '.join(ROLES)}.")
    last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    found, place = [], 0
    for number, message in enumerate(messages):
        content = str(message["content"]).strip()
        start = text.find(content, place)
        if start < 0:
            raise ValueError(
                f"the content of message {number} ({message['role']}) does not stand in the rendered chat as it is: "
                "name its characters with spans instead."
            )
        place = start + len(content)
        if content and (message["role"] in roles or ("last_user" in roles and number == last_user)):
            found.append((start, place))
    if not found:
        raise ValueError(f"roles={tuple(roles)}: no message has such a role.")
    return found
