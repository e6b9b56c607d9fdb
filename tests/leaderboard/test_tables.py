"""The leaderboard's tables and sentences say what their rows say, whichever way these turn out."""

from __future__ import annotations

import pytest

from sdtp_lib.leaderboard import page, picture, plan, tables, words
from tests.leaderboard.made_rows import FREE, framed, kl_rows, ruler_rows


def test_a_method_that_loses_less_is_named_with_its_interval_and_its_count():
    frame = framed(kl_rows({"sdtp": 0.2, "lazyllm": 0.1, "gemfilter": 0.4}))
    (sentence,) = words.better_elsewhere(frame)
    assert sentence.startswith("text at 2x and 64 tokens: `lazyllm` is better: KL -0.1") and "(8)" in sentence
    short = words.better_in_short(frame)
    assert short.endswith("beyond the 95 % interval, at any length and speed-up: `lazyllm` (text at 2x and 64 tokens).")
    verdicts = {line["method"]: line["verdict"] for line in tables.kl_differences(frame)}
    assert verdicts == {"lazyllm": "better", "gemfilter": "worse"}
    assert (
        words.goals(frame)[0].startswith("MISSED: lowest KL on text at 2x")
        and "others `lazyllm`" in words.goals(frame)[0]
    )


def test_where_none_is_ahead_the_goal_is_met_and_no_sentence_stands():
    frame = framed(kl_rows({"sdtp": 0.1, "lazyllm": 0.2}))
    assert words.better_elsewhere(frame) == [] and words.goals(frame)[0].startswith("met: lowest KL on text at 2x")
    assert words.better_in_short(frame).startswith("No other method's mean is ahead of `sdtp`")
    assert "best of the others `lazyllm` 0.2" in words.goals(frame)[0], "not ours again"
    alone = framed(kl_rows({"sdtp": 0.1}))
    assert words.goals(alone)[0].startswith("no other method to say: lowest KL on text")
    assert "On no test set, task or data set is another method's mean better" in page.page(frame.to_dict("records"))


def test_this_projects_other_schedules_are_named_where_they_are_ahead_and_are_no_rivals():
    frame = framed(kl_rows({"sdtp": 0.2, "sdtp-fast": 0.1, "lazyllm": 0.15}))
    assert "text at 2x and 64 tokens: `sdtp-fast` is better" in words.better_elsewhere(frame)[0]
    ahead, own = words.better_in_short(frame).split(" Of this project's other schedules: ")
    assert "`lazyllm` (text at 2x" in ahead and "sdtp-fast" not in ahead
    assert own == "`sdtp-fast` (text at 2x and 64 tokens)."
    alone = framed(kl_rows({"sdtp": 0.2, "sdtp-fast": 0.1}))
    assert words.better_in_short(alone).startswith("No other method's mean is ahead of `sdtp`")
    assert words.better_in_short(alone).endswith("schedules: `sdtp-fast` (text at 2x and 64 tokens).")
    assert "best of the others `lazyllm`" in words.goals(frame)[0]


def test_under_six_items_no_verdict_is_given():
    frame = framed(kl_rows({"sdtp": 0.2, "lazyllm": 0.1}, count=5))
    assert tables.kl_differences(frame)[0]["verdict"] == "too few"
    assert "too few items" in words.better_elsewhere(frame)[0]
    short = words.better_in_short(frame)
    assert "speed-up: none. 1 more mean is ahead by less than the interval or on too few items." in short
    assert words.goals(frame)[0].startswith("too few items to say: lowest KL on text at 2x")


def test_an_item_that_a_running_command_has_not_finished_does_not_count():
    rows = kl_rows({"sdtp": 0.2, "lazyllm": 0.1})[:-1]
    values = tables.kl_by_test_set(tables.at(framed(rows), 64, 2.0))["text"]
    assert {name: value.items for name, value in values.items()} == {"sdtp": 7, "lazyllm": 7}
    begun = ruler_rows({"sdtp": [1.0]}, [1.0])  # the first item of a task, by the first method alone
    assert tables.answers(tables.at(framed(rows, begun), 64, 2.0)) == {}


def test_an_item_on_which_one_method_failed_still_counts_for_the_others():
    rows = kl_rows({"sdtp": 0.2, "lazyllm": 0.1})
    rows[-1] |= {"kind": "failure", "kl_nats": None, "error": "out of memory"}
    values = tables.kl_by_test_set(tables.at(framed(rows), 64, 2.0))["text"]
    assert {name: value.items for name, value in values.items()} == {"sdtp": 8, "lazyllm": 7}


