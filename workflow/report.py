"""A sweep as one self-contained HTML page: what ran, tables, Pareto picture, links to executed notebooks, provenance.

    python workflow/report.py embedded              # writes data/results/embedded/report.html

Opens from a file; loads nothing from anywhere. All of it are views of the run's rows and stamps.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docs_frame import BASE_STYLE, Frame, head, notebook_html
from notebook_parameters import meant, words
from result_tables import (
    by_folder,
    latency_table,
    origin,
    other_tables,
    rows_of,
    run_name,
    scorer_table,
    stamps_of,
    unfinished_of,
)

from sdtp_lib.records import atomic_write, project_root, provenance_of

STYLE = f"""{BASE_STYLE}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ line-height: 1.2; }} figure {{ display: inline-block; max-width: 100%; border-radius: 8px; padding: 6px;
  margin: 1rem 0; background: white; }} figure img {{ display: block; }}
td {{ white-space: nowrap; }} td.values {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
"""


def page(run: Path) -> str:
    """The page of a run's folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no rows.
    """
    rows, stamps = rows_of(run), stamps_of(run)
    if not rows:
        raise FileNotFoundError(f"there are no rows under {run.name}: run `make study` first.")
    tables = [table for table in (latency_table(rows), scorer_table(rows)) if table] + other_tables(rows)
    left = unfinished_of(run).values()
    title = f"SDTP sweep: {run.name}"
    parts = [
        f'<!doctype html>\n<html lang="en">{head(title, STYLE)}<body><h1>{html.escape(title)}</h1>',
        f"<p>{len(rows):,} rows of {len(stamps)} notebook runs. {html.escape(origin(rows))}</p>",
        *([f"<p>Not finished: {html.escape(', '.join(left))}.</p>"] if left else []),
        "<h2>What ran</h2>",
        runs_table(run, stamps),
    ]
    parts += quality_pictures(rows)
    parts += pictures(run)
    parts += ["<h2>Results</h2>", *(table.html() for table in tables), "<h2>Provenance</h2>", provenance(rows)]
    return "\n".join(parts) + "\n</body></html>\n"


def pictures(run: Path) -> list[str]:
    """Every picture that the notebooks saved, in their order, inside the page."""
    parts = []
    for path in sorted(run.rglob("[0-9][0-9]_*.png")):
        name = path.relative_to(run).with_suffix("").as_posix()
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<figure><img alt='{html.escape(name, quote=True)}' src='data:image/png;base64,{data}'></figure>")
        parts.append(f"<p class=note>{html.escape(name)}</p>")
    return ["<h2>Pictures</h2>", *parts] if parts else []


def notebook_pages(run: Path, stamps: Sequence[Mapping[str, Any]]) -> None:
    """An HTML page beside each executed notebook, so that a link from the report opens in a browser."""
    for stamp in stamps:
        executed = project_root() / stamp["executed"]
        target = executed.with_suffix(".html")
        if executed.is_file() and not (target.is_file() and target.stat().st_mtime > executed.stat().st_mtime):
            back = [("../report.html", "Report")] if target.parent.parent == run else []
            frame = Frame(back, f"commit {stamp['commit']}")
            with atomic_write(target) as temporary:
                page = frame.page(target.name, stamp["notebook"], notebook_html(executed))
                Path(temporary).write_text(page, encoding="utf-8")


def runs_table(run: Path, stamps: Sequence[Mapping[str, Any]]) -> str:
    """One line per executed notebook, with a link to its copy, relative to the page."""
    lines = []
    for stamp in stamps:
        link = (project_root() / stamp["executed"]).with_suffix(".html").relative_to(run).as_posix()
        values = {name: value for name, value in stamp["parameters"].items() if name != "run_dir"}
        lines.append(
            f"<tr><td><a href='{html.escape(link, quote=True)}'>{html.escape(stamp['notebook'])}</a></td>"
            f"<td>{html.escape(stamp['folder'].strip('.'))}</td><td>{stamp['seconds']:,.0f}</td>"
            f"<td>{html.escape(stamp['ended_utc'])}</td><td>{html.escape(stamp['commit'])}</td>"
            f"<td class=values>{html.escape(words(values))}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("notebook", "cell", "seconds", "ended", "commit", "parameters"))
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def quality_pictures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Quality against cost, one picture per folder (the sweep's cell), named where there are several."""
    made = {folder: pareto_svg(own) for folder, own in by_folder(rows).items()}
    made = {folder: picture for folder, picture in made.items() if picture}
    parts = []
    for folder, picture in made.items():
        parts.append(f"<figure>{picture}</figure>")
        if len(made) > 1:
            parts.append(f"<p class=note>{html.escape(folder)}</p>")
    return ["<h2>Quality against cost</h2>", *parts] if parts else []


def pareto_svg(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """KL against the share of prefill FLOPs that is left, one point per scorer and budget, as inline SVG.

    Of rows of one folder: those of several would be averaged.
    """
    import pandas

    rows = [row for row in rows if row.get("kind") == "scorer" and row.get("kl_nats") is not None]
    if not rows:
        return None
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from sdtp_lib import plots
    from sdtp_lib.evaluation.tables import scorer_summary

    lines = scorer_summary(pandas.DataFrame(rows))
    with plots.use_style():
        if lines.setting.nunique() == 1:  # one budget: nothing varies along the axis of costs
            figure, ax = plt.subplots(figsize=(13, 5), layout="constrained")
            plots.score_by_group(lines, ax, x="cell", y="kl_nats", y_label="KL [nats/token]", log=True)
            ax.set_title(f"{lines.setting.iloc[0]}: KL to the unpruned model (lower is better)")
        else:
            figure = _pareto_by_test_set(lines)
        written = io.StringIO()
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return written.getvalue()[written.getvalue().index("<svg") :]


def _pareto_by_test_set(lines: Any) -> Any:
    """KL against FLOPs, one axes per test set, with one legend for all."""
    import matplotlib.pyplot as plt

    from sdtp_lib import plots

    test_sets = list(dict.fromkeys(lines.cell))
    columns = min(2, len(test_sets))
    rows = -(-len(test_sets) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 4.5 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(test_sets) :]:
        ax.remove()
    for ax, test_set in zip(axes.flat, test_sets, strict=False):
        part = lines[(lines.cell == test_set) & (lines.kl_nats > 0)]
        plots.pareto(part, ax, x="prefill_flops_share", y="kl_nats", hue="scorer", text="setting")
        ax.set_title(str(test_set).replace("_", " "))
    plots.one_legend(axes.flat[: len(test_sets)])
    return figure


def provenance(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every value of every provenance field that the rows hold."""
    names = [name for name in provenance_of() if name != "utc"]
    seen = {name: sorted({str(row.get(name)) for row in rows}) for name in names}
    return f"<pre>{html.escape(json.dumps(seen, indent=1))}</pre>"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=run_name, default="embedded", help="a folder of data/results")
    options = parser.parse_args(arguments)
    results = project_root() / "data" / "results"
    run = results / options.run
    there = sorted({path.relative_to(results).parts[0] for path in results.glob("*/**/*.jsonl")})
    if options.run not in there:
        known = f"{meant(options.run, there)} (make report RUN=...)" if there else "run `make study` first."
        print(f"REFUSED  there are no rows under data/results/{options.run}: {known}", file=sys.stderr)
        return 2
    try:
        text = page(run)
    except FileNotFoundError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2
    notebook_pages(run, stamps_of(run))
    with atomic_write(run / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print((run / "report.html").relative_to(project_root()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
