"""Which tests the leg of the newest releases runs: all where a release is newer, else what other legs have not run."""

from __future__ import annotations

import newest
import pytest

GIVEN = ["-n", "2", "-m", "not slow", *newest.ENGINE_TESTS, "tests/data", "tests/test_models.py"]


@pytest.fixture
def pins() -> dict[str, str]:
    return {name: newest.pinned(name) for name in newest.ENGINE}


def test_the_engines_folders_are_left_out_where_all_it_imports_is_as_pinned(pins):
    chosen = newest.worth_running(GIVEN, pins)
    assert chosen == ["-n", "2", "-m", "not slow", "tests/data", "tests/test_models.py"]
    assert newest.worth_running(GIVEN, {**pins, "torch": f"{pins['torch']}+cpu", "pandas": "99"}) == chosen


@pytest.mark.parametrize("name", newest.ENGINE)
def test_one_release_of_another_number_or_none_at_all_runs_everything(pins, name):
    assert newest.worth_running(GIVEN, {**pins, name: "99.0"}) == GIVEN
    assert newest.worth_running(GIVEN, {other: pins[other] for other in pins if other != name}) == GIVEN


def test_the_folders_are_among_those_that_make_gives():
    makefile = (newest.ROOT / "Makefile").read_text()
    folders = makefile.split("LIBRARY_TESTS :=")[1].split("NOT_SLOW")[0].split()
    assert set(newest.ENGINE_TESTS) <= set(folders)
    assert all((newest.ROOT / folder).is_dir() for folder in newest.ENGINE_TESTS)
