"""LongBench v1 by its official protocol: data, prompts, truncation, what is cut off an answer, metrics, averages.

Prompts and metrics are read from the installed ``lm_eval`` package; where it differs from the official code the
official form wins: a blank or newline at the end of four prompts, an empty line before the last turn of triviaqa and
samsum, the choice of the predicted line of code. Knows no model and no pruning; a tokenizer is passed in.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtp_lib.data.lm_eval_files import private_module, settings, task_folder
from sdtp_lib.data.samples import chat_prompt, tokenise_prompt
from sdtp_lib.data.texts import from_hub, instead, json_lines

GROUPS = {
    "Single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "Multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "Summarisation": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "Few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "Synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "Code": ("lcc", "repobench-p"),
}
DATASETS = tuple(name for names in GROUPS.values() for name in names)
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
LONGBENCH_E = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
PAPER_14 = tuple(n for g, names in GROUPS.items() if g != "Synthetic" for n in names if n not in CHINESE)
SETS = {
    "all": DATASETS,
    "english": tuple(name for name in DATASETS if name not in CHINESE),
    "paper": PAPER_14,
    "eight": (
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "musique",
        "gov_report",
        "multi_news",
        "triviaqa",
    ),
    "longbench-e": tuple(f"{name}_e" for name in LONGBENCH_E),
}
FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
HUB_DATASET = "THUDM/LongBench"
_MAX_NEW_TOKENS = {
    128: ("narrativeqa", "qasper", "dureader", "samsum"),
    64: ("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"),
    32: (
        "hotpotqa",
        "2wikimqa",
        "musique",
        "triviaqa",
        "passage_count",
        "passage_retrieval_en",
        "passage_retrieval_zh",
    ),
    512: ("gov_report", "qmsum", "multi_news", "vcsum"),
}
_UNCHATTED = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_METRICS = {
    "qa_f1_zh_score": ("multifieldqa_zh",),
    "rouge_zh_score": ("dureader", "vcsum"),
    "rouge_score": ("gov_report", "qmsum", "multi_news", "samsum"),
    "classification_score": ("trec", "lsht"),
    "count_score": ("passage_count",),
    "retrieval_score": ("passage_retrieval_en",),
    "retrieval_zh_score": ("passage_retrieval_zh",),
    "code_sim_score": ("lcc", "repobench-p"),
}
_OFFICIAL_ENDS = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}


@dataclass(frozen=True)
class Task:
    """One data set's rules: prompt template with ``{context}`` and ``{input}``, metric, new tokens, special cases."""

    name: str
    template: str
    metric: str
    max_new_tokens: int
    chat: bool
    first_line_only: bool
    stop_at_newline: bool


@functools.cache
def task(dataset: str) -> Task:
    """The rules of a data set; of ``<name>_e`` (LongBench-E) they are those of ``<name>``.

    Raises
    ------
    ValueError
        For an unknown data set.
    """
    name = dataset.removesuffix("_e")
    if name not in DATASETS:
        raise ValueError(f"dataset={dataset!r} is unknown: choose among {', '.join(DATASETS)}.")
    template = _lm_eval_template(name)
    if name in _OFFICIAL_ENDS:
        template = template.rstrip() + _OFFICIAL_ENDS[name]
    if name in ("triviaqa", "samsum"):
        template = re.sub(r"\{context\}\n+\{input\}", "{context}\n\n{input}", template)
    return Task(
        name=name,
        template=template,
        metric=next((metric for metric, names in _METRICS.items() if name in names), "qa_f1_score"),
        max_new_tokens=next(tokens for tokens, names in _MAX_NEW_TOKENS.items() if name in names),
        chat=name not in _UNCHATTED,
        first_line_only=name in _FIRST_LINE,
        stop_at_newline=name == "samsum",
    )


