"""The page and the blocks of README and docs/results.md tell whose rows they are, what failed and what was not run."""

from __future__ import annotations

from sdtp_lib import methods
from sdtp_lib.leaderboard import blocks, page, participants, plan
from sdtp_lib.scorers.token_pruners import TokenPruners
from tests.leaderboard.made_rows import FREE, STAMP, framed, kl_rows, ruler_rows


def test_the_page_says_how_much_was_run_who_is_out_of_reach_and_what_was_not_run():
    reach = {**STAMP, "kind": "out of reach", "method": "snapkv", "length": 64, "speedup": 2.0, "error": "cache only"}
    rows = [*kl_rows({"sdtp": 0.1, "lazyllm": 0.2}), *ruler_rows({"sdtp": [1.0], "lazyllm": [0.0]}, [1.0]), reach]
    text = page.page(rows)
    assert "64 tokens, 2x: 8 items per KL test set, 1 item of RULER (1 of its 13 tasks), 2 methods" in text
    assert "`0.025 [0.021, 0.030] (24)` is a mean" in text
    assert "- `snapkv`: cache only" in text and "LongBench (`--longbench" in text and "needle, instructions" in text
    assert "| niah_single_1 | 1 | 100 | 100 | 0 |" in text
    assert "nan" not in text


def test_the_page_says_what_failed_and_in_what_a_method_is_not_its_papers():
    rows = kl_rows({"sdtp": 0.1, "specprefill": 0.3, "streamingllm": 0.2})
    rows = [
        {**row, "remark": "kept tokens are not renumbered"} if row["method"] == "streamingllm" else row for row in rows
    ]
    failed = {**rows[-1], "kind": "failure", "method": "gemfilter", "error": "no rotary table, layers=[1, 2, 3, 4, 9]"}
    text = page.page([*rows, {**failed, "key": "a"}, {**failed, "key": "b"}])
    assert "- `gemfilter`: failed on 2 items: no rotary table, layers=[1, ..., 9]" in text
    assert "- `streamingllm`: kept tokens are not renumbered." in text
    assert "- `specprefill`: without a draft model" in text


def test_the_page_says_which_learned_method_ran_with_other_pruners_than_ours():
    rows = [{**row, "scorer": "learned"} for row in kl_rows({"sdtp": 0.1, "earlier-scheme": 0.3})]
    rows += kl_rows({FREE: 0.2})
    said = "`earlier-scheme` was measured with other pruners than `sdtp`"
    assert said not in page.page([{**row, "scorer_id": "TokenPruners 1"} for row in rows])
    mixed = [{**row, "scorer_id": f"TokenPruners {len(row['method'])}"} for row in rows]
    assert said in page.page(mixed) and f"`{FREE}` was measured" not in page.page(mixed)


def test_a_method_without_any_row_is_named_as_not_measured_place_by_place():
    reach = {**STAMP, "kind": "out of reach", "method": "snapkv", "length": 64, "speedup": 2.0, "error": "cache only"}
    rows = [*kl_rows({"sdtp": 0.1, FREE: 0.2}), *kl_rows({"sdtp": 0.1, "asl": 0.2}, speedup=3.0), reach]
    frame = framed(rows)
    slow, fast = (participants.unmeasured(frame, 64, speedup) for speedup in (2.0, 3.0))
    assert {"asl", "lazyllm"} <= set(slow) and not {"sdtp", FREE, "snapkv"} & set(slow)
    assert {FREE, "snapkv", "lazyllm"} <= set(fast) and "asl" not in fast
    assert set(slow) | {"sdtp", FREE, "snapkv"} == {*methods.names(), FREE}
    text = page.page(rows)
    assert "Not measured: " + ", ".join(f"`{name}`" for name in slow) + "." in text
    assert text.count("Not measured: ") == 2
    everyone = [*methods.names(), FREE]
    assert "Not measured" not in page.page(kl_rows(dict.fromkeys(everyone, 0.1)))


