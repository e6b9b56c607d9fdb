"""The leaderboard's command on tiny models: measured, stopped, gone on, reported; random weights by a YAML file."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sdtp_lib.leaderboard import committed
from sdtp_lib.records import project_root, read_rows

sys.path.insert(0, str(project_root() / "benchmarks"))

import leaderboard
import leaderboard_report


@pytest.fixture
def arguments(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--name", "mine", "--run-dir", str(tmp_path / "run"),
            "--lengths", "200", "--items", "2", "--tasks", "--test-sets", "text", "--speedups", "1.5",
            "--method", "lazyllm", "gemfilter"]  # fmt: skip


def test_a_run_that_is_stopped_goes_on_and_is_reported_with_page_rows_and_picture(arguments, tmp_path, capsys):
    path = tmp_path / "run" / "leaderboard.jsonl"
    with pytest.raises(ValueError, match="no rows"):
        leaderboard.main([*arguments, "--hours", "1e-9"])
    assert "hours" in capsys.readouterr().err
    leaderboard.main(arguments)
    rows = read_rows(path)
    assert sorted({row["sample"] for row in rows if row["sort"] == "kl"}) != [] and len(rows) == 2 * 3 + 3
    text = capsys.readouterr().out
    assert "1.5x at 200 tokens" in text and "lazyllm" in text
    leaderboard.main(arguments)
    assert read_rows(path) == rows, "nothing is measured twice"
    embedded = [{**row, "model": "embedded"} for row in rows]
    leaderboard_report.write_report(embedded, tmp_path)
    assert committed.read_committed(tmp_path / "docs" / "leaderboard.jsonl")[0]["key"] == rows[0]["key"]
    first = (tmp_path / "figures" / "leaderboard.png").stat().st_size
    leaderboard_report.write_report(rows, tmp_path)
    kept = committed.every_committed(tmp_path)
    assert [(name, {row["model"] for row in each}) for name, each in kept.items()] == [
        ("", {"embedded"}), ("-mine", {"mine"})
    ], "each model has a file of its own"  # fmt: skip
    assert "[mine](leaderboard-mine.md)" in (tmp_path / "docs" / "leaderboard.md").read_text()
    assert json.loads((tmp_path / "figures" / "leaderboard.json").read_text())["models"] == ["embedded", "mine"]
    assert (tmp_path / "figures" / "leaderboard.png").stat().st_size > first
    assert json.loads((tmp_path / "figures" / "leaderboard.json").read_text())["prompt_tokens"] == 200
    assert (tmp_path / "figures" / "leaderboard.png").stat().st_size > 5000


def test_a_model_of_a_few_items_stays_out_of_the_picture_where_another_has_more():
    def rows(count: int) -> list[dict]:
        return [{"kind": "item", "sort": "kl", "cell": "text", "length": 64, "sample": f"{n}", "method": "sdtp",
                 "speedup": 2.0, "kl_nats": 0.1, "key": f"{n}"} for n in range(count)]  # fmt: skip

    few, many = rows(5), rows(6)
    assert leaderboard_report.of_enough_items({"": many, "-few": few}) == {"": many}
    assert leaderboard_report.of_enough_items({"-few": few}) == {"-few": few}, "better than no picture"


def test_a_run_with_other_rows_takes_the_committed_ones_in_and_a_report_loses_none(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "project_root", lambda: tmp_path)
    leaderboard.main([*arguments, "--items", "1"])
    path = tmp_path / "run" / "leaderboard.jsonl"
    leaderboard_report.write_report(read_rows(path), tmp_path)
    first = {row["key"] for row in read_rows(path)}
    leaderboard.main([*arguments, "--fresh", "--speedups", "1.3", "--run-dir", str(tmp_path / "other")])
    other = read_rows(tmp_path / "other" / "leaderboard.jsonl")
    leaderboard_report.write_report(other, tmp_path)
    kept = {row["key"] for row in committed.read_committed(committed.path_of("mine", tmp_path))}
    assert kept == first | {row["key"] for row in other} > first
    leaderboard.main([*arguments, "--speedups", "1.3", "--run-dir", str(tmp_path / "other")])
    assert {row["key"] for row in read_rows(tmp_path / "other" / "leaderboard.jsonl")} == kept


def test_a_method_that_a_run_only_repeats_keeps_its_rows_of_other_pruners(arguments, tmp_path):
    """192 rows of a method that the run had not measured went, unsaid, when its own rows were written."""
    leaderboard.main([*arguments, "--items", "1"])
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    timed = {"prefill_ms", "unpruned_prefill_ms", "peak_bytes"}
    quality = next(row for row in rows if row["method"] != "unpruned" and "kl_nats" in row)
    elsewhere = {name: value for name, value in quality.items() if name not in timed}
    elsewhere |= {"key": "elsewhere", "scorer_id": "others", "device": "cuda", "device_name": "Big GPU"}
    kept, other = [*rows, elsewhere], {**quality, "method": "another", "key": "another"}

    def left(*more):
        return {row["key"] for row in committed.joined(kept, [*rows, *more])}

    assert left(other) == {row["key"] for row in kept} | {"another"}
    assert "elsewhere" not in left({**quality, "key": "one more item"})


def test_a_report_of_rows_of_other_settings_loses_no_committed_row(arguments, tmp_path):
    leaderboard.main([*arguments, "--items", "1"])
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    leaderboard_report.write_report(rows, tmp_path)
    path = committed.path_of("mine", tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="mine.jsonl: 6 of its 6 rows are of another device"):  # times, memory
        leaderboard_report.write_report([{**row, "threads": 16} for row in rows], tmp_path)
    assert path.read_bytes() == before


def test_a_report_after_a_run_on_another_device_goes_beside_its_rows_and_says_so_first(
    arguments, tmp_path, monkeypatch, capsys
):
    leaderboard.main([*arguments, "--items", "1"])
    kept = committed.path_of("mine", tmp_path / "project")
    kept.parent.mkdir(parents=True)
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    committed.write_committed(kept, [{**row, "device_name": "Big GPU"} for row in rows])
    before = kept.read_bytes()
    monkeypatch.setattr(committed, "project_root", lambda: tmp_path / "project")
    capsys.readouterr()
    leaderboard.main([*arguments, "--items", "1", "--report-after", "--run-dir", str(tmp_path / "second")])
    said = capsys.readouterr().err
    first = "leaderboard-mine.jsonl has 6 rows of Big GPU"
    assert said.index(first) < said.index("text at 200") and said.count(first) == 1, "before any compute, and once"
    assert (tmp_path / "second" / "docs" / "leaderboard-mine.md").is_file() and kept.read_bytes() == before


def test_without_times_the_page_has_cache_and_limit_and_says_why(arguments, tmp_path, capsys):
    leaderboard.main([*arguments, "--no-times"])
    rows = [row for row in read_rows(tmp_path / "run" / "leaderboard.jsonl") if row["kind"] == "item"]
    assert rows and not any("prefill_ms" in row or "unpruned_prefill_ms" in row for row in rows)
    text = capsys.readouterr().out
    assert "not measured: several processes shared the device" in text and "| lazyllm | - | 1.50x |" in text
    leaderboard_report.write_report([{**row, "model": "embedded"} for row in rows], tmp_path)
    assert (tmp_path / "figures" / "leaderboard.png").is_file()


def test_the_page_has_rows_that_another_device_measured_without_times(arguments, tmp_path, capsys):
    leaderboard.main([*arguments, "--items", "1"])
    leaderboard.main([*arguments, "--no-times", "--fresh", "--run-dir", str(tmp_path / "gpu")])
    rows = [{**row, "device": "cuda:0", "device_name": "Big GPU"}
            for row in read_rows(tmp_path / "gpu" / "leaderboard.jsonl")]  # fmt: skip
    beside = tmp_path / "gpu.jsonl"
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    leaderboard.main([*arguments, "--tables", "--join", str(beside)])
    said = capsys.readouterr()
    assert f"3 of {len(rows)} rows of --join are joined" in said.err, "one item, unpruned and by two methods"
    assert "3 of 9 rows on Big GPU" in said.out and "2 items per KL test set" in said.out
    with pytest.raises(SystemExit):
        leaderboard.parse(["--join", str(tmp_path / "nowhere.jsonl")])
    assert "nowhere.jsonl: there is no such file" in capsys.readouterr().err


def test_a_parameter_sets_name_keeps_its_dots():
    options = leaderboard.parse(["--params", "gpu-llama3.1-8b"])
    assert options.run_dir.name == "leaderboard-gpu-llama3.1-8b"


def test_a_run_goes_on_from_committed_rows_of_the_same_model(arguments, tmp_path, monkeypatch, capsys):
    leaderboard.main(arguments)
    path = tmp_path / "run" / "leaderboard.jsonl"
    rows = read_rows(path)
    committed.write_committed(tmp_path / "kept.jsonl", rows)
    monkeypatch.setattr(committed, "path_of", {"mine": tmp_path / "kept.jsonl"}.get)
    path.unlink()
    leaderboard.main(arguments)
    assert "goes on from 9 committed rows" in capsys.readouterr().err
    assert [row["key"] for row in read_rows(path)] == [row["key"] for row in rows]
    other = [row for row in rows if row["method"] == "lazyllm"]
    old = [{**row, "scorer_id": "settings of before"} if row in other else row for row in rows]
    committed.write_committed(tmp_path / "kept.jsonl", old)
    path.unlink()
    leaderboard.main(arguments)
    assert f"goes on from {9 - len(other)} committed rows" in capsys.readouterr().err and other
    assert {row["scorer_id"] for row in read_rows(path) if row["method"] == "lazyllm"} == {other[0]["scorer_id"]}
    path.unlink()
    leaderboard.main([*arguments[:-2], "gemfilter"])
    laid = {row["scorer_id"] for row in read_rows(path) if row["method"] == "lazyllm"}
    assert laid == {"settings of before"}, "this run does not measure it: its rows are laid down as they are"
    # Rows of before had been laid over new ones that a stopped run of two processes had left in its own files.
    path.rename(path.with_name("leaderboard.share1.jsonl"))
    write_rows = [{**row, "scorer_id": "new"} if row["method"] == "lazyllm" else row
                  for row in read_rows(tmp_path / "run" / "leaderboard.share1.jsonl")]  # fmt: skip
    path.with_name("leaderboard.share1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_rows))
    leaderboard.main([*arguments[:-2], "gemfilter"])
    assert {row["scorer_id"] for row in read_rows(path) if row["method"] == "lazyllm"} == {"new"}


def test_a_new_method_is_measured_on_the_items_that_there_are_rows_of(arguments, tmp_path, monkeypatch, capsys):
    leaderboard.main(arguments)
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    first, second = dict.fromkeys(row["sample"] for row in rows if row["sort"] == "kl")  # as they are drawn
    kept = [row for row in rows if row["sample"] != first]
    kept += [row for row in rows if row["sample"] == first and row["method"] == "lazyllm"]  # stopped half-way
    committed.write_committed(tmp_path / "kept.jsonl", kept)
    monkeypatch.setattr(committed, "path_of", {"mine": tmp_path / "kept.jsonl"}.get)
    capsys.readouterr()
    here = ["--run-dir", str(tmp_path / "new"), "--lengths", "900", "--items", "5", "--as-measured"]
    leaderboard.main([*arguments[:-2], "asl", *here])
    assert "as measured: 2 steps, 1.5x at 200" in capsys.readouterr().err
    found = [row for row in read_rows(tmp_path / "new" / "leaderboard.jsonl") if row["method"] == "asl"]
    assert sorted((row["sort"], row["length"], row["speedup"]) for row in found) == [
        ("kl", 200, 1.5), ("memory", 200, 1.5)
    ]  # fmt: skip
    assert found[0]["sample"] == second, "not the first item, which not all others have"
    monkeypatch.setattr(committed, "path_of", {"mine": tmp_path / "nothing.jsonl"}.get)
    with pytest.raises(ValueError, match="no rows of mine yet"):
        leaderboard.main([*arguments, "--run-dir", str(tmp_path / "none"), "--as-measured"])


def test_new_only_leaves_out_what_another_device_has_without_times(arguments, tmp_path, monkeypatch):
    leaderboard.main([*arguments, "--no-times"])
    rows = [row for row in read_rows(tmp_path / "run" / "leaderboard.jsonl") if row["kind"] == "item"]
    first = next(row["sample"] for row in rows if row["sort"] == "kl")
    kept = [{**row, "device": "cuda:0", "device_name": "Big GPU"} for row in rows if row["sample"] == first]
    kept = [{**row, "config_hash": "other settings"} if row["method"] == "gemfilter" else row for row in kept]
    committed.write_committed(tmp_path / "kept.jsonl", kept)
    monkeypatch.setattr(committed, "path_of", {"mine": tmp_path / "kept.jsonl"}.get)

    def measured(*more):
        leaderboard.main([*arguments, "--run-dir", str(tmp_path / "-".join(("new", *more))), *more])
        found = read_rows(tmp_path / "-".join(("new", *more)) / "leaderboard.jsonl")
        return {(row["sample"], row["method"]) for row in found if row["sort"] == "kl"}

    every = {(row["sample"], row["method"]) for row in rows if row["sort"] == "kl"}
    assert measured() == every and (first, "lazyllm") in every
    assert measured("--new-only") == every - {(first, "lazyllm")}, "gemfilter's row is of other settings"


def test_random_weights_of_a_yaml_files_sizes_are_timed_and_rows_say_so(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(
        "model: tiny, random weights\nlengths: [96]\nitems: [2]\nspeedups: [1.5]\nmethods: [sdtp, lazyllm]\n"
        f"run_dir: {tmp_path / 'run'}\n"
        "config: {model_type: llama, vocab_size: 128, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 18,\n"
        "         num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}\n"
    )
    leaderboard.main(["--params", str(tmp_path / "tiny.yaml")])
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    assert {row["weights"] for row in rows} == {"random, true sizes"} and not any("kl_nats" in row for row in rows)
    timed = [row for row in rows if row["sort"] == "time" and row["method"] == "sdtp"]
    assert len(timed) == 2 and timed[0]["scorer"] == "learned" and timed[0]["flops_speedup"] >= 1.5
    assert "Random weights of the true sizes" in capsys.readouterr().out


def test_a_model_named_beside_a_set_of_random_weights_is_measured_with_its_own_weights_and_name(arguments, tmp_path):
    (tmp_path / "big.yaml").write_text(
        "model: Big, random weights\nname: big\ndtype: float32\nlengths: [200]\nitems: [1]\nspeedups: [1.5]\n"
        "config: {model_type: llama, vocab_size: 128, hidden_size: 32, num_hidden_layers: 18}\n"
    )
    own = ["--params", str(tmp_path / "big.yaml"), "--model", str(tmp_path / "model")]
    options = leaderboard.parse(own)
    assert options.config is None and options.name == str(tmp_path / "model") and options.dtype == "float32"
    assert options.run_dir.name == "leaderboard-model", "not beside the rows of random weights"
    assert leaderboard.parse(own[:2]).config["model_type"] == "llama" and leaderboard.parse(own[:2]).name == "big"
    assert leaderboard.parse([*own, "--name", "mine"]).name == "mine"
    leaderboard.main(
        [*own, "--run-dir", str(tmp_path / "run"), "--method", "lazyllm", "--test-sets", "text", "--tasks"]
    )
    rows = read_rows(tmp_path / "run" / "leaderboard.jsonl")
    assert {row["model"] for row in rows} == {str(tmp_path / "model")}
    assert not any("random" in str(row["weights"]) for row in rows)
    assert [row["method"] for row in rows if "kl_nats" in row] == ["lazyllm"], "items are measured"


@pytest.mark.parametrize(
    ("text", "told"),
    [("lengths: 1024", "lengths: 1024 is not a list"), ("texts: hub", "texts: 'hub' is not a list"),
     ("methods: sdtp", "methods: 'sdtp' is not a list"), ("speedups: [2x]", "--speedups: invalid float value: '2x'"),
     ("lengths: []", "--lengths: expected at least one argument"), ("test_sets: [foo]", "invalid choice: 'foo'"),
     ("hours: soon", "--hours: 'soon' is no time"), ("hours: true", "--hours: 'True' is no"),
     ("hours: [1]", "hours: [1] is not one value"), ("fresh: always", "fresh: 'always' is not true or false"),
     ("threads: 2.5", "--threads: '2.5' is not a whole number"), ("lengths: [1.5]", "--lengths: '1.5' is not"),
     ("config: 5", "config: 5 is no model's"), ("config: {hidden_size: 4}", "give model_type and sizes"),
     ("- a", "does not say arguments by their names"), ("a: [", "a.yaml cannot be read"), ("join: [no]", "no such"),
     ("help: true", "'help' is no argument"), ("colour: red", "'colour' is no argument")],
)  # fmt: skip
def test_a_value_of_a_yaml_file_is_checked_as_if_it_were_typed(text, told, tmp_path, capsys):
    """``texts: hub`` meant the places h, u and b, ``lengths: 1024`` a traceback."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        leaderboard.parse(["--params", str(tmp_path / "a.yaml")])
    assert told in capsys.readouterr().err