def test_a_method_that_is_only_begun_takes_no_items_out_and_is_named():
    rows = kl_rows({"sdtp": 0.2, "lazyllm": 0.1})
    rows += [row for row in kl_rows({"asl": 0.3}) if row["sample"] in ("text0", "text1", "text2")]
    frame = framed(rows)
    values = tables.kl_by_test_set(tables.at(frame, 64, 2.0))["text"]
    assert {name: value.items for name, value in values.items()} == {"sdtp": 8, "lazyllm": 8}
    assert "- `asl`: begun: 3 of 8 items" in page.page(rows)
    rows += [row for row in kl_rows({"asl": 0.3}) if row["sample"] == "text3"]
    values = tables.kl_by_test_set(tables.at(framed(rows), 64, 2.0))["text"]
    assert {name: value.items for name, value in values.items()} == {"sdtp": 4, "lazyllm": 4, "asl": 4}


def test_items_that_a_method_cannot_shorten_so_far_are_counted():
    rows = kl_rows({"sdtp": 0.2, "lazyllm": 0.1})
    rows[-1] |= {"kind": "out of reach", "kl_nats": None, "error": "at most 1.8x", "key": "a"}
    assert "- `lazyllm`: out of reach on 1 item: at most 1.8x" in page.page(rows)


def test_a_line_of_the_picture_connects_the_same_prompts_only():
    rows = [*kl_rows({"sdtp": 0.1}, count=8), *kl_rows({"sdtp": 0.2}, count=3, speedup=1.5)]
    assert picture.points(framed(rows)).kl_items.tolist() == [3, 3]
    assert picture.points(framed(rows[:8])).kl_items.tolist() == [8], "alone it keeps all"
    few = ruler_rows({"sdtp": [1, 1, 1]}, [1, 1, 0], speedup=1.5)
    many = ruler_rows({"sdtp": [1, 0, 1, 0, 0]}, [1, 1, 0, 1, 1])
    lines = picture.points(framed(few, many))
    assert lines.lost_items.tolist() == [2, 2] and lines.lost.tolist() == [0, 50]
    said = picture.in_words(framed(few, many))
    assert "2 items of RULER that the unpruned model solves." in said and "has 2 of the 4 items" in said
    assert said.endswith("were measured at 2x: ours loses 50.0 points on those, 75.0 on all.")


def test_before_any_pruned_run_there_is_a_page_and_nothing_to_draw():
    rows = [{**row, "method": "unpruned", "speedup": 1.0} for row in kl_rows({"sdtp": 0.1}, count=1)]
    assert picture.shown(framed(rows)).empty and picture.in_words(framed(rows)) == ""
    assert "not measured at 2x or 1.5x yet" in page.page(rows) and "In the picture" not in page.page(rows)


def test_a_method_that_lacks_an_item_of_the_picture_has_no_point_there_and_that_is_said():
    slow = ruler_rows({"sdtp": [1, 1], "uniprefill": [1, 0]}, [1, 1], speedup=1.5)
    fast = ruler_rows({"sdtp": [1, 0], "uniprefill": [1, None]}, [1, 1])
    lines = picture.points(framed(slow, fast)).set_index(["method", "speedup"])
    assert lines.lost["uniprefill", 1.5] == 50 and lines.lost_items["uniprefill", 1.5] == 2
    assert lines.lost.isna()["uniprefill", 2.0] and lines.lost_lacking["uniprefill", 2.0] == 1
    assert lines.lost["sdtp", 2.0] == 50, "the others keep the item"
    said = picture.in_words(framed(slow, fast))
    assert "No point, since it lacks some of them: `uniprefill` at 2x (RULER)." in said
    kl = kl_rows({"sdtp": 0.1, "lazyllm": 0.2})
    assert "No point" not in picture.in_words(framed(kl))
    kl[-1] |= {"kind": "failure", "kl_nats": None}
    assert "8 items per KL test set. No point, since it lacks some of them: `lazyllm` at 2x (KL)." in picture.in_words(
        framed(kl)
    )
    untimed = [{**row, "prefill_ms": None} if row["method"] == "lazyllm" else row for row in kl]
    assert "since it has no times: `lazyllm`." in picture.in_words(framed(untimed))
    assert picture.in_words(framed(slow, fast)) in page.page([*slow, *fast])


