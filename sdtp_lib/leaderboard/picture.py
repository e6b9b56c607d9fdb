"""What the leaderboard's picture shows of rows: what a line of it connects must be the same prompts.

The points of every method, and the words that stand beside the picture. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdtp_lib.extras import extra
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.tables import KL, RULER, answers, at, costs, methods_in, places, scored_rows

with extra("train"):
    import pandas

COLUMNS = ["length", "speedup", "method", "measured", "kl_nats", "kl_items", "kl_lacking", "lost", "lost_items",
           "lost_lacking"]  # fmt: skip


def points(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One line per length, speed-up and method, over the items that are measured at every speed-up of their length.

    ``length, speedup, method, measured`` (speed-up to the first token), ``kl_nats`` (the mean over the KL test sets,
    each weighing alike), ``kl_items`` (per test set), ``lost`` (RULER points on items that the unpruned model solves),
    ``lost_items``. ``kl_lacking, lost_lacking``: how many of these items the method does not have; it has no mean then.
    """
    lines = []
    parts = {place: at(frame, *place) for place in places(frame)}
    for (length, speedup), part in parts.items():
        of_length = [each for (other, _), each in parts.items() if other == length]
        kl, ruler = _in_all([_kl_rows(each) for each in of_length]), _in_all([_solved_rows(each) for each in of_length])
        cost = costs(part)
        for name in methods_in(part):
            own = part[part.method == name]
            own_kl, own_ruler = _among(_kl_rows(own), kl), _among(_solved_rows(own), ruler)
            has_kl, has_ruler = 0 < len(kl) == len(own_kl), 0 < len(ruler) == len(own_ruler)
            by_test_set = own_kl.groupby("cell").kl_nats
            lines.append({
                "length": length, "speedup": speedup, "method": name,
                "measured": cost[name]["speedup"] if name in cost else None,
                "kl_nats": float(by_test_set.mean().mean()) if has_kl else None,
                "kl_items": int(by_test_set.size().min()) if has_kl else 0, "kl_lacking": len(kl) - len(own_kl),
                "lost": 100 * (1 - float(own_ruler.score.mean())) if has_ruler else None,
                "lost_items": len(own_ruler) if has_ruler else 0, "lost_lacking": len(ruler) - len(own_ruler),
            })  # fmt: skip
    return pandas.DataFrame(lines, columns=COLUMNS)


def shown(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The points at the shortest length: those that are drawn."""
    found = points(frame)
    return found[found.length == found.length.min()]


def in_words(frame: pandas.DataFrame) -> str:
    """What the picture's lines connect, how many items that is, and which method has no point where; empty where
    nothing is drawn."""
    lines = shown(frame)
    if lines.empty:
        return ""
    counts, without = [], []
    panels = (("kl", "KL", "per KL test set"), ("lost", "RULER", "of RULER that the unpruned model solves"))
    for kind, name, what in panels:
        if most := int(lines[f"{kind}_items"].max()):
            counts.append(f"{most} item{'s' * (most != 1)} {what}")
        lacking = lines[lines[f"{kind}_lacking"] > 0]
        without += [f"`{line.method}` at {line.speedup:g}x ({name})" for line in lacking.itertuples()]
    said = [
        f"In the picture ({lines.length.min():,} tokens) a line connects the same prompts, those that were measured at "
        f"every speed-up: {', '.join(counts) or 'none'}."
    ]
    if without:
        said.append(f"No point, since it lacks some of them: {', '.join(without)}.")
    if untimed := lines[lines.measured.isna()].method.unique().tolist():
        said.append(f"No point, since it has no times: {', '.join(f'`{name}`' for name in untimed)}.")
    return " ".join((*said, *of_more_items(frame)))


def of_more_items(frame: pandas.DataFrame) -> list[str]:
    """Where ours has more of RULER's solved items than are drawn: what it loses on all of them."""
    lines, found = shown(frame), []
    for line in lines[(lines.method == OURS) & (lines.lost_items > 0)].itertuples():
        solved = answers(at(frame, line.length, line.speedup))[OURS]["solved"]
        if solved.items > line.lost_items:
            found.append(
                f"The picture has {line.lost_items} of the {solved.items} items of RULER that the unpruned model "
                f"solves and that were measured at {line.speedup:g}x: ours loses {line.lost:.1f} points on those, "
                f"{100 - solved.value:.1f} on all."
            )
    return found


def _kl_rows(part: pandas.DataFrame) -> pandas.DataFrame:
    rows = part[part.sort == KL]
    return rows.assign(kl_nats=rows.kl_nats.astype(float))


def _solved_rows(part: pandas.DataFrame) -> pandas.DataFrame:
    rows = scored_rows(part, RULER)
    return rows[rows.unpruned_score >= 1.0]


def _in_all(parts: Sequence[pandas.DataFrame]) -> set[tuple[str, str]]:
    """(cell, sample) of the items that each of those parts has that has any."""
    items = [set(zip(rows.cell, rows["sample"], strict=True)) for rows in parts if len(rows)]
    return set.intersection(*items) if items else set()


def _among(rows: pandas.DataFrame, items: set[tuple[str, str]]) -> pandas.DataFrame:
    among = [item in items for item in zip(rows.cell, rows["sample"], strict=True)]
    return rows[pandas.Series(among, index=rows.index, dtype=bool)]
