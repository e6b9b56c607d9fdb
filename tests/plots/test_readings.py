"""The sentences beside the figures say what the figures' own values say, whichever way these turn out."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sdtp_lib.latency.report import with_shorter_prefill
from sdtp_lib.plots import readings
from sdtp_lib.pruning.token_fates import TokenFates


def summary(speedup: float = 1.5, spread: float = 2.0, limit: float = 1.6) -> pd.DataFrame:
    base = {"prompt_tokens": 1024, "prefill_ms": 100.0, "prefill_ms_q1": 99.0, "prefill_ms_q3": 99.0 + spread}
    full = base | {"method": "unpruned", "prefill_speedup": 1.0, "prefill_limit": 1.0, "prefill_share_of_limit": 1.0}
    pruned = base | {"method": "keep09", "prefill_speedup": speedup, "prefill_limit": limit}
    pruned["prefill_share_of_limit"] = speedup / limit
    frame = pd.DataFrame([full, pruned])
    return frame.assign(decode_speedup=[1.0, 1.05], kv_reduction_percent=[0.0, 33.0])


def test_the_best_tokens_are_counted_in_the_answers_place():
    """The old text said that removal singles out the answer's tokens, beside a table with none of them."""
    said = readings.best_tokens({"removal": [3, 9, 10], "gradient_x_hidden": [0, 1, 2]}, (9, 12), 4)
    assert "1 of the 3" not in said and "2 of the 3 best by removal" in said
    assert "0 of the 3 best by gradient x hidden" in said and "tokens 9 to 12, 4 of them" in said
    assert "not found" in readings.best_tokens({"removal": [1]}, None, 4)


def test_labels_that_agree_are_not_said_to_disagree():
    """The old text said "disagree" at a correlation of 0.75."""
    frame = pd.DataFrame({"layer": [0, 1, 2], "rank_correlation": [0.7, 0.75, 0.8]})
    said = readings.label_agreement(frame)
    assert "largely alike" in said and "0.75" in said and "0.70 (layer 0) to 0.80 (layer 2)" in said
    assert "hardly alike" in readings.label_agreement(frame.assign(rank_correlation=[0.1, 0.2, 0.0]))


def test_the_concentration_is_that_of_the_rows():
    rows = pd.DataFrame({"label": ["removal"] * 3, "share": [0.1, 0.2, 0.9], "top_tenth_share": [0.5, 0.6, 0.7]})
    said = readings.concentration(rows, 0.1)
    assert "by removal the best tenth of the tokens holds 60 %" in said and "20 % of the tokens are above 0.1" in said


def test_pruners_that_rank_worse_are_said_to():
    rows = pd.DataFrame({"scorer": ["trained", "attention"], "rank_correlation": [0.6, 0.4], "recall": [0.8, 0.7]})
    rows["sample_id"] = "one"
    assert "better than the best simple score" in readings.learned_ranking(rows, 0.5)
    assert "no better than" in readings.learned_ranking(rows.assign(rank_correlation=[0.3, 0.4]), 0.5)


def test_a_loss_that_rose_is_not_said_to_fall():
    steps = list(range(1, 21))
    falling = readings.loss_fell(pd.DataFrame({"step": steps, "loss": np.linspace(3, 1, 20)}))
    assert "fell from 2.95 to 1.05 in 20 steps" in falling
    assert "did not fall" in readings.loss_fell(pd.DataFrame({"step": steps, "loss": np.linspace(1, 3, 20)}))


def test_the_overlap_is_that_of_the_last_stage():
    first = TokenFates(np.array([3, 1, 3, 1]), (1,), 3, np.zeros((1, 4)))
    other = TokenFates(np.array([3, 3, 1, 1]), (1,), 3, np.zeros((1, 4)))
    said = readings.kept_overlap({"learned": first, "recency": other})
    assert "2 of 4 tokens reach the last layer with learned; of these recency 50 % are kept too" in said


def test_a_speedup_is_said_beside_its_limit_and_a_quiet_machine_needs_no_excuse():
    said = readings.speedup(summary())
    assert "keep09 1.50 times as fast, of 1.60 that its FLOPs allow (94 %)" in said and "busy" not in said


def test_a_busy_machine_is_said_to_be_busy():
    """The old text said "prefill gains what its FLOPs allow" beside 0.68 of the limit."""
    assert "This machine was busy: repetitions of unpruned" in readings.speedup(summary(spread=30.0))
    assert "keep09 at 1,024 tokens seems to beat its limit" in readings.busy(summary(speedup=1.8))
    low = readings.speedup(summary(speedup=1.088))
    assert "(68 %)" in low and "busy" not in low, "a low share is no sign of a busy machine where times do not scatter"


def test_decoding_is_said_with_its_cache():
    assert "keep09 1.05 times (33 % less cache) the unpruned speed" in readings.decode(summary())
    assert readings.decode(summary().assign(decode_speedup=np.nan)) == "No decoding was timed."


def test_families_that_are_never_as_good_are_counted():
    never = {"text": "needle", "reference": "keep09", "family": "filter", "prefill_ms": None, "sdtp_is_faster_by": None}
    reached = {**never, "family": "attention", "prefill_ms": 9.0, "sdtp_is_faster_by": 0.9}
    said = readings.equal_quality([never, reached])
    assert "1 of 2 other families are as good as keep09 at some ratio (attention), and attention in less time" in said
    assert readings.equal_quality([never]).endswith(
        "none of 1 other families is as good as keep09 at any of its ratios."
    )


def test_what_a_figure_or_table_leaves_out_is_named_with_the_reason():
    """Methods that cut the cache alone were zigzag lines over prefill time; one without figures was not spoken of."""
    points = pd.DataFrame(
        {"method": ["unpruned", "keep09", "twice 0.9", "twice 0.5", "snapkv 0.9"], "tflops": [2.0, 1.2, 2.1, 0.8, 2.0],
         "family": ["unpruned", "SDTP", "twice", "twice", "snapkv"], "text": "a short one"}
    )  # fmt: skip
    points = pd.concat([points, points.assign(tflops=10 * points.tflops, text="a long one")], ignore_index=True)
    shorter = with_shorter_prefill(points)
    assert list(shorter.family) == 2 * ["SDTP", "twice", "twice"]
    assert readings.whole_prefills(points, shorter).endswith("after a whole prefill: snapkv.")
    assert readings.whole_prefills(shorter, shorter) == ""
    assert readings.without_figures(["SDTP", "fastkv"], points.rename(columns={"family": "scorer"})).endswith(
        ": fastkv."
    )
    assert readings.without_figures(["SDTP"], points.rename(columns={"family": "scorer"})) == ""


def test_the_best_scores_are_those_of_the_table():
    frame = pd.DataFrame(
        {"cell": ["text"] * 2 + ["needle"] * 2, "scorer": ["SDTP", "recency"] * 2, "kl_nats": [0.3, 0.1, 0.01, 0.9]}
    )
    assert "text: recency (0.100), then SDTP (0.300); needle: SDTP (0.010)" in readings.best_scores(frame)
    assert "recency is number 1 on running text, and 2.0 in the mean over tasks" in readings.text_and_tasks(frame)
