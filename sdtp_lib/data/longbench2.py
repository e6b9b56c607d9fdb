"""LongBench v2: questions with four choices about texts of up to millions of words; prompts as lm-eval asks them.

The model writes its choice, which is read from the answer; lm-eval compares the likelihoods of the four letters
instead. Knows no model; a tokenizer is passed in.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtp_lib.data.lm_eval_files import settings, task_folder
from sdtp_lib.data.longbench import cut_middle
from sdtp_lib.data.samples import chat_prompt, tokenise_prompt
from sdtp_lib.data.texts import from_hub

HUB_DATASET = "THUDM/LongBench-v2"
FIELDS = ("_id", "domain", "difficulty", "length", "question", "choice_A", "choice_B", "choice_C", "choice_D",
          "answer", "context")  # fmt: skip
MAX_NEW_TOKENS = 16


def read_records(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records, sorted by ``_id``.

    Parameters
    ----------
    source
        The official ``data.json``, a folder that holds it, or ``"hub"``.

    Raises
    ------
    OSError
        If it is not there, or the Hub cannot be reached.
    ValueError
        For a record that lacks an official field.
    """
    path = from_hub(HUB_DATASET, "data.json") if os.fspath(source) == "hub" else Path(source)
    if path.is_dir():
        path = path / "data.json"
    if not path.is_file():
        raise OSError(f"No such file: {path.name}; give LongBench v2's official data.json, its folder, or 'hub'.")
    records = json.loads(path.read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        missing = [field for field in FIELDS if field not in record]
        if missing:
            raise ValueError(f"{path.name}, record {number} lacks {missing}: not in LongBench v2's official fields.")
    return sorted(records, key=lambda record: record["_id"])


def build_prompt(record: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> tuple[list[int], bool]:
    """Prompt token ids, and whether the middle was cut out to have at most ``max_tokens`` before the chat format."""
    values = {"context": record["context"], "question.strip()": record["question"].strip()}
    values |= {f"choices[{place}]": record[f"choice_{letter}"] for place, letter in enumerate("ABCD")}
    prompt = re.sub(r"\{\{(.+?)\}\}", lambda field: values[field[1]], _template())
    prompt, cut = cut_middle(prompt, tokenizer, max_tokens)
    return tokenise_prompt(tokenizer, chat_prompt(tokenizer, prompt), chat=True), cut


def score(record: Mapping[str, Any], prediction: str) -> float:
    """1.0 where the first choice that the prediction names is the right one."""
    named = re.search(r"\(([A-D])\)", prediction) or re.search(r"\b([A-D])\b", prediction)
    return float(named is not None and named[1] == record["answer"])


@functools.cache
def _template() -> str:
    return settings(task_folder("longbench2") / "_longbench_common_yaml")["doc_to_text"]
