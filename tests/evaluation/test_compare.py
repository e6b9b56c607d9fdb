"""Quality measures: what is compared with what, and that a comparison can be stopped and goes on."""

from __future__ import annotations

import math

import pytest
import torch

from sdtp_lib import budget, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.compare import compare_scorers
from sdtp_lib.evaluation.divergence import continuation_logits, kl_divergence, mean_loss
from sdtp_lib.evaluation.methods import baseline_methods, published_methods
from sdtp_lib.evaluation.statistics import agreement, paired_bootstrap, perplexity
from sdtp_lib.methods.variant import Variant
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.records import OtherProvenance, RowWriter, read_rows
from sdtp_lib.training.oracles import oracle_methods

CONFIG = PruningConfig(layers=(2, 4), keep_ratio=0.5, min_local_tokens=4)


def a_sample(number: int = 0, tokens: int = 60) -> dict:
    draw = torch.Generator().manual_seed(number)
    return {
        "id": f"s{number}",
        "category": "text",
        "prompt_ids": torch.randint(3, 120, (tokens,), generator=draw).tolist(),
        "response_ids": torch.randint(3, 120, (7,), generator=draw).tolist(),
        "answer_mask": [False] * 5 + [True] * 2,
    }


@pytest.fixture
def model(tiny_model):
    return tiny_model(dtype=torch.float64)


def test_unpruned_continuation_logits_are_those_of_one_plain_forward(model):
    sample = a_sample()
    logits, trace = continuation_logits(model, sample["prompt_ids"], sample["response_ids"])
    plain = model(torch.tensor([sample["prompt_ids"] + sample["response_ids"]])).logits[0, 59:-1]
    assert trace is None and logits.shape == (7, 128)
    assert torch.allclose(logits, plain.float(), atol=1e-5)


def test_keep_ratio_one_costs_nothing_and_a_lower_one_something(model):
    sample = a_sample()
    full, _ = continuation_logits(model, sample["prompt_ids"], sample["response_ids"])
    arguments = (model, sample["prompt_ids"], sample["response_ids"])
    same, _ = continuation_logits(*arguments, CONFIG.replace(keep_ratio=1.0), scorers.random())
    assert torch.equal(full, same)
    less, trace = continuation_logits(*arguments, CONFIG, scorers.random())
    assert kl_divergence(full, less) > 1e-6
    assert trace.tokens_per_layer == [60, 60, 30, 30, 15, 15]
    by_name, trace = continuation_logits(*arguments, "streamingllm@1.5x")
    assert trace.tokens_per_layer[-1] < 60 and kl_divergence(full, by_name) > 0


def test_one_continuation_token_is_enough_and_none_is_refused(model):
    assert continuation_logits(model, [5, 6, 7], [8])[0].shape == (1, 128)
    with pytest.raises(ValueError, match="0 continuation tokens"):
        continuation_logits(model, [5, 6, 7], [])
    with pytest.raises(ValueError, match="both config and scorer"):
        continuation_logits(model, [5, 6, 7], [8], CONFIG)


def test_divergence_loss_and_perplexity_agree_with_values_worked_by_hand():
    full = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    other = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    assert kl_divergence(full, full) == pytest.approx(0, abs=1e-7)
    assert kl_divergence(full, other) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, rel=1e-5)
    assert mean_loss(full, [0, 1]) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-5)
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)


def test_a_paired_bootstrap_sees_a_constant_difference_and_not_one_that_is_noise():
    rising = [float(number) for number in range(40)]
    assert paired_bootstrap([value + 1 for value in rising], rising) == pytest.approx((1, 1, 1))
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1)).tolist()
    difference, low, high = paired_bootstrap(noise, [0.0] * 40)
    assert low < 0 < high and low < difference < high
    assert paired_bootstrap(noise, rising, seed=3) == paired_bootstrap(noise, rising, seed=3)
    with pytest.raises(ValueError, match="length 1 and 2"):
        paired_bootstrap([1.0], [1.0, 2.0])


@pytest.mark.parametrize("ratio", [0.9, 0.7])
def test_published_methods_cost_the_flops_of_the_common_stages(model, ratio):
    shape = ModelShape.from_model(model)
    config = PruningConfig(layers=(2, 4), keep_ratio=ratio)
    for line in baseline_methods():
        if line.budget is not None:
            method = line.at(model, config, 400).budget
            own = method.budget_for(model).for_prompt(400)
            limit = budget.speedup_limit(shape, config, 400)
            full = budget.prefill_flops(shape, [400] * shape.num_layers)
            assert full / method.prefill_flops(shape, own, 400) == pytest.approx(limit, rel=0.01), line.name


