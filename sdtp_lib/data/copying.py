"""What an agent needs of a pruned prompt: copies that stay exact, and a second question on the same context.

``repeat_function``: Python functions of the standard library, one of which is to be written out again.
``quote_sentence``: running text (held-out documents), one sentence of which is to be quoted. ``second_question``: two
facts in running text; one is asked for first, so that a prompt that is pruned by that question must still know the
other. Knows no model; a tokenizer is passed in.
"""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.checked import one_of
from sdtp_lib.data import tasks
from sdtp_lib.data.samples import chat_prompt, tokenise_prompt
from sdtp_lib.data.texts import stable_number

TASKS = ("repeat_function", "quote_sentence", "second_question")
_LONGEST_COPY = 600  # characters of a function
_OPENING = 5  # words of a sentence that the question tells: repeating those is no copy
_MORE = 24  # new tokens beyond the copy itself
_PROGRAM = "Here are functions of a program.\n\n```python\n"
_QUOTE = 'Quote the sentence of this text that begins with "{}" word for word, and nothing else.'


def records(name: str, length: int, count: int, tokenizer: Any, *, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` records of a task at just below ``length`` tokens, new ones and a second turn included.

    Returns
    -------
    list of records ``dataset, _id, prompt, answers, length, max_new_tokens, answer_depth, follow_up``; ``follow_up``
    is a second user turn, whose answer is the one that counts, or None. Where there is one ``first_answers`` are those
    of the first.

    Raises
    ------
    ValueError
        For an unknown task or a length with no room for it.
    """
    one_of("task", name, TASKS)
    make = {"repeat_function": _function, "quote_sentence": _sentence, "second_question": _two_questions}[name]
    around = 2 * _tokens(tokenizer, chat_prompt(tokenizer, ""))  # for two turns
    found = []
    for number in range(count):
        identifier = f"{name}-{length}-{seed}-{number}"
        draw = random.Random(stable_number("copying", identifier))
        record = make(draw, tokenizer, length - around)
        if not record:
            raise ValueError(f"length={length} has no room for {name}: give more (600 with most tokenizers).")
        found.append({"dataset": name, "_id": identifier, "length": length, "follow_up": None} | record)
    return found


def build_prompt(record: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids of a record's (first) user turn in the chat format."""
    return tokenise_prompt(tokenizer, chat_prompt(tokenizer, record["prompt"]), chat=True)


def follow_up_ids(record: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """What stands between the first answer and the second one: end of turn, second question, the answer's opening."""
    if not record["follow_up"]:
        return []
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(f"\n\n{record['follow_up']}\n", add_special_tokens=False)["input_ids"]
    mark = "\ufffcanswer\ufffc"
    turns = [("user", record["prompt"]), ("assistant", mark), ("user", record["follow_up"])]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text.partition(mark)[2], add_special_tokens=False)["input_ids"]


def score(record: Mapping[str, Any], prediction: str) -> float:
    """Of a copy: the share of its words (of a function: lines, indented as they are) before the first wrong one,
    not counting what the question itself tells of a sentence.

    1.0 is an exact copy, wherever it stands in the prediction. Of a question: 1.0 where the answer is there as a word.
    """
    (answer,) = record["answers"]
    if record["follow_up"]:
        return float(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prediction) is not None)
    cut = _lines if record["dataset"] == "repeat_function" else str.split
    wanted, given = cut(answer), cut(prediction)
    starts = [place for place, piece in enumerate(given) if piece == wanted[0]]
    told = _OPENING if record["dataset"] == "quote_sentence" else 0
    right = max((_agreeing(wanted, given[start:]) for start in starts), default=0)
    return max(0, right - told) / (len(wanted) - told)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n")]


def _agreeing(wanted: Sequence[str], given: Sequence[str]) -> int:
    wrong = (place for place, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b)
    return next(wrong, min(len(wanted), len(given)))


def _function(draw: random.Random, tokenizer: Any, room: int) -> dict[str, Any]:
    named = list(functions().items())
    draw.shuffle(named)
    name, source = next(pair for pair in named if len(pair[1]) <= _LONGEST_COPY)
    ask = f"Repeat the function `{name}` word for word. Give the code only."
    used = _tokens(tokenizer, _PROGRAM + ask) + 2 * _tokens(tokenizer, source) + _MORE
    others = [other for _, other in named if other != source]
    shown = others[: _fitting(tokenizer, others, room - used)] if room > used else []
    if not shown:
        return {}
    shown.insert(draw.randrange(len(shown) + 1), source)
    code = "\n\n\n".join(shown)
    return _copy(tokenizer, f"{_PROGRAM}{code}\n```\n\n{ask}", source)


def _sentence(draw: random.Random, tokenizer: Any, room: int) -> dict[str, Any]:
    text = _running_text(draw, tokenizer, room)
    longest = max((_tokens(tokenizer, sentence) for sentence in text), default=0)
    used = _tokens(tokenizer, _QUOTE) + 2 * longest + _MORE
    text = text[: _fitting(tokenizer, text, room - used)]
    openings = [" ".join(sentence.split()[:_OPENING]) for sentence in text]
    usable = [
        (opening, sentence)
        for opening, sentence in zip(openings, text, strict=True)
        if len(sentence.split()) >= 12 and openings.count(opening) == 1
    ]
    if not usable:
        return {}
    opening, sentence = draw.choice(usable)
    return _copy(tokenizer, f"{' '.join(text)}\n\n{_QUOTE.format(opening)}", sentence)


def _copy(tokenizer: Any, prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [answer], "max_new_tokens": _tokens(tokenizer, answer) + _MORE,
            "answer_depth": prompt.find(answer) / len(prompt)}  # fmt: skip


def _two_questions(draw: random.Random, tokenizer: Any, room: int) -> dict[str, Any]:
    question, _, facts = tasks.needles("test", draw, 2)
    told = re.compile(r"The (.+) is (\d+)\.")
    (_, first), (what, code) = (told.fullmatch(fact).groups() for fact in facts)
    later = f"One more question about the text.\n\nQuestion: What is the {what}?"
    new_tokens = tasks.MOST_NEW_TOKENS["needle"]
    used = sum(_tokens(tokenizer, text) for text in (*facts, question, later))
    sentences = _running_text(draw, tokenizer, room - used - 2 * new_tokens - 80)
    if not sentences:
        return {}
    for fact in facts:
        sentences.insert(draw.randrange(len(sentences) + 1), fact)
    prompt = tasks.TEMPLATES["needle"].format(context=" ".join(sentences), input=question)
    return {"prompt": prompt, "answers": [code], "max_new_tokens": new_tokens, "follow_up": later,
            "first_answers": [first], "answer_depth": prompt.find(facts[1]) / len(prompt)}  # fmt: skip


def _running_text(draw: random.Random, tokenizer: Any, room: int) -> list[str]:
    following = tasks.running_text(tasks.haystack("test"), draw)
    sentences = [following() for _ in range(max(1, room // 4))]
    return sentences[: _fitting(tokenizer, sentences, room)]


def _fitting(tokenizer: Any, pieces: Iterable[str], room: int) -> int:
    """How many of ``pieces``, from the first, go into ``room`` tokens; two per piece are for what joins them."""
    count = 0
    for piece in pieces:
        room -= _tokens(tokenizer, piece) + 2
        if room < 0:
            break
        count += 1
    return count


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.cache
def functions() -> dict[str, str]:
    """Source of functions of the standard library, by name: of the Python version that rows name."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and 5 <= node.end_lineno - node.lineno <= 25:
                twice |= {node.name} & found.keys()
                found[node.name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return {name: source for name, source in found.items() if name not in twice}
