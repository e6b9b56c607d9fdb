"""The eight few-shot tasks on local files in their own fields, through lm-eval's own prompts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from sdtp_lib import scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.answer_tables import fewshot_table
from sdtp_lib.evaluation.fewshot import TASKS, _gold, local_task, run_task
from sdtp_lib.harness import SDTPLM
from sdtp_lib.records import OtherProvenance, RowWriter, read_frame, read_rows

ROWS = {
    "copa": {"premise": "It rained.", "choice1": "It got wet.", "choice2": "Dry.", "question": "effect", "label": 1},
    "piqa": {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
    "winogrande": {"sentence": "Ann saw Bea so _ waved.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "mathqa": {"Problem": "1 + 1 ?", "options": "A ) 1 , B ) 2 , C ) 3 , D ) 4 , E ) nonE oF thEsE", "correct": "b"},
    "boolq": {"question": "is it so", "passage": "It is so.", "label": True},
    "cb": {"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral"},
    "wic": {"word": "run", "sentence1": "I run.", "sentence2": "A run.", "start1": 2, "end1": 5, "start2": 2, "end2": 5,
            "label": False},
    "wsc": {"text": "Tom saw Bob when he came .", "label": True,
            "target": {"span1_index": 0, "span1_text": "Tom", "span2_index": 4, "span2_text": "he"}},
}  # fmt: skip
GOLD = {"copa": 1, "piqa": 0, "winogrande": 1, "mathqa": 1, "boolq": 1, "cb": 2, "wic": 0, "wsc": 1}
CHOICES = {"mathqa": ["1", "2", "3", "4", "none of these"], "cb": ["True", "False", "Neither"], "boolq": ["no", "yes"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fewshot")
    for name, row in ROWS.items():
        for split, first in (("train", 100), ("validation", 0)):  # lm-eval shows no item as its own example
            lines = [json.dumps(row | {"idx": first + number}) for number in range(6)]
            (path / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", TASKS)
def test_labels_and_choices_are_read_from_the_files_own_fields(name, folder):
    task = local_task(name, folder, shots=2)
    (doc, *_) = list(task.validation_docs())
    assert _gold(task, doc) == GOLD[name]
    if name in CHOICES:
        assert task.doc_to_choice(doc) == CHOICES[name]
    task.build_all_requests(limit=1)
    assert len({instance.doc_id for instance in task.instances}) == 1


def test_a_row_has_accuracy_and_the_margin_of_the_right_choice_and_a_second_run_adds_none(
    folder, tiny_model, tiny_tokenizer, tmp_path
):
    shared = {"pretrained": tiny_model(max_position_embeddings=2048), "tokenizer": tiny_tokenizer, "batch_size": 1}
    config = PruningConfig(layers=(2, 4), keep_ratio=0.7, min_local_tokens=4)
    models = {
        "full": SDTPLM(**shared),
        "whole": SDTPLM(**shared, pruning=config.replace(keep_ratio=1.0), scorer=scorers.recency()),
        "recency": SDTPLM(**shared, pruning=config, scorer=scorers.recency()),
    }
    path = tmp_path / "fewshot.jsonl"
    for _ in range(2):
        with RowWriter(path, {}) as writer:
            for name in ("boolq", "winogrande"):
                run_task(local_task(name, folder, shots=2), models, writer, limit=3)
    rows = read_rows(path)
    assert len(rows) == 2 * 3 * 3 and {row["kind"] for row in rows} == {"item"}
    assert {row["shots"] for row in rows} == {2}
    by = {(row["dataset"], row["item"], row["variant"]): row for row in rows}
    for row in rows:
        assert row["score"] == (row["margin_nats"] > 0)
        plain = by[row["dataset"], row["item"], "full"]
        if row["variant"] == "whole":
            assert row["loglikelihoods"] == pytest.approx(plain["loglikelihoods"], abs=1e-4)
        if row["variant"] == "recency":
            assert row["compression_ratio"] > 1.2
            assert row["loglikelihoods"] != pytest.approx(plain["loglikelihoods"], abs=1e-6)
    table = fewshot_table(read_frame(path)).set_index(["task", "variant"])
    assert table.loc[("mean of tasks", "full"), "items"] == 6
    assert table.loc[("boolq", "whole"), "difference"] == 0


def test_missing_files_and_unknown_tasks_are_named(tmp_path):
    with pytest.raises(OSError, match=r"copa\.train\.jsonl and copa\.validation\.jsonl"):
        local_task("copa", tmp_path)
    with pytest.raises(ValueError, match="task='coppa'"):
        local_task("coppa", tmp_path)


def test_another_number_of_shots_is_another_prompt_and_refused(folder, tiny_model, tiny_tokenizer, tmp_path):
    shared = {"pretrained": tiny_model(max_position_embeddings=2048), "tokenizer": tiny_tokenizer, "batch_size": 1}
    models = {"full": SDTPLM(**shared)}
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_task(local_task("boolq", folder, shots=2), models, writer, limit=1)
        with pytest.raises(OtherProvenance, match="sample_hash"):
            run_task(local_task("boolq", folder, shots=3), models, writer, limit=1)


def test_a_byte_order_mark_does_not_hide_the_first_row(folder, tmp_path):
    for split in ("train", "validation"):
        text = (folder / f"copa.{split}.jsonl").read_bytes()
        (tmp_path / f"copa.{split}.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    assert len(list(local_task("copa", tmp_path, shots=2).validation_docs())) == 6
