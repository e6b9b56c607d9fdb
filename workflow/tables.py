"""The pages' tables as views of result rows: `make tables` takes them from a run's rows; none is typed by hand.

    python workflow/tables.py                        # tables.json and the pages from data/results/embedded
    python workflow/tables.py --render-only          # the pages from tables.json

Rows are not tracked, so what README and docs/*.md show is kept, with its origin, in figures/tables.json; a test
compares the two. A block stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; so do pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from headlines import costs, headline
from result_tables import Table, latency_table, other_tables, refuse_unfinished, rows_of, run_name, scorer_table

from sdtp_lib.leaderboard import opening
from sdtp_lib.leaderboard.committed import every_committed
from sdtp_lib.records import atomic_write, project_root, write_json

BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)
STORE = "figures/tables.json"
UNMEASURED = "*Not measured yet: `make study && make tables` fills this block.*"


# <!-- picture: NAME | what it shows -->
PICTURE = re.compile(r"(<!-- picture: (?P<name>[\w-]+) \| (?P<shows>[^>]+?) -->\n).*?(<!-- end -->)", re.S)


def collect(run: Path) -> dict[str, Any]:
    """All tables of a run by name, as JSON."""
    rows = rows_of(run)
    latency, scorers = latency_table(rows), scorer_table(rows)
    found = [table for table in (headline(latency), costs(scorers), latency, scorers) if table]
    found += other_tables(rows)
    return {table.name: table.to_dict() for table in found} | opening.every(every_committed())


def pages(root: Path) -> list[Path]:
    """The documents that show tables or pictures."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(page: str, tables: dict[str, Any], folder: str = ".") -> str:
    """A page with every marked block replaced by its table, and every marked picture that is there shown.

    ``folder`` of the page, from the project's root: pictures are linked from there.
    """

    def block(match: re.Match[str]) -> str:
        values = tables.get(match["name"])
        return match[1] + (Table.from_dict(values).markdown() if values else UNMEASURED) + "\n" + match[3]

    def picture(match: re.Match[str]) -> str:
        path = f"figures/{match['name']}.png"
        shown = f"![{match['shows']}]({os.path.relpath(path, folder)})\n" if (project_root() / path).exists() else ""
        return match[1] + shown + match[4]

    return PICTURE.sub(picture, BLOCK.sub(block, page))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=run_name, default=["embedded"],
                        help="folders of data/results, later ones win")  # fmt: skip
    parser.add_argument("--render-only", action="store_true", help="leave tables.json as it is")
    options = parser.parse_args(arguments)
    root = project_root()
    store = root / STORE
    tables = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    if not options.render_only:
        for name in options.run:
            run = root / "data" / "results" / name
            if not run.is_dir():
                print(f"REFUSED  there is no data/results/{name}: run `make study` first.", file=sys.stderr)
                return 2
            try:
                refuse_unfinished(run)
            except FileNotFoundError as error:
                print(f"REFUSED  {error}", file=sys.stderr)
                return 2
            tables |= collect(run)
        shown = {match["name"] for page in pages(root) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
        tables = {name: table for name, table in sorted(tables.items()) if name in shown}
        write_json(store, tables)
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        rendered = render(text, tables, str(page.parent.relative_to(root)))
        if rendered != text:
            with atomic_write(page) as temporary:
                Path(temporary).write_text(rendered, encoding="utf-8")
    print(f"README.md, docs/: {', '.join(tables) or 'no tables yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
