"""What a run says in two sentences: how much faster, and at what cost. README and docs/index.html begin with them.

Views of the time table and the quality table (`result_tables`), so a sentence never says another number than its table.
Where a leaderboard is there, `sdtp_lib.leaderboard.opening` says the cost, beside all other methods.
"""

from __future__ import annotations

from result_tables import Table


def headline(latency: Table | None) -> Table | None:
    """README's first line, as a block of `tables`: a table without columns, whose note is the text."""
    if not latency:
        return None
    return Table("headline", "How much faster", (), (), f"**How much faster:** {faster(latency)} {latency.note}")


def costs(scorers: Table | None) -> Table | None:
    """What stands in the place of `opening`'s line where no leaderboard was measured."""
    if not scorers:
        return None
    origin = scorers.note.rpartition(". ")[2]  # what KL is, which stands before it, is in the sentence
    return Table("costs", "What it costs", (), (), f"**What it costs:** {cost(scorers)} {origin}")


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