def test_a_method_with_fewer_items_of_ruler_is_held_against_ours_on_those_it_has():
    """Its mean of easy items stood as a lead over ours, which had the hard ones too."""
    unpruned = [1.0] * 8
    rows = ruler_rows({"sdtp": [1, 1, 1, 1, 1, 1, 0, 0], "uniprefill": [1, 1, 1, 1, 1, 0.5, None, None]}, unpruned)
    frame = framed(rows)
    found = tables.answers(tables.at(frame, 64, 2.0))
    assert found["uniprefill"]["all"] > found["sdtp"]["all"], "over other items"
    (line,) = tables.ruler_differences(tables.at(frame, 64, 2.0))
    assert (line["own"], line["ours"]) == (pytest.approx(550 / 6), 100) and line["difference"].items == 6
    assert words.better_elsewhere(frame) == []
    text = page.page(rows)
    assert "`uniprefill` has 6 of the 8 items and 1 of the 1 tasks" in text
    assert "on the 6 that ours has too it scores 91.7 where ours scores 100.0" in text
    assert "| niah_single_1 | 8 | 100 | 75 | 92 (6) |" in text and "in brackets the number of items" in text
    whole = ruler_rows({"sdtp": [1, 0], "uniprefill": [1, 0.5]}, [1, 1])
    assert "in brackets the number of items" not in page.page(whole) and "`uniprefill` has" not in page.page(whole)


def test_a_lead_on_ruler_has_its_paired_interval():
    frame = framed(ruler_rows({"sdtp": [0, 0, 0, 0, 0, 1], "lazyllm": [1, 1, 1, 1, 1, 1]}, [1] * 6))
    (sentence,) = words.better_elsewhere(frame)
    assert (
        "RULER at 2x and 64 tokens: `lazyllm` is better: 100.0 where ours has 16.7 on the same items, +83.3" in sentence
    )
    assert "at any length and speed-up: `lazyllm` (RULER at 2x" in words.better_in_short(frame)
    few = framed(ruler_rows({"sdtp": [0, 0], "lazyllm": [1, 1]}, [1, 1]))
    assert "higher, on too few items to say" in words.better_elsewhere(few)[0]


def test_the_goal_is_held_against_another_method_on_the_items_that_both_have():
    rows = kl_rows({"sdtp": 0.2, "lazyllm": 0.21}, count=10)
    assert words.goals(framed(rows))[0].startswith("met")
    for row in rows:  # it fails on the four items that are hard for both
        if row["method"] == "lazyllm" and int(row["sample"][-1]) >= 6:
            row |= {"kind": "failure", "kl_nats": None, "error": "out of memory"}
    values = tables.kl_by_test_set(tables.at(framed(rows), 64, 2.0))["text"]
    assert values["lazyllm"].value < values["sdtp"].value, "over other items"
    goal = words.goals(framed(rows))[0]
    assert goal.startswith("met") and "(6), best of the others `lazyllm`" in goal and goal.endswith("(6).")


def test_ruler_is_told_of_all_items_and_of_those_that_the_unpruned_model_solves():
    frame = framed(ruler_rows({"sdtp": [1, 1, 0, 1], "lazyllm": [0, 1, 0, 0]}, [1, 1, 0, 0.5]))
    found = tables.answers(tables.at(frame, 64, 2.0))
    assert found["sdtp"]["all"] == 75 and found["sdtp"]["unpruned"] == pytest.approx(62.5)
    assert found["sdtp"]["lost"].value == pytest.approx(-12.5) and found["sdtp"]["solved"].value == 100
    assert found["lazyllm"]["solved"].value == 50 and found["lazyllm"]["solved_items"] == 2
    assert words.goals(frame) == [
        "too few items to say: at most 1 point lost on RULER's items that the unpruned model solves, 2x, 64 tokens: "
        "0.0 [0.0, 0.0] (n = 2)."
    ]


def test_longbench_has_its_paired_losses_and_differences_and_its_count():
    scores = {"sdtp": [0.1, 0.2, 0.2, 0.1, 0.2, 0.1], "lazyllm": [0.3, 0.4, 0.4, 0.2, 0.4, 0.3], "asl": [0.0] * 6}
    rows = ruler_rows(scores, [0.25] * 6, "multi_news", plan.LONGBENCH)
    verdicts = {line["method"]: line["verdict"] for line in tables.score_differences(framed(rows), plan.LONGBENCH)}
    assert verdicts == {"lazyllm": "better", "asl": "worse"}, "more is better of scores"
    (sentence,) = words.better_elsewhere(framed(rows))
    assert sentence.startswith("LongBench's multi_news at 2x and 64 tokens: `lazyllm` is better: +18.33 [")
    text = page.page([*kl_rows({"sdtp": 0.1, "lazyllm": 0.2, "asl": 0.3}), *rows])
    assert "6 items of LongBench" in text and "| sdtp | 15.00 (6) | 10.00 [" in text and "unpruned 25.00" in text
    assert "LongBench (`--longbench" not in text and "By data set" not in text
    few = tables.score_differences(
        framed(ruler_rows({"sdtp": [0.1], "asl": [1.0]}, [1], "x", plan.LONGBENCH)), plan.LONGBENCH
    )
    assert few[0]["verdict"] == "too few"