def read_records(source: str | os.PathLike[str], dataset: str) -> list[dict[str, Any]]:
    """The records of a data set, sorted by ``_id`` so that "the first 40" means the same everywhere.

    Parameters
    ----------
    source
        A folder of ``<dataset>.jsonl`` files (or with a ``data`` folder of them), the official ``data.zip``, or
        ``"hub"``, which downloads that file.

    Raises
    ------
    OSError
        If the data set is not there, or the Hub cannot be reached.
    ValueError
        For a record that lacks an official field; the line is named.
    """
    task(dataset)
    source = from_hub(HUB_DATASET, "data.zip") if os.fspath(source) == "hub" else Path(source)
    member = f"{dataset}.jsonl"
    if source.is_dir():
        paths = [path for path in (source / member, source / "data" / member) if path.is_file()]
        if not paths:
            raise OSError(f"{source} has no {member}: give a folder in the official format, the data.zip, or 'hub'.")
        content = paths[0].read_bytes()
    elif source.is_file():
        if not zipfile.is_zipfile(source):
            raise OSError(
                f"{source.name} is no zip archive{instead(source.read_bytes()[:200])}; the official data.zip of "
                f"{HUB_DATASET} is wanted."
            )
        with zipfile.ZipFile(source) as archive:
            inside = [name for name in archive.namelist() if name.rpartition("/")[2] == member]
            if not inside:
                raise OSError(f"{source.name} holds no {member}: is it the official data.zip of {HUB_DATASET}?")
            try:
                content = archive.read(inside[0])
            except (zipfile.BadZipFile, zlib.error) as error:
                raise OSError(f"{member} in {source.name} is damaged ({error}): download the archive again.") from error
    else:
        raise OSError(f"No such file or folder: {os.fspath(source)!r}; give the official data.zip or 'hub'.")
    return sorted(json_lines(content, member, FIELDS), key=lambda record: record["_id"])


def build_prompt(record: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> tuple[list[int], bool]:
    """Prompt token ids as the official code makes them, and whether the middle was cut out.

    A prompt above ``max_tokens`` keeps its first and its last ``max_tokens // 2`` tokens, decoded; then comes the chat
    format, but for the few-shot and code tasks. The chat format's own tokens come on top, as in the official code.
    """
    rules = task(record["dataset"])
    # In one pass, so that braces in a context stay what they are.
    prompt = re.sub(r"\{(context|input)\}", lambda field: record[field[1]], rules.template)
    prompt, cut = cut_middle(prompt, tokenizer, max_tokens)
    if rules.chat:
        prompt = chat_prompt(tokenizer, prompt)
    return tokenise_prompt(tokenizer, prompt, chat=rules.chat), cut


def cut_middle(prompt: str, tokenizer: Any, max_tokens: int) -> tuple[str, bool]:
    """``prompt``, of its first and last ``max_tokens // 2`` tokens if it has more than ``max_tokens``; and whether."""
    ids = tokenizer(prompt, truncation=False)["input_ids"]
    if len(ids) <= max_tokens:
        return prompt, False
    half = max_tokens // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])), True


def as_sample(
    record: Mapping[str, Any], tokenizer: Any, *, max_tokens: int, response_tokens: int = 128
) -> dict[str, Any]:
    """The record as a sample (see `data`): its first answer's first tokens are the response."""
    prompt_ids, _ = build_prompt(record, tokenizer, max_tokens)
    response = record["answers"][0]
    return {
        "id": record["_id"],
        "prompt": tokenizer.decode(prompt_ids),
        "response": response,
        "source": "longbench",
        "category": record["dataset"],
        "prompt_ids": prompt_ids,
        "response_ids": tokenizer(response, add_special_tokens=False)["input_ids"][:response_tokens],
    }


def score(record: Mapping[str, Any], prediction: str) -> float:
    """The official metric, 0 to 1: the best over the record's answers."""
    rules = task(record["dataset"])
    if rules.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if rules.metric == "code_sim_score":
        prediction = _line_of_code(prediction)
    metric = getattr(_metrics(), rules.metric)
    classes = record["all_classes"]
    return float(max((metric(prediction, answer, all_classes=classes) for answer in record["answers"]), default=0.0))


def average(scores: Mapping[str, float]) -> float:
    """The paper's AVG: the mean over its 14 English data sets (not over the five groups).

    Raises
    ------
    ValueError
        If a data set is missing: an average over fewer is not comparable.
    """
    missing = [name for name in PAPER_14 if name not in scores]
    if missing:
        raise ValueError(f"AVG is over the 14 English data sets, but {missing} are missing.")
    return sum(scores[name] for name in PAPER_14) / len(PAPER_14)


def resolve(names: Sequence[str]) -> list[str]:
    """Data sets of a list of data-set and set names, in order, each once."""
    found: dict[str, None] = {}
    for name in names:
        for dataset in SETS.get(name, (name,)):
            task(dataset)
            found.setdefault(dataset)
    return list(found)


def _line_of_code(prediction: str) -> str:
    """Official: the first line without a backtick or a comment sign, blank lines counting as lines."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")


@functools.cache
def _lm_eval_template(name: str) -> str:
    content = settings(task_folder("longbench") / f"{name}.yaml")
    return content["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")


@functools.cache
def _metrics() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fuzzywuzzy and jieba warn about themselves on import
        return private_module(task_folder("longbench") / "metrics.py", {})
