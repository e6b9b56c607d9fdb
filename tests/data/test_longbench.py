"""LongBench's official protocol, held by golden values: prompts, truncation, metrics, averages, loading."""

from __future__ import annotations

import json
import zipfile

import pytest

from sdtp_lib.data import longbench
from sdtp_lib.data.longbench import (
    DATASETS,
    PAPER_14,
    SETS,
    average,
    build_prompt,
    read_records,
    score,
    task,
)

# Table 1 of arXiv 2504.04514: SingleDoc, MultiDoc, Summ., FewShot, Code, and the AVG it prints.
PAPER_ROWS = {
    "original": (36.66, 29.88, 28.26, 66.95, 53.74, 42.34),
    "SDTP": (32.70, 27.74, 26.65, 62.74, 53.99, 39.82),
    "LLMLingua-2": (31.35, 30.57, 27.29, 52.29, 33.87, 35.16),
}
PAPER_GROUPS = ("Single-document QA", "Multi-document QA", "Summarisation", "Few-shot", "Code")


def a_record(dataset="multi_news", **fields):
    record = {
        "input": "",
        "context": "ctx",
        "answers": ["an answer"],
        "length": 1,
        "dataset": dataset,
        "language": "en",
    }
    return record | {"all_classes": None, "_id": "x"} | fields


def test_there_are_21_data_sets_and_the_named_sets_are_the_published_ones():
    assert len(DATASETS) == 21 and len(PAPER_14) == 14 and len(SETS["eight"]) == 8 and len(SETS["longbench-e"]) == 13
    assert longbench.resolve(["eight", "qasper", "lcc"]) == [*SETS["eight"], "lcc"]
    with pytest.raises(ValueError, match="dataset='qaspar'"):
        longbench.resolve(["qaspar"])


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (128, "narrativeqa qasper dureader samsum"),
        (64, "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p"),
        (32, "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en passage_retrieval_zh"),
        (512, "gov_report qmsum multi_news vcsum"),
    ],
)
def test_new_tokens_are_the_official_ones(tokens, names):
    assert {name for name in DATASETS if task(name).max_new_tokens == tokens} == set(names.split())


def test_special_cases_are_the_official_ones():
    unchatted = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name in DATASETS if not task(name).chat} == unchatted
    assert {name for name in DATASETS if task(name).first_line_only} == {"trec", "triviaqa", "samsum", "lsht"}
    assert [name for name in DATASETS if task(name).stop_at_newline] == ["samsum"]
    assert task("qasper_e") == task("qasper")


@pytest.mark.parametrize(
    ("dataset", "end"),
    [
        ("passage_count", "The final answer is: "),
        ("passage_retrieval_en", "The answer is: "),
        ("lcc", "{context}Next line of code:\n"),
        ("repobench-p", "{context}{input}Next line of code:\n"),
        ("triviaqa", "{context}\n\n{input}"),
        ("samsum", "{context}\n\n{input}"),
        ("trec", "{context}\n{input}"),
        ("multi_news", "Now, write a one-page summary of all the news.\n\nSummary:"),
    ],
)
def test_prompts_end_as_the_official_ones_do_where_lm_eval_trims_them(dataset, end):
    assert task(dataset).template.endswith(end)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_prompt_takes_the_context_and_nothing_of_lm_evals_syntax_is_left(dataset):
    template = task(dataset).template
    assert template.count("{context}") == 1 and "{{" not in template and "question}}" not in template


def test_braces_in_a_context_stay_what_they_are(tiny_tokenizer):
    record = a_record("lcc", context="print({input}) {context} {0}\n")
    ids, _ = build_prompt(record, tiny_tokenizer, 500)
    assert "print({input}) {context} {0}\n" in tiny_tokenizer.decode(ids)


def test_a_long_prompt_loses_its_middle_and_keeps_both_ends(tiny_tokenizer):
    record = a_record("trec", context="first " + "filler " * 300 + "last", input="Question: which?")
    ids, cut = build_prompt(record, tiny_tokenizer, 200)
    text = tiny_tokenizer.decode(ids)
    assert cut and len(ids) == 200
    assert text.startswith("Please determine the type") and text.endswith("last\nQuestion: which?")
    assert build_prompt(record, tiny_tokenizer, 5000)[1] is False


def test_chat_tasks_are_wrapped_after_truncation_and_few_shot_tasks_never(tiny_tokenizer):
    long_text = "word " * 400
    chat, _ = build_prompt(a_record("multi_news", context=long_text), tiny_tokenizer, 300)
    assert tiny_tokenizer.decode(chat).startswith("<|im_start|>user")
    assert 300 < len(chat) < 350
    bare, _ = build_prompt(a_record("samsum", context=long_text), tiny_tokenizer, 300)
    assert "<|im_start|>" not in tiny_tokenizer.decode(bare) and len(bare) == 300


