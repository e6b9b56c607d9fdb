"""The benchmark commands of the evaluation, end to end on a tiny model in a folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types

import pandas
import pytest

from sdtp_lib import TokenPruners
from sdtp_lib.records import OtherProvenance, project_root, read_rows
from sdtp_lib.scorers.by_name import NamedScorer, loaded, scorer_named
from sdtp_lib.shipped import shipped_pruners
from tests.benchmarks.commands import RUNS, command, script

needs_chunks = pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) < (5, 24),
    reason="prefill_chunk_size is refused",
)


def test_the_measure_writes_rows_a_table_and_a_picture_and_a_second_run_adds_nothing(model_folder, tmp_path, capsys):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--prompts", "2", "--oracle-prompts", "1"]
    arguments += ["--lengths", "128", "--test-sets", "text", "--settings", "r=0.9", "r=0.7", "--recency-weight", "1"]
    command("scorers")(arguments)
    rows = read_rows(tmp_path / "scorers.jsonl")
    assert len(rows) == 2 * (2 * 9 + 2) and {row["kind"] for row in rows} <= {"scorer", "out of reach"}
    printed = capsys.readouterr().out
    assert "text@128 (n=2)" in printed and "oracle (n=1)" in printed
    assert (tmp_path / "quality_over_flops.png").stat().st_size > 10_000
    command("scorers")(arguments)
    assert read_rows(tmp_path / "scorers.jsonl") == rows
    capsys.readouterr()
    command("scorers")([*arguments, "--tables", "--scores", "recency"])
    printed = capsys.readouterr().out
    assert "recency" in printed and "hidden norm" not in printed and "oracle" not in printed


def test_two_processes_share_the_measure_and_leave_one_file(model_folder, tmp_path):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--prompts", "2", "--oracle-prompts", "0"]
    arguments += ["--lengths", "600", "--test-sets", "text", "needle", "--settings", "r=0.9"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(project_root() / "benchmarks" / "scorers.py"), *arguments],
        env=quiet, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "scorers.jsonl")
    measured = [row["key"] for row in rows if row["cell"] != "tuning"]
    assert len(measured) == len(set(measured)) == 2 * 2 * 9
    assert sum(row["cell"] == "tuning" for row in rows) == 4 * 4
    assert done.stdout.count("### r=0.9") == 1 and not list(tmp_path.glob("*share*.jsonl"))


def test_the_latency_command_says_what_quality_costs_and_what_the_cost_model_misses(model_folder, tmp_path, capsys):
    main, where = command("latency"), ["--model", str(model_folder), "--repeats", "1", "--out", str(tmp_path)]
    assert main(["quality", *where, "--samples", "1", "--prompt-tokens", "160"]) == 0
    printed = capsys.readouterr().out
    assert "| text | method | samples | kl_nats |" in printed and "flops_bound" in printed
    assert main(["run", *where, "--lengths", "128", "--new-tokens", "3", "--presets", "keep09"]) == 0
    assert main(["predict", *where, str(tmp_path / "latency.jsonl")]) == 0
    assert "prefill_ms: error" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--model embedded: .* name that model"):
        main(["predict", str(tmp_path / "latency.jsonl")])


def test_named_scores_alone_are_measured_on_answers_that_the_model_gets_right(model_folder, tmp_path, capsys):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--prompts", "2", "--oracle-prompts", "0"]
    arguments += ["--lengths", "600", "--test-sets", "needle", "--settings", "r=0.9"]
    command("scorers")([*arguments, "--scores", "recency"])
    rows = read_rows(tmp_path / "scorers.jsonl")
    assert {row["scorer"] for row in rows} == {"recency"} and len(rows) == 2
    # A tiny random model answers nothing: pretend that it had, and that pruning lost one of the two.
    changed = [row | {"answer_full": True, "answer": number == 0} for number, row in enumerate(rows)]
    (tmp_path / "scorers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    command("scorers")([*arguments, "--tables"])
    printed = capsys.readouterr().out
    assert "of those that the unpruned model gets right (needle@600 2)" in printed and "| 50.0 |" in printed
    with pytest.raises(ValueError, match="--scores 'recentness' is unknown: choose among random"):
        command("scorers")([*arguments, "--scores", "recentness"])


def test_the_weight_of_recency_is_tuned_on_training_samples_only(model_folder, tmp_path):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--prompts", "1", "--oracle-prompts", "0"]
    command("scorers")([*arguments, "--lengths", "2000", "--test-sets", "needle", "--settings", "r=0.7"])
    rows = read_rows(tmp_path / "scorers.jsonl")
    tuning = {row["sample"] for row in rows if row["cell"] == "tuning"}
    measured = {row["sample"] for row in rows if row["cell"] != "tuning"}
    assert len(tuning) == 4 and not tuning & measured
    assert all("-test-" in name for name in measured) and not any("-test-" in name for name in tuning)


def test_labels_are_held_against_the_gold_check_and_a_second_run_adds_nothing(model_folder, tmp_path, capsys):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--test-sets", "text", "--samples", "1"]
    arguments += ["--prompt-tokens", "96", "--layers", "4", "--labels", "removal", "gradient_x_hidden"]
    command("labels")([*arguments, "--presets", "keep09"])
    rows = read_rows(tmp_path / "labels.jsonl")
    assert [row["kind"] for row in rows] == ["agreement", "agreement", "scorer", "scorer"]
    assert all(-1 <= row["rank_agreement"] <= 1 and row["blocks"] == 6 for row in rows[:2])
    assert "| removal |" in capsys.readouterr().out
    command("labels")([*arguments, "--presets", "keep09"])
    assert read_rows(tmp_path / "labels.jsonl") == rows
    command("labels")([*arguments, "--presets", "keep09", "--step-by-step", "removal", "--blocks", "removal"])
    more = [row["scorer"] for row in read_rows(tmp_path / "labels.jsonl")[len(rows) :]]
    assert sorted(more) == ["oracle: removal, step by step", "oracle: removal, within gold blocks"]


@pytest.mark.parametrize("what", ["first", "stages", "search"])
def test_schedules_are_compared_at_the_budget_that_was_asked_for(model_folder, tmp_path, capsys, what):
    arguments = [what, "--model", str(model_folder), "--scorer", "attention", "--test-sets", "text", "--samples", "1"]
    arguments += ["--prompt-tokens", "160", "--ratios", "0.8", "--run-dir", str(tmp_path)]
    arguments += ["--speedups", "1.3"] if what == "search" else ["--speedup", "1.3"]
    command("schedules")(arguments)
    rows = read_rows(tmp_path / "schedules.jsonl")
    assert len(rows) >= 2 and {row["kind"] for row in rows} == {"scorer"}
    shares = [row["prefill_flops_share"] for row in rows]
    if what == "first":
        assert len({round(share, 3) for share in shares}) > 1, "a later first layer costs more"
        assert (tmp_path / "by_first.png").exists()
    else:
        assert max(shares) - min(shares) < 0.03 and abs(shares[0] - 1 / 1.3) < 0.03
    printed = capsys.readouterr().out
    if what == "search":
        chosen = printed.split("chosen: ")[1].splitlines()[0]
        held_out = {row["setting"] for row in rows if "|heldout|" in row["cell"]}
        assert chosen in held_out and len(held_out) == 2 and (tmp_path / "by_search.png").exists()
        assert "from 4 every 1, even" not in chosen and "KL minus that of" in printed


def test_a_search_names_where_its_stages_begin_lie_and_end():
    search = script("schedule_search")
    layers = [4, 7, 10, 13, 16]
    found = search.schedules(layers, 1, [1, 2], ["even", "early"], [10, 16])
    assert next(iter(found)) == "from 4 every 3, even"
    assert {name: stages for name, (stages, _) in found.items() if "early" in name} == {
        "from 4 every 3 to 10, early": [4, 7, 10],
        "from 4 every 3, early": layers,
        "from 4 every 6 to 10, early": [4, 10],
        "from 4 every 6, early": [4, 10, 16],
    }
    assert search.schedules(layers, 1, [1], ["even"], [4]) == {
        "from 4 every 3, even": (layers, "even"),
        "4 alone": ([4], "even"),
    }


def test_training_free_scores_are_compared_in_pairs_with_schedules_at_equal_flops(model_folder, tmp_path, capsys):
    arguments = ["pairs", "--model", str(model_folder), "--test-sets", "text", "needle", "--samples", "1"]
    arguments += ["--prompt-tokens", "200", "--speedups", "1.2", "1.8", "--run-dir", str(tmp_path)]
    arguments += ["--scores", "recency", "pooled", "pooled, earlier layers + recency"]
    command("schedules")(arguments)
    rows = read_rows(tmp_path / "schedules.jsonl")
    assert {row["kind"] for row in rows} == {"scorer"}
    first = {row["setting"] for row in rows}
    assert {"1.2x, a third", "1.2x, half", "1.8x, a third"} <= first
    assert "1.8x, layer 4" not in first, "of six layers, two cannot save so much"
    for row in rows:
        assert abs(row["prefill_flops_share"] * float(row["setting"].partition("x")[0]) - 1) < 0.03
    assert {row["scorer"] for row in rows} == set(arguments[-3:]) and len(rows) == 2 * len(first) * 3
    printed = capsys.readouterr().out
    assert "### 1.2x by FLOPs" in printed and "### 1.8x by FLOPs" in printed and "geometric mean" in printed


def test_ablations_train_what_is_missing_and_compare_all_of_them(tmp_path, monkeypatch):
    module, calls = script("ablations"), []
    monkeypatch.setattr(module, "call", lambda name, *arguments: calls.append((name, *map(str, arguments))))
    (tmp_path / "paper").mkdir()
    asked = {"recipe": "paper", "dolly": "d.jsonl", "prompts": 180, "epochs": 10.0}
    (tmp_path / "paper" / "training.json").write_text(json.dumps({"asked": asked}))
    recipes = ["--recipes", "paper", "sdtp, without rank"]
    module.main(["--dolly", "d.jsonl", *recipes, "--run-dir", str(tmp_path), "--fewshot", "folder"])
    assert [call[0] for call in calls] == ["train_embedded.py", "scorers.py", "fewshot.py"]
    assert calls[0][calls[0].index("--recipe") + 1] == "sdtp, without rank", "the paper's is trained already"
    names = [f"SDTP paper={tmp_path / 'paper'}", f"SDTP sdtp, without rank={tmp_path / 'sdtp-without-rank'}"]
    alone = ["SDTP paper", "SDTP sdtp, without rank"]
    assert [part for part in calls[1] if part.startswith("SDTP")] == names + alone, "no baseline is measured with them"
    assert [part for part in calls[2] if part.startswith("SDTP")] == names
    with pytest.raises(SystemExit):
        module.main(["--dolly", "d.jsonl", "--recipes", "nonsense"])


def test_scores_are_named_simple_shipped_or_by_folder(tiny_model, tmp_path):
    model, name = tiny_model(), "smollm2-135m-instruct"
    TokenPruners.for_model(model, [2, 4]).save_pretrained(tmp_path / "own")
    shipped = shipped_pruners()[name]
    assert scorer_named("SDTP") == scorer_named(f"SDTP={shipped}") == scorer_named(f"SDTP={name}")
    assert scorer_named("SDTP").folder == shipped
    recency = scorer_named("recency")
    assert recency.folder is None and recency.layers(recency.load(model), 6) == [1, 2, 3, 4, 5]
    learned = scorer_named(f"own={tmp_path / 'own'}")
    assert learned.layers(learned.load(model), 6) == [2, 4]
    with pytest.raises(ValueError, match="does not fit the model's"):
        scorer_named("SDTP").load(model)
    for wrong in (f"SDTP={tmp_path}", "=somewhere", "SDTP=", "recency="):
        with pytest.raises(argparse.ArgumentTypeError, match="no pruners in"):
            scorer_named(wrong)


def test_a_misspelt_score_is_refused_and_never_the_shipped_pruners(tmp_path, monkeypatch):
    """Any unknown name was measured as the shipped pruners, under that name."""
    for wrong in ("atention", "hidden-norm", "./mine/own", "mine/none", "sdtp", "", "Recency"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no score and no pruners' folder: .*SDTP.*hidden_norm"):
            scorer_named(wrong)
    monkeypatch.chdir(tmp_path)
    shipped = shipped_pruners()["smollm2-135m-instruct"]
    for name in ("mine/own", "recency"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text((shipped / "config.json").read_text())
    assert scorer_named("./mine/own").name == "own" and scorer_named("./mine/own").folder.samefile("mine/own")
    assert scorer_named("smollm2-135m-instruct") == NamedScorer("smollm2-135m-instruct", shipped)
    for wrong in ("./recency", "recency=mine/own"):
        with pytest.raises(argparse.ArgumentTypeError, match="recency is the name of a score without training"):
            scorer_named(wrong)
    assert scorer_named("recency").folder is None


def test_two_scores_of_one_name_are_refused_before_any_is_loaded(tmp_path):
    """The second one's rows counted as done by the first one's."""
    shipped, other = scorer_named("SDTP"), NamedScorer("SDTP", tmp_path)
    with pytest.raises(ValueError, match="SDTP names several scores"):
        loaded([shipped, other], model=None)
    assert list(loaded([scorer_named("recency")] * 2, model=None)) == ["recency"]


@pytest.mark.parametrize("arguments", [("longbench", "--scorers"), ("schedules", "first", "--scorer"),
                                       ("fewshot", "--pruners"), ("scorers", "--pruners")])  # fmt: skip
def test_pruners_that_are_not_there_end_a_command_before_it_loads_a_model(arguments, tmp_path, capsys):
    name, *rest = arguments
    with pytest.raises(SystemExit):
        command(name)([*rest, f"mine={tmp_path}"])
    assert f"no pruners in {tmp_path}" in capsys.readouterr().err


def test_unknown_names_end_a_command_before_it_loads_a_model(tmp_path):
    with pytest.raises(ValueError, match="dataset='qaspar'"):
        command("longbench")(["--datasets", "qaspar", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        command("scorers")(["--test-sets", "nonsense"])


@pytest.mark.parametrize(
    "name",
    [
        "ruler",
        "longbench",
        "fewshot",
        "labels",
        "latency run",
        "tune_blend",
        "compression",
        "chunks",
        "overhead scoring",
    ],
)
def test_a_preset_that_there_is_not_ends_a_command_before_it_loads_a_model(name, capsys):
    """It was a traceback, after the model had been loaded."""
    name, *rest = name.split()
    needed = {"tune_blend": ["smollm2-135m-instruct"]}
    with pytest.raises(SystemExit):
        option = ["--preset"] if name in ("chunks", "overhead") else ["--presets", "keep09"]
        command(name)([*rest, *needed.get(name, ()), *option, "kepe09"])
    assert "kepe09" in capsys.readouterr().err


@pytest.fixture
def other_folder(tiny_model, tiny_tokenizer, tmp_path):
    """A model of the same shape with other weights, under the same folder name as `model_folder`'s would have."""
    torch = pytest.importorskip("torch")
    model = tiny_model(max_position_embeddings=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("name", RUNS)
def test_rows_of_another_model_end_every_benchmark_before_it_measures(model_folder, other_folder, tmp_path, name):
    """The second run measured nothing and reported the first model's figures as its own."""
    main, where = command(name), ["--out" if name == "latency" else "--run-dir", str(tmp_path / "rows")]
    main([*RUNS[name], "--model", str(model_folder), *where])
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    before = path.read_bytes()
    with pytest.raises(OtherProvenance, match=rf"{path.name} holds rows made with model=.*weights_fingerprint"):
        main([*RUNS[name], "--model", str(other_folder), *where])
    if name != "latency":
        with pytest.raises(OtherProvenance, match="seed=0"):
            main([*RUNS[name], "--model", str(model_folder), "--seed", "5", *where])
    assert path.read_bytes() == before


def test_another_size_of_the_gold_checks_blocks_is_refused(model_folder, tmp_path):
    arguments = [*RUNS["labels"], "--model", str(model_folder), "--run-dir", str(tmp_path), "--presets"]
    command("labels")(arguments)
    with pytest.raises(OtherProvenance, match="block_tokens=16"):
        command("labels")([*arguments, "--block-tokens", "8"])


def test_a_blend_is_never_chosen_from_rows_of_other_pruners(model_folder, tiny_model, tmp_path, monkeypatch):
    from sdtp_lib import TokenPruners

    module, model = script("tune_blend"), tiny_model()
    monkeypatch.setattr(module, "GROUPS", {"text": ("text",)})
    layers = tuple(range(4, 6, 3))
    for name in ("a", "b"):
        TokenPruners.for_model(model, layers, features=("hidden",)).save_pretrained(tmp_path / name)
    arguments = ["--model", str(model_folder), "--presets", "keep08", "--prompt-tokens", "128", "--samples", "1",
                 "--learned", "1", "--smoothing", "1", "--run-dir", str(tmp_path / "rows")]  # fmt: skip
    module.main([str(tmp_path / "a"), *arguments])
    before = (tmp_path / "b" / "config.json").read_bytes()
    with pytest.raises(OtherProvenance, match="blend.jsonl holds rows of .* that were made by TokenPruners"):
        module.main([str(tmp_path / "b"), *arguments])
    assert (tmp_path / "b" / "config.json").read_bytes() == before
    with pytest.raises(OtherProvenance, match="sample_hash|seed"):
        module.main([str(tmp_path / "a"), *arguments, "--seed", "8"])


def test_latency_loads_one_model_for_weights_and_tokenizer(model_folder, tmp_path, monkeypatch):
    """Its tokenizer came from a second whole model."""
    import sdtp_lib.models

    loaded, load = [], sdtp_lib.models.load_model
    counted = lambda *arguments, **options: loaded.append(arguments) or load(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(sdtp_lib.models, "load_model", counted)
    monkeypatch.setattr("sdtp_lib.load_model", counted, raising=False)
    where = ["--model", str(model_folder), "--repeats", "1", "--out", str(tmp_path)]
    assert command("latency")(["quality", *where, "--samples", "1", "--prompt-tokens", "160"]) == 0
    assert len(loaded) == 1


def test_pruners_trained_on_other_data_are_not_taken_for_an_ablations_own(tmp_path, monkeypatch):
    module = script("ablations")
    monkeypatch.setattr(module, "call", lambda *arguments: None)
    (tmp_path / "paper").mkdir()
    asked = {"recipe": "paper", "dolly": "d.jsonl", "prompts": 180, "epochs": 10.0}
    (tmp_path / "paper" / "training.json").write_text(json.dumps({"asked": asked}))
    arguments = ["--dolly", "d.jsonl", "--recipes", "paper", "--run-dir", str(tmp_path)]
    module.main(arguments)
    with pytest.raises(ValueError, match=r"paper holds pruners trained with epochs 10.0 \(asked: 3.0\): give this run"):
        module.main([*arguments, "--epochs", "3"])


@needs_chunks
def test_chunks_are_held_against_one_shot_and_their_memory_is_read_in_a_process_of_its_own(
    model_folder, tmp_path, capsys, monkeypatch
):
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--preset", "keep07", "--scorers", "recency"]
    arguments += ["--test-sets", "text", "--samples", "1", "--prompt-tokens", "200", "--chunks", "64"]
    chunks = script("chunks")
    chunks.main([*arguments, "--parts", "quality"])
    rows = read_rows(tmp_path / "quality.jsonl")
    assert [row["chunk"] for row in rows] == [0, 64]
    assert rows[0]["kl_to_one_shot_nats"] < 1e-9 < rows[1]["kl_to_one_shot_nats"]
    assert rows[0]["tokens_per_layer"] == rows[1]["tokens_per_layer"]
    assert "| keep07 | recency | one-shot | 1 |" in capsys.readouterr().out
    told = {}
    for variant, size in (("unpruned", "0"), ("one-shot", "0"), ("pruned", "128"), ("unpruned", "128")):
        chunks.main(["--child", "random", "500", variant, size])
        told[variant, size] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["unpruned", "0"]["kv_mb"] == told["unpruned", "128"]["kv_mb"] > told["pruned", "128"]["kv_mb"]
    assert told["one-shot", "0"]["tokens_in_last_layer"] == told["pruned", "128"]["tokens_in_last_layer"]

    def ran(command, **_):
        key = command[-3], command[-2], command[-1]
        broken = key[2] == "64"
        return subprocess.CompletedProcess(command, int(broken), json.dumps(told["pruned", "128"]), "no room")

    monkeypatch.setattr(chunks.subprocess, "run", ran)
    arguments = ["--run-dir", str(tmp_path), "--memory", "random:500", "--memory-chunks", "128", "64"]
    chunks.main([*arguments, "--parts", "memory"])
    rows = read_rows(tmp_path / "memory.jsonl")
    assert [(row["kind"], row["variant"], row["chunk"]) for row in rows] == [
        ("chunk memory", "unpruned", 0), ("chunk memory", "one-shot", 0), ("chunk memory", "pruned", 128),
        ("failure", "pruned", 64), ("chunk memory", "unpruned", 128), ("failure", "unpruned", 64),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "| random | 500 | one-shot | own | none |" in printed and "failed: random pruned 64: no room" in printed


@pytest.mark.parametrize("arguments", [("batches", "--lengths", "60", "90"), ("identity", "--lengths", "64"),
                                       ("scoring", "--lengths", "64")])  # fmt: skip
def test_what_pruning_costs_is_printed_with_its_goal(model_folder, capsys, arguments):
    command("overhead")([*arguments, "--model", str(model_folder), "--repeats", "2"])
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("met: ", "MISSED: "))]
    assert len(verdicts) == (1 if arguments[0] == "scoring" else 2)


def test_a_mixture_of_experts_is_timed_beside_its_limit(capsys):
    command("overhead")(["experts", "--families", "olmoe", "--layers", "6", "--lengths", "128", "--repeats", "2"])
    family, tokens, _, _, speedup, limit = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (family, tokens) == ("olmoe", "128") and float(speedup.partition("x")[0]) > 0
    assert 1 < float(limit.removesuffix("x")) < 1.5, "a fifth of the tokens leaves before the last two of six layers"


@needs_chunks
def test_chunks_of_another_preset_stand_beside_the_first_and_other_pruning_or_prompts_are_refused(
    model_folder, tmp_path, capsys, monkeypatch
):
    """A second run with another preset measured nothing and printed the first one's rows under its name."""
    arguments = ["--model", str(model_folder), "--run-dir", str(tmp_path), "--scorers", "recency", "--chunks", "64"]
    arguments += ["--parts", "quality", "--test-sets", "text", "--samples", "1", "--prompt-tokens", "200"]
    chunks = script("chunks")
    for preset in ("keep09", "keep07"):
        chunks.main([*arguments, "--preset", preset])
    rows = read_rows(tmp_path / "quality.jsonl")
    assert [(row["preset"], row["chunk"]) for row in rows] == [(p, c) for p in ("keep09", "keep07") for c in (0, 64)]
    assert all(rows[0][field] != rows[2][field] for field in ("tokens_per_layer", "config_hash"))
    printed = capsys.readouterr().out
    assert "| keep07 | recency | 64 | 1 |" in printed and "| keep09 | recency | 64 | 1 |" in printed
    preset = chunks.PruningConfig.preset
    monkeypatch.setattr(chunks.PruningConfig, "preset", lambda *given: preset(*given).replace(keep_ratio=0.5))
    with pytest.raises(OtherProvenance, match="config_hash"):
        chunks.main([*arguments, "--preset", "keep07"])
    monkeypatch.setattr(chunks.PruningConfig, "preset", preset)
    monkeypatch.setattr(chunks, "sample_hash", lambda sample: "of another tokenizer")
    with pytest.raises(OtherProvenance, match="sample_hash"):
        chunks.main([*arguments, "--preset", "keep07"])
    monkeypatch.setattr(chunks, "loaded", lambda *_: {"recency": chunks.scorers.random()})
    with pytest.raises(OtherProvenance, match="rows of 'recency' that were made by"):
        chunks.main([*arguments, "--preset", "keep08"])


def test_memory_of_another_preset_is_measured_where_the_preset_counts(tmp_path, monkeypatch):
    chunks, asked = script("chunks"), []

    def ran(command, **_):
        asked.append((command[command.index("--preset") + 1], *command[-4:]))
        row = {"memory_growth_mb": 1.0, "kv_mb": 1.0, "seconds": 1.0, "tokens_in_last_layer": 9}
        return subprocess.CompletedProcess(command, 0, json.dumps(row), "")

    monkeypatch.setattr(chunks.subprocess, "run", ran)
    arguments = ["--run-dir", str(tmp_path), "--parts", "memory", "--memory", "embedded:500", "--memory-chunks", "128"]
    for preset in ("keep09", "keep07"):
        chunks.main([*arguments, "--preset", preset])
    assert [(preset, variant) for preset, _, _, variant, _ in asked] == [
        ("keep09", "unpruned"), ("keep09", "one-shot"), ("keep09", "pruned"), ("keep09", "unpruned"),
        ("keep07", "one-shot"), ("keep07", "pruned"),
    ]  # fmt: skip


def test_another_layer_of_the_gold_check_is_refused_for_oracles_within_blocks(model_folder, tmp_path):
    """The rows named a function, so those of other layers counted as this run's."""
    arguments = [*RUNS["labels"], "--model", str(model_folder), "--run-dir", str(tmp_path), "--presets", "keep09"]
    arguments += ["--blocks", "removal"]
    command("labels")(arguments)
    with pytest.raises(OtherProvenance, match="within gold blocks.* at layers"):
        command("labels")([*arguments, "--layers", "4", "5"])


def test_the_gold_check_of_every_label_is_held_against_its_own_row(model_folder, tmp_path):
    """Behind a label that was not there yet, rows of other blocks counted as done."""
    arguments = [*RUNS["labels"], "--model", str(model_folder), "--run-dir", str(tmp_path), "--presets"]
    command("labels")(arguments)
    with pytest.raises(OtherProvenance, match="block_tokens=16"):
        command("labels")([*arguments, "--labels", "gradient_x_hidden", "removal", "--block-tokens", "8"])


def test_memory_of_other_pruners_under_the_same_folder_name_is_refused(model_folder, tiny_model, tmp_path):
    """Rows said the folder's last name alone, and the second set's peak was the first one's."""
    from sdtp_lib import TokenPruners

    model, main = tiny_model(), command("latency")
    for place in ("a", "b"):
        TokenPruners.for_model(model, (4,), features=("hidden",)).save_pretrained(tmp_path / place / "set")
    arguments = ["memory", "--model", str(model_folder), "--lengths", "64", "--out", str(tmp_path), "--pruners"]
    main([*arguments, str(tmp_path / "a" / "set")])
    rows = read_rows(tmp_path / "latency.jsonl")
    assert all("config_hash" in row and "scorer_id" in row for row in rows) and len(rows) == 2
    with pytest.raises(OtherProvenance, match="made by TokenPruners"):
        main([*arguments, str(tmp_path / "b" / "set")])


def test_presses_of_two_shares_have_two_names_and_the_scorer_has_its_own(monkeypatch, model_folder, tmp_path):
    """40.4 % was called 40%, and every scorer SDTP."""
    press = types.SimpleNamespace(ObservedAttentionPress=None, SnapKVPress=None)
    press.ObservedAttentionPress = press.SnapKVPress = lambda **_: lambda model: contextlib.nullcontext()
    monkeypatch.setitem(sys.modules, "kvpress", press)
    arguments = ["--model", str(model_folder), "--scorer", "recency", "--test-sets", "text", "--samples", "1"]
    arguments += ["--prompt-tokens", "128", "--run-dir", str(tmp_path)]
    for share in ("0.4", "0.404"):
        command("compression")([*arguments, "--kv", share])
    found = {row["scorer"] for row in read_rows(tmp_path / "compression.jsonl")}
    assert found == {"recency"} | {f"{before}{name} {share}" for before in ("", "recency + ")
                                   for name in ("H2O", "SnapKV") for share in ("40%", "40.4%")}  # fmt: skip


def test_a_blend_is_chosen_at_the_presets_that_are_asked_for(model_folder, tiny_model, tmp_path, monkeypatch, capsys):
    """Rows of other presets in the same folder chose with them."""
    from sdtp_lib import TokenPruners

    module = script("tune_blend")
    monkeypatch.setattr(module, "GROUPS", {"text": ("text",)})
    TokenPruners.for_model(tiny_model(), (4,), features=("hidden",)).save_pretrained(tmp_path / "a")
    arguments = [str(tmp_path / "a"), "--model", str(model_folder), "--prompt-tokens", "128", "--samples", "1",
                 "--learned", "1", "--smoothing", "1", "--run-dir", str(tmp_path / "rows"), "--dry-run"]  # fmt: skip
    module.main([*arguments, "--presets", "keep08"])
    capsys.readouterr()
    module.main([*arguments, "--presets", "keep07"])
    printed = capsys.readouterr().out
    assert "keep07" in printed and "keep08" not in printed


def test_another_command_that_fails_ends_an_ablation_with_its_exit_code(monkeypatch):
    module = script("ablations")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2))
    with pytest.raises(SystemExit) as ended:
        module.call("scorers.py")
    assert ended.value.code == 2


def test_the_few_shot_table_says_the_shots_that_its_rows_were_measured_with():
    """It said those of its own arguments, whatever the rows were."""
    shots_of, frame = script("fewshot").shots_of, pandas.DataFrame
    assert shots_of(frame({"shots": [0, 0]})) == "0-shot" and shots_of(frame({"shots": [5]})) == "5-shot"
    assert shots_of(frame({"shots": [5, 0, None]})) == "0- and 5-shot"
    assert shots_of(frame({"kind": ["item"]})) == "few-shot"


def test_a_recency_weight_of_0_is_0_and_none_is_below(model_folder, tmp_path):
    """0 was measured as 1."""
    asked = ["--model", str(model_folder), "--scores", "attention + recency", "--recency-weight", "0", "--prompts", "1",
             "--lengths", "256", "--test-sets", "needle", "--settings", "r=0.9", "--oracles", "--run-dir"]  # fmt: skip
    command("scorers")([*asked, str(tmp_path)])
    (row,) = [row for row in read_rows(tmp_path / "scorers.jsonl") if row["kind"] == "scorer"]
    assert "Recency(name='recency'), 0.0]" in row["scorer_id"]
    with pytest.raises(SystemExit):
        command("scorers")(["--recency-weight", "-1"])
