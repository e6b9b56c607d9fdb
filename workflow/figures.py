"""`make figures`: the pictures that README shows, copied from a run's folder with the JSON that says what made each.

Only this writes into figures/. Pictures are listed here by the name that a notebook gave them: a rename is noticed.
"""

from __future__ import annotations

import argparse
import shutil
import sys

import tables
from result_tables import refuse_unfinished, run_name

from sdtp_lib.records import atomic_write, project_root

# figures/<name>.png -> what a notebook saves in its run folder, each with its JSON.
SHOWN = {
    "dropped-tokens": "03_pruning_text",
    "speedup": "04_speedup",
    "quality": "04_quality_over_latency",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=run_name, default="embedded", help="a folder of data/results")
    options = parser.parse_args(arguments)
    source, target = project_root() / "data" / "results" / options.run, project_root() / "figures"
    missing = [f"{name}.png" for name in SHOWN.values() if not (source / f"{name}.png").exists()]
    if missing:
        print(f"REFUSED  {source.name} lacks {', '.join(missing)}: run `make study` first.", file=sys.stderr)
        return 2
    try:
        refuse_unfinished(source)
    except FileNotFoundError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2
    for name, made in SHOWN.items():
        for suffix in (".png", ".json"):
            with atomic_write(target / f"{name}{suffix}") as temporary:
                shutil.copyfile(source / f"{made}{suffix}", temporary)
    print(f"figures/: {', '.join(SHOWN)}")
    return tables.main(["--render-only"])


if __name__ == "__main__":
    sys.exit(main())
