"""What a run says in two sentences: how much faster, and at what cost. README and docs/index.html begin with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from result_tables import Table, origin


def headline(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """README's first lines, as a block of `tables`: a table without columns, whose note is the text."""
    shown = [row for row in rows if row.get("kind") in ("latency", "scorer")]
    if not shown:
        return None
    text = f"**How much faster:** {faster(rows)}\n\n**What it costs:** {cost(rows)}\n\n{origin(shown)}"
    return Table("headline", "In two sentences", (), (), text)


def faster(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each preset's prefill speed-up at the longest prompt that was timed, beside its limit."""
    import pandas

    from sdtp_lib.latency.report import summary
    from sdtp_lib.plots import readings

    lines = summary(row for row in rows if row.get("kind") == "latency")
    lines = [line for line in lines if line.get("prefill_speedup")]
    if not lines:
        return "not measured yet."
    longest = max(line["prompt_tokens"] for line in lines)
    said = [
        f"{line['method']} **{line['prefill_speedup']:.2f}x** (FLOPs allow {line['prefill_limit']:.2f}x)"
        for line in lines
        if line["prompt_tokens"] == longest and line["method"] != "unpruned"
    ]
    text = f"time to the first token after {longest:,} tokens, {', '.join(said)}."
    return " ".join(filter(None, [text, readings.busy(pandas.DataFrame(lines))]))


def cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """KL to the unpruned model by test set: the first scorer's, and the best other one's."""
    import pandas

    from sdtp_lib.evaluation.tables import scorer_summary

    rows = [row for row in rows if row.get("kind") == "scorer"]
    if not rows:
        return "not measured yet."
    said = []
    lines = scorer_summary(pandas.DataFrame(rows))
    for cell, part in lines.groupby("cell", sort=False):
        own, others = part.iloc[0], part.iloc[1:]
        other = others.loc[others.kl_nats.idxmin()]
        said.append(f"{str(cell).replace('_', ' ')} {own.kl_nats:.3f} ({other.scorer} {other.kl_nats:.3f})")
    first = lines.iloc[0]
    return (
        f"KL to the unpruned model's next-token distributions in nats per token, {first.scorer} at {first.setting} "
        f"(and the best simple score): {'; '.join(said)}."
    )