def test_the_page_says_whose_rule_one_dial_does_not_scale_whatever_the_rows_say():
    names = [name for name in methods.names() if name not in ("snapkv", "h2o")]  # these shorten no prefill
    frame = framed(kl_rows(dict.fromkeys(names, 0.1)))
    assert set(participants.not_by_one_dial(frame)) == {"asl", "fastkv", "specprefill", "uniprefill"}
    said = participants.remarks(frame)
    assert "one keep ratio" in said["uniprefill"] and "KV budget" in said["fastkv"] and "no longer" in said["asl"]
    assert said["specprefill"].startswith("without a draft model") and "whole chunks" in said["specprefill"]
    text = page.page(kl_rows({"sdtp": 0.1, "lazyllm": 0.2, "uniprefill": 0.3}))
    assert f"`uniprefill`: {said['uniprefill']}." in text and "per prompt (`uniprefill`: not the whole rule" in text
    assert "not the whole rule" not in page.page(kl_rows({"sdtp": 0.1, "lazyllm": 0.2}))
    told = [{**row, "remark": methods.get(row["method"]).remark} for row in kl_rows({"specprefill": 0.1})]
    assert participants.remarks(framed(told)) == {"specprefill": said["specprefill"]}, "no remark twice"


def test_the_readme_says_which_learned_method_had_no_pruners_or_others():
    rows = kl_rows({"sdtp": 0.1, "sdtp-low": 0.2, "earlier-scheme": 0.3, FREE: 0.25, "uniprefill": 0.4})
    scorers = {"sdtp": "a", "earlier-scheme": "b", "sdtp-low": "c"}
    for row in rows:
        row |= {"scorer": "learned" if row["method"] in ("sdtp", "earlier-scheme") else FREE}
        row |= {"scorer_id": scorers.get(row["method"])}
    table = blocks.readme_table(rows)
    trained = {line[0].strip("*"): line[1] for line in table["body"]}
    assert trained == {"sdtp": "yes", "sdtp-low": "no †", "earlier-scheme": "yes †", FREE: "no", "uniprefill": "no"}
    note = table["note"]
    assert f"- † `sdtp-low`: no pruners for its stages, scored by {FREE}; `earlier-scheme`: scored by other" in note
    assert "pruners than `sdtp`.\n" in note and "differ from their papers (`uniprefill`)." in note
    assert max(map(len, note.splitlines())) < 400, "a line says one thing"
    rows[2] |= {"scorer_id": "a"}
    assert rows[2]["method"] == "earlier-scheme" and "than `sdtp` in 7 of 8 rows." in blocks.readme_table(rows)["note"]
    same = [{**row, "scorer": "learned", "scorer_id": "a"} for row in kl_rows({"sdtp": 0.1, "earlier-scheme": 0.3})]
    assert "†" not in str(blocks.readme_table(same))


def test_the_readme_marks_a_solved_score_of_fewer_items_with_their_number():
    rows = ruler_rows({"sdtp": [1, 1, 0], "uniprefill": [1, None, None]}, [1, 1, 0])
    table = blocks.readme_table([*kl_rows({"sdtp": 0.1, "uniprefill": 0.2}), *rows])
    column = table["header"].index("RULER, solved")
    assert [line[column] for line in table["body"]] == ["100", "100 (1)"]
    solved = "on the 2 items that the unpruned model solves and every method was run on (in brackets: how many"
    assert solved in table["note"]
    assert "in brackets" not in blocks.readme_table(kl_rows({"sdtp": 0.1}))["note"]


