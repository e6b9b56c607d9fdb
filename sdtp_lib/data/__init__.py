"""Text to train and measure on, as plain dictionaries; knows no model (a tokenizer is passed in).

`texts` are raw documents, `samples` what is fed to a model (offered here by name), `tasks` are made with known answers,
`longbench` is the official benchmark, `test_sets` what the comparisons are measured on.
"""

from __future__ import annotations

from sdtp_lib.data.samples import (
    CONTEXT_CATEGORIES,
    DOLLY,
    SPLITS,
    chat_prompt,
    dolly_split,
    load_instructions,
    long_documents,
    pack_contexts,
    record_id,
    stable_number,
    text_windows,
    tokenise_prompt,
)

__all__ = [
    "CONTEXT_CATEGORIES",
    "DOLLY",
    "SPLITS",
    "chat_prompt",
    "dolly_split",
    "load_instructions",
    "long_documents",
    "pack_contexts",
    "record_id",
    "stable_number",
    "text_windows",
    "tokenise_prompt",
]
