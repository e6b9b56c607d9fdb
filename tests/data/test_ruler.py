"""RULER by lm-eval's own code: lengths, draws, scores, texts by place, and no look at a network."""

from __future__ import annotations

import json
import random
import sys
import types

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from sdtp_lib.data import ruler, ruler_generators, ruler_texts
from sdtp_lib.data.lm_eval_files import private_module, settings, task_folder
from sdtp_lib.data.texts import stable_number


class Words:
    """One token per word, as many as a real tokenizer has for plain text; no chat format."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [stable_number(word) % 120 + 6 for word in text.split()]}


@pytest.fixture(autouse=True, scope="module")
def few_words():
    """A stand-in for the word lists of ``wonderwords``: the real six million pairs take seconds and a gigabyte."""

    class RandomWord:
        def __init__(self):
            kinds = {"noun": 60, "adjective": 30, "verb": 30}
            self._categories = {name: [f"{name}{n}" for n in range(count)] for name, count in kinds.items()}
            self._categories |= {f"{name}s": words for name, words in list(self._categories.items())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", types.SimpleNamespace(RandomWord=RandomWord))
        ruler_generators.needles.cache_clear()
        yield
    ruler_generators.needles.cache_clear()


def records(name, length=1024, count=2, tokenizer=None, **more):
    return ruler.records(name, length, count, tokenizer or Words(), places=("embedded",), **more)


@pytest.mark.parametrize("name", ruler.TASKS)
def test_each_task_fits_into_its_length_scores_its_answers_and_draws_the_same_again(name):
    found = records(name, count=3)
    assert records(name) == found[:2], "the first items do not depend on how many follow"
    assert records(name, seed=1)[0]["prompt"] != found[0]["prompt"]
    new_tokens = ruler.task(name).max_new_tokens
    for record in found:
        assert 100 < len(ruler.build_prompt(record, Words())) + new_tokens <= 1024
        assert ruler.score(record, "They are " + ", ".join(record["answers"])) == 1.0
        assert ruler.score(record, "nothing") == 0.0
        assert all(answer.lower() in record["prompt"].lower() for answer in record["answers"])
    assert found[0]["text_source"] == ("generated" if name in ruler.SETS["offline"] else "embedded")
    if name.startswith("niah") and len(found[0]["answers"]) == 1:
        document = found[0]["prompt"].rpartition(" The special magic")[0]
        place = document.find(found[0]["answers"][0]) / len(document)
        assert found[0]["answer_depth"] == pytest.approx(place)
    else:
        assert found[0]["answer_depth"] is None


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "vt", "cwe", "qa_2"])
def test_a_long_prompt_fits_too_and_is_not_read_again_at_every_size_on_the_way(name):
    class Counting(Words):
        read = 0

        def __call__(self, text, add_special_tokens=True):
            ids = super().__call__(text, add_special_tokens)
            self.read += len(ids["input_ids"])
            return ids

    tokenizer = Counting()
    (record,) = records(name, 16384, 1, tokenizer)
    assert tokenizer.read < 16384 * 16, "every size on the way alone would be 20 to 100 prompts"
    used = len(ruler.build_prompt(record, tokenizer)) + ruler.task(name).max_new_tokens
    assert used <= 16384 and (used > 12000 or name == "cwe"), "cwe ends where the short word list does"


def test_a_score_is_the_share_of_the_answers_also_of_a_questions():
    record = records("niah_multivalue", count=1)[0]
    assert len(record["answers"]) == 4 and ruler.score(record, " ".join(record["answers"][:2])) == 0.5
    question = records("qa_2", count=1)[0] | {"answers": ["Leiden", "Jena"]}
    assert ruler.score(question, "in jena") == 0.5, "unlike RULER's own string_match_part"


def test_the_prompt_has_the_chat_format_and_the_answers_opening_or_lm_evals_plain_form(tiny_tokenizer):
    (chat,) = records("niah_single_1", 1400, 1, tiny_tokenizer)
    opening = chat["prompt"].rpartition("<|im_start|>assistant\n")[2]
    assert opening.startswith("The special magic number for") and opening.endswith("is")
    assert len(ruler.build_prompt(chat, tiny_tokenizer)) + 128 <= 1400
    (plain,) = records("cwe", count=1)
    assert "above list?\n\nAnswer: The top 10 words" in plain["prompt"] and not plain["chat"]
    (unchatted,) = records("niah_single_1", 1400, 1, tiny_tokenizer, chat=False)
    assert "<|im_start|>" not in unchatted["prompt"] and not unchatted["chat"]


def test_nothing_is_downloaded_or_printed_and_other_draws_go_on_as_if_nothing_had_been(monkeypatch, capsys):
    import nltk

    def refuse(*_args, **_kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr("requests.get", refuse)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - what lm-eval draws from
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    for name in ("niah_single_2", "vt", "cwe", "qa_1"):
        records(name, count=1)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "length", "message"), [
    ("vt", 200, "length=200 has no room for vt"), ("cwe", 150, "length=150 has no room for cwe"),
    ("fwe", 60, "length=60 has no room for fwe"),
    ("niah_single_1", 200, "length=200 has no room for niah_single_1: give a longer one"),
])  # fmt: skip
def test_a_length_with_no_room_is_refused_where_lm_eval_would_try_for_ever(name, length, message):
    with pytest.raises(ValueError, match=message):
        records(name, length)


def test_a_tokenizer_that_cuts_words_small_has_no_room_for_vts_example(tiny_tokenizer):
    with pytest.raises(ValueError, match="vt: its example takes"):
        records("vt", 2000, 1, tiny_tokenizer)


def test_unknown_tasks_are_named_and_sets_are_resolved_in_order():
    assert ruler.resolve(["vt", "offline"])[:2] == ["vt", "niah_single_1"] and len(ruler.resolve(["ruler"])) == 13
    with pytest.raises(ValueError, match="task='niah_9' is unknown: choose among ruler, niah, offline, niah_single_1"):
        ruler.resolve(["niah_9"])
    with pytest.raises(ValueError, match="task='niah' is unknown"):
        ruler.task("niah")


def test_without_the_word_lists_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    ruler_generators.needles.cache_clear()
    for name in ("niah_single_1", "cwe"):
        with pytest.raises(OSError, match=r"lack wonderwords: pip install 'sdtp-lib\[eval\]'"):
            records(name)


def test_essays_come_from_the_first_place_that_has_them(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("third  fourth\n")
    (tmp_path / "a.txt").write_text("first second")
    assert ruler_texts.essay_words([str(tmp_path), "embedded"])[0] == ["first", "second", "third", "fourth", ""]
    assert ruler_texts.essay_words([str(tmp_path)])[1] == f"folder {tmp_path.name}"
    assert ruler_texts.essay_words([str(tmp_path / "none"), "embedded"])[1] == "embedded"

    def unreachable(_name):
        raise OSError("no network")

    monkeypatch.setattr(ruler_texts, "hub_records", unreachable)
    assert ruler.records("niah_single_2", 1024, 1, Words())[0]["text_source"] == "embedded"
    with pytest.raises(OSError, match="essays: none of .*hub: no network"):
        ruler_texts.essay_words(["hub"])
    monkeypatch.setattr(ruler_texts, "hub_records", lambda _name: [{"text": "An essay. " * 900}])
    assert ruler.records("niah_single_2", 1024, 1, Words())[0]["text_source"] == "hub"


def test_questions_of_a_folder_are_read_by_lm_evals_own_reader(tmp_path):
    paragraphs = [
        {"context": f"House {n} is green. " * 6,
         "qas": [{"question": f"Which colour has house {n}?", "answers": [{"text": "green"}], "is_impossible": False},
                 {"question": "Which age?", "answers": [], "is_impossible": True}]}
        for n in range(30)
    ]  # fmt: skip
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = ruler.records("qa_1", 1024, 3, Words(), places=(str(tmp_path), "embedded"))
    assert {record["text_source"] for record in found} == {f"folder {tmp_path.name}"}
    assert found[2]["answers"] == ["green"] and "Which colour has house 2?" in found[2]["prompt"]
    with pytest.raises(ValueError, match="count=31: folder .* has 30 questions of squad"):
        ruler.records("qa_1", 1024, 31, Words(), places=(str(tmp_path),))


def test_embedded_questions_are_answered_by_the_documents_they_name():
    for name in ("squad", "hotpotqa"):
        (asked, documents), _ = ruler_texts.questions(name, ["embedded"], None)
        assert len(asked) >= 200 and len(documents) > 500 and len(set(documents)) == len(documents)
        for question in asked[:200]:
            own = [documents[number] for number in question["context"]]
            assert question["outputs"][0] in own[-1], question
            assert len(own) == (1 if name == "squad" else 2)


def test_lm_evals_files_are_read_with_what_they_include_and_their_code_stays_private(tmp_path):
    assert settings(task_folder("ruler") / "cwe.yaml")["process_results"] == "common_utils.process_results"
    (tmp_path / "code.py").write_text(
        "from lm_eval.tasks.nothing import given\n\ndef loud():\n    raise AssertionError\n\nloud()\n\n"
        "def own():\n    return 'its own'\n\ndef told():\n    return given(own())\n"
    )
    module = private_module(tmp_path / "code.py", {"given": str.upper, "own": lambda: "ours"}, without=["loud"])
    assert module.told() == "OURS" and module.__name__ not in sys.modules
    assert "lm_eval.tasks.nothing" not in sys.modules


def test_the_real_word_lists_have_the_categories_that_lm_eval_reads(monkeypatch):
    monkeypatch.delitem(sys.modules, "wonderwords")
    wonderwords = pytest.importorskip("wonderwords")
    kinds = wonderwords.RandomWord()._categories
    assert {"noun", "adjective", "verb", "nouns", "adjectives", "verbs"} <= set(kinds) and len(kinds["noun"]) > 1000
