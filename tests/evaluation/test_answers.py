"""Generated answers as rows: full and pruned, resumable after a SIGKILL, failures recorded."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import textwrap
import types

import numpy as np
import pandas
import pytest
import torch
import transformers

from sdtp_lib import scorers
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.config import PruningConfig
from sdtp_lib.data import tasks
from sdtp_lib.evaluation.answer_run import add_arguments, variants
from sdtp_lib.evaluation.answer_tables import answers_table, means_over_tasks
from sdtp_lib.evaluation.answers import FULL, _next_turn, run_items, token_fates
from sdtp_lib.evaluation.items import Item, longbench_items, synthetic_items
from sdtp_lib.evaluation.statistics import stratified_bootstrap
from sdtp_lib.evaluation.tables import (
    beside_oracles,
    best_simple,
    markdown,
    paired_differences,
    scorer_summary,
    wide_table,
)
from sdtp_lib.methods.variant import Variant
from sdtp_lib.model_shape import positions
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.records import OtherProvenance, RowWriter, read_frame, read_rows
from tests.evaluation.multimodal import multimodal_model

CONFIG = PruningConfig(layers=(2, 4), keep_ratio=0.6, min_local_tokens=4)
VARIANTS = [Variant(FULL), Variant("recency", CONFIG, scorers.recency()), Variant("all", CONFIG.replace(keep_ratio=1.0),
            scorers.random())]  # fmt: skip


def an_item(number: int, tokens: int = 60) -> Item:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(6, 120, (tokens,), generator=draw).tolist()
    return Item("multi_news", f"i{number}", ids, 6, score=lambda prediction: len(prediction) / 100)


def test_rows_hold_answers_and_what_was_kept_and_ratio_one_answers_as_the_full_model(
    tiny_model, tiny_tokenizer, tmp_path
):
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(tiny_model(), tiny_tokenizer, [an_item(0), an_item(1)], VARIANTS, writer)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["kind"] for row in rows] == ["item"] * 6
    by = {(row["item"], row["variant"]): row for row in rows}
    for name in ("i0", "i1"):
        assert by[name, "all"]["prediction"] == by[name, FULL]["prediction"]
        assert by[name, "recency"]["tokens_per_layer"] == [60, 60, 36, 36, 21, 21]
        fate = token_fates(by[name, "recency"]["dropped_at"], (2, 4), 6).dropped_at
        assert [(fate == layer).sum() for layer in (2, 4, 6)] == [24, 15, 21] and (fate[:4] == 6).all()
        assert 0 < by[name, FULL]["prefill_seconds"] <= by[name, FULL]["generate_seconds"]
    table = answers_table(read_frame(tmp_path / "rows.jsonl"), against=FULL)
    assert list(table["items"]) == [2, 2, 2]
    assert table.set_index("variant").loc["all", "difference"] == 0


def test_a_second_turn_goes_on_with_the_pruned_cache_and_its_answer_counts(tiny_model, tiny_tokenizer, tmp_path):
    model, turn = tiny_model(), (7, 8, 9, 10)
    item = dataclasses.replace(an_item(0), follow_up_ids=turn, labels={"target_tokens": 80})
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(model, tiny_tokenizer, [item, an_item(1)], VARIANTS, writer, batch_size=2)
    rows = {(row["item"], row["variant"]): row for row in read_rows(tmp_path / "rows.jsonl")}
    with token_pruning(model, CONFIG, scorers.recency()):
        first = model.generate(torch.tensor([item.prompt_ids]), max_new_tokens=6, do_sample=False,
                               return_dict_in_generate=True)  # fmt: skip
        said = first.sequences[0].tolist()
        said += turn[1:] if said[-1] == turn[0] else turn
        cache = cache_argument(model, cache_in(first))
        both = model.generate(torch.tensor([said]), max_new_tokens=6, do_sample=False, **cache)
    pruned = rows["i0", "recency"]
    assert pruned["first_prediction"] == tiny_tokenizer.decode(first.sequences[0, 60:], skip_special_tokens=True)
    assert pruned["prediction"] == tiny_tokenizer.decode(both[0, len(said) :], skip_special_tokens=True)
    assert pruned["target_tokens"] == 80 and pruned["tokens_per_layer"] == [60, 60, 36, 36, 21, 21]
    assert rows["i0", FULL]["tokens_per_layer"] == [60] * 6 and rows["i0", FULL]["compression_ratio"] == 1.0
    assert rows["i0", "all"]["prediction"] == rows["i0", FULL]["prediction"]
    assert "first_prediction" not in rows["i1", FULL] and rows["i1", FULL]["batch"] == 1


def test_an_end_of_turn_that_the_first_answer_gave_is_not_said_twice():
    assert _next_turn(torch.tensor([[5, 6, 2]]), (2, 7, 8)).tolist() == [[5, 6, 2, 7, 8]]
    assert _next_turn(torch.tensor([[5, 6, 4]]), (2, 7, 8)).tolist() == [[5, 6, 4, 2, 7, 8]]


def answer_rows():
    """Two tasks at one length: pruning loses one of two solved items in the first and nothing in the second."""
    scores = {("a", "full"): [1, 1, 0, 0], ("a", "p"): [1, 0, 0, 1], ("b", "full"): [1, 0.5], ("b", "p"): [1, 0.5]}
    return pandas.DataFrame([
        {"kind": "item", "dataset": dataset, "variant": variant, "item": f"{dataset}{n}", "score": float(score),
         "target_tokens": 1024, "compression_ratio": 2.0, "prefill_seconds": 1.0, "generate_seconds": 2.0}
        for (dataset, variant), values in scores.items() for n, score in enumerate(values)
    ])  # fmt: skip


def test_a_table_shows_all_items_and_those_that_the_unpruned_model_solves():
    table = answers_table(answer_rows(), against=FULL, by=["dataset", "target_tokens"]).set_index(
        ["dataset", "variant"]
    )
    assert table.loc[("a", "p"), ["items", "score", "difference", "solved items"]].tolist() == [4, 50, 0, 2]
    assert table.loc[("a", "p"), "solved score"] == 50 and table.loc[("b", "p"), "solved score"] == 100
    assert table.loc[("b", "full"), "solved items"] == 1
    half = answers_table(answer_rows(), against=FULL, solved_from=0.5).set_index(["dataset", "variant"])
    assert half.loc[("b", "p"), ["solved items", "solved score"]].tolist() == [2, 75]


def test_a_mean_over_tasks_weighs_them_alike_and_its_interval_resamples_within_each():
    table = means_over_tasks(answer_rows(), against=FULL).set_index("variant")
    assert table.loc["p", ["tasks", "items", "score", "solved tasks", "solved items"]].tolist() == [2, 6, 62.5, 2, 3]
    assert table.loc["p", "solved score"] == 75 and table.loc["p", "solved low"] == 50
    assert table.loc["p", "difference"] == 0 and table.loc["p", "low"] < 0 < table.loc["p", "high"]
    draws = np.random.default_rng(1).normal(size=40)
    _, low, high = stratified_bootstrap([draws, -draws])
    assert high - low > 0.2, "the same places drawn in both tasks would cancel out"
    with pytest.raises(ValueError, match="at least one value in each"):
        stratified_bootstrap([[1.0], []])


def test_a_prompt_beyond_the_models_positions_is_recorded_and_the_rest_goes_on(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(max_position_embeddings=64)
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(model, tiny_tokenizer, [an_item(0, tokens=80), an_item(1, tokens=40)], [Variant(FULL)], writer)
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert first["kind"] == "failure" and "80 prompt and 6 new tokens" in first["error"]
    assert second["kind"] == "item"


def test_a_batch_answers_as_each_item_alone_and_keeps_the_same_tokens(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    items = [an_item(number, tokens=40 + 9 * number) for number in range(5)]
    # One ends early: what the batch fills its row with must not count.
    ids = torch.tensor([items[1].prompt_ids])
    second = int(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)[0, -1])
    items = [dataclasses.replace(item, stop_ids=(second,)) for item in items]
    compared = ("prediction", "new_tokens", "score", "prompt_tokens", "tokens_per_layer", "dropped_at")
    found = {}
    for size in (1, 3):
        with RowWriter(tmp_path / f"rows{size}.jsonl", {}) as writer:
            run_items(model, tiny_tokenizer, items, VARIANTS, writer, batch_size=size)
        rows = read_rows(tmp_path / f"rows{size}.jsonl")
        found[size] = {row["key"]: [row.get(name) for name in compared] for row in rows}
        assert {row["batch"] for row in rows} == ({1} if size == 1 else {2, 3})
    assert found[1] == found[3] and len(found[1]) == 15
    assert found[1]["multi_news|i1|full"][1] <= 2


def test_a_batch_that_fails_is_answered_item_by_item(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(max_position_embeddings=64)
    items = [an_item(0, tokens=80), an_item(1, tokens=40)]
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(model, tiny_tokenizer, items, [Variant(FULL)], writer, batch_size=2)
    kinds = {row["item"]: row["kind"] for row in read_rows(tmp_path / "rows.jsonl")}
    assert kinds == {"i0": "failure", "i1": "item"}


def test_a_stop_token_ends_an_answer(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(model, tiny_tokenizer, [an_item(3)], [Variant(FULL)], writer)
        ids = torch.tensor([an_item(3).prompt_ids])
        third = int(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[0, -1])
        stopped = Item("multi_news", "stopped", an_item(3).prompt_ids, 6, lambda text: 0.0, stop_ids=(third,))
        run_items(model, tiny_tokenizer, [stopped], [Variant(FULL)], writer)
    whole, short = read_rows(tmp_path / "rows.jsonl")
    assert short["new_tokens"] <= 3 < whole["new_tokens"]


def test_items_of_both_kinds_carry_their_tasks_rules(tiny_tokenizer):
    record = {
        "input": "",
        "context": "news " * 200,
        "answers": ["x"],
        "length": 1,
        "dataset": "samsum",
        "language": "en",
    }
    (item,) = longbench_items([record | {"all_classes": None, "_id": "a"}], tiny_tokenizer, max_tokens=300)
    assert item.cut and len(item.prompt_ids) == 300 and item.max_new_tokens == 128 and len(item.stop_ids) == 1
    records = tasks.synthetic_tasks("needle", tokenizer=tiny_tokenizer, prompt_tokens=2000, count=1)
    (item,) = synthetic_items(records, tiny_tokenizer)
    assert item.score(f"it is {records[0]['answers'][0]}") == 1.0 and item.score("no") == 0.0


_KILLED_RUN = """
    import os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from transformers import LlamaConfig, LlamaForCausalLM
    from sdtp_lib import scorers
    from sdtp_lib.config import PruningConfig
    from sdtp_lib.evaluation.answers import FULL, run_items
    from sdtp_lib.methods.variant import Variant
    from sdtp_lib.evaluation.items import Item
    from sdtp_lib.records import RowWriter, read_rows

    class Decoder:
        def decode(self, ids, skip_special_tokens=True):
            return " ".join(map(str, ids))

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                             num_attention_heads=2, num_key_value_heads=1, vocab_size=64)).eval()
    items = [Item("d", str(n), torch.randint(3, 60, (40,)).tolist(), 5, len) for n in range(12)]
    variants = [Variant(FULL), Variant("recency", PruningConfig(layers=(1, 2), keep_ratio=0.7, min_local_tokens=4),
                scorers.recency())]
    folder = sys.argv[1]

    def run(path):
        with RowWriter(path, {}) as writer:
            run_items(model, Decoder(), items, variants, writer)

    def table(path):
        return sorted((row["key"], row["prediction"], row["score"]) for row in read_rows(path))

    run(folder + "/whole.jsonl")
    path, draw, survived, seconds = folder + "/killed.jsonl", random.Random(1), 0, 0.02
    while survived < 20:
        child = os.fork()
        if child == 0:
            run(path)
            os._exit(0)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        before = table(path) if os.path.exists(path) else []
        survived += os.WIFSIGNALED(status)
        if len(before) == len(items) * 2:
            os.remove(path)  # it was faster than the kills: begin again, to be killed at other points
    finished = [row["utc"] if "utc" in row else row["key"] for row in read_rows(path)] if os.path.exists(path) else []
    run(path)
    again = [row["key"] for row in read_rows(path)]
    assert again[: len(finished)] == finished and len(set(again)) == len(again), "a finished item was computed again"
    assert table(path) == table(folder + "/whole.jsonl"), "another table"
    print("survived", survived, "rows", len(again))
