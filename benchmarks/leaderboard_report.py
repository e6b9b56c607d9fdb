"""What the leaderboard writes into the repository: pages, picture, rows, and blocks of documents; all from rows.

Each model has its rows and its page; the picture shows all of them, the blocks of README and docs/results.md the
embedded one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from leaderboard_needles import PICTURE as NEEDLES
from leaderboard_needles import draw_needles

from sdtp_lib import plots
from sdtp_lib.evaluation.tables import FEWEST_PAIRS
from sdtp_lib.files import atomic_write
from sdtp_lib.leaderboard import blocks, committed, opening, page, picture, tables, words
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.provenance import called, model_called
from sdtp_lib.records import project_root, provenance_of, write_json

PICTURE, STORE = "figures/leaderboard.png", "figures/tables.json"
ORIGIN = ("model", "weights", "device", "device_name", "dtype", "torch", "transformers", "host_cpus", "threads", "seed")


def write_report(rows: Sequence[Mapping[str, Any]], root: Path | None = None) -> str:
    """Write one model's rows, then pages and picture of all models and the documents' blocks, under ``root`` (default:
    the project's); returns that model's page."""
    root = root or project_root()
    path = committed.path_of(rows[0]["model"], root)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = committed.read_committed(path)
    if lost := committed.of_other_origin(before, rows):
        raise ValueError(
            f"{path.name}: {len(lost)} of its {len(before)} rows are of another device, dtype, seed or number of "
            "threads than these and would go. Measure with --no-times and add the rows by --join, or as those were "
            "measured (`make leaderboard` has one thread), or remove the file first."
        )
    rows, begun = committed.without_beginnings(before, rows)
    for method, (now, there) in begun.items():
        print(f"{method}: {now} rows of other pruners than those of {path.name}; its {there} rows stand until there "
              "are as many", file=sys.stderr)  # fmt: skip
    committed.write_committed(path, committed.joined(before, rows or before))
    models = committed.every_committed(root)
    shown = {suffix: each for suffix, each in models.items()
             if page.has_quality(each) and len(picture.shown(tables.frame_of(each)))}  # fmt: skip
    drawn_too = of_enough_items(shown)
    if shown:
        draw(list(drawn_too.values()), root / PICTURE)
    drawn = draw_needles(models.get("", ()), root / NEEDLES, _made([models.get("", ())]))
    pages: dict[str, str] = {}
    sentence = words.over_models({model_called(each[0]): tables.frame_of(each) for each in shown.values()})
    for suffix, each in models.items():
        others = {called(rows[0]["model"]): f"leaderboard{name}.md" for name, rows in models.items() if name != suffix}
        with atomic_write(root / "docs" / f"leaderboard{suffix}.md") as temporary:
            needles = f"../{NEEDLES}" if drawn and not suffix else ""
            pages[suffix] = page.page(
                each, picture=suffix in drawn_too, others=others, over_models=sentence, needle_map=needles
            )
            temporary.write_text(pages[suffix], encoding="utf-8")
    store = root / STORE
    kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    if made := blocks.every(models.get("", ())) | opening.every(models):
        write_json(store, dict(sorted((kept | made).items())))
    if root == project_root():
        sys.path.insert(0, str(root / "workflow"))
        import tables as documents  # workflow/tables.py

        documents.main(["--render-only"])
    names = ", ".join(f"docs/leaderboard{suffix}.md" for suffix in pages)
    print(f"written: {path.relative_to(root)}, {names}{f', {PICTURE}' if shown else ''}")
    return pages[path.stem.removeprefix("leaderboard")]


def of_enough_items(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The models with a verdict's number of items to draw; all of them where none has.

    A line through two or three items shows nothing: such a model has its page alone.
    """
    found = {}
    for suffix, rows in models.items():
        points = picture.shown(tables.frame_of(rows))
        if max(points.kl_items.max(), points.lost_items.max()) >= FEWEST_PAIRS:
            found[suffix] = rows
    return found or dict(models)


def _commits(rows: Sequence[Mapping[str, Any]]) -> str:
    """The commit of the newest row, and how many others there are: a foot line has no room for all."""
    others = len({row["commit"] for row in rows}) - 1
    newest = max(rows, key=lambda row: row["utc"])["commit"]
    return newest + (f" and {others} earlier" if others else "")


def _made(models: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What stands in a picture's foot line and beside it."""
    rows = [row for each in models for row in each]
    if not rows:
        return {}
    names = list(dict.fromkeys(model_called(each[0]) for each in models))
    return {name: rows[0].get(name) for name in ORIGIN} | {
        "model": " and ".join(names), "weights": None, "commit": _commits(rows), "drawn_at": provenance_of()["commit"],
        "models": [str(each[0]["model"]) for each in models],
    }  # fmt: skip


def draw(models: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """The picture: per model a line of panels, from its rows at their shortest length."""
    made = _made(models)
    with plots.use_style():
        figure = plt.figure(figsize=(11.5, 4.6 * len(models)), layout="constrained")
        for part, each in zip(np.atleast_1d(figure.subfigures(len(models), 1)), models, strict=True):
            found = picture.shown(tables.frame_of(each))
            length = int(found.length.min())
            made.setdefault("prompt_tokens", length)
            plots.quality_lost(found, part.subplots(1, 2), ours=OURS)
            title = f"{model_called(each[0])}: quality lost over prefill speed-up, {length:,} tokens"
            part.suptitle(title, x=0.01, ha="left", weight="bold")
        saved = plots.save(figure, path, made)
        plt.close(figure)
    return saved
