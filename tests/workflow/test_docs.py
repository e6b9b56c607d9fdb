"""`make docs`: pages from an executed study that open from a file, link to each other only, and ask no other host."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import docs_reference
import nbformat
import pytest
import render_docs as docs
from docs_frame import link_pages, markdown_html, notebook_html

import sdtp_lib
from sdtp_lib.records import RowWriter, provenance_of, write_json

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
OTHER_HOST = re.compile(r"""(?:src=|<link[^>]+href=|url\(|@import\s)["']?(?:https?:)?//""")


def executed(path: Path, title: str) -> None:
    """An executed notebook with a picture, a progress bar, a widget and a cell that only a kernel can serve."""
    cell = nbformat.v4.new_code_cell("1 + 1")
    picture = nbformat.v4.new_output("display_data", data={"image/png": PIXEL})
    bar = nbformat.v4.new_output("stream", name="stderr", text="100% of a progress bar")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    widget = nbformat.v4.new_output("display_data", data=view)
    cell.outputs = [picture, bar, widget]
    sliders = nbformat.v4.new_code_cell("explore()", metadata={"tags": ["skip-execution"]})
    text = f"# {title}\n\n[play](../app/explore.ipynb), [next](05_longbench.ipynb), [log](../LOG.md)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), cell, sliders])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "results" / "run"
    for name in docs.NOTEBOOKS:
        copy = folder / "executed" / f"{name}-0123456789ab.ipynb"
        executed(copy, f"{name[:2]} · What?")
        stamp = {"notebook": name, "executed": copy, "ended_utc": "2026-01-01T00:00:00+00:00"}
        write_json(folder / ".stamps" / f"{copy.stem}.json", stamp)
        (folder / ".stamps" / f"{name}.begun").write_text(f"{copy.stem}.json")
    for picture in docs.PICTURES.values():
        (folder / f"{picture}.png").write_bytes(b"png")
    with RowWriter(folder / "05_longbench.jsonl", provenance_of(model_name="embedded") | {"device": "cpu"}) as rows:
        for scorer, kl in (("SDTP", 0.1), ("recency", 0.5)):
            rows.add(
                scorer, kind="scorer", cell="text", setting="keep08", scorer=scorer, block="deployable", sample="1",
                kl_nats=kl, loss_full_nats=2.0, loss_nats=2.0, compression_ratio=1.5, prefill_flops_share=0.6,
            )  # fmt: skip
    return folder


def test_a_study_becomes_pages_without_a_broken_link_or_a_request(run, tmp_path):
    target = tmp_path / "docs"
    target.mkdir()
    (target / "method.md").write_text("# Method\n\nSee [clusters](slurm.md) and [the code](../workflow/study.py).\n")
    (target / "leaderboard.md").write_text("# Leaderboard\n\n![Lost](../figures/speedup.png) [7B](leaderboard-7b.md)\n")
    (target / "leaderboard-7b.md").write_text("# Leaderboard\n\nAnother model.\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "speedup.png").write_bytes(b"png")
    (target / "slurm.md").write_text("# Clusters\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    written = docs.build(run, target)
    names = {path.name for path in written}
    assert {"index.html", "03_pruning.html", "leaderboard.html", "leaderboard-7b.html", "reference.html"} <= names
    assert docs.broken_links(target) == []
    for path in written:
        text = path.read_text()
        assert not OTHER_HOST.search(text), path.name
        assert "commit " in text and re.search(r"\d{4}-\d\d-\d\d", text), "commit and date"
    index = (target / "index.html").read_text()
    assert "SDTP at keep08" in index and "text 0.100 (recency 0.500, n = 1)" in index and "01 · What?" in index
    assert '<a href="slurm.html">clusters</a>' in (target / "method.html").read_text()
    page = (target / "01_saliency.html").read_text()
    assert "data:image/png;base64" in page
    assert "progress bar" not in page and "explore()" not in page and "widget" not in page


def test_a_run_without_an_executed_notebook_is_refused(run, tmp_path):
    shutil.rmtree(run / "executed")
    with pytest.raises(FileNotFoundError, match="no finished, executed 01_saliency: run `make study` first"):
        docs.build(run, tmp_path)


def test_the_copy_of_a_failed_run_is_never_the_page(run, tmp_path):
    """The newest copy was taken, and a failed one lies beside the one that ended well."""
    executed(run / "executed" / "04_latency-bbbbbbbbbbbb.ipynb", "failed")
    assert docs._executed(run, "04_latency").stem == "04_latency-0123456789ab"
    (run / ".stamps" / "04_latency.begun").write_text("04_latency-bbbbbbbbbbbb.json")
    with pytest.raises(FileNotFoundError, match="run: 04_latency failed or is not finished: run `make study` first"):
        docs.build(run, tmp_path)
    (run / ".stamps" / "04_latency.begun").unlink()
    cell = nbformat.v4.new_code_cell("1 / 0", outputs=[nbformat.v4.new_output("error", ename="ZeroDivisionError")])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), run / "executed" / "04_latency-0123456789ab.ipynb")
    with pytest.raises(FileNotFoundError, match="the executed 04_latency holds an error: run `make study` first"):
        docs.build(run, tmp_path)


def test_documents_are_rendered_without_a_study_and_leave_its_pages_as_they_are(tmp_path):
    (tmp_path / "method.md").write_text("# Method\n")
    (tmp_path / "leaderboard.md").write_text("![Lost](../figures/speedup.png)\n")
    (tmp_path.parent / "figures").mkdir(exist_ok=True)
    (tmp_path.parent / "figures" / "speedup.png").write_bytes(b"png")
    (tmp_path / "01_saliency.html").write_text("the study's")
    assert {path.name for path in docs.documents(tmp_path)} == {
        "leaderboard.html", "method.html", "reference.html"
    }  # fmt: skip
    assert (tmp_path / "01_saliency.html").read_text() == "the study's"
    assert 'href="01_saliency.html"' in (tmp_path / "method.html").read_text()


def test_links_to_files_that_are_no_page_become_their_words():
    body = '<a href="../notebooks/04_latency.ipynb">time</a> <a href="../LOG.md">log</a> <a href="https://a.org">a</a>'
    assert link_pages(body) == '<a href="04_latency.html">time</a> log <a href="https://a.org">a</a>'
    assert "<td" in markdown_html("| a |\n|---|\n| 1 |") and "class=wide" in markdown_html("| a |\n|---|\n| 1 |")


def test_a_table_of_words_is_set_left_and_one_of_numbers_right():
    words = markdown_html("| command | what |\n|---|---|\n| `a` | time |\n| `b` | 2 kinds |\n| `c` | `memory` |")
    numbers = markdown_html("| method | KL | by |\n|---|---|---|\n| a | **0.1** | x |\n| b | -33 % | 2x |")
    assert "wide words" in words and "wide words" not in numbers


def test_what_a_prompt_says_stays_text_in_a_rendered_notebook(tmp_path):
    cell = nbformat.v4.new_code_cell("print(answer)")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="<script>alert(1)</script>")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    assert "<script>alert" not in notebook_html(tmp_path / "a.ipynb")


def test_the_reference_has_every_public_name_and_no_address():
    text = docs_reference.markdown()
    for name in sdtp_lib.__all__:
        assert name.startswith("__") or f"## {name}\n" in text, name
    assert "### scorers.recency" in text and "**Parameters**" in text and " at 0x" not in text


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text("<h1 id='top'></h1><a href='#top'></a><a href='b.html'></a><img src='c.png'>")
    assert docs.broken_links(tmp_path) == ["a.html: b.html", "a.html: c.png"]


@pytest.mark.skipif(not (DOCS / "index.html").is_file(), reason="docs/ is not rendered yet: make docs")
def test_the_committed_pages_link_to_what_is_there():
    assert docs.broken_links(DOCS) == []
    assert [path.stem for path in sorted(ROOT.glob("notebooks/0*.ipynb"))] == list(docs.NOTEBOOKS)
    assert all((DOCS / f"{name}.html").is_file() for name in docs.NOTEBOOKS)
