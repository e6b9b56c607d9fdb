"""What a run says in two sentences: how much faster, and at what cost. README and docs/index.html begin with them.

Views of the time table and the quality table (`result_tables`), so a sentence never says another number than its table.
What a GPU measured, and the cost beside all other methods, come from committed rows of the leaderboard.
"""

from __future__ import annotations

from pathlib import Path

from result_tables import Table

from sdtp_lib.leaderboard import committed, page, tables
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.participants import before_what_ships
from sdtp_lib.leaderboard.words import GOAL_SPEEDUP, best_others


def headline(latency: Table | None, scorers: Table | None, gpu: str = "", costs: str = "") -> Table | None:
    """README's first lines, as a block of `tables`: a table without columns, whose note is the text.

    ``costs`` stands in the place of the study's small quality table, where a leaderboard has more prompts.
    """
    shown = [table for table in (latency, scorers) if table]
    if not shown:
        return None
    origins = dict.fromkeys(table.note.rpartition(". ")[2] for table in shown)
    gpu = f"\n\n**On a GPU:** {gpu}" if gpu else ""
    both = f"**How much faster:** {faster(latency)}{gpu}\n\n**What it costs:** {costs or cost(scorers)}"
    beside = "All but the line on a GPU: " if gpu else ""
    return Table("headline", "In two sentences", (), (), f"{both}\n\n{beside}{' '.join(origins)}")


def faster(table: Table | None) -> str:
    """Each preset's prefill speed-up at the longest prompt that was timed, beside what FLOPs allow."""
    body = [row for row in table.body if row[3] and row[1] != "unpruned"] if table else []
    if not body:
        return "not measured yet."
    longest = max(int(row[0].replace(",", "")) for row in body)
    said = [f"{row[1]} **{row[3]}** (FLOPs allow {row[4]})" for row in body if row[0] == f"{longest:,}"]
    beyond = any(float(row[5] or 0) > 1 for row in body if row[0] == f"{longest:,}")
    scatter = " What is above the limit is the machine's scatter." if beyond else ""
    return f"time to the first token after {longest:,} tokens, {', '.join(said)}.{scatter}"


def cost(table: Table | None) -> str:
    """KL to the unpruned model by test set: the first scorer's, and the best other one's."""
    if not table or not table.body:
        return "not measured yet."
    own, *others = table.header[3:]
    said = []
    for data, _, items, value, *rest in table.body:
        known = [(cell.strip("*"), name) for cell, name in zip(rest, others, strict=True) if cell]
        other = "" if not known else " ({1} {0}, n = {2})".format(*min(known, key=lambda pair: float(pair[0])), items)
        said.append(f"{data.replace('_', ' ')} {value.strip('*')}{other}")
    return (
        f"KL to the unpruned model's next-token distributions in nats per token, {own} at {table.body[0][1]} (and the "
        f"best simple score): {'; '.join(said)}."
    )


def cost_beside_all_methods(root: Path, folder: str = "docs/") -> str:
    """KL by test set at the goal's speed-up and the shortest length of the embedded model's leaderboard, beside the
    best other method there, and what is kept of RULER's answers; empty without such rows."""
    rows = committed.every_committed(root).get("")
    frame = tables.frame_of(rows) if rows else None
    length = min((n for n, speedup in tables.places(frame) if speedup == GOAL_SPEEDUP), default=0) if rows else 0
    if not length:
        return ""
    part, said = tables.at(frame, length, GOAL_SPEEDUP), []
    for test_set, (own, best, other) in best_others(part).items():
        said.append(f"{test_set} **{own.value:.3f}** ({best} {other.value:.3f}, n = {own.items})")
    dates = sorted({str(utc)[:10] for utc in part.utc})
    ruler, kept = tables.answers(part).get(OURS), ""
    if ruler and ruler["solved"]:
        kept = (
            f" Of RULER's points on the {ruler['solved_items']} items that the unpruned model solves "
            f"**{ruler['solved'].value:.0f} %** are kept."
        )
    return (
        f"at {GOAL_SPEEDUP:g}x fewer prefill FLOPs and {length:,} tokens, KL to the unpruned model's next-token "
        f"distributions, nats per token, 0 is no loss; in brackets the best other method: {', '.join(said)}.{kept} "
        f"[All that were measured]({folder}leaderboard.md), {' to '.join(sorted({dates[0], dates[-1]}))}."
        f"{f' {earlier}' if (earlier := before_what_ships(frame)) else ''}"
    )


def on_a_gpu(root: Path, folder: str = "docs/") -> str:
    """What models of random weights, timed on a GPU, say of ours, model by model; empty without such rows.

    ``folder`` stands before the names of the pages that are linked.
    """
    found = []
    for suffix, rows in committed.every_committed(root).items():
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