def test_what_is_typed_goes_before_a_yaml_files_value_and_null_is_the_default(tmp_path):
    (tmp_path / "a.yaml").write_text("lengths: [64, 96]\ntasks: []\nfresh: true\nno_times: false\nhours: null\nseed: 3")
    options = leaderboard.parse(["--params", str(tmp_path / "a.yaml"), "--seed", "4"])
    assert (options.lengths, options.tasks, options.seed, options.hours) == ([64, 96], [], 4, None)
    assert options.fresh and not options.no_times


def test_the_report_of_another_models_run_folder_goes_where_that_models_rows_are(tmp_path, monkeypatch):
    """Without --name it was held against the embedded model's rows, and went to the run's folder."""
    monkeypatch.setattr(committed, "project_root", lambda: tmp_path)
    row = {"key": "1", "kind": "item", "device": "cpu", "prefill_ms": 1.0}
    (tmp_path / "docs").mkdir()
    committed.write_committed(committed.path_of("embedded"), [row | {"model": "embedded"}])
    options = leaderboard.parse(["--report", "--run-dir", str(tmp_path / "run")])
    assert leaderboard.report_root(options, row | {"model": "mine"}) == project_root()
    assert leaderboard.report_root(options, row | {"model": "embedded", "device": "cuda"}) == tmp_path / "run"


