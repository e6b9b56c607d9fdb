"""Training by a recipe: a user's whole way on a tiny model, what is used of a user's records, resuming, the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re

import pytest
import torch

import sdtp_lib
from sdtp_lib import TokenPruners, __main__, load_model, token_pruning
from sdtp_lib.config import PruningConfig
from sdtp_lib.data import training_mix
from sdtp_lib.data.own_records import own_samples
from sdtp_lib.data.samples import dolly_split
from sdtp_lib.files import BeingWritten
from sdtp_lib.processes import Share
from sdtp_lib.provenance import fingerprint, provenance_of
from sdtp_lib.records import RowWriter
from sdtp_lib.scorers.found import pruners_for
from sdtp_lib.shipped import folder_for, pruner_folders
from sdtp_lib.training import recipes, run, saliency, verdict
from sdtp_lib.training.recipes import RECIPES, NothingMeasured, choose_blend, joined_label


def main(arguments: list[str]) -> int:
    return __main__.main(["train", *arguments])


STORY = "The mill by the river ground corn for the whole valley, and its wheel never stood still in spring. "


def a_line(number: int) -> dict:
    """Record ``number`` of a user's file: all forms in turn."""
    asked, answer = f"Which number has house {number}?", f"House {number} has number {number * 7}."
    return (
        {"instruction": asked, "context": STORY + answer, "response": answer},
        {"instruction": asked, "response": answer},
        {"prompt": STORY * 4 + asked, "completion": answer},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked},
                      {"role": "assistant", "content": answer}]},
    )[number % 4]  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "My-Model"
    tiny_model(max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTP_PRUNERS", str(tmp_path / "pruners"))
    monkeypatch.setenv("SDTP_CACHE", str(tmp_path / "cache"))


# The tiny tokenizer cuts words small: prompts of tasks need a thousand tokens.
SMALL = {"prompts": 10, "prompt_tokens": (1000, 1100), "epochs": 1.0, "instructions": "embedded", "progress": False}


@pytest.mark.slow
def test_a_users_whole_way_from_a_folder_and_forty_lines_to_pruners_found_by_the_models_fingerprint(
    model_folder, tmp_path, capsys
):
    mine = tmp_path / "mine.jsonl"
    lines = [*map(a_line, range(37)), a_line(0), {"instruction": "Why?"}, {"remark": "no question here"}]
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(model_folder), "--data", str(mine), "--instructions", "embedded", "--prompts", "20",
                 "--prompt-tokens", "1000", "1100", "--epochs", "1", "--heldout", "2"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    told, before = printed.index("yours: 37 of 40 records used"), printed.index("labels in")
    assert told < before, "what is used is told before any compute"
    for reason in ("1 left out: the same as an earlier one", "1 left out: no response", "1 left out: no prompt"):
        assert reason in printed
    assert "minutes for the others" in printed and "best training-free score" in printed
    assert "had 2" in printed, "two prompts per kind are no proof, and the sentence says so"

    model, tokenizer = load_model(model_folder)
    folder = folder_for("My-Model", fingerprint(model))
    assert folder.parent == tmp_path / "pruners" and pruner_folders()[0] == folder
    pruners, _ = pruners_for(model)
    assert pruners.identity == TokenPruners.from_pretrained(folder).identity
    with token_pruning(model, PruningConfig(layers=(4,), keep_ratio=0.5)) as trace:
        model(**tokenizer(STORY * 3, return_tensors="pt"))
    assert trace.compression_ratio > 1 and "learned" in str(trace), "found by the fingerprint, since no scorer is named"
    card = (folder / "README.md").read_text()
    assert "| own | 0.9 | 2 |" in card and str(tmp_path) not in card
    facts = json.loads((folder / "training.json").read_text())
    assert len(facts["ids"]) == 20 and sum(name.startswith("own-") for name in facts["ids"]) == 10

    assert main(arguments) == 2, "nothing is overwritten"
    assert "exists already" in capsys.readouterr().err


def test_a_folder_that_is_there_is_refused_before_any_compute(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "checked_labels", lambda *a: pytest.fail("computed"))
    monkeypatch.setattr(run, "choose_prompts", lambda *a: pytest.fail("read data"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        sdtp_lib.train_pruners(tiny_model(), tiny_tokenizer, out=tmp_path / "there")
    with pytest.raises(ValueError, match="recipe='best' is unknown"):
        sdtp_lib.train_pruners(tiny_model(), tiny_tokenizer, recipe="best")


def test_a_killed_run_goes_on_with_its_labels_and_leaves_no_half_folder(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    model, out = tiny_model(max_position_embeddings=4096), tmp_path / "out"

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.trainer, "train_pruners", killed)
        with pytest.raises(KeyboardInterrupt):
            sdtp_lib.train_pruners(model, tiny_tokenizer, out=out, heldout=0, **SMALL)
    assert not out.exists()
    monkeypatch.setattr(saliency, "saliency_of", lambda *a: pytest.fail("labelled again"))
    pruners = sdtp_lib.train_pruners(model, tiny_tokenizer, out=out, heldout=0, **SMALL)
    assert pruners.layers == (4,) and (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("what", ["refined", "averaged"])
def test_a_run_that_is_killed_after_its_training_ends_where_an_unbroken_one_does(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch, what
):
    """What a refinement or an average wrote over the trained pruners was taken for them: refused, or averaged twice."""
    model, options = tiny_model(max_position_embeddings=4096), {"heldout": 0, **SMALL}
    plain = dataclasses.replace(RECIPES["sdtp"], blends=RECIPES["sdtp"].blends[:1])
    if what == "refined":
        refinement = RECIPES["sdtp, refined"].refinement.replace(epochs=1.0)
        options["recipe"] = dataclasses.replace(plain, refinement=refinement)
    else:
        sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "first", **options)
        options |= {"recipe": plain, "start": tmp_path / "first", "start_share": 0.5}
    whole = sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "whole", **options)

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "choose_blend", killed)
            sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "broken", **options)
    again = sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "broken", **options)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight)


