"""What README and docs/results.md show of the leaderboard, from rows: the best methods at 2x, and where ours stands.

Blocks as `workflow/tables.py` keeps and renders them; no file is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib.evaluation.tables import FEWEST_PAIRS
from sdtp_lib.leaderboard import picture, tables, words
from sdtp_lib.leaderboard.entrants import LEARNED, OURS, OWN
from sdtp_lib.leaderboard.participants import (
    before_what_ships,
    is_learned,
    measured_elsewhere,
    of_other_pruners,
    remarks,
    scored_by,
)
from sdtp_lib.provenance import origin_line

LINES = 10
MARK = "†"
PAGE = "[docs/leaderboard.md](docs/leaderboard.md)"


def every(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All blocks that the rows give, by name."""
    return {block["name"]: block for block in (readme_table(rows), standing(rows)) if block}


def readme_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """README's block: the best `LINES` methods at 2x by mean KL."""
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
    fewer = any("(" in line[header.index("RULER, solved")] for line in body)
    differ = [f"`{name}`" for name in order if name in remarks(part)]
    legend = [
        f"{speedup:g}x fewer prefill FLOPs, prompts of {length:,} tokens: the {len(body)} best of "
        f"{len(tables.methods_in(part))} methods by the mean of the KL columns.",
        "KL: to the unpruned model's predictions, nats per token, lower is better; n prompts per test set.",
        f"RULER, solved: score x 100 on the {solved_items} items that the unpruned model solves and every method was "
        f"run on{' (in brackets: how many, where a method has fewer)' if fewer else ''}.",
        "TTFT: measured speed-up of the time to the first token. KV cache: what is left of it.",
    ]
    remarked = [f"{MARK} {'; '.join(marked.values())}."] if marked else []
    bullets = [
        words.better_in_short(frame),
        *picture.of_more_items(frame),
        *([earlier] if (earlier := before_what_ships(frame)) else []),
        *remarked,
        f"{measured_on(part)}. Other work ran on the machine meanwhile: times scatter.",
        f"On {PAGE}: all lengths and speed-ups, intervals, RULER by task"
        f"{', how some methods differ from their papers (' + ', '.join(differ) + ')' if differ else ''}.",
    ]
    note = "\n".join([" ".join(legend[:2]), "", *(f"- {bullet}" for bullet in (*legend[2:], *bullets))])
    return {"name": "leaderboard", "title": "Leaderboard", "header": header, "body": body, "note": note}


def standing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """docs/results.md's block: by length and speed-up, where ours has the lowest KL, and who is not behind it."""
    frame, body = tables.frame_of(rows), []
    for length, speedup in tables.places(frame) if len(frame) else ():
        part = tables.at(frame, length, speedup)
        part = part[(part.method == OURS) | ~part.method.isin(OWN)]
        lines = tables.kl_differences(part)
        counts = [values[OURS].items for values in tables.kl_by_test_set(part).values() if OURS in values]
        if not lines:
            continue
        lower = {line["cell"] for line in lines if line["difference"].value < 0}
        body.append((
            f"{length:,} tokens, {speedup:g}x",
            str(len(tables.methods_in(part)) - 1),
            ", ".join(dict.fromkeys(line["cell"] for line in lines if line["cell"] not in lower)) or "-",
            _by_test_set(lines, "better"), _by_test_set(lines, "open"), _ruler_beside_the_next(part),
            "-".join(str(count) for count in sorted({min(counts), max(counts)})),
        ))  # fmt: skip
    if not body:
        return None
    header = ("prompts", "others", "ours has the lowest KL", "lower than ours", "level with ours",
              "RULER, solved", "n")  # fmt: skip
    done = frame[frame.kind == "item"]
    note = (
        f"Ours: `{OURS}`; this project's other schedules are no rivals. KL to the unpruned model by test set, paired "
        "by item: lower where the 95 % interval of the difference is below zero, level where it holds zero; n items "
        "per test set. RULER: the score x 100 on the items that the unpruned model solves (how many), and that of the "
        f"best other method that has all of them. No verdict under {FEWEST_PAIRS} items. "
        f"{f'{earlier} ' if (earlier := before_what_ships(frame)) else ''}"
        f"{_origin(done)}{_elsewhere(done)}. Figures, intervals, LongBench: [leaderboard](leaderboard.md)."
    )
    return {"name": "standing", "title": "Beside other methods", "header": header, "body": body, "note": note}


def _by_test_set(lines: Sequence[Mapping[str, Any]], verdict: str) -> str:
    found: dict[str, list[str]] = {}
    for line in lines:
        if line["verdict"] == verdict:
            found.setdefault(line["cell"], []).append(f"`{line['method']}`")
    return "; ".join(f"{cell}: {', '.join(names)}" for cell, names in found.items()) or "-"


def _ruler_beside_the_next(part: Any) -> str:
    _, _, solved_items = tables.items_of(part)
    found = {name: own["solved"].value for name, own in tables.answers(part).items()
             if solved_items and own["solved_items"] == solved_items}  # fmt: skip
    if OURS not in found:
        return "-"
    if solved_items < FEWEST_PAIRS:
        return f"too few ({solved_items})"
    ours = found.pop(OURS)
    best = max(found, key=found.__getitem__, default=None)
    return f"{ours:.0f} ({solved_items})" + (f", `{best}` {found[best]:.0f}" if best else "")


def _origin(part: Any) -> str:
    """What measured the rows; where some are timed, those."""
    timed = part[part.unpruned_prefill_ms.notna()]
    first = _known((timed if len(timed) else part).iloc[0])
    return origin_line({**first, "commit": None})  # commits are many, and the page names them


def measured_on(part: Any) -> str:
    """Model, device and days of these rows."""
    dates = sorted({str(utc)[:10] for utc in part.utc})
    return f"{_origin(part)}; measured {' to '.join(sorted({dates[0], dates[-1]}))}{_elsewhere(part)}"


def _elsewhere(part: Any) -> str:
    said = measured_elsewhere([_known(row) for row in part.to_dict("records")])
    return f", {said}" if said else ""


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a frame without the columns that only other rows have, which are NaN there."""
    return {name: value for name, value in row.items() if value == value}


def footnotes(part: Any, order: Sequence[str]) -> dict[str, str]:
    """Method -> what "trained" does not say of it: a learned one without pruners of its own, or with other ones."""
    used, others, found = scored_by(part), of_other_pruners(part), {}
    for name in order:
        if name in LEARNED and name in used and not is_learned(name, used):
            found[name] = f"`{name}`: no pruners for its stages, scored by {used[name]}"
        elif name in others:
            count, of = others[name]
            share = "" if count == of else f" in {count:,} of {of:,} rows"
            found[name] = f"`{name}`: scored by other pruners than `{OURS}`{share}"
    return found


def _solved(solved: Any, of: int) -> str:
    if not solved:
        return ""
    return f"{solved.value:.0f}" + f" ({solved.items})" * (solved.items < of)
