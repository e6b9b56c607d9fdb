"""Records, packed prompts and text windows: deterministic, split by id, never above the wanted length."""

from __future__ import annotations

import json

import pytest

from sdtp_lib.data import dolly_split, load_instructions, long_documents, pack_contexts, record_id, text_windows


def a_record(number: int, words: int = 12) -> dict[str, str]:
    context = " ".join(f"fact {number} {word}." for word in range(words))
    record = {"instruction": f"what is {number}?", "context": context, "response": f"it is {number}", "category": "qa"}
    return {"id": record_id(record), **record}


@pytest.fixture
def records():
    return [a_record(number) for number in range(30)]


@pytest.fixture
def jsonl(tmp_path, records):
    path = tmp_path / "own.jsonl"
    lines = [json.dumps({k: v for k, v in record.items() if k != "id"}) for record in records]
    path.write_text("\n".join([*lines, lines[0], ""]))
    return path


def test_a_json_lines_file_gives_each_record_once_with_an_id_that_does_not_depend_on_its_place(jsonl, records):
    loaded = load_instructions(jsonl)
    assert [record["id"] for record in loaded] == [record["id"] for record in records]
    few = load_instructions(jsonl, limit=5, seed=1)
    assert len(few) == 5 and few == load_instructions(jsonl, limit=5, seed=1)
    assert few != load_instructions(jsonl, limit=5, seed=2)


def test_train_and_heldout_records_share_no_id_and_leave_none_out(jsonl):
    train, heldout = (load_instructions(jsonl, split=split) for split in ("train", "heldout"))
    assert {r["id"] for r in train} & {r["id"] for r in heldout} == set()
    assert len(train) + len(heldout) == 30
    assert all(dolly_split(record["id"]) == "heldout" for record in heldout)


def test_about_two_ids_in_ten_are_held_out():
    share = sum(dolly_split(f"{number:016x}") == "heldout" for number in range(5000)) / 5000
    assert 0.17 < share < 0.23


@pytest.mark.parametrize("line", ['{"instruction": "half', '{"instruction": "no answer"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        load_instructions(path)


def test_a_missing_file_and_an_unknown_split_are_refused(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load_instructions(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="split='test'"):
        load_instructions("embedded", split="test")


def test_the_embedded_records_answer_from_their_own_context():
    records = load_instructions("embedded")
    assert len(records) > 500
    assert all(record["response"][:40] in " ".join(record["context"].split()) for record in records)


def test_a_packed_prompt_holds_its_own_context_once_and_keeps_to_its_length(records, tiny_tokenizer):
    samples = pack_contexts(records, tiny_tokenizer, tokens=(500, 700), seed=3)
    assert len(samples) == 30
    by_id = {record["id"]: record for record in records}
    for sample in samples:
        assert 450 <= len(sample["prompt_ids"]) <= 700
        assert sample["prompt"].count(by_id[sample["id"]]["context"]) == 1
        assert sample["prompt_ids"] == tiny_tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        assert sample["response_ids"][-1] == tiny_tokenizer.eos_token_id
    places = [sample["prompt"].index(by_id[sample["id"]]["context"]) for sample in samples]
    assert max(places) - min(places) > 200


def test_packing_one_record_does_not_depend_on_how_many_are_wanted(records, tiny_tokenizer):
    few = pack_contexts(records, tiny_tokenizer, tokens=(400, 600), limit=4)
    many = {sample["id"]: sample for sample in pack_contexts(records, tiny_tokenizer, tokens=(400, 600))}
    assert few == [many[sample["id"]] for sample in few]


def test_a_context_longer_than_the_prompt_is_left_out(tiny_tokenizer):
    samples = pack_contexts([a_record(1, 400), a_record(2), a_record(3)], tiny_tokenizer, tokens=(300, 400))
    assert len(samples) == 2


def test_documents_are_split_by_name_and_windows_do_not_overlap(tiny_tokenizer):
    train, heldout = long_documents("train"), long_documents("heldout")
    assert not {d["id"] for d in train} & {d["id"] for d in heldout}
    assert 25 < len(heldout) < 80 < len(train)
    documents = [{"id": f"d{number}", "text": "ab cd ef gh " * 40} for number in range(2)]
    windows = text_windows(documents, tiny_tokenizer, prompt_tokens=80, continuation_tokens=16, limit=6)
    assert {window["id"].split("@")[0] for window in windows[:2]} == {"d0", "d1"}
    assert len({window["id"] for window in windows}) == 6
    assert all(len(w["prompt_ids"]) == 80 and len(w["response_ids"]) == 16 for w in windows)
    assert all(int(window["id"].split("@")[1]) % 96 == 0 for window in windows)
    assert len(text_windows(documents, tiny_tokenizer, prompt_tokens=80, continuation_tokens=16, limit=999)) < 20


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, jsonl):
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + jsonl.read_bytes())
    assert load_instructions(marked) == load_instructions(jsonl)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>Sign in</html>", "line 1 is not JSON: .*; it is a web page"),
        ('{"instruction": "a"}'.encode("utf-16"), "is not UTF-8 text"),
        (b"[1, 2]\n", "line 1 is not an object"),
    ],
)
def test_a_file_that_holds_something_else_is_named_with_what_it_holds(tmp_path, content, told):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.jsonl,? {told}"):
        load_instructions(tmp_path / "bad.jsonl")
