"""The RULER command, end to end on a tiny model in a folder."""

from __future__ import annotations

import json
import sys
import types

import pytest

pytest.importorskip("lm_eval")

from sdtp_lib.data import ruler_generators
from sdtp_lib.records import OtherProvenance, read_rows
from tests.benchmarks.commands import command

LENGTH = 1400  # the tiny tokenizer has about a token per letter


@pytest.fixture
def run(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """``run(*arguments)``: the command on the tiny model, with a short word list."""
    kinds = {name: [f"{name}{n}" for n in range(30)] for name in ("noun", "adjective", "verb")}
    kinds |= {f"{name}s": words for name, words in list(kinds.items())}
    words = types.SimpleNamespace(_categories=kinds)
    monkeypatch.setitem(sys.modules, "wonderwords", types.SimpleNamespace(RandomWord=lambda: words))
    ruler_generators.needles.cache_clear()
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    main = command("ruler")
    arguments = ["--model", str(tmp_path / "model"), "--scorers", "recency", "--run-dir", str(tmp_path)]
    yield lambda *more: main([*arguments, "--lengths", str(LENGTH), *more])
    ruler_generators.needles.cache_clear()


def test_all_variants_answer_the_same_items_and_a_stopped_run_goes_on(run, tmp_path, capsys):
    run("--tasks", "niah_single_1", "second_question", "--limit", "1")
    first = read_rows(tmp_path / "ruler.jsonl")
    assert [(row["dataset"], row["variant"]) for row in first] == [
        (name, variant) for name in ("niah_single_1", "second_question") for variant in ("full", "recency keep09")
    ]
    for row in first:
        assert row["target_tokens"] == LENGTH and 0 <= row["answer_depth"] <= 1 and 0 <= row["score"] <= 1
        assert 0 < row["prefill_seconds"] <= row["generate_seconds"] and len(row["tokens_per_layer"]) == 6
        assert row["prompt_tokens"] + row["new_tokens"] <= LENGTH and isinstance(row["prediction"], str)
    assert [row["text_source"] for row in first] == ["generated"] * 2 + ["embedded"] * 2
    assert first[0]["sample_hash"] == first[1]["sample_hash"], "the same prompt"
    capsys.readouterr()
    run("--tasks", "niah_single_1", "second_question", "--limit", "2")
    rows = read_rows(tmp_path / "ruler.jsonl")
    assert rows[:4] == first and len(rows) == 8
    printed = capsys.readouterr().out
    assert f"| niah_single_1 | {LENGTH} | recency keep09 | 2 |" in printed and "solved items" in printed
    assert f"| {LENGTH} | full | 1 | 2 |" in printed, "the mean is over RULER's own tasks"
    assert "texts of second_question: embedded" in printed
    assert f"| {LENGTH} | recency keep09 | 2 |" in printed.partition("and another one on the same cache")[2]
    assert {row.get("first_score") for row in rows if row["dataset"] == "second_question"} <= {0.0, 1.0}
    made = json.loads((tmp_path / "needle_map.json").read_text())
    assert made["items"] == 4 and (tmp_path / "needle_map.png").stat().st_size > 5000
    run("--tables")
    assert read_rows(tmp_path / "ruler.jsonl") == rows
    with pytest.raises(OtherProvenance, match="sample_hash"):
        run("--tasks", "niah_single_1", "--limit", "1", "--no-chat")


def test_a_speed_up_and_a_keep_ratio_do_beside_the_presets(run, tmp_path):
    run("--tasks", "niah_single_1", "--limit", "1", "--presets", "keep09", "1.2x", "0.8")
    rows = read_rows(tmp_path / "ruler.jsonl")
    assert [row["variant"] for row in rows] == ["full", "recency keep09", "recency 1.2x", "recency 0.8"]
    assert rows[1]["tokens_per_layer"][-1] > rows[3]["tokens_per_layer"][-1]
    assert all(row["kind"] == "item" for row in rows)


def test_longbench2_runs_beside_the_others_and_what_is_not_there_is_left_out(run, tmp_path, capsys):
    record = {"_id": "a", "domain": "Code", "difficulty": "easy", "length": "short", "question": "Which?",
              "answer": "A", "context": "House one is green. " * 30}  # fmt: skip
    record |= {f"choice_{letter}": letter for letter in "ABCD"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    run("--tasks", "longbench2", "--data", str(tmp_path), "--presets", "keep09")
    rows = read_rows(tmp_path / "ruler.jsonl")
    assert [row["dataset"] for row in rows] == ["LongBench v2 Code"] * 2 and not rows[0]["was_cut"]
    assert "| LongBench v2 Code | - | full | 1 |" in capsys.readouterr().out
    run("--tasks", "longbench2", "--data", str(tmp_path / "none"))
    assert "longbench2 is left out: No such file" in capsys.readouterr().err


def test_unknown_tasks_and_too_long_prompts_end_the_command_before_it_computes(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--tasks", "niah_9")
    assert "task='niah_9' is unknown: choose among ruler" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--lengths 4096 is more than the model's 2048 positions"):
        run("--tasks", "niah_single_1", "--lengths", "4096")
    assert not (tmp_path / "ruler.jsonl").exists()