def test_one_item_per_task_gives_an_interval_over_tasks_and_not_one_without_width():
    rows = [
        row for n, score in enumerate([1, 0, 1, 0])
        for row in ruler_rows({"sdtp": [score]}, [1], task=f"task{n}")
    ]  # fmt: skip
    lost = tables.answers(tables.at(framed(rows), 64, 2.0))["sdtp"]["lost"]
    assert lost.value == 50 and lost.low < 50 < lost.high and lost.items == 4


def test_answers_that_are_right_unpruned_are_counted_when_they_stay_right():
    kept = tables.answers_kept(tables.at(framed(kl_rows({"sdtp": 0.1})), 64, 2.0))["sdtp"]
    assert (kept.value, kept.items) == (50, 4)


def test_the_best_method_without_training_is_found_by_rank_and_learned_ones_do_not_compete():
    frame = framed(
        kl_rows({"sdtp": 0.01, FREE: 0.3, "lazyllm": 0.1}),
        kl_rows({"sdtp": 0.01, FREE: 0.1, "lazyllm": 0.2}, "needle"),
        kl_rows({"sdtp": 0.01, FREE: 0.2, "lazyllm": 0.1}, "instructions"),
    )  # fmt: skip
    assert [name for name, *_ in words.training_free(frame)] == ["lazyllm", FREE]
    assert "`lazyllm` is best by rows: mean rank 1.3" in words.best_training_free(frame)
    lead, (line,) = words.against_the_default(frame)
    assert lead.startswith("`lazyllm` minus the default `attention_pooled`") and line.startswith("2x and 64 tokens: ")
    text, needle, _ = line.split("; ")
    assert "text -0.2" in text and text.endswith("better") and needle.endswith("worse")


def test_the_best_without_training_over_models_is_among_those_that_all_have():
    one = framed(kl_rows({"sdtp": 0.01, FREE: 0.4, "lazyllm": 0.1, "asl": 0.01}))
    other = framed(kl_rows({"sdtp": 0.01, FREE: 0.1, "lazyllm": 1.6}))
    said = words.over_models({"small": one, "large": other})
    assert "Over 2 models (small, large)" in said and f"`{FREE}` 0.200, `lazyllm` 0.400." in said
    assert words.over_models({"small": one}) == ""
    assert said in page.page(kl_rows({"sdtp": 0.1, FREE: 0.2}), over_models=said)


def test_the_perplexity_of_text_is_paired_with_the_unpruned_models_and_has_its_goal():
    def with_losses(rows, change):
        losses = [2.0 + n / 10 for n in range(len(rows))]
        return [row | {"loss_full_nats": at, "loss_nats": at + change} for row, at in zip(rows, losses, strict=True)]

    rows = with_losses(kl_rows({"sdtp": 0.1}, speedup=1.5), 0.02)
    rows += with_losses(kl_rows({"lazyllm": 0.2}, speedup=1.5), 0.0)
    rows += with_losses(kl_rows({"sdtp": 0.1}, "needle", speedup=1.5), 9.0)
    grown = tables.perplexity_change(tables.at(framed(rows), 64, 1.5))
    assert {name: round(each.value, 3) for name, each in grown.items()} == {"sdtp": 2.020, "lazyllm": 0.0}
    assert grown["sdtp"].low == pytest.approx(grown["sdtp"].high), "one and the same change on every item"
    text = page.page(rows)
    assert "- MISSED: perplexity of text at most 1 % higher at 1.5x, 64 tokens: +2.0 [+2.0, +2.0] (8) %." in text
    assert "| perplexity of text, % |" in text and "| lazyllm | 0.200 " in text and "| +0.0 [+0.0, +0.0] (8) |" in text
    assert "perplexity of" not in page.page(kl_rows({"sdtp": 0.1}))
    few = words.goals(framed(with_losses(kl_rows({"sdtp": 0.1}, count=2, speedup=1.5), 0.0)))
    assert few == ["too few items to say: perplexity of text at most 1 % higher at 1.5x, 64 tokens: "
                   "+0.0 [+0.0, +0.0] (2) %."]  # fmt: skip
