"""What the leaderboard writes into the repository: page, picture, rows, and README's block; all from rows.

Only the embedded model's rows are committed: those of a GPU model stay in their run's folder, with page and picture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from sdtp_lib import plots
from sdtp_lib.files import atomic_write
from sdtp_lib.leaderboard import committed, page, tables
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.records import passport, project_root, write_json

PAGE, ROWS, PICTURE, STORE = (
    "docs/leaderboard.md", "docs/leaderboard.jsonl", "figures/leaderboard.png", "figures/tables.json",
)  # fmt: skip
ORIGIN = ("model", "weights", "device", "device_name", "dtype", "torch", "transformers", "host_cpus", "threads", "seed")


def write_report(rows: Sequence[Mapping[str, Any]], text: str, root: Path | None = None) -> None:
    """Write all four under ``root`` (default: the project's)."""
    root = root or project_root()
    draw(rows, root / PICTURE)
    with atomic_write(root / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    committed.write_committed(root / ROWS, rows)
    store = root / STORE
    kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    if table := page.readme_table(rows):
        kept["leaderboard"] = table
        write_json(store, dict(sorted(kept.items())))
    if root == project_root():
        sys.path.insert(0, str(root / "workflow"))
        import tables as readme  # workflow/tables.py

        readme.main(["--render-only"])
    print(f"written: {PAGE}, {PICTURE}, {ROWS}")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The picture of the rows at their shortest length."""
    found = tables.summary(tables.frame_of(rows))
    length = int(found.length.min())
    made = {name: rows[0].get(name) for name in ORIGIN} | {
        "commit": ", ".join(sorted({row["commit"] for row in rows})), "rows": ROWS, "prompt_tokens": length,
        "drawn_at": passport()["commit"],
    }  # fmt: skip
    with plots.use_style():
        figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
        plots.quality_lost(found[found.length == length], axes, ours=OURS)
        figure.suptitle(f"Quality lost over prefill speed-up, {length:,} tokens", x=0.01, ha="left", weight="bold")
        saved = plots.save(figure, path, made)
        plt.close(figure)
    return saved
