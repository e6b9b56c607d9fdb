"""What training prompts are made of: tables, conversations, second questions, code, and what stays out."""

from __future__ import annotations

import random

import pytest

from sdtp_lib.data import long_values, lookups, test_sets, training_mix
from sdtp_lib.data.conversations import chats, second_questions
from sdtp_lib.data.samples import code_documents, load_instructions, pack_contexts, reference_documents

STORY = "The mill by the river ground corn for the whole valley, and its wheel never stood still in spring. "


@pytest.fixture(scope="module")
def records():
    return [
        {"id": f"{number:016x}", "instruction": f"Which number has house {number}?",
         "response": f"Number {number * 7}.", "category": "closed_qa",
         "context": f"{STORY}House {number} has number {number * 7}."}
        for number in range(40)
    ]  # fmt: skip


def test_a_table_holds_the_asked_cell_once_among_keys_that_look_alike(tiny_tokenizer):
    samples = lookups.table_lookups(tiny_tokenizer, tokens=(700, 900), count=12)
    assert samples == lookups.table_lookups(tiny_tokenizer, tokens=(700, 900), count=12)
    for sample in samples:
        assert 550 <= len(sample["prompt_ids"]) <= 920
        asked = sample["response"].split(" is ")[0].split()[-1]
        assert sample["prompt"].count(asked) == 2, "in the table and in the question"
        value = sample["response"].split(" is ")[1].split("<")[0].split("\n")[0].rstrip(".")
        assert value in sample["prompt"]
    held = lookups.table_lookups(tiny_tokenizer, tokens=(700, 900), count=12, split="heldout")
    heads = [set(lookups._COLUMNS[split]) for split in ("train", "heldout")]
    assert not heads[0] & heads[1] and not {s["prompt"] for s in samples} & {s["prompt"] for s in held}
    keys = lookups._near_identical_keys(random.Random(1))
    made = [keys() for _ in range(200)]
    assert len(set(made)) == 200
    assert sum(sorted(a) == sorted(b) for a in made for b in made) > 300, "many are digits of another, changed round"


def test_a_long_value_stands_whole_in_the_text_and_in_the_answer(tiny_tokenizer):
    sizes = {"tokens": (700, 900), "count": 24}
    samples = long_values.long_values(tiny_tokenizer, **sizes)
    assert samples == long_values.long_values(tiny_tokenizer, **sizes)
    begun = several = crowded = 0
    for number, sample in enumerate(samples):
        assert 550 <= len(sample["prompt_ids"]) <= 910
        prompt, values = sample["prompt"], sample["values"]
        several, begun = several + (len(values) > 1), begun + sample["response"].startswith(" ")
        assert sample["response"].endswith(f" {long_values._listed(values)}.")
        for value in values:
            assert prompt.count(value) == 1 and len(value) > 6, "in the text, once"
        if number % 4 == 0:
            assert len(values) == 1 and len(values[0]) == 36, "an identifier"
        crowded += max(prompt.count(noun) for noun in long_values._NOUNS["train"]) > 12
    assert several and crowded, "some ask for several values, some hide one among dozens of its kind"
    assert 0 < begun < len(samples), "some prompts end in the beginning of the answer, and the response goes on there"
    for seed in range(6):  # names, pairs of words, identifiers
        key = long_values._keys(random.Random(seed), [f"word{n}" for n in range(40)], ["Anna", "Bruno"])
        assert len({key() for _ in range(300)}) == 300, "all that is asked for, and no more: no key comes twice"
    assert not any("special magic" in sample["prompt"] for sample in samples), "RULER's wording is not trained on"
    held = long_values.long_values(tiny_tokenizer, **sizes, split="heldout")
    assert not {s["prompt"] for s in samples} & {s["prompt"] for s in held}
    assert not set(long_values._NOUNS["train"]) & set(long_values._NOUNS["heldout"])
    assert len(set(long_values._WORDINGS["train"]) & set(long_values._WORDINGS["heldout"])) == 1, "the plainest one"