def test_rows_of_another_benchmark_are_not_joined(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"key": "1", "kind": "item", "method": "sdtp", "score": 1.0}\n')
    with pytest.raises(ValueError, match="row '1' is none of a leaderboard: no length"):
        leaderboard.rows_beside([tmp_path / "other.jsonl"])


def test_gpu_parameter_sets_have_the_true_numbers_of_parameters():
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    billions = {"gpu-qwen2.5-7b": 7.6, "gpu-qwen3-8b": 8.2, "gpu-llama3.1-8b": 8.0}
    assert {path.stem for path in leaderboard.PARAMS.glob("gpu-*.yaml")} == set(billions)
    for name, expected in billions.items():
        fields = yaml.safe_load((leaderboard.PARAMS / f"{name}.yaml").read_text())["config"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        assert sum(each.numel() for each in model.parameters()) / 1e9 == pytest.approx(expected, abs=0.06), name


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--params", "nowhere"], "nowhere"), (["--tasks", "niah"], None), (["--tasks", "niahh"], "niahh"),
     (["--speedups", "0.5"], "more than 1"), (["--speedups", "nan"], "more than 1"),
     (["--speedups", "inf"], "more than 1"), (["--lengths", "0"], "--lengths: '0' is not a whole number of 1 or more"),
     (["--items", "-1"], "--items: '-1' is not"), (["--hours", "nan"], "--hours: 'nan' is no time"),
     (["--hours", "-1"], "is no time"), (["--method", "fastkv@2x"], "--method fastkv@2x is none of"),
     (["--threads", "0"], "--threads: '0' is not")],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(given, told, capsys):
    if told is None:
        assert len(leaderboard.parse(given).tasks) == 8
        return
    with pytest.raises(SystemExit):
        leaderboard.parse(given)
    assert told in capsys.readouterr().err
