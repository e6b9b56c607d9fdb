"""RULER, the 13 tasks, made and scored by lm-eval's own code; knows no model (a tokenizer is passed in).

Settings, generators, templates and metrics are those of the installed ``lm_eval``. What differs, on purpose:

- A prompt, its chat format, the beginning of its answer and the new tokens fit into ``length`` together, so that 8,192
  runs on a model of 8,192 positions; lm-eval does not count the first words of the answer and fwe's new tokens.
- The prompt stands in the tokenizer's chat format, followed by the beginning of the answer, as in RULER's own code and
  lm-eval's ``--apply_chat_template``; ``chat=False`` gives lm-eval's plain form.
- Draws depend on task, length and seed alone: the first 12 items are the first of 24.
- Essays and questions come from the first place that has them (see `ruler_texts`), which each record names; without
  nltk's ``punkt_tab`` sentences are split by its untrained rules (only where needles may stand depends on it).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib.data import ruler_generators, ruler_texts
from sdtp_lib.data.lm_eval_files import private_module, settings, task_folder
from sdtp_lib.data.ruler_generators import CountedTokenizer
from sdtp_lib.data.samples import chat_prompt, tokenise_prompt
from sdtp_lib.data.texts import stable_number

_FILES = {
    "niah_single_1": "niah_single_1", "niah_single_2": "niah_single_2", "niah_single_3": "niah_single_3",
    "niah_multikey_1": "niah_multikey_1", "niah_multikey_2": "niah_multikey_2", "niah_multikey_3": "niah_multikey_3",
    "niah_multivalue": "niah_multivalue", "niah_multiquery": "niah_multiquery",
    "vt": "vt", "cwe": "cwe", "fwe": "fwe", "qa_1": "qa_squad", "qa_2": "qa_hotpot",
}  # fmt: skip
TASKS = tuple(_FILES)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SETS = {
    "ruler": TASKS,
    "niah": tuple(name for name in TASKS if name.startswith("niah")),
    # Made of word lists and fixed sentences, by anybody, anywhere: no essay, no data set.
    "offline": ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"),
}
PLACES = (ruler_texts.HUB, ruler_texts.EMBEDDED)
# What lm-eval's generators do not count: the beginning of the answer (for four words or a long number), and for fwe the
# new tokens.
_UNCOUNTED = {"niah": 64, "qa": 8, "fwe": 50}


@dataclass(frozen=True)
class Task:
    """One task's rules, from lm-eval's file: its generator and metric, new tokens, what precedes the answer."""

    name: str
    generator: str
    metric: str
    max_new_tokens: int
    delimiter: str


@functools.cache
def task(name: str) -> Task:
    """The rules of a task.

    Raises
    ------
    ValueError
        For an unknown task.
    OSError
        If lm-eval is not installed.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown: choose among {', '.join(TASKS)}.")
    found = settings(task_folder("ruler") / f"{_FILES[name]}.yaml")
    new_tokens = found["generation_kwargs"]["max_gen_toks"]
    return Task(name, found["custom_dataset"], found["process_results"], new_tokens, found["target_delimiter"])


def records(
    name: str,
    length: int,
    count: int,
    tokenizer: Any,
    *,
    places: Sequence[str] = PLACES,
    seed: int = 0,
    chat: bool = True,
) -> list[dict[str, Any]]:
    """``count`` records of a task at ``length`` tokens, new ones included.

    Parameters
    ----------
    places
        Where essays and questions may come from, the first that has them first: ``"hub"``, a folder, ``"embedded"``.
    chat
        Whether the prompt stands in the tokenizer's chat format, if it has one.

    Returns
    -------
    list of records ``dataset, _id, prompt, answers, length, chat, text_source, answer_depth``. ``answer_depth`` is the
    share of the prompt's text before the needle, where there is one; ``text_source`` is ``"generated"`` where no text
    is needed.

    Raises
    ------
    ValueError
        For an unknown task or a length with no room for it.
    OSError
        If a package or a text is missing.
    """
    rules = task(name)
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    made, text_source = ruler_generators.samples(
        rules.generator,
        name,
        length,
        count,
        CountedTokenizer(tokenizer, chat, _UNCOUNTED.get(name.partition("_")[0], 0), length),
        places=places,
        seed=stable_number("ruler", name, length, seed),
        max_new_tokens=rules.max_new_tokens,
    )
    found = []
    for number, doc in enumerate(made):
        opening = doc["gen_prefix"]
        prompt = chat_prompt(tokenizer, doc["input"]) + opening if chat else doc["input"] + rules.delimiter + opening
        answers = list(doc["outputs"])
        place = doc["input"].find(answers[0]) if name.startswith("niah") and len(answers) == 1 else -1
        found.append(
            {"dataset": name, "_id": f"{name}-{length}-{seed}-{number}", "prompt": prompt, "answers": answers,
             "length": length, "chat": chat, "text_source": text_source,
             "answer_depth": place / len(doc["input"]) if place >= 0 else None}
        )  # fmt: skip
    return found


def build_prompt(record: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids of a record's prompt."""
    return tokenise_prompt(tokenizer, record["prompt"], chat=record["chat"])


def score(record: Mapping[str, Any], prediction: str) -> float:
    """lm-eval's metric, 0 to 1: the share of the answers that are in the prediction.

    For questions too: RULER's own code is content with one of the answers, lm-eval's counts their share.
    """
    function = task(record["dataset"]).metric.split(".")[1]
    doc = {"max_length": record["length"], "outputs": record["answers"]}
    return float(getattr(_common(), function)(doc, [prediction])[str(record["length"])])


def resolve(names: Iterable[str]) -> list[str]:
    """Tasks of a list of task and set names, in order, each once."""
    found = [name for given in names for name in SETS.get(given, (given,))]
    for name in found:
        if name not in TASKS:
            raise ValueError(f"task={name!r} is unknown: choose among {', '.join((*SETS, *TASKS))}.")
    return list(dict.fromkeys(found))


@functools.cache
def _common() -> types.ModuleType:
    return private_module(task_folder("ruler") / "common_utils.py", {})
