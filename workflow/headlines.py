"""What a run says in two sentences: how much faster, and at what cost. README and docs/index.html begin with them.

Views of the time table and the quality table (`result_tables`), so a sentence never says another number than its table.
Where a leaderboard is there, `sdtp_lib.leaderboard.opening` says the cost, beside all other methods.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    body = [dict(zip(table.header, row, strict=True)) for row in table.body] if table else []
    body = [row for row in body if row["prefill speed-up"] and row["method"] != "unpruned"]
    if not body:
        return "not measured yet."
    longest = max(int(row["prompt"].replace(",", "")) for row in body)
    body = [row for row in body if row["prompt"] == f"{longest:,}"]
    said = [f"{_called(row)} **{row['prefill speed-up']}** (FLOPs allow {row['limit']})" for row in body]
    beyond = any(float(row["share of the limit"] or 0) > 1 for row in body)
    scatter = " What is above the limit is the machine's scatter." if beyond else ""
    return f"time to the first token after {longest:,} tokens, {', '.join(said)}.{scatter}"


def _called(row: Mapping[str, str]) -> str:
    """A line's method, and of which folder and number of new tokens it is where lines differ in them."""
    tokens = f" at {row['new tokens']} new tokens" if row.get("new tokens") else ""
    return row["method"] + tokens + (f" in {row['folder']}" if row.get("folder") else "")


def cost(table: Table | None) -> str:
    """KL to the unpruned model by test set: the first scorer's, and the best other one's."""
    if not table or not table.body:
        return "not measured yet."
    first = table.header.index("data")  # 1 where lines name their folder
    own, *others = table.header[first + 3 :]
    budget = table.body[0][first + 1]
    said = []
    for row in table.body:
        data, _, items, value, *rest = row[first:]
        data = f"{data} in {row[0]}" if first and row[0] else data
        known = [(cell.strip("*"), name) for cell, name in zip(rest, others, strict=True) if cell]
        other = "" if not known else " ({1} {0}, n = {2})".format(*min(known, key=lambda pair: float(pair[0])), items)
        said.append(f"{data.replace('_', ' ')} {value.strip('*')}{other}")
    return (
        f"KL to the unpruned model's next-token distributions in nats per token, {own} at {budget} (and the "
        f"best simple score): {'; '.join(said)}."
    )
