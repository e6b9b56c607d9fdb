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

import contextlib
import functools
import random
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtp_lib.data import ruler_texts
from sdtp_lib.data.lm_eval_files import private_module, settings, task_folder
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
# The functions of lm-eval that make so many samples.
_MAKERS = ("generate_samples", "sys_word_pair_random", "sys_vartrack_w_noise_random", "sys_kwext")


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
    file, function = rules.generator.split(".")
    counted = _Counted(tokenizer, chat, _UNCOUNTED.get(name.partition("_")[0], 0), length)
    source = ["generated"]
    module = _module(file, counted, count, places, source)
    with _seeded(stable_number("ruler", name, length, seed)):
        _refuse_too_short(name, module, counted, length, rules)
        made = getattr(module, function)(max_seq_lengths=[length])
    found = []
    for number, doc in enumerate(made["test"]):
        opening = doc["gen_prefix"]
        prompt = chat_prompt(tokenizer, doc["input"]) + opening if chat else doc["input"] + rules.delimiter + opening
        answers = list(doc["outputs"])
        place = doc["input"].find(answers[0]) if name.startswith("niah") and len(answers) == 1 else -1
        found.append(
            {"dataset": name, "_id": f"{name}-{length}-{seed}-{number}", "prompt": prompt, "answers": answers,
             "length": length, "chat": chat, "text_source": source[0],
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


class _Counted:
    """The tokenizer as lm-eval's generators use it: only the number of ids matters, and that counts all of a prompt.

    Generators look for the right size by making longer and longer texts, 500 of them for 131,072 tokens. What is far
    below ``length`` is therefore estimated from the characters per token of the longest text so far; what could decide
    is counted.
    """

    def __init__(self, tokenizer: Any, chat: bool, uncounted: int, length: int) -> None:
        self._tokenizer, self._special, self._length = tokenizer, not chat, length
        around = tokenise_prompt(tokenizer, chat_prompt(tokenizer, ""), chat=True) if chat else []
        self._more = len(around) + uncounted
        self._longest, self._per_token = 0, 1.0

    def __call__(self, text: str) -> types.SimpleNamespace:
        count = int(len(text) / self._per_token)
        if len(text) > 1.5 * self._longest or not 2000 < count + self._more < 0.9 * self._length:
            count = len(self._tokenizer(text, add_special_tokens=self._special)["input_ids"])
            if len(text) > self._longest:
                self._longest, self._per_token = len(text), len(text) / max(1, count)
        return types.SimpleNamespace(input_ids=range(count + self._more))


def _module(file: str, tokenizer: _Counted, count: int, places: Sequence[str], source: list[str]) -> types.ModuleType:
    """lm-eval's module of a task, making ``count`` samples with our tokenizer and texts; ``source`` gets the place."""

    def haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return _needles().get_haystack(type_haystack)
        words, source[0] = ruler_texts.essay_words(places)
        return words

    given = _quiet() | {
        "DEFAULT_SEQ_LENGTHS": [],
        "get_tokenizer": lambda _name: tokenizer,
        "resolve_tokenizer_name": lambda _arguments: None,
        "get_haystack": haystack,
        "download_json": ruler_texts.read_json,
    }
    if file == "niah_utils":
        given["generate_samples"] = _needles().generate_samples
    with _words_at_hand():
        module = private_module(task_folder("ruler") / f"{file}.py", given)
    if file == "qa_utils":
        for name, reader in (("squad", module.read_squad), ("hotpotqa", module.read_hotpotqa)):
            setattr(module, reader.__name__, _questions_reader(name, reader, places, source, count))
    for maker in _MAKERS:
        if hasattr(module, maker):
            setattr(module, maker, _making(count, getattr(module, maker)))
    if hasattr(module, "RNG"):  # cwe has draws of its own beside Python's
        module.RNG = random
    return module


def _making(count: int, maker: Any) -> Any:
    @functools.wraps(maker)
    def made(*args: Any, **kwargs: Any) -> Any:
        # vt makes its one example by the same function.
        return maker(*args, **kwargs | {"num_samples": min(count, kwargs.get("num_samples", count))})

    return made


def _questions_reader(name: str, reader: Any, places: Sequence[str], source: list[str], count: int) -> Any:
    def read() -> tuple[list, list[str]]:
        (asked, documents), source[0] = ruler_texts.questions(name, places, reader)
        if len(asked) < count:
            raise ValueError(f"count={count}: {source[0]} has {len(asked)} questions of {name}: ask for fewer items.")
        return asked, documents

    return read


def _refuse_too_short(name: str, module: types.ModuleType, tokenizer: _Counted, length: int, rules: Task) -> None:
    """cwe, fwe and vt of lm-eval try for ever where nothing fits: their smallest prompt is measured first."""
    if name == "vt":  # its example must fit into 500 tokens
        example = len(tokenizer(module.generate_input_output(5, 1, 4, is_icl=True)[0]).input_ids)
        if example + 30 > 500:
            raise ValueError(
                f"vt: its example takes {example} of this tokenizer's tokens, and lm-eval allows 470: choose other "
                "tasks."
            )
        least = example + len(tokenizer(module.generate_input_output(10, 1, 4)[0]).input_ids)
    elif name == "cwe":
        least = len(tokenizer(module.generate_input_output(10, length)[1]).input_ids)
    elif name == "fwe":
        least = len(tokenizer(module.TEMPLATE).input_ids)
    else:
        return
    if least + rules.max_new_tokens + 50 > length:
        raise ValueError(f"length={length} has no room for {name}: give at least {least + rules.max_new_tokens + 50}.")


@functools.cache
def _common() -> types.ModuleType:
    return private_module(task_folder("ruler") / "common_utils.py", {})


@functools.cache
def _needles() -> types.ModuleType:
    """lm-eval's needles; kept, since its list of adjective-noun pairs takes seconds to make."""
    with _words_at_hand():
        return private_module(
            task_folder("ruler") / "prepare_niah.py",
            _quiet() | {"cached_sent_tokenize": _sentences},
            without=("download_nltk_resources",),
        )


@contextlib.contextmanager
def _words_at_hand() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        missing = error.name or getattr(error.__cause__, "name", None)  # one of lm-eval's modules wraps it
        raise OSError(f"RULER's generators lack {missing}: pip install 'sdtp-lib[eval]'") from error


@functools.lru_cache(maxsize=8)
def _sentences(text: str) -> list[str]:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return nltk.tokenize.punkt.PunktSentenceTokenizer().tokenize(text)
    return nltk.sent_tokenize(text)


def _quiet() -> dict[str, Any]:
    """Generators print and draw a bar for each sample."""
    return {"tqdm": lambda items, **_: items, "print": lambda *_, **__: None}


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
    """Python's and numpy's own draws, which lm-eval uses, from a seed; afterwards they go on as if nothing had been."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002
