"""Synthetic long-context tasks: official fields, answers that are there, train and test that share nothing."""

from __future__ import annotations

import re

import pytest

from sdtp_lib.data import tasks
from sdtp_lib.data.tasks import TASKS, as_prompt, as_sample, score, synthetic_tasks

OFFICIAL_FIELDS = ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]


def make(task, tokenizer, **options):
    return synthetic_tasks(task, tokenizer=tokenizer, **{"prompt_tokens": 4000, "count": 4, **options})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_records_have_the_official_fields_and_prompts_just_below_the_wanted_length(task, split, tiny_tokenizer):
    records = make(task, tiny_tokenizer, split=split)
    assert [list(record) for record in records] == [OFFICIAL_FIELDS] * 4
    assert len({record["_id"] for record in records}) == 4
    for record in records:
        length = len(as_sample(record, tiny_tokenizer)["prompt_ids"])
        assert 3700 <= length <= 4000
        assert record["answers"][0] in (
            record["context"] if task != "fewshot_classification" else record["all_classes"]
        )


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_records_and_another_seed_others(task, tiny_tokenizer):
    assert make(task, tiny_tokenizer) == make(task, tiny_tokenizer)
    assert make(task, tiny_tokenizer) != make(task, tiny_tokenizer, seed=1)
    assert make(task, tiny_tokenizer, count=2) == make(task, tiny_tokenizer)[:2]


def test_train_and_test_share_no_name_noun_code_fact_label_or_frame(tiny_tokenizer):
    assert not set(tasks.NAMES["train"].split()) & set(tasks.NAMES["test"].split())
    for table in (tasks._NOUNS, tasks._FACTS, tasks._CLASSES, tasks._FRAMES):
        assert not set(table["train"]) & set(table["test"])
    for kinds in (tasks._FACTS, tasks._CLASSES):
        words = {
            split: {w for v in kinds[split].values() for w in ([v] if isinstance(v, str) else v)} for split in kinds
        }
        assert not words["train"] & words["test"]
    codes = {s: {r["answers"][0] for r in make("needle", tiny_tokenizer, split=s, count=40)} for s in tasks.SPLITS}
    assert not codes["train"] & codes["test"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "fewshot_classification"])
def test_the_answer_mask_covers_the_answer_and_nothing_before_it(task, tiny_tokenizer):
    sample = as_sample(make(task, tiny_tokenizer, count=1)[0], tiny_tokenizer)
    answer = [t for t, inside in zip(sample["response_ids"], sample["answer_mask"], strict=True) if inside]
    text = tiny_tokenizer.decode(answer).strip()
    assert sample["response"].endswith(f"{text}.") and " is " not in text


def test_the_needle_is_in_the_text_once_and_stands_at_varied_depths(tiny_tokenizer):
    depths = []
    for record in make("needle", tiny_tokenizer, count=20):
        assert record["context"].count(record["answers"][0]) == 1
        depths.append(record["context"].index(record["answers"][0]) / len(record["context"]))
    assert min(depths) < 0.3 and max(depths) > 0.7


def test_a_variable_can_be_traced_to_its_value_through_assignments_in_order(tiny_tokenizer):
    for record in make("variable_tracking", tiny_tokenizer):
        values: dict[str, str] = {}
        for name, value in re.findall(r"Let (\w+) = (\w+)\.", record["context"]):
            values[name] = values.get(value, value)
        asked = re.search(r"value of (\w+)", record["input"])[1]
        assert values[asked] == record["answers"][0]


@pytest.mark.parametrize(
    ("task", "prediction", "expected"),
    [
        ("needle", "The code is 4821.", 1.0),
        ("needle", "The code is 48210.", 0.0),
        ("needle", "", 0.0),
        ("fewshot_classification", " weather\nMessage: other", 1.0),
        ("fewshot_classification", " the weather is fine", 0.0),
        ("fewshot_classification", "", 0.0),
    ],
)
def test_a_prediction_counts_only_if_it_holds_the_answer_as_a_whole_word(task, prediction, expected):
    answers = ["weather"] if task == "fewshot_classification" else ["4821"]
    assert score({"dataset": task, "answers": answers}, prediction) == expected


def test_fewshot_prompts_have_no_chat_format_and_the_others_have(tiny_tokenizer):
    for task in TASKS:
        prompt = as_prompt(make(task, tiny_tokenizer, count=1)[0], tiny_tokenizer)
        assert ("<|im_start|>" in prompt) == (task != "fewshot_classification")


def test_an_unknown_task_or_split_and_too_short_a_prompt_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="task='haystack'"):
        make("haystack", tiny_tokenizer)
    with pytest.raises(ValueError, match="split='heldout'"):
        make("needle", tiny_tokenizer, split="heldout")
    with pytest.raises(ValueError, match="prompt_tokens=20"):
        make("needle", tiny_tokenizer, prompt_tokens=20)
