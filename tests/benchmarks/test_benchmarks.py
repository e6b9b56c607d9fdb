"""The benchmark commands of the evaluation, end to end on a tiny model in a folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sdtp_lib.records import OtherProvenance, project_root, read_rows
from sdtp_lib.scorers.by_name import scorer_named
from sdtp_lib.shipped import shipped_pruners
from tests.benchmarks.commands import command, script


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
    with pytest.raises(SystemExit, match="--model embedded: .* name that model"):
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
    with pytest.raises(SystemExit, match="--scores 'recentness' is unknown: choose among random"):
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
    shipped = shipped_pruners()[name]
    assert scorer_named("SDTP") == scorer_named(f"SDTP={shipped}") == scorer_named(f"SDTP={name}")
    assert scorer_named("SDTP").folder == shipped
    recency = scorer_named("recency")
    assert recency.folder is None and recency.layers(recency.load(model), 6) == [1, 2, 3, 4, 5]
    learned = scorer_named("SDTP")
    assert learned.layers(learned.load(model), 30) == list(range(4, 30, 3))
    for wrong in (f"SDTP={tmp_path}", "=somewhere"):
        with pytest.raises(argparse.ArgumentTypeError, match="no pruners in"):
            scorer_named(wrong)


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


RUNS = {
    "latency": ["run", "--lengths", "64", "--new-tokens", "2", "--presets", "keep09", "--repeats", "1"],
    "scorers": ["--prompts", "1", "--oracle-prompts", "0", "--lengths", "128", "--test-sets", "text",
                "--settings", "r=0.9", "--recency-weight", "1"],
    "labels": ["--test-sets", "text", "--samples", "1", "--prompt-tokens", "64", "--layers", "4",
               "--labels", "removal"],
    "schedules": ["first", "--scorer", "attention", "--test-sets", "text", "--samples", "1", "--prompt-tokens", "128",
                  "--ratios", "0.8"],
}  # fmt: skip


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
    with pytest.raises(SystemExit, match=r"paper holds pruners trained with epochs 10.0 \(asked: 3.0\): give this run"):
        module.main([*arguments, "--epochs", "3"])


@pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) < (5, 24),
    reason="prefill_chunk_size is refused",
)
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
    assert "| recency | one-shot | 1 |" in capsys.readouterr().out
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
    assert "| random | 500 | one-shot | none |" in printed and "failed: random pruned 64: no room" in printed


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
