"""README's tables as views of result rows: `make tables` takes them from a run's rows; none is typed by hand.

    python workflow/tables.py                        # tables.json and README.md from data/results/embedded
    python workflow/tables.py --render-only          # README.md from tables.json

Rows are not tracked, so what README shows is kept, with its origin, in figures/tables.json; a test compares the two.
A block of README stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; so do pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from result_tables import Table, latency_table, other_tables, rows_of, scorer_table

from sdtp_lib.records import project_root, write_json

BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)
STORE = "figures/tables.json"
UNMEASURED = "*Not measured yet: `make study && make tables` fills this block.*"


# <!-- picture: NAME | what it shows -->
PICTURE = re.compile(r"(<!-- picture: (?P<name>[\w-]+) \| (?P<shows>[^>]+?) -->\n).*?(<!-- end -->)", re.S)


def collect(run: Path) -> dict[str, Any]:
    """All tables of a run by name, as JSON."""
    rows = rows_of(run)
    found = [table for table in (latency_table(rows), scorer_table(rows)) if table] + other_tables(rows)
    return {table.name: table.to_dict() for table in found}


def render(readme: str, tables: dict[str, Any]) -> str:
    """README with every marked block replaced by its table, and every marked picture that is there shown."""

    def block(match: re.Match[str]) -> str:
        values = tables.get(match["name"])
        return match[1] + (Table.from_dict(values).markdown() if values else UNMEASURED) + "\n" + match[3]

    def picture(match: re.Match[str]) -> str:
        path = f"figures/{match['name']}.png"
        shown = f"![{match['shows']}]({path})\n" if (project_root() / path).exists() else ""
        return match[1] + shown + match[4]

    return PICTURE.sub(picture, BLOCK.sub(block, readme))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", default=["embedded"], help="folders of data/results, later ones win")
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
            tables |= collect(run)
        shown = {match["name"] for match in BLOCK.finditer((root / "README.md").read_text(encoding="utf-8"))}
        tables = {name: table for name, table in sorted(tables.items()) if name in shown}
        write_json(store, tables)
    readme = root / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(f"README.md: {', '.join(tables) or 'no tables yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