"""


def test_twenty_kills_at_random_points_give_the_table_of_a_run_that_was_left_alone(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_KILLED_RUN), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "survived 20 rows 24" in result.stdout


def test_two_writers_on_one_run_are_refused(tmp_path):
    with (
        RowWriter(tmp_path / "rows.jsonl", {}),
        pytest.raises(RuntimeError, match="is being written by"),
        RowWriter(tmp_path / "rows.jsonl", {}),
    ):
        pass


def scorer_rows():
    rows = []
    for number in range(12):
        for scorer, kl in (("SDTP", 0.1), ("recency", 0.2), ("random", 0.4)):
            rows.append({"kind": "scorer", "cell": "text@64", "setting": "r=0.9", "scorer": scorer,
                         "block": "deployable", "sample": f"s{number}", "kl_nats": kl + number / 1000,
                         "loss_nats": 2.0 + kl, "loss_full_nats": 2.0, "answer": number % 2 == 0, "answer_full": True,
                         "compression_ratio": 1.5, "prefill_flops_share": 0.66})  # fmt: skip
    return pandas.DataFrame(rows)


def test_a_summary_counts_items_and_a_paired_difference_gives_its_verdict():
    frame = scorer_rows()
    summary = scorer_summary(frame).set_index("scorer")
    assert summary.loc["SDTP", "items"] == 12
    assert summary.loc["SDTP", "kl_nats"] == pytest.approx(0.1055)
    assert summary.loc["SDTP", "answers_percent"] == 50 and summary.loc["SDTP", "answers_full_percent"] == 100
    assert summary.loc["SDTP", "perplexity_change_percent"] == pytest.approx(10.517, abs=0.01)
    differences = paired_differences(frame, "SDTP").set_index("against")
    assert differences.loc["recency", "verdict"] == "better"
    assert paired_differences(frame, "random").set_index("against").loc["SDTP", "verdict"] == "worse"
    assert set(paired_differences(frame[frame["sample"] < "s5"], "SDTP").verdict) == {"better"}, "s0-s4, s10, s11"
    assert set(paired_differences(frame[frame["sample"].isin(["s1", "s2", "s3"])], "SDTP").verdict) == {"too few"}
    verdict = best_simple(scorer_summary(frame)).iloc[0]
    assert verdict["best simple"] == "recency" and verdict["learned wins"]


def test_learned_scores_stand_beside_the_oracles_on_the_very_prompts_that_those_had():
    frame = scorer_rows()
    oracle = frame[(frame.scorer == "SDTP") & frame["sample"].isin(["s0", "s11"])]
    frame = pandas.concat([frame, oracle.assign(scorer="oracle: removal", block="oracle", kl_nats=0.01)])
    summary = scorer_summary(beside_oracles(frame)).set_index("scorer")
    assert summary.loc["SDTP, same prompts", ["block", "items"]].tolist() == ["oracle", 2]
    assert summary.loc["SDTP, same prompts", "kl_nats"] == pytest.approx(0.1 + 0.011 / 2)
    assert summary.loc["SDTP", "items"] == 12 and "recency, same prompts" not in summary.index
    assert beside_oracles(scorer_rows()).equals(scorer_rows()), "no oracle, nothing added"


def test_a_scorer_that_lags_behind_is_compared_on_the_samples_all_have():
    frame = scorer_rows()
    lagging = frame[~((frame.scorer == "recency") & (frame["sample"].isin(["s10", "s11"])))]
    assert set(scorer_summary(lagging)["items"]) == {10}


def test_a_wide_table_counts_the_items_of_oracles_apart():
    frame = scorer_rows()
    oracle = frame[frame.scorer == "random"].head(3).assign(scorer="oracle: removal", block="oracle")
    wide = wide_table(scorer_summary(pandas.concat([frame, oracle])), "r=0.9")
    assert list(wide.columns) == ["block", "scorer", "text@64 (n=12)"]
    assert list(wide.block) == ["deployable"] * 3 + ["oracle (n=3)"]


def test_markdown_marks_the_lowest_and_shows_missing_values_as_a_dash():
    frame = pandas.DataFrame({"name": ["a|b", "c"], "kl": [0.25, float("nan")]})
    assert markdown(frame, bold_lowest=["kl"]) == "| name | kl |\n| --- | --- |\n| a\\|b | **0.250** |\n| c | - |"


def test_answers_of_another_scorer_or_prompt_are_refused_and_failures_tried_again(tiny_model, tiny_tokenizer, tmp_path):
    path, short = tmp_path / "rows.jsonl", tiny_model(max_position_embeddings=64)

    def answer(model, item, scorer=None):
        with RowWriter(path, {}) as writer:
            variants = [Variant("learned keep09", CONFIG, scorer or scorers.recency())]
            run_items(model, tiny_tokenizer, [item], variants, writer)
        return [row["kind"] for row in read_rows(path)]

    assert answer(short, an_item(0, tokens=80)) == ["failure"]
    assert answer(tiny_model(), an_item(0, tokens=80)) == ["item"]
    with pytest.raises(OtherProvenance, match="rows of 'learned keep09' that were made by Recency"):
        answer(tiny_model(), an_item(0, tokens=80), scorers.random())
    with pytest.raises(OtherProvenance, match="row 'multi_news|i0|learned keep09': holds rows made with sample_hash"):
        answer(tiny_model(), an_item(0, tokens=60))


def test_published_methods_are_variants_by_the_names_that_were_typed(tiny_model, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, "x", presets=[])
    options = parser.parse_args(["--scorers", "recency", "--method", "lazyllm@1.5x", "gemfilter"])
    found = variants(options, tiny_model())
    assert [variant.name for variant in found] == [FULL, "lazyllm@1.5x", "gemfilter"]
    assert found[1].budget.speedup == 1.5 and found[2].budget.speedup is None and found[1].scorer.name == "lazyllm"
    with pytest.raises(SystemExit):
        parser.parse_args(["--method", "lazzyllm"])
    assert "did you mean 'lazyllm'" in capsys.readouterr().err


def test_a_model_inside_a_multimodal_one_answers_within_its_own_positions(tiny_model, tiny_tokenizer, tmp_path):
    """Its outer configuration has no layers, which was an error, and no positions, which were then 8,192."""
    model, parser = multimodal_model(), argparse.ArgumentParser()
    model.config.get_text_config().max_position_embeddings = 64
    unsaid = types.SimpleNamespace(config=transformers.BloomConfig())
    assert positions(model) == 64 and positions(tiny_model()) == 512 and positions(unsaid) is None
    add_arguments(parser, "x", presets=["keep09"])
    chosen = variants(parser.parse_args(["--scorers", "recency"]), model)
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        run_items(model, tiny_tokenizer, [an_item(0, tokens=40), an_item(1, tokens=80)], chosen, writer)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["kind"] for row in rows] == ["item", "item", "failure", "failure"]
    layers = model.config.get_text_config().num_hidden_layers
    assert rows[0]["tokens_per_layer"] == [40] * layers and rows[1]["tokens_per_layer"][-1] < 40
    assert "more than the model's 64 positions" in rows[2]["error"]