def test_a_refined_recipe_trains_on_through_simulated_pruning_and_says_so(tiny_model, tiny_tokenizer, tmp_path):
    model, options = tiny_model(max_position_embeddings=4096), {"heldout": 0, **SMALL}
    recipe = RECIPES["sdtp, refined"]
    first = dataclasses.replace(recipe, refinement=None, blends=recipe.blends[:1])
    refined = dataclasses.replace(first, refinement=recipe.refinement.replace(epochs=1.0))
    sets = [
        sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / name, recipe=each, **options)
        for name, each in (("first", first), ("refined", refined))
    ]
    assert not any("distill_loss" in line for line in sets[0].history)
    assert all(any(part in line for line in sets[1].history) for part in ("distill_loss", "mse_loss"))
    assert sets[0].identity != sets[1].identity and sets[1].blend == sets[0].blend
    said = json.loads((tmp_path / "refined" / "training.json").read_text())["recipe"]["refinement"]
    assert said["distill_weight"] == 1.0 and said["distill_floor"] == recipes.NEGLIGIBLE_NATS
    assert "refinement" not in json.loads((tmp_path / "first" / "training.json").read_text())["recipe"]


def test_prompts_with_evidence_train_beside_labelled_ones_and_need_no_label(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    model, seen = tiny_model(max_position_embeddings=4096), []
    recipe = RECIPES["sdtp, on evidence"].changed("training", batch_size=4)
    training = run.trained

    def looked_at(model, labelled, *rest):
        seen.append(labelled)
        return training(model, labelled, *rest)

    monkeypatch.setattr(run, "trained", looked_at)
    options = {"heldout": 0, **SMALL, "progress": True, "out": tmp_path / "out"}
    pruners = sdtp_lib.train_pruners(model, tiny_tokenizer, recipe=recipe, **options)
    labelled = seen[0]
    with_evidence = labelled.filter(lambda row: row["evidence"] is not None)
    printed = capsys.readouterr().out
    assert f"{len(with_evidence)} more prompts whose evidence is known" in printed
    assert "evidence is meant for pruners to go on from (start=); these begin anew" in printed
    assert len(labelled) == 10 + len(with_evidence) and 12 <= len(with_evidence) <= 17, "too long ones are left out"
    assert all(row["layer_4"] is None and len(row["evidence"]) == row["prompt_length"] for row in with_evidence)
    labels = list((tmp_path / "cache" / "saliency").rglob("*.safetensors"))
    assert len(labels) == 10, "what is known is not labelled"
    chosen_on = {sample["id"] for sample in recipes.held_back(labelled, recipe)}
    assert chosen_on and not any(name.startswith("evidence") for name in chosen_on), "a blend is chosen on others"
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["recipe"]["evidence"] == pytest.approx(5 / 3) and len(facts["ids"]) == len(labelled)
    assert pruners.history and "evidence" not in RECIPES["sdtp"].to_dict()


def test_the_old_form_takes_samples_and_a_config(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    samples = [{"id": str(n), "prompt_ids": list(range(5, 45)), "response_ids": [7, 8, 9 + n]} for n in range(4)]
    config = sdtp_lib.TrainingConfig(epochs=1, eval_share=0.0)
    options = {"output_dir": tmp_path / "work", "cache_dir": tmp_path / "cache", "progress": False}
    assert sdtp_lib.train_pruners(model, samples, config, **options).layers == (4,)
    assert sdtp_lib.train_pruners(model, samples, config=config, tokenizer=tiny_tokenizer, **options).layers == (4,)


def test_training_goes_on_from_given_pruners_and_refuses_those_of_other_layers(tiny_model, tiny_tokenizer, tmp_path):
    model, first = tiny_model(max_position_embeddings=4096), tmp_path / "first"
    options = {"heldout": 0, **SMALL, "recipe": RECIPES["paper"]}
    anew = sdtp_lib.train_pruners(model, tiny_tokenizer, out=first, **options)
    further = sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "second", start=first, **options)
    assert further.notes["start"] == anew.identity != further.identity
    half = sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "half", start=first, start_share=0.5, **options)
    for name, weight in half.state_dict().items():
        torch.testing.assert_close(weight, (anew.state_dict()[name] + further.state_dict()[name]) / 2)
    with pytest.raises(ValueError, match=r"has layers \[4\]; wanted are \[5\]"):
        sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "third", start=first, layers=[5], **options)
    # They were trained on as they are, and the card and `training.json` told of the recipe's inputs.
    other = {**options, "recipe": "sdtp, without passages"}
    with pytest.raises(ValueError, match=r"sizes than the recipe \(features=\['hidden'\] and not \['att"):
        sdtp_lib.train_pruners(model, tiny_tokenizer, out=tmp_path / "fourth", start=first, **other)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann."},
        {"instruction": "Who?", "input": "It was Ann.", "output": "Ann."},
        {"question": "It was Ann. Who?", "answer": "Ann."},
        {"prompt": [{"role": "user", "content": "It was Ann. Who?"}], "completion": [{"content": "Ann."}]},
        {"conversations": [{"from": "human", "value": "It was Ann. Who?"}, {"from": "gpt", "value": "Ann."}]},
        {"messages": [{"role": "user", "content": "It was Ann. Who?"}, {"role": "assistant", "content": "Ann."},
                      {"role": "user", "content": "Thanks."}]},
        {"prompt": "<|im_start|>user\nIt was Ann. Who?<|im_end|>\n<|im_start|>assistant\n", "response": "Ann."},
    ],
)  # fmt: skip
def test_each_usual_form_of_a_record_asks_the_same(record, tiny_tokenizer):
    found = own_samples([record], tiny_tokenizer, fillers=(), tokens=(300, 400))
    (sample,) = found.samples
    assert "It was Ann." in sample["prompt"] and sample["prompt"].count("<|im_start|>") == 2
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert tiny_tokenizer.decode(sample["response_ids"]) == "Ann.</s>"