@pytest.mark.parametrize(
    ("dataset", "prediction", "answers", "classes", "expected"),
    [
        ("hotpotqa", "The Eiffel Tower!", ["eiffel tower"], None, 1.0),
        ("hotpotqa", "the tall tower", ["eiffel tower", "tall tower"], None, 1.0),
        ("qasper", "a red car", ["red bus"], None, 0.5),
        ("triviaqa", "\nParis\nQuestion: more", ["Paris"], None, 1.0),
        ("trec", "Type of animal\nQuestion", ["Type of animal"], ["Type of animal", "Country"], 1.0),
        ("trec", "Country or Type of animal", ["Country"], ["Type of animal", "Country"], 0.5),
        ("passage_count", "There are 7, not 8", ["7"], None, 0.5),
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], None, 1.0),
        ("multi_news", "same words here", ["same words here"], None, 1.0),
        ("multi_news", "", ["words"], None, 0.0),
        ("lcc", "# a comment\nreturn x\nmore", ["return x"], None, 1.0),
        ("lcc", "# a comment\n\nreturn x", ["return x"], None, 0.0),
        ("multifieldqa_zh", "北京", ["北京"], None, 1.0),
        ("passage_retrieval_zh", "段落3", ["段落3"], None, 1.0),
    ],
)
def test_metrics_on_pairs_worked_by_hand(dataset, prediction, answers, classes, expected):
    pytest.importorskip("jieba", reason="the metrics need the extra 'eval'")
    record = a_record(dataset, answers=answers, all_classes=classes)
    assert score(record, prediction) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_the_average_is_over_14_data_sets_and_gives_the_papers_figures(name):
    *columns, printed = PAPER_ROWS[name]
    scores = {
        dataset: value
        for group, value in zip(PAPER_GROUPS, columns, strict=True)
        for dataset in longbench.GROUPS[group]
        if dataset in PAPER_14
    }
    assert average(scores) == pytest.approx(printed, abs=0.011)
    with pytest.raises(ValueError, match="lcc"):
        average({dataset: value for dataset, value in scores.items() if dataset != "lcc"})


def test_records_come_from_a_folder_or_the_official_zip_sorted_by_id(tmp_path):
    records = [a_record(_id=identifier) for identifier in "cab"]
    text = "\n".join(json.dumps(record) for record in records) + "\n"
    (tmp_path / "multi_news.jsonl").write_text(text)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/multi_news.jsonl", text)
    from_folder = read_records(tmp_path, "multi_news")
    assert [record["_id"] for record in from_folder] == ["a", "b", "c"]
    assert read_records(tmp_path / "data.zip", "multi_news") == from_folder
    with pytest.raises(OSError, match=r"no qasper\.jsonl"):
        read_records(tmp_path, "qasper")
    with pytest.raises(OSError, match="No such file"):
        read_records(tmp_path / "nothing.zip", "multi_news")


def test_a_record_without_an_official_field_is_named_by_its_line(tmp_path):
    bad = {key: value for key, value in a_record().items() if key != "all_classes"}
    (tmp_path / "multi_news.jsonl").write_text(json.dumps(a_record()) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=r"line 2 lacks \['all_classes'\]"):
        read_records(tmp_path, "multi_news")


@pytest.mark.shared_data
def test_the_real_multi_news_file_is_read_and_scored():
    pytest.importorskip("jieba", reason="the metrics need the extra 'eval'")
    from sdtp_lib.data.test_sets import shared_data

    records = read_records(shared_data() / "longbench", "multi_news")
    assert len(records) == 200
    assert score(records[0], records[0]["answers"][0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is no zip archive; it is a web page, saved where the download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is no zip archive; it is a git-lfs pointer"),
        (b"", "is no zip archive; the file is empty"),
        (b"PK\x03\x04 cut off", "is no zip archive; the official data.zip"),
    ],
)
def test_an_archive_that_is_something_else_is_refused_with_what_it_is(tmp_path, content, told):
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(OSError, match=f"data.zip {told}"):
        read_records(tmp_path / "data.zip", "multi_news")


def test_a_damaged_member_of_the_archive_is_named(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/multi_news.jsonl", json.dumps(a_record()) + "\n")
    content = bytearray(path.read_bytes())
    at = content.index(b'"context"')
    content[at + 1] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(OSError, match="multi_news.jsonl in data.zip is damaged"):
        read_records(path, "multi_news")


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    content = b"\xef\xbb\xbf" + json.dumps(a_record()).encode() + b"\n"
    (tmp_path / "multi_news.jsonl").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("multi_news.jsonl", content)
    assert read_records(tmp_path, "multi_news") == read_records(tmp_path / "data.zip", "multi_news") == [a_record()]
