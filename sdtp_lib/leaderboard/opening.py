"""What README and docs/index.html open with, from the leaderboards' rows: the cost beside all other methods, and times
of a GPU.

Rows of models as `committed.every_committed` gives them (suffix -> rows, the embedded model's under ""); no file is
known here. ``folder`` stands before the names of the pages that are linked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib.leaderboard import page, tables
from sdtp_lib.leaderboard.blocks import measured_on
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.participants import before_what_ships
from sdtp_lib.leaderboard.words import GOAL_SPEEDUP, best_others

Models = Mapping[str, Sequence[Mapping[str, Any]]]


def every(models: Models) -> dict[str, dict[str, Any]]:
    """README's lines that the rows give, by name, as `workflow/tables.py` keeps blocks: no columns, the note is the
    text."""
    lines = {"gpu": ("On a GPU", on_a_gpu(models)), "costs": ("What it costs", cost_beside_all_methods(models))}
    return {
        name: {"name": name, "title": title, "header": (), "body": (), "note": f"**{title}:** {said}"}
        for name, (title, said) in lines.items()
        if said
    }


def cost_beside_all_methods(models: Models, folder: str = "docs/") -> str:
    """KL by test set at the goal's speed-up and the shortest length of the embedded model's leaderboard, beside the
    best other method there, and what is kept of RULER's answers; empty without such rows."""
    rows = models.get("")
    frame = tables.frame_of(rows) if rows else None
    length = min((n for n, speedup in tables.places(frame) if speedup == GOAL_SPEEDUP), default=0) if rows else 0
    if not length:
        return ""
    part, said = tables.at(frame, length, GOAL_SPEEDUP), []
    for test_set, (own, best, other, _) in best_others(part).items():
        said.append(f"{test_set} **{own.value:.3f}** ({best} {other.value:.3f}, n = {own.items})")
    # All items of ours, also those that other methods were not run on.
    own = frame[(frame.length == length) & (frame.speedup == GOAL_SPEEDUP) & (frame.kind == "item")]
    ruler, kept = tables.answers(own[own.method == OURS]).get(OURS), ""
    if ruler and (solved := ruler["solved"]):
        kept = (
            f" Of RULER's score on the {solved.items} items that the unpruned model solves "
            f"**{solved.value:.0f} %** [{solved.low:.0f}, {solved.high:.0f}] is kept."
        )
    return (
        f"at {GOAL_SPEEDUP:g}x fewer prefill FLOPs and {length:,} tokens, KL to the unpruned model's next-token "
        f"distributions, nats per token, 0 is no loss; in brackets the best other method: {', '.join(said)}.{kept} "
        f"[All that were measured]({folder}leaderboard.md): {measured_on(part)}."
        f"{f' {earlier}' if (earlier := before_what_ships(frame)) else ''}"
    )


def on_a_gpu(models: Models, folder: str = "docs/") -> str:
    """What models of random weights, timed on a GPU, say of ours, model by model; empty without such rows."""
    found = []
    for suffix, rows in models.items():
        if not rows or page.has_quality(rows) or not rows[0].get("device_name"):
            continue
        frame, said = tables.frame_of(rows), []
        for length, speedup in tables.places(frame):
            cost_of = tables.costs(tables.at(frame, length, speedup)).get(OURS)
            if speedup == GOAL_SPEEDUP and cost_of and cost_of["speedup"]:
                said.append(f"**{cost_of['speedup']:.2f}x** after {length:,} (n = {cost_of['timed']})")
        if said:
            found.append(
                f"{rows[0]['model']}, {rows[0]['dtype']} on one {rows[0]['device_name']}: time to the first token "
                f"{', '.join(said)} tokens, where FLOPs allow {GOAL_SPEEDUP:g}x "
                f"([all that were measured]({folder}leaderboard{suffix}.md))."
            )
    return " ".join(found)