def test_short_prompts_are_put_among_other_texts_and_long_ones_lose_their_middle(tiny_tokenizer):
    records = [{"instruction": "Who?", "response": "Ann."}, {"prompt": "a b " * 900, "response": "c"}]
    found = own_samples(records, tiny_tokenizer, fillers=[STORY], tokens=(400, 500), most_tokens=1000)
    short, long = found.samples
    assert 350 <= len(short["prompt_ids"]) <= 500 and STORY.strip() in short["prompt"] and "Who?" in short["prompt"]
    assert len(long["prompt_ids"]) == 1000 and long["prompt"].endswith("<|im_start|>assistant\n")
    assert sum(found.changed.values()) == 2
    with pytest.raises(ValueError, match="no record can be used .*3 left out"):
        own_samples([{"a": 1}, {"a": 1}, {"a": 1}], tiny_tokenizer, fillers=(), tokens=(3, 4))


def test_the_mix_is_the_same_each_time_holds_every_kind_and_shares_nothing_with_the_held_out_side(tiny_tokenizer):
    summaries = [{"instruction": f"Sum up {n}.", "context": STORY + f"Item {n}.", "response": f"A mill {n}.",
                  "category": "summarization", "id": f"{n:016x}"} for n in range(80)]  # fmt: skip
    lengths = (1000, 1200)
    mix = training_mix.training_mix(tiny_tokenizer, 22, summaries, lengths=lengths)
    again = training_mix.training_mix(tiny_tokenizer, 22, summaries, lengths=lengths)
    assert [sample["id"] for sample in mix] == [sample["id"] for sample in again]
    assert len(mix) == len({sample["id"] for sample in mix}) == 22
    for part in (mix[:11], mix[11:]):
        kinds = [recipes.kind_of(sample["category"]) for sample in part]
        assert {kind: kinds.count(kind) for kind in kinds} == {"text": 3, "instructions": 2, "tasks": 5, "summaries": 1}
    held = [s for kind in training_mix.KINDS
            for s in training_mix.samples_of(kind, tiny_tokenizer, 4, summaries, "heldout", lengths)]  # fmt: skip
    assert not {sample["id"] for sample in held} & {sample["id"] for sample in mix}
    for sample in (*mix, *held):
        if recipes.kind_of(sample["category"]) == "instructions":
            record = sample["id"].removeprefix("chat-").removeprefix("second-")
            assert dolly_split(record) == ("train" if sample in mix else "heldout")
    digest = next(sample for sample in mix if sample["category"] == "digest")
    assert digest["prompt"].count("Item") == digest["response"].count("A mill") > 1, "the answer draws on every text"
    assert all(len(sample["prompt_ids"]) <= 1200 for sample in mix)


