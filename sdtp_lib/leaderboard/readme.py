"""README's lines of the leaderboard, from rows: the best methods at 2x, and what must be known to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib.leaderboard import picture, tables, words
from sdtp_lib.leaderboard.entrants import LEARNED, OURS
from sdtp_lib.leaderboard.participants import is_learned, of_other_pruners, remarks, scored_by
from sdtp_lib.provenance import origin_line

LINES = 10
MARK = "†"
PAGE = "[docs/leaderboard.md](docs/leaderboard.md)"


def readme_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """README's block as `workflow/tables.py` keeps it: the best `LINES` methods at 2x by mean KL."""
    frame = tables.frame_of(rows)
    if frame.empty:
        return None
    at_goal = [place for place in tables.places(frame) if place[1] == words.GOAL_SPEEDUP]
    if not at_goal:
        return None
    length, speedup = at_goal[0]
    part = tables.at(frame, length, speedup)
    kl, ruler, costs = tables.kl_by_test_set(part), tables.answers(part), tables.costs(part)
    order = tables.by_mean_kl(kl, tables.methods_in(part))[:LINES]
    used, marked = scored_by(part), footnotes(part, order)
    _, _, solved_items = tables.items_of(part)
    body = []
    for name in order:
        cost = costs.get(name, {})
        body.append((
            f"**{name}**" if name == OURS else name,
            ("yes" if is_learned(name, used) else "no") + f" {MARK}" * (name in marked),
            *(f"{values[name].value:.3f}" if name in values else "" for values in kl.values()),
            _solved(ruler.get(name, {}).get("solved"), solved_items),
            f"{cost['speedup']:.2f}x" if cost and cost["speedup"] else "",
            f"{100 * cost['kv']:.0f} %" if cost else "",
            str(min((values[name].items for values in kl.values() if name in values), default=0)),
        ))  # fmt: skip
    header = ("method", "trained", *(f"KL {test_set}" for test_set in kl), "RULER, solved", "TTFT", "KV cache", "n")
    timed = part[part.unpruned_prefill_ms.notna()]
    # Commits are many, and the page names them; a column that other rows have is NaN where this one has nothing.
    first = {name: value for name, value in (timed if len(timed) else part).iloc[0].items()
             if name != "commit" and value == value}  # fmt: skip
    dates = sorted({str(utc)[:10] for utc in part.utc})
    fewer = any("(" in line[header.index("RULER, solved")] for line in body)
    differ = [f"`{name}`" for name in order if name in remarks(part)]
    sentences = [
        f"{speedup:g}x fewer prefill FLOPs at {length:,} tokens, the {len(body)} best of "
        f"{len(tables.methods_in(part))} that can be so fast and were measured, by mean KL to the unpruned model (nats "
        "per token, n items per test set).",
        f"RULER, solved: of {solved_items} items that the unpruned model solves, the score x 100"
        f"{'; in brackets how many of them a method has, where it has fewer' if fewer else ''}.",
        "TTFT: measured speed-up, beside other work on the machine.",
        f"{origin_line(first)}; measured {' to '.join(sorted({dates[0], dates[-1]}))}.",
        *([f"{MARK} {' '.join(marked.values())}"] if marked else []),
        *([f"Not in all as in their papers: {', '.join(differ)}; in what, says the page."] if differ else []),
        words.better_in_short(frame),
        picture.in_words(frame),
        f"Intervals, all methods, tasks and speed-ups: {PAGE}.",
    ]
    note = " ".join(sentences)
    return {"name": "leaderboard", "title": "Leaderboard", "header": header, "body": body, "note": note}


def footnotes(part: Any, order: Sequence[str]) -> dict[str, str]:
    """Method -> what "trained" does not say of it: a learned one without pruners of its own, or with other ones."""
    used, others, found = scored_by(part), of_other_pruners(part), {}
    for name in order:
        if name in LEARNED and name in used and not is_learned(name, used):
            found[name] = (
                f"`{name}` is a learned method, but no pruners for its stages were found: it was scored by "
                f"{used[name]}, which needs no training."
            )
        elif name in others:
            count, of = others[name]
            share = "all" if count == of else f"{count:,} of {of:,}"
            found[name] = f"`{name}` was scored by other pruners than `{OURS}` in {share} of its rows here."
    return found


def _solved(solved: Any, of: int) -> str:
    if not solved:
        return ""
    return f"{solved.value:.0f}" + f" ({solved.items})" * (solved.items < of)
