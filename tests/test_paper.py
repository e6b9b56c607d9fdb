"""How far the counts and the cost model are from what the paper prints."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from sdtp_lib import paper
from sdtp_lib.latency.cost_model import HARDWARE


def test_the_papers_formula_gives_table_2s_unpruned_column():
    rows = paper.paper_table2()
    assert len(rows) == 6 * 3 * 3
    assert max(abs(row["full_error_percent"]) for row in rows) < 0.1


def test_one_reading_of_the_layer_list_gives_table_2s_pruned_column():
    errors = {}
    for row in paper.paper_table2():
        errors.setdefault((row["layers"], row["ratio_of"]), []).append(abs(row["pruned_error_percent"]))
    assert max(errors["before 3, 6 .. 30", "unprotected, end fixed"]) < 0.5
    assert 2.0 < min(errors["before 4, 7 .. 31", "current"]) < max(errors["before 4, 7 .. 31", "current"]) < 2.5


def test_an_a100_predicts_the_papers_unpruned_prefill_within_ten_percent():
    for row in paper.against_paper(HARDWARE["A100-80GB"]):
        assert row["prefill_s"] == pytest.approx(row["prefill_s_paper"], rel=0.10)
        assert row["prefill_speedup"] == pytest.approx(row["prefill_speedup_paper"], rel=0.13)


def test_the_papers_unpruned_memory_fits_a_model_that_computes_all_logits():
    for row in paper.against_paper(HARDWARE["A100-80GB"]):
        assert row["memory_gb_all_logits"] == pytest.approx(row["memory_gb_paper"], rel=0.04)
    assert row["memory_gb"] < 0.75 * row["memory_gb_paper"]  # 128K with logits for one position


def test_the_report_prints_every_layer_list():
    text = subprocess.run([sys.executable, "-m", "sdtp_lib.paper"], check=True, capture_output=True, text=True).stdout
    assert text.count("before 3, 6 .. 30") == 18
    assert math.isclose(float(text.splitlines()[1].split()[-1]), 1.533, abs_tol=1e-3)


def test_the_command_line_says_its_options_and_prints_one_half_alone(capsys):
    with pytest.raises(SystemExit, match="0"):
        paper.main(["--help"])
    assert "flops" in capsys.readouterr().out
    paper.main(["times"])
    assert "before 3, 6 .. 30" not in capsys.readouterr().out