def test_the_results_page_says_where_ours_is_lowest_and_who_is_lower_or_level():
    rows = [
        *kl_rows({"sdtp": 0.1, "lazyllm": 0.05, "asl": 0.3, "sdtp-fast": 0.01}),
        *kl_rows({"sdtp": 0.1, "lazyllm": 0.2, "asl": 0.3, "sdtp-fast": 0.01}, "needle"),
        *ruler_rows({"sdtp": [1, 1, 1, 1, 1, 0], "lazyllm": [0] * 6, "asl": [1] * 5 + [None], "sdtp-fast": [1] * 6},
                    [1] * 6),
    ]  # fmt: skip
    for row in rows:  # asl: now below, now above ours
        if row["method"] == "asl" and row.get("cell") == "needle":
            row["kl_nats"] = 0.06 if int(row["sample"][-1]) % 2 else 0.15
    table = blocks.standing(rows)
    (line,) = table["body"]
    assert dict(zip(table["header"], line, strict=True)) == {
        "prompts": "64 tokens, 2x", "others": "2", "ours has the lowest KL": "needle", "lower than ours":
        "text: `lazyllm`", "level with ours": "needle: `asl`", "RULER, solved": "83 (6), `lazyllm` 0", "n": "8",
    }, "asl lacks an item of RULER; this project's other schedule is no rival"  # fmt: skip
    few = [*kl_rows({"sdtp": 0.1, "lazyllm": 0.2}), *ruler_rows({"sdtp": [1], "lazyllm": [1]}, [1])]
    assert blocks.standing(few)["body"][0][5] == "too few (1)"
    assert set(blocks.every(rows)) == {"leaderboard", "standing"} and blocks.every([]) == {}
    assert set(blocks.every(kl_rows({"sdtp": 0.1, "lazyllm": 0.2}, speedup=3.0))) == {"standing"}


def test_the_readmes_lines_are_the_best_ten_by_kl_and_name_their_count_and_origin():
    names = {"sdtp": 0.1} | {f"m{n:02d}": 0.2 + n / 10 for n in range(12)}
    table = blocks.readme_table(kl_rows(names))
    assert len(table["body"]) == 10 and table["body"][0][0] == "**sdtp**" and table["body"][0][-1] == "8"
    assert table["header"][2] == "KL text" and "measured 2026-01-02" in table["note"]
    assert "- No other method's mean is ahead of `sdtp`" in table["note"] and "10 best of 13 methods" in table["note"]
    assert blocks.readme_table(kl_rows(names, speedup=1.5)) is None


def test_random_weights_give_costs_and_no_word_on_quality():
    rows = [
        {**row, "sort": plan.TIME, "cell": "time", "kl_nats": None}
        for row in kl_rows({"sdtp": 0.1, "lazyllm": 0.2}) if row["sample"] != "x"
    ]  # fmt: skip
    text = page.page(rows)
    assert "Random weights" in text and "| lazyllm | 1.50x" in text and "## In words" not in text


def test_rows_of_pruners_that_do_not_ship_any_more_say_so():
    ships = TokenPruners.from_pretrained("smollm2-135m-instruct").identity
    rows = kl_rows({"sdtp": 0.1, "lazyllm": 0.2}, count=2)
    for name, own, said in (("embedded", ships, False), ("embedded", "an earlier set", True), ("mine", "own", False)):
        given = [{**row, "model": name, "scorer_id": own if row["method"] == "sdtp" else "x"} for row in rows]
        sentence = "`sdtp` was measured with another set of pruners than the one that ships now"
        assert (sentence in page.page(given)) == said == (sentence in participants.before_what_ships(framed(given)))


def test_rows_of_another_device_are_counted_wherever_the_machine_is_named():
    near = [row | {"threads": 1} for row in kl_rows({"sdtp": 0.1, "lazyllm": 0.2})]
    there = {"device": "cuda", "device_name": "Chip", "torch": "2", "prefill_ms": None, "unpruned_prefill_ms": None}
    far = [row | there for row in ruler_rows({"sdtp": [1.0], "lazyllm": [0.0]}, [1.0])]
    assert participants.measured_elsewhere(near) == "" == participants.measured_elsewhere([])
    said = "2 of 18 rows on Chip (torch 2"
    assert f"Measured elsewhere: {said}" in page.page([*near, *far])
    for block in blocks.every([*far, *near]).values():
        assert f", {said}" in block["note"]
    assert "rows on" not in str(blocks.every(near))
