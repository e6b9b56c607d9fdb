"""Exact copies, second questions and LongBench v2: prompts that fit, and what counts as right."""

from __future__ import annotations

import json

import pytest

from sdtp_lib.data import copying, longbench2


@pytest.mark.parametrize("name", copying.TASKS)
def test_prompt_turns_and_new_tokens_fit_and_the_answer_stands_in_the_prompt(name, tiny_tokenizer):
    found = copying.records(name, 3000, 3, tiny_tokenizer)
    assert copying.records(name, 3000, 2, tiny_tokenizer) == found[:2]
    for record in found:
        turns = 2 if record["follow_up"] else 1
        used = len(copying.build_prompt(record, tiny_tokenizer)) + turns * record["max_new_tokens"]
        assert 2000 < used + len(copying.follow_up_ids(record, tiny_tokenizer)) <= 3000
        (answer,) = record["answers"]
        assert record["prompt"].count(answer) == 1 and 0 <= record["answer_depth"] < 1
        assert copying.score(record, f"Here it is:\n{answer}\nThat is all.") == 1.0 and copying.score(record, "") == 0.0
    assert len({record["prompt"] for record in found}) == 3


def test_a_copy_counts_up_to_its_first_wrong_word_and_a_functions_indentation_counts():
    quote = {"dataset": "quote_sentence", "follow_up": None, "answers": ["We meet here in a time of peace."]}
    assert copying.score(quote, "It says: We meet here in\na  time of peace.") == 1.0
    assert copying.score(quote, "We meet there. We meet here in a good time.") == 0.0
    assert copying.score(quote, "We meet here in a time of peace, friends.") == 2 / 3
    function = {"dataset": "repeat_function", "follow_up": None, "answers": ["def f(x):\n    y = x\n    return y"]}
    assert copying.score(function, "```python\ndef f(x):\n    y = x  \n    return y\n```") == 1.0
    assert copying.score(function, "def f(x):\n  y = x\n  return y") == pytest.approx(1 / 3)


def test_the_second_question_asks_for_another_fact_than_the_first(tiny_tokenizer):
    record = copying.records("second_question", 2000, 1, tiny_tokenizer)[0]
    first = record["prompt"].rpartition("Question: ")[2]
    assert record["follow_up"].rpartition("Question: ")[2] != first
    turn = tiny_tokenizer.decode(copying.follow_up_ids(record, tiny_tokenizer))
    assert turn.startswith("<|im_end|>") and turn.endswith("<|im_start|>assistant\n") and record["follow_up"] in turn
    assert copying.score(record, f"It is {record['answers'][0]}.") == 1.0
    (asked,) = record["first_answers"]
    assert asked != record["answers"][0] and f"{first.partition('the ')[2].rstrip('?')} is {asked}" in record["prompt"]
    assert copying.score(record, f"It is 1{record['answers'][0]}.") == 0.0, "a part of a number is another number"


@pytest.mark.parametrize("name", copying.TASKS)
def test_a_length_with_no_room_is_refused(name, tiny_tokenizer):
    with pytest.raises(ValueError, match=f"length=250 has no room for {name}"):
        copying.records(name, 250, 1, tiny_tokenizer)
    with pytest.raises(ValueError, match="task='copy' is unknown"):
        copying.records("copy", 1000, 1, tiny_tokenizer)


RECORD = {"domain": "Single-Document QA", "difficulty": "easy", "length": "short", "question": " Which colour? ",
          "choice_A": "red", "choice_B": "green", "choice_C": "blue", "choice_D": "none", "answer": "B",
          "context": "House {1} is green. " * 80}  # fmt: skip


def test_longbench2_asks_as_lm_eval_does_and_reads_the_choice_from_the_answer(tmp_path, tiny_tokenizer):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.json").write_text(json.dumps([RECORD | {"_id": "b"}, RECORD | {"_id": "a"}]))
    records = longbench2.read_records(tmp_path)
    assert [record["_id"] for record in records] == ["a", "b"]
    ids, cut = longbench2.build_prompt(records[0], tiny_tokenizer, 4000)
    prompt = tiny_tokenizer.decode(ids)
    assert (
        not cut and "House {1} is green." in prompt and "question: Which colour?\nChoices:\n(A) red\n(B) gr" in prompt
    )
    short, cut = longbench2.build_prompt(records[0], tiny_tokenizer, 400)
    assert cut and len(short) < 450 and "(D) none" in tiny_tokenizer.decode(short)
    right = [longbench2.score(records[0], text) for text in ("(B) green", "B", "The correct answer is B.", "A or (B)")]
    assert right == [1.0] * 4
    assert [longbench2.score(records[0], text) for text in ("A", "Because", "")] == [0.0] * 3
    (tmp_path / "data.json").write_text(json.dumps([{"_id": "a"}]))
    with pytest.raises(ValueError, match=r"data.json, record 0 lacks \['domain'"):
        longbench2.read_records(tmp_path)
    with pytest.raises(OSError, match="official data.json"):
        longbench2.read_records(tmp_path / "elsewhere")
