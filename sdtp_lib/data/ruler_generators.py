"""lm-eval's generators of RULER samples, run as private copies: with a given tokenizer, number of samples and texts.

They draw from Python's and numpy's global draws (put back afterwards), print, download on import and try for ever where
nothing fits; here they do none of that.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdtp_lib.data import ruler_texts
from sdtp_lib.data.lm_eval_files import private_module, task_folder
from sdtp_lib.data.samples import chat_prompt, tokenise_prompt

# The functions of lm-eval that make so many samples.
_MAKERS = ("generate_samples", "sys_word_pair_random", "sys_vartrack_w_noise_random", "sys_kwext")


def samples(
    generator: str,
    name: str,
    length: int,
    count: int,
    tokenizer: CountedTokenizer,
    *,
    places: Sequence[str],
    seed: int,
    max_new_tokens: int,
) -> tuple[Iterable[Mapping[str, Any]], str]:
    """lm-eval's samples ``input, outputs, gen_prefix, ...`` of a task, and the place that its texts come from.

    Parameters
    ----------
    generator
        ``"module.function"`` of lm-eval's ruler folder.
    places
        See `ruler_texts`; the place is ``"generated"`` where no text is needed.

    Raises
    ------
    ValueError
        For a length with no room for the task.
    OSError
        If a package or a text is missing.
    """
    file, function = generator.split(".")
    source = ["generated"]
    module = _module(file, tokenizer, count, places, source)
    with _seeded(seed):
        _refuse_too_short(name, module, tokenizer, length, max_new_tokens)
        try:
            made = getattr(module, function)(max_seq_lengths=[length])
        except ValueError as error:  # of the needle tasks, in the words of lm-eval's own settings
            if "max_seq_length" not in str(error):
                raise
            raise ValueError(f"length={length} has no room for {name}: give a longer one.") from error
    return made["test"], source[0]


class CountedTokenizer:
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


def _module(
    file: str, tokenizer: CountedTokenizer, count: int, places: Sequence[str], source: list[str]
) -> types.ModuleType:
    """lm-eval's module of a task, making ``count`` samples with our tokenizer and texts; ``source`` gets the place."""

    def haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return needles().get_haystack(type_haystack)
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
        given["generate_samples"] = needles().generate_samples
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


def _refuse_too_short(
    name: str, module: types.ModuleType, tokenizer: CountedTokenizer, length: int, max_new_tokens: int
) -> None:
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
    if least + max_new_tokens + 50 > length:
        raise ValueError(f"length={length} has no room for {name}: give at least {least + max_new_tokens + 50}.")


@functools.cache
def needles() -> types.ModuleType:
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
