"""What is wrong is said in one sentence, before anything is measured; what is a bug raises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sdtp_lib.checked import told
from sdtp_lib.records import project_root
from tests.benchmarks.commands import command


def test_every_command_says_in_one_sentence_what_is_wrong():
    for path in sorted((project_root() / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            assert text.endswith("    from sdtp_lib.checked import told\n\n    sys.exit(told(main))\n"), path.name


def test_a_mistake_ends_a_command_with_a_sentence_and_exit_code_2(tmp_path):
    started = [sys.executable, str(project_root() / "benchmarks" / "latency.py"), "report", str(tmp_path / "no.jsonl")]
    ended = subprocess.run(started, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "no.jsonl" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("arguments", "sentence"), [
    *((f"{name} --tables --run-dir none", f"none/{name}.jsonl yet: measure first")
      for name in ("longbench", "ruler", "fewshot", "labels", "scorers")),
    ("latency compare nope.jsonl nope.jsonl", "nope.jsonl"),
    ("longbench --datasets nope", "dataset='nope' is unknown"),
    ("longbench --model ./nope", "Cannot load './nope'"),
    ("scorers --model ./nope", "Cannot load './nope'"),
    ("fewshot --model ./nope", "Cannot load './nope'"),
])  # fmt: skip
def test_ordinary_mistakes_are_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    """They were tracebacks."""
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments.split()
    assert told(lambda: command(name)(rest)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_what_is_no_mistake_of_the_user_still_raises(capsys):
    def buggy() -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        told(buggy)
    assert told(lambda: None) == 0 and told(lambda: 1) == 1


@pytest.mark.parametrize("name", ["longbench", "fewshot", "ruler"])
def test_a_run_none_of_whose_parts_has_its_data_says_so(model_folder, tmp_path, capsys, name):
    """It was an AttributeError of an empty table."""
    none, model = str(tmp_path / "none"), str(model_folder)
    arguments = ["--model", model, "--data", none, "--run-dir", str(tmp_path), "--presets", "keep09", "--scorers",
                 "recency"]  # fmt: skip
    arguments += {"longbench": ["--datasets", "trec"], "fewshot": ["--tasks", "copa", "--pruners"],
                  "ruler": ["--tasks", "longbench2"]}[name]  # fmt: skip
    assert told(lambda: command(name)(arguments)) == 2
    said = capsys.readouterr().err
    assert "is left out: " in said and f"error: {tmp_path / name}.jsonl has no rows" in said


@pytest.mark.parametrize("name", ["longbench", "fewshot", "ruler", "scorers"])
def test_a_run_of_failures_alone_says_the_first_ones_reason(tmp_path, capsys, name):
    """LongBench ended in an AttributeError, the others in a table without columns."""
    row = {"key": "a", "kind": "failure", "dataset": "a", "item": "b", "variant": "full", "cell": "c", "error": "E: x"}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert told(lambda: command(name)(["--tables", "--run-dir", str(tmp_path)])) == 2
    assert capsys.readouterr().err.rstrip().rstrip(".").endswith("E: x")


@pytest.mark.parametrize("arguments", [
    "longbench --batch-size 0", "longbench --limit -3", "longbench --max-tokens 0", "ruler --batch-size 0",
    "ruler --limit 0", "ruler --lengths -1", "fewshot --limit -3", "fewshot --shots -1", "fewshot --batch-size 0",
    "scorers --prompts 0", "scorers --oracle-prompts -1", "labels --samples 0", "labels --layers -1",
    "chunks --chunks 0", "chunks --memory random", "chunks --memory random:0", "compression --samples 0",
    "schedules first --samples 0", "latency run --repeats 0", "latency memory --lengths 0",
    "overhead scoring --repeats 0", "tune_blend smollm2-135m-instruct --samples 0", "ablations --dolly x --limit 0",
    "train_embedded --prompts 0",
])  # fmt: skip
def test_a_size_below_one_ends_a_command_before_it_loads_a_model(arguments, capsys):
    """Most were taken: no item, the last three left out, or an error deep in a run."""
    name, *rest = arguments.split()
    with pytest.raises(SystemExit) as ended:
        command(name)(rest)
    assert ended.value.code == 2 and f"argument {rest[-2]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fewshot", "latency run"])
def test_a_method_that_there_is_not_ends_a_command_before_it_loads_a_model(name, capsys):
    name, *rest = name.split()
    with pytest.raises(SystemExit):
        command(name)([*rest, "--method", "lazzyllm"])
    assert "did you mean 'lazyllm'" in capsys.readouterr().err


def test_pruners_of_another_model_end_a_run_before_anything_is_measured(model_folder, tmp_path, capsys):
    """They were one failure at the end of hours, and exit code 0."""
    arguments = ["--model", str(model_folder), "--pruners", "SDTP", "--run-dir", str(tmp_path)]
    assert told(lambda: command("scorers")(arguments)) == 2
    assert "does not fit the model's" in capsys.readouterr().err and not list(tmp_path.glob("*.jsonl"))
