"""Evidence: the tokens that answer a question are told by how its prompt is made, on the training side alone."""

from __future__ import annotations

import re

import pytest

from sdtp_lib.data import evidence
from sdtp_lib.data.evidence import PARTS, evidence_prompts
from sdtp_lib.data.samples import dolly_split

STORY = "The mill by the river ground corn for the whole valley. Its wheel never stood still in spring. "


@pytest.fixture(scope="module")
def records():
    return [
        {"id": f"{number:016x}", "instruction": f"Which number has house {number}?",
         "response": f"House {number} has number {number * 7 + 1000}.", "category": "closed_qa",
         "context": f"{STORY}House {number} has number {number * 7 + 1000}. Its roof is red."}
        for number in range(60)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def samples(tiny_tokenizer, records):
    return evidence_prompts(tiny_tokenizer, 68, records, lengths=(1000, 1400))


def told(tokenizer, sample, least):
    """The text of the tokens with at least so much evidence."""
    ids = [token for token, much in zip(sample["prompt_ids"], sample["evidence"], strict=True) if much >= least]
    return tokenizer.decode(ids)


def of_kind(samples, kind):
    return [sample for sample in samples if sample["id"].startswith(f"evidence-{kind}-")]


def test_all_kinds_are_there_in_their_parts_and_each_token_has_a_number(samples, tiny_tokenizer, records):
    assert samples == evidence_prompts(tiny_tokenizer, 68, records, lengths=(1000, 1400)), "the same each time"
    assert len({sample["id"] for sample in samples}) == len(samples)
    for kind in PARTS:
        assert of_kind(samples, kind), kind
    assert len(of_kind(samples, "packed")) > len(of_kind(samples, "table"))
    for sample in samples:
        assert len(sample["evidence"]) == len(sample["prompt_ids"]) <= 1420
        assert min(sample["evidence"]) >= 0 and max(sample["evidence"]) == 1 and sample["response_ids"]
        share = sum(much > 0 for much in sample["evidence"]) / len(sample["evidence"])
        assert 0 < share < 0.75, "most of a prompt is no evidence"


def test_of_packed_records_the_sentence_with_the_answer_has_most_and_other_records_have_none(
    samples, tiny_tokenizer, records
):
    by_id = {record["id"]: record for record in records}
    packed = of_kind(samples, "packed")
    for sample in packed:
        record = by_id[sample["id"].split("-")[-1]]
        assert dolly_split(record["id"]) == "train"
        most, any_of_it = (told(tiny_tokenizer, sample, least) for least in (1.0, 0.01))
        assert record["response"].rstrip(".") in most and "roof" not in most
        assert "roof is red" in any_of_it and record["instruction"] in any_of_it
        others = {int(number) for number in re.findall(r"House (\d+) has", any_of_it)}
        assert others == {int(re.search(r"\d+", record["instruction"])[0])}, "fillers are no evidence"


def test_of_planted_facts_rows_and_quotations_the_place_of_the_answer_has_most(samples, tiny_tokenizer):
    for sample in of_kind(samples, "values"):
        assert all(value in told(tiny_tokenizer, sample, 1.0) for value in sample["values"])
        assert sample["question"].split()[0] in told(tiny_tokenizer, sample, 0.8)
    for sample in of_kind(samples, "needles"):
        answer = sample["response"].rstrip(".").split(" is ")[-1]
        text = told(tiny_tokenizer, sample, 1.0)
        assert answer in text and len(text) < 200, text
    for sample in of_kind(samples, "table"):
        answer = re.search(r" is ([^ ]+?)\.(?:\s|<|$)", sample["response"])[1]  # the first of two
        assert answer in told(tiny_tokenizer, sample, 1.0)
    for sample in of_kind(samples, "quoted"):
        for part in (sample["response"][:40], sample["response"][-40:]):
            assert part.strip() in told(tiny_tokenizer, sample, 1.0)


def test_an_answer_inside_another_word_or_sentence_is_no_evidence(tiny_tokenizer):
    """The colour red had been seen in "incurred" and "the reduction"."""
    found = evidence._needles(tiny_tokenizer, 90, [], (1000, 1100), 0)
    some = [sample for sample in found if sample["category"] == "multi_doc_qa"]
    assert len(some) == 30 and any("red" in sample["response"] for sample in some)
    for sample in some:
        assert told(tiny_tokenizer, sample, 1.0).strip() == sample["response"].strip()


def test_a_row_that_cannot_be_read_without_the_tables_head_comes_with_it(tiny_tokenizer):
    found = evidence._tables(tiny_tokenizer, 24, [], (900, 1000), 0)
    bare = [sample for sample in found if "item" not in told(tiny_tokenizer, sample, 1.0)]
    assert 0 < len(bare) < len(found)
    for sample in bare:
        assert sample["table_head"] in told(tiny_tokenizer, sample, 0.8)
    for sample in found:
        text = told(tiny_tokenizer, sample, 1.0)
        assert sample["question"] not in text and text.strip().count("\n") == 0, "one row"


def test_where_a_chat_format_changes_the_text_there_is_no_quotation(tiny_tokenizer, monkeypatch):
    made = evidence.chat_prompt
    monkeypatch.setattr(evidence, "chat_prompt", lambda tokenizer, text: " ".join(made(tokenizer, text).split()))
    pool = ["One small sentence with several rare words stands here. " * 3 + "\n\nAnother paragraph."]
    assert not [sample for sample in evidence._quoted(tiny_tokenizer, 6, [{"context": pool[0]}], (900, 1000), 0)
                if "\n" in sample["prompt"]]  # fmt: skip


def test_a_fact_at_the_very_beginning_is_evidence_from_its_first_letter():
    assert evidence._around("X is 4821. Rain.", "4821") == [(0, 10, 1.0)]


def test_where_tokens_are_not_those_of_the_text_there_is_no_sample(tiny_tokenizer):
    sample = {"prompt": "The lift is here. The key is 4821.", "prompt_ids": [5, 6, 7]}
    assert evidence._told(tiny_tokenizer, sample, [(18, 34, 1.0)]) is None


def test_a_tokenizer_that_tells_no_places_is_refused_with_the_remedy(records):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer=Slow does not say which characters"):
        evidence_prompts(Slow(), 3, records)
    assert evidence_prompts(Slow(), 0, records) == [], "a recipe without evidence takes any tokenizer"