def test_an_own_answer_ends_where_it_begins_to_repeat_itself():
    loop = [*range(30), *range(5, 30), *range(5, 30)]
    assert saliency._unrepeated(loop) == 30
    assert saliency._unrepeated(list(range(40))) == 40
    assert saliency._unrepeated([1] * 60) == 16, "never less than can be learned from"


def test_labels_are_summed_each_over_its_mean_and_averaged_over_neighbours():
    row = {"layer_4": [1.0, 3.0, 2.0, 2.0], "layer_4_removal_odds": [0.0, 0.0, 40.0, 0.0]}
    joined = joined_label(row, (4,), ("removal", "removal_odds"), 3)
    plain = [0.5, 1.5, 1.0 + 4.0, 1.0]
    wanted = [sum(plain[:2]) / 2, sum(plain[:3]) / 3, sum(plain[1:]) / 3, sum(plain[2:]) / 2]
    assert joined["layer_4"] == pytest.approx(wanted)


def test_a_recipes_pruner_grows_with_the_model():
    assert RECIPES["sdtp"].pruner_options(576)["width"] == 64, "as shipped"
    assert RECIPES["sdtp"].pruner_options(4096)["width"] == 256
    assert "width" not in RECIPES["paper"].pruner_options(4096)


def test_the_blend_with_the_lowest_divergence_is_chosen(tiny_model, tmp_path):
    model = tiny_model()
    TokenPruners.for_model(model, (4,), features=("hidden",)).save_pretrained(tmp_path / "set")
    samples = [{"id": str(n), "category": "text", "prompt_ids": [(7 * n + 3 * i) % 120 + 6 for i in range(80)],
                "response_ids": [9, 8, 7]} for n in range(3)]  # fmt: skip
    blends = [{"learned": 1.0}, {"learned": 0.0, "recency": 1.0}, {"learned": 0.0, "recency": -1.0}]
    config = PruningConfig(layers=(4,), keep_ratio=0.3)
    chosen, figures = choose_blend(
        model, tmp_path / "set", blends, samples, config, tmp_path / "rows.jsonl", provenance_of(model, seed=0), Share()
    )
    assert len(figures) == 3 and figures[json.dumps(chosen)] == min(figures.values()) < max(figures.values())


@pytest.mark.parametrize("error", [BeingWritten("rows are being written"), NothingMeasured("nothing was measured")])
def test_what_stops_a_training_run_and_is_no_fault_of_ours_is_one_sentence(model_folder, error, capsys, monkeypatch):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr("sdtp_lib.training.run.train_by_recipe", stopped)
    assert main([str(model_folder)]) == 2
    assert capsys.readouterr().err.endswith(f"error: {error}\n")


