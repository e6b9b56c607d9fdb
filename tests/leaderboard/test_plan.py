"""What is measured of a new method: the items that all others have, whoever was begun beside them."""

from __future__ import annotations

import pytest

from sdtp_lib.leaderboard.plan import KL, MEMORY, Measured


def row(method, sample, sort=KL, speedup=2.0, length=1024):
    return {"method": method, "sample": sample, "sort": sort, "cell": "text", "speedup": speedup, "length": length}


FULL = [row(method, f"{n}") for method in ("ours", "lazyllm", "uniprefill") for n in range(8)]


def items(rows, *methods):
    return {sample for *_, sample, _ in Measured(rows, methods)._places}


def test_an_item_counts_where_all_other_methods_were_tried_on_it():
    missing = [each for each in FULL if (each["method"], each["sample"]) != ("lazyllm", "3")]
    assert items(missing, "ours") == {f"{n}" for n in range(8)} - {"3"}
    assert items(missing, "lazyllm") == {f"{n}" for n in range(8)}, "its own rows do not count"


@pytest.mark.parametrize("sort", [KL, MEMORY])
def test_a_method_that_was_only_begun_takes_no_items_out(sort):
    """One row of peak memory, left by a run that was stopped, had taken out all 61 items of a length and speed-up."""
    assert items([*FULL, row("begun", "0", sort)], "ours") == {f"{n}" for n in range(8)}
    half = [row("half", f"{n}") for n in range(4)]
    assert items([*FULL, *half], "ours") == {f"{n}" for n in range(4)}, "as in the tables"