def test_a_second_question_is_in_the_response_and_no_label_counts_it(records, tiny_tokenizer):
    tables = lookups.table_lookups(tiny_tokenizer, tokens=(900, 1200), count=6)
    asked_twice = [sample for sample in tables if "loss_mask" in sample]
    packed = second_questions(records, tiny_tokenizer, tokens=(900, 1200), count=4)
    assert len(asked_twice) == 2 and len(packed) == 4
    for sample in (*asked_twice, *packed):
        ids, mask = sample["response_ids"], sample["loss_mask"]
        assert len(ids) == len(mask)
        between = tiny_tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if not counts])
        assert "<|im_start|>user" in between and "?" in between and between.endswith("assistant\n")
        answers = tiny_tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
        assert "?" not in answers and mask[0] and mask[-1]
    for sample in packed:
        for answer in sample["response"].split("Number ")[1:]:
            assert f"has number {answer.split('.')[0]}." in sample["prompt"], "both contexts are there"


def test_a_conversation_asks_last_about_a_text_of_an_early_turn(records, tiny_tokenizer):
    samples = chats(records, tiny_tokenizer, tokens=(900, 1200), count=5)
    assert len(samples) == 5
    for sample in samples:
        record = next(record for record in records if sample["id"] == "chat-" + record["id"])
        prompt = sample["prompt"]
        assert 900 <= len(sample["prompt_ids"]) <= 1200 and prompt.count("<|im_start|>user") > 2
        assert prompt.count(record["context"]) == prompt.count(record["instruction"]) == 1
        assert prompt.index(record["context"]) < len(prompt) / 2
        assert prompt.split("<|im_start|>user\n")[-1].startswith(record["instruction"])


def test_instructions_are_asked_at_the_end_the_start_and_in_the_middle(records, tiny_tokenizer):
    def places(**options):
        samples = pack_contexts(records, tiny_tokenizer, tokens=(900, 1000), **options)
        asked = {record["id"]: record["instruction"] for record in records}
        return [sample["prompt"].index(asked[sample["id"]]) / len(sample["prompt"]) for sample in samples]

    assert min(places()) > 0.9
    anywhere = places(asked_anywhere=True)
    assert sum(place < 0.1 for place in anywhere) > 3 < sum(place > 0.9 for place in anywhere)
    assert sum(0.3 < place < 0.7 for place in anywhere) > 3


def test_code_is_split_by_module_and_the_reference_is_trained_on_nowhere(tiny_tokenizer):
    train, heldout = ({document["id"] for document in code_documents(split)} for split in ("train", "heldout"))
    assert train and heldout and not train & heldout
    topics = [document["text"] for document in reference_documents()]
    assert len(topics) > 10
    embedded = load_instructions("embedded")
    assert not any(record["context"][:200] in topic for record in embedded for topic in topics)
    mix = training_mix.training_mix(tiny_tokenizer, 20, embedded, lengths=(600, 900))
    assert not any(sample["prompt"][100:300] in topic for sample in mix for topic in topics)
    sizes = {"prompt_tokens": 200, "count": 3}
    windows = test_sets.samples_of("reference", tiny_tokenizer, **sizes)
    assert len(windows) == 3 and all(len(window["prompt_ids"]) == 200 for window in windows)
    assert test_sets.samples_of("reference", tiny_tokenizer, split="train", **sizes) == []


def test_instructions_of_other_records_than_dollys_are_said(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SDTP_SHARED_DATA", str(tmp_path))
    with pytest.warns(UserWarning, match="instructions are made of the embedded records, for there is no dolly-15k"):
        test_sets.samples_of("instructions", tiny_tokenizer, prompt_tokens=400, count=1)


def test_one_training_prompt_in_twelve_is_longer_than_the_others(records, tiny_tokenizer):
    mix = training_mix.training_mix(tiny_tokenizer, 64, records, lengths=(900, 1000))
    longer = [len(sample["prompt_ids"]) for sample in mix if len(sample["prompt_ids"]) > 1000]
    assert 2 <= len(longer) <= 6 and max(longer) <= 2000
