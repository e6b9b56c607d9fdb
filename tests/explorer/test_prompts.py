"""Typed prompts and examples: one sentence where nothing can be pruned, and the places that a reader looks for."""

from __future__ import annotations

import pytest

from sdtp_lib.explorer.prompts import check_length, task_prompt, typed_prompt


def test_a_typed_prompt_has_document_and_question_in_the_chat_format(tiny_tokenizer):
    prompt = typed_prompt(tiny_tokenizer, "the sea\n", " is it wet? ")
    text = tiny_tokenizer.decode(prompt.ids)
    assert "<|im_start|>user" in text and "the sea\n\nis it wet?<|im_end|>" in text
    first, last = prompt.places["question"]
    assert tiny_tokenizer.decode(prompt.ids[first : last + 1]).strip() == "is it wet?"


def test_without_the_chat_format_the_text_alone_is_the_prompt(tiny_tokenizer):
    prompt = typed_prompt(tiny_tokenizer, "the sea", chat=False)
    assert "im_start" not in tiny_tokenizer.decode(prompt.ids) and "question" not in prompt.places


@pytest.mark.parametrize(("document", "question"), [("", ""), (" \n", "\n ")])
def test_an_empty_prompt_is_refused_in_one_sentence(tiny_tokenizer, document, question):
    with pytest.raises(ValueError, match="The prompt is empty"):
        typed_prompt(tiny_tokenizer, document, question)


def test_a_prompt_of_one_token_is_refused_in_one_sentence(tiny_tokenizer):
    with pytest.raises(ValueError, match="1 token"):
        typed_prompt(tiny_tokenizer, "x", chat=False)
    with pytest.raises(ValueError, match="0 token"):
        check_length([])


def test_a_model_without_chat_format_says_which_tick_to_take_away(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat format"):
        typed_prompt(tiny_tokenizer, "the sea")


def test_the_answers_place_is_the_one_beside_the_questions_name(tiny_tokenizer):
    context = "Boris was born in Vienna. " + "Some words stand between. " * 8 + "Celine was born in Vienna."
    record = {
        "input": "What is the birthplace of Celine?",
        "context": context,
        "answers": ["Vienna"],
        "dataset": "multi_doc_qa",
        "_id": "made-up",
    }
    prompt = task_prompt(record, tiny_tokenizer)
    first, last = prompt.places["answer"]
    assert tiny_tokenizer.decode(prompt.ids[first : last + 1]).strip() == "Vienna"
    assert "Celine was born in" in tiny_tokenizer.decode(prompt.ids[first - 24 : first])
