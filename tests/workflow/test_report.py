"""Tables and the sweep report are views of rows: their numbers, their escaping, and README's blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import headlines
import nbformat
import pandas
import pytest
import report
import result_tables
import tables
from result_tables import Table

import figures
from sdtp_lib.records import RowWriter, provenance_of, write_json

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = provenance_of(model_name="tiny <model>", seed=3) | {"device": "cpu", "commit": "abc123"}


def latency_row(tokens: int, method: str, repetition: int, prefill_ms: float, tflops: float) -> dict:
    return {
        "kind": "latency", "prompt_tokens": tokens, "method": method, "family": method, "repetition": repetition,
        "status": "ok", "prefill_ms": prefill_ms, "decode_ms": 100.0, "end_to_end_ms": prefill_ms + 100.0,
        "tflops": tflops, "kv_bytes": 1000 * tflops, "kv_tokens_per_layer": [tokens], "compression_ratio": 1.0,
        "new_tokens": 8, "weight_bytes": 1000, "peak_memory_mb": 10.0, "prune_layers": [], "keep_ratio": 1.0,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    with RowWriter(folder / "seed-3" / "04_latency.jsonl", ORIGIN) as rows:
        for repetition, (full, pruned) in enumerate([(200.0, 100.0), (220.0, 110.0), (300.0, 100.0)]):
            rows.add(f"full/{repetition}", **latency_row(1024, "unpruned", repetition, full, 2.0))
            rows.add(f"pruned/{repetition}", **latency_row(1024, "keep09", repetition, pruned, 1.0))
    with RowWriter(folder / "05_longbench.jsonl", ORIGIN) as rows:
        for scorer, values in {"learned": (0.1, 0.3), "recency": (0.5, 0.7)}.items():
            for sample, kl in enumerate(values):
                rows.add(
                    f"{scorer}/{sample}", kind="scorer", cell="text", setting="r=0.9", scorer=scorer, block="baseline",
                    sample=str(sample), kl_nats=kl, loss_full_nats=2.0, loss_nats=2.0, compression_ratio=1.5,
                    prefill_flops_share=0.6,
                )  # fmt: skip
        for task, score in (("needle", 0.5), ("needle", 1.0), ("qa", 0.25), ("qa", 0.0)):
            rows.add(f"{task}/{score}", kind="task", task=task, score=score)
    # What a training run wrote beside its notebook's rows is no notebook's: it stays out of every table.
    with RowWriter(folder / "pruners" / "heldout.jsonl", ORIGIN) as rows:
        rows.add("own", kind="scorer", cell="held out", setting="r=0.9", scorer="learned", sample="0", kl_nats=9.0,
                 loss_full_nats=2.0, loss_nats=2.0, compression_ratio=1.5, prefill_flops_share=0.6)  # fmt: skip
    write_json(
        folder / "seed-3/.stamps/04_latency-0123456789ab.json",
        {
            "notebook": "04_latency", "parameters": {"text": "<script>alert(1)</script>"}, "seconds": 12.3,
            "ended_utc": "2026-01-01T00:00:00+00:00", "commit": "abc123",
            "executed": str(folder / "seed-3/executed/04_latency-0123456789ab.ipynb"),
        },
    )  # fmt: skip
    return folder


def test_the_latency_table_shows_paired_medians_beside_the_limit(run):
    table = result_tables.latency_table(result_tables.rows_of(run))
    pruned = dict(zip(table.header, next(row for row in table.body if row[1] == "keep09"), strict=True))
    assert pruned["prefill ms"] == "100" and pruned["limit"] == "2.00x"
    assert table.body[1][3] == "2.00x", "the median of the paired ratios 2, 2 and 3"
    assert pruned["KV cache"] == "-50 %"
    assert "Medians of 3 repetitions" in table.note and "commit abc123" in table.note


def test_the_scorer_table_marks_the_best(run):
    table = result_tables.scorer_table(result_tables.rows_of(run))
    assert table.header == ("data", "budget", "items", "learned", "recency")
    assert table.body == (("text", "r=0.9", "2", "**0.200**", "0.600"),)


def test_rows_of_another_kind_are_averaged_by_what_tells_them_apart(run):
    (table,) = result_tables.other_tables(result_tables.rows_of(run))
    assert table.header == ("task", "score") and table.body == (("needle", "0.7500"), ("qa", "0.1250"))


@pytest.fixture
def sweep(tmp_path):
    """Two cells of a sweep, of models that differ fifty times in speed."""
    folder = tmp_path / "run"
    for cell, ms, kl in (("m-A", 100.0, 0.1), ("m-B", 5000.0, 0.9)):
        with RowWriter(folder / cell / "04_latency.jsonl", ORIGIN) as rows:
            rows.add("full", **latency_row(1024, "unpruned", 0, ms, 2.0))
            rows.add("pruned", **latency_row(1024, "keep09", 0, ms / 2, 1.0))
        with RowWriter(folder / cell / "05_longbench.jsonl", ORIGIN) as rows:
            rows.add("a", kind="scorer", cell="text", setting="r=0.9", scorer="learned", block="b", sample="0",
                     kl_nats=kl, loss_full_nats=2.0, loss_nats=2.0, compression_ratio=1.5,
                     prefill_flops_share=0.6)  # fmt: skip
    return folder


def stamped(folder: Path, name: str) -> Path:
    stamp = folder / ".stamps" / f"{name}-0123456789ab.json"
    write_json(stamp, {"notebook": name})
    stamp.with_name(f"{name}.begun").write_text(stamp.name)
    return stamp


def test_cells_of_a_sweep_are_never_averaged_together(sweep):
    rows = result_tables.rows_of(sweep)
    latency, scorers = result_tables.latency_table(rows), result_tables.scorer_table(rows)
    assert [(*row[:4], row[4]) for row in latency.body if row[2] == "unpruned"] == [
        ("m-A", "1,024", "unpruned", "100", "1.00x"), ("m-B", "1,024", "unpruned", "5,000", "1.00x")
    ]  # fmt: skip
    assert scorers.header[:4] == ("folder", "data", "budget", "items")
    assert [(row[0], row[4]) for row in scorers.body] == [("m-A", "**0.100**"), ("m-B", "**0.900**")]
    assert "keep09 in m-A **2.00x** (FLOPs allow 2.00x), keep09 in m-B" in headlines.faster(latency)
    assert "text in m-A 0.100; text in m-B 0.900" in headlines.cost(scorers)
    assert latency.html().count("<td>keep09</td>") == 4, "the cut table names its rows again"
    pictures = report.quality_pictures(rows)
    assert sum("<svg" in part for part in pictures) == 2 and "<p class=note>m-B</p>" in pictures
    one = [row for row in rows if row["folder"] == "m-A"]
    assert result_tables.latency_table(one).header[0] == "prompt" and len(report.quality_pictures(one)) == 2


def test_rows_without_a_stamp_are_left_out_where_the_notebook_has_stamps_and_kept_where_it_has_none(sweep):
    def shown():
        return {(row["folder"], row["notebook"]) for row in result_tables.rows_of(sweep)}

    everything = {(cell, name) for cell in ("m-A", "m-B") for name in ("04_latency", "05_longbench")}
    assert shown() == everything, "a run made by hand has no stamp"
    stamped(sweep / "m-A", "04_latency")
    assert shown() == everything - {("m-B", "04_latency")}
    stamped(sweep / "m-B", "05_longbench").unlink()
    assert shown() == everything - {("m-B", "04_latency"), ("m-B", "05_longbench")}


def test_tables_and_figures_of_an_unfinished_run_are_refused_by_the_notebooks_name(sweep, monkeypatch, capsys):
    stamped(sweep / "m-A", "04_latency").unlink()
    root = sweep.parent / "root"
    (root / "data" / "results").mkdir(parents=True)
    sweep.rename(root / "data" / "results" / "mine")
    for made in figures.SHOWN.values():
        (root / "data" / "results" / "mine" / f"{made}.png").write_bytes(b"png")
    for module in (tables, figures):
        monkeypatch.setattr(module, "project_root", lambda: root)
        assert module.main(["mine"]) == 2
        assert "data/results/mine: 04_latency [m-A] failed or is not finished: run `make" in capsys.readouterr().err


def test_a_pipe_in_a_cell_does_not_break_a_markdown_table():
    text = Table("t", "T", ("a", "b"), (("x|y", "z"),), "note").markdown()
    assert text.splitlines()[2] == "| x\\|y | z |"


def test_the_report_is_one_page_that_loads_nothing_and_escapes_what_it_shows(run, monkeypatch):
    monkeypatch.setattr(report, "project_root", lambda: run)
    page = report.page(run)
    assert "<script" not in page and "&lt;script&gt;" in page and "tiny &lt;model&gt;" in page
    assert not re.search(r"""(src|href)=['"]?(https?:)?//""", page) and "@import" not in page
    assert "href='seed-3/executed/04_latency-0123456789ab.html'" in page
    assert "<svg" in page and page.count("<table>") == 4


def test_the_report_shows_every_picture_and_its_links_open_as_pages(run, monkeypatch, capsys):
    root = run.parent
    monkeypatch.setattr(report, "project_root", lambda: root)
    results = root / "data" / "results"
    results.mkdir(parents=True)
    run.rename(results / "mine")
    run = results / "mine"
    (run / "04_speedup.png").write_bytes(b"png")
    executed = run / "seed-3/executed/04_latency-0123456789ab.ipynb"
    executed.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Time")]), executed)
    (stamp,) = run.rglob(".stamps/*.json")
    write_json(stamp, {**json.loads(stamp.read_text()), "executed": executed.relative_to(root).as_posix()})
    assert report.main(["other"]) == 2
    assert "there are no rows under data/results/other: there are mine" in capsys.readouterr().err
    assert report.main(["mine"]) == 0
    page = (run / "report.html").read_text()
    assert "alt='04_speedup' src='data:image/png;base64,cG5n'" in page and "text=&lt;script&gt;" in page
    assert 'id="Time"' in executed.with_suffix(".html").read_text()


def test_flags_read_yes_and_no_and_a_wide_table_is_cut_in_two():
    assert [result_tables.mean(pandas.Series(v)) for v in ([True, True], [False], [True, False, True], [1.0, 2.0])] == [
        "yes", "no", "2 of 3", "1.5000"
    ]  # fmt: skip
    header = ("task", *(f"measure {i}" for i in range(14)))
    page = Table("t", "T", header, (("needle", *map(str, range(14))),), "note").html()
    assert page.count("<table>") == 2 and page.count("<td>needle</td>") == 2 and page.count("<th>measure") == 14


def test_a_run_without_rows_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `make study` first"):
        report.page(tmp_path)


def test_tables_replace_their_blocks_and_nothing_else(run):
    collected = tables.collect(run)
    blocks = ("<!-- table: scorers -->\nstale text\n<!-- end -->", "<!-- table: none -->\n<!-- end -->")
    readme = f"before\n{blocks[0]}\nbetween\n{blocks[1]}\nafter\n"
    rendered = tables.render(readme, collected)
    assert "| text | r=0.9 | 2 | **0.200** | 0.600 |" in rendered and "stale text" not in rendered
    assert tables.UNMEASURED in rendered
    assert rendered.startswith("before\n") and "\nbetween\n" in rendered and rendered.endswith("\nafter\n")
    assert tables.render(rendered, collected) == rendered


def test_the_pages_show_what_the_tables_hold():
    store = ROOT / tables.STORE
    kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    shown = set()
    for page in tables.pages(ROOT):
        text = page.read_text(encoding="utf-8")
        assert tables.render(text, kept, str(page.parent.relative_to(ROOT))) == text, "run `make tables`"
        shown |= {match["name"] for match in tables.BLOCK.finditer(text)}
    assert shown >= set(kept)


def test_the_first_lines_of_a_run_have_its_origin_and_stand_where_it_measured_that(run):
    rows = result_tables.rows_of(run)
    latency, scorers = result_tables.latency_table(rows), result_tables.scorer_table(rows)
    faster, cost = headlines.headline(latency), headlines.costs(scorers)
    assert (faster.name, cost.name) == ("headline", "costs")
    assert faster.note.startswith("**How much faster:** time to the first token after 1,024 tokens, ")
    assert cost.note.startswith("**What it costs:** KL to the unpruned model's next-token distributions")
    assert all("abc123" in table.note for table in (faster, cost))
    assert headlines.headline(None) is headlines.costs(None) is None


def test_an_origin_names_the_model_as_people_do():
    row = {"model": "embedded", "weights": "Q4_1, dequantised", "device": "cpu", "dtype": "float32", "seed": 0}
    assert result_tables.origin([row]) == "SmolLM2-135M-Instruct (Q4_1, dequantised), CPU, float32; seed 0."
    assert result_tables.origin([row, {"model": "mine"}]).startswith("SmolLM2-135M-Instruct/mine (Q4_1")


@pytest.mark.parametrize("given", ["mine", "data/results/mine", "data/results/mine/", "./data/results/mine"])
def test_a_run_is_named_by_its_name_or_by_its_path(given):
    assert result_tables.run_name(given) == "mine"