@pytest.mark.slow
def test_training_whose_prompts_cannot_be_measured_or_whose_rows_are_being_written_ends_in_one_sentence(
    model_folder, tmp_path, capsys, monkeypatch
):
    def failing(model, samples, settings, methods, writer, **more):
        if not writer.done("a"):
            writer.add("a", kind="failure", error="RuntimeError: no room")

    for module in (recipes, verdict):
        monkeypatch.setattr(module, "compare_scorers", failing)
    arguments = [str(model_folder), "--instructions", "embedded", "--prompts", "10", "--prompt-tokens", "1000", "1100",
                 "--epochs", "1", "--heldout", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 2, "blends are measured first"
    assert re.search(r"error: no blend could be measured on \d+ prompts: 1 failed, .* no room", capsys.readouterr().err)
    (work,) = {path.parent for path in tmp_path.rglob("blends.jsonl")}
    with RowWriter(work / "blends.jsonl", json.loads((work / "blends.jsonl").read_text())):
        assert main(arguments) == 2
    assert "error: blends.jsonl is being written by process" in capsys.readouterr().err
    monkeypatch.setattr(run, "choose_blend", lambda *_: ({"learned": 1.0}, {}))
    assert main(arguments) == 2
    assert "error: no held-out prompt could be measured: 1 failed, the first" in capsys.readouterr().err


def _rows(learned: list[float], free: list[float], kind: str = "text") -> list[dict]:
    return [
        {"kind": "scorer", "cell": kind, "setting": "r=0.8", "sample": str(n), "scorer": name, "kl_nats": value}
        for n, (mine, other) in enumerate(zip(learned, free, strict=True))
        for name, value in (("learned", mine), ("attention", other), ("recency", other + 1))
    ]


def test_the_verdict_says_in_words_where_the_pruners_are_not_better():
    (line,) = verdict.table(_rows([0.1] * 10, [0.3] * 10))
    assert (line.verdict, line.prompts, line.best_name) == ("better", 10, "attention")
    assert math.isclose(line.difference, -0.2) and line.high < 0 and math.isclose(line.recency, 1.3)
    assert "everywhere it was measured" in verdict.in_words([line])
    lines = verdict.table([*_rows([0.1] * 10, [0.3] * 10), *_rows([0.5] * 4, [0.3] * 4, "own")])
    words = verdict.in_words(lines)
    assert words.startswith("NOT better than the best training-free score on own at 0.8")
    assert "More samples: had 4" in words
    few = verdict.table(_rows([0.1] * 4, [0.3] * 4))
    assert few[0].verdict == "open" and "NOT shown to be better" in verdict.in_words(few), "few prompts prove nothing"
    mixed = verdict.table(_rows([0.1, 0.5] * 8, [0.5, 0.1] * 8))
    assert "NOT shown to be better" in verdict.in_words(mixed) and "Open on text at 0.8" in verdict.in_words(mixed)
    assert "| text | 0.8 | 10 | 0.1000 | 0.3000 (attention) |" in verdict.as_text([line], markdown=True)


def test_prompts_that_lack_a_score_count_for_none():
    rows = _rows([0.1] * 3, [0.3] * 3)
    (line,) = verdict.table(rows[:-1])
    assert line.prompts == 2


def test_the_users_newest_pruners_come_before_older_ones_and_before_those_that_ship(tmp_path):

    for age, name in enumerate(("z-old", "a-new", ".half-written")):
        folder = tmp_path / "pruners" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (1000 + age, 1000 + age))
    names = [folder.name for folder in pruner_folders()]
    assert names == ["a-new", "z-old", "smollm2-135m-instruct"]
    assert folder_for("Qwen/Qwen3 8B!", "f0").name == "qwen3-8b-f0"


def test_rows_of_a_measure_are_not_made_twice(tiny_model, tmp_path):
    model = tiny_model()
    pruners = TokenPruners.for_model(model, (4,), features=("hidden",)).eval()
    samples = {"own": [{"id": "a", "category": "own", "prompt_ids": list(range(6, 90)), "own_tokens": 5}]}
    where = (samples, (4,), tmp_path / "rows.jsonl", provenance_of(model, seed=0), Share())
    first = verdict.measure(model, pruners, *where)
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert len(first) == 3 and verdict.measure(model, pruners, *where) == first
    assert (tmp_path / "rows.jsonl").stat().st_size == size
    with RowWriter(tmp_path / "rows.jsonl", provenance_of(model, seed=0)):
        assert torch.is_grad_enabled()