def test_a_method_that_cannot_be_so_fast_says_so_in_its_row(model, tmp_path):
    lines = published_methods(["fastkv", "lazyllm"])
    early = PruningConfig(layers=(1,), keep_ratio=0.3, min_local_tokens=4)
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        compare_scorers(model, [a_sample(0)], {"most": early}, lines, writer, test_set="text")
    rows = {row["scorer"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows["fastkv"]["kind"] == "out of reach" and "at most" in rows["fastkv"]["error"]
    assert rows["lazyllm"]["kind"] in ("scorer", "out of reach")


def test_a_comparison_has_a_row_for_each_method_and_budget_and_goes_on_where_it_stopped(model, tmp_path):
    path = tmp_path / "scorers.jsonl"
    configs = {"half": CONFIG, "most": CONFIG.replace(keep_ratio=0.8)}
    methods = [*baseline_methods(), *oracle_methods()]
    with RowWriter(path, {}) as writer:
        compare_scorers(model, [a_sample(0)], configs, methods, writer, test_set="text")
    first = read_rows(path)
    assert len(first) == 2 * len(methods) and {row["kind"] for row in first} == {"scorer"}
    assert all(row["kl_nats"] >= -1e-6 and isinstance(row["answer"], bool) for row in first)
    by_method = {row["scorer"]: row for row in first if row["setting"] == "half"}
    assert by_method["random"]["compression_ratio"] == by_method["oracle: removal"]["compression_ratio"]
    assert by_method["oracle: removal"]["kl_nats"] < by_method["random"]["kl_nats"]
    with RowWriter(path, {}) as writer:
        compare_scorers(model, [a_sample(0), a_sample(1)], configs, methods, writer, test_set="text")
    again = read_rows(path)
    assert again[: len(first)] == first and len(again) == 2 * len(first)


def test_a_method_that_fails_on_an_item_is_a_row_and_does_not_end_the_run(model, tmp_path):
    def fails(stage):
        raise RuntimeError("out of memory, say")

    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        methods = [Variant("broken", scorer=fails), Variant("random", scorer=scorers.random())]
        compare_scorers(model, [a_sample()], {"half": CONFIG}, methods, writer, test_set="text")
    rows = {row["scorer"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows["broken"]["kind"] == "failure" and "out of memory" in rows["broken"]["error"]
    assert rows["random"]["kind"] == "scorer"


def test_agreement_is_one_for_the_same_order_and_counts_the_best_that_are_found():
    label = [0.0, 1.0, 2.0, 3.0]
    assert agreement([1.0, 2.0, 30.0, 40.0], label, 0.5) == (pytest.approx(1.0), 1.0)
    correlation, recall = agreement([0.0, 3.0, 1.0, 2.0], label, 0.5)
    assert correlation == pytest.approx(0.4) and recall == 0.5
    with pytest.raises(ValueError, match="one number per token"):
        agreement([1.0], label, 0.5)
    with pytest.raises(ValueError, match="share=1"):
        agreement(label, label, 1)


def test_a_comparison_refuses_rows_of_another_scorer_prompt_or_budget_of_the_same_name(model, tmp_path):
    """``--prompt-tokens`` was in no key: a run at another length measured nothing and averaged the old rows."""
    path = tmp_path / "rows.jsonl"

    def compare(sample, config, scorer):
        with RowWriter(path, {}) as writer:
            variants = [Variant("random", scorer=scorer)]
            compare_scorers(model, [sample], {"half": config}, variants, writer, test_set="text")
        return len(read_rows(path))

    assert compare(a_sample(), CONFIG, scorers.random(0)) == compare(a_sample(), CONFIG, scorers.random(0)) == 1
    with pytest.raises(OtherProvenance, match="rows of 'random' that were made by Random.*seed=0"):
        compare(a_sample(), CONFIG, scorers.random(1))
    with pytest.raises(OtherProvenance, match="sample_hash"):
        compare(a_sample(tokens=80), CONFIG, scorers.random(0))
    with pytest.raises(OtherProvenance, match="config_hash"):
        compare(a_sample(), CONFIG.replace(keep_ratio=0.6), scorers.random(0))
    assert len(read_rows(path)) == 1


def test_a_method_that_failed_is_measured_again_by_the_next_run(model, tmp_path):
    calls = []

    def fails_once(stage):
        calls.append(stage.layer_index)
        if len(calls) == 1:
            raise RuntimeError("out of memory, say")
        return stage.positions.float()

    for kind in ("failure", "scorer", "scorer"):
        with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
            methods = [Variant("shaky", scorer=fails_once)]
            compare_scorers(model, [a_sample()], {"half": CONFIG}, methods, writer, test_set="text")
        assert [row["kind"] for row in read_rows(tmp_path / "rows.jsonl")] == [kind]
    assert len(calls) == 3, "failed at the first stage, then two stages, then nothing"
