"""What rows of a leaderboard say: one line per method, length and speed-up, each mean with its interval and count.

Every comparison is paired: a method against this project's learned one on the items that both have, a pruned answer
against the unpruned one of the same item. Nothing is computed on a model here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib import methods
from sdtp_lib.evaluation.answer_tables import means_over_tasks
from sdtp_lib.evaluation.statistics import paired_bootstrap
from sdtp_lib.evaluation.tables import FEWEST_PAIRS
from sdtp_lib.extras import extra
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.plan import KL, LONGBENCH, MEMORY, RULER, TIME
from sdtp_lib.methods.variant import UNPRUNED

with extra("train"):
    import pandas


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % interval and over how many items."""

    value: float
    low: float
    high: float
    items: int

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """``0.041 [0.030, 0.055] (24)``."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}] ({self.items})"


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """The rows as a frame that has every column that is asked for here."""
    frame = pandas.DataFrame.from_records(list(rows))
    for column in ("kl_nats", "score", "unpruned_score", "answer", "answer_full", "peak_bytes", "unpruned_peak_bytes",
                   "prefill_ms", "unpruned_prefill_ms", "kv_bytes", "unpruned_kv_bytes", "flops_speedup", "sort",
                   "cell", "sample", "scorer", "scorer_id", "error", "remark", "key"):  # fmt: skip
        if column not in frame:
            frame[column] = None
    return frame


def places(frame: pandas.DataFrame) -> list[tuple[int, float]]:
    """(length, speed-up) that have pruned items, shorter lengths and then lower speed-ups first."""
    done = frame[(frame.kind == "item") & (frame.method != UNPRUNED)]
    return sorted({(int(length), float(speedup)) for length, speedup in zip(done.length, done.speedup, strict=True)})


def at(frame: pandas.DataFrame, length: int, speedup: float) -> pandas.DataFrame:
    """The measured rows of one length and speed-up; an item that a running command has not finished is left out.

    Where a method failed on an item, the others keep it: their counts then differ, and each says its own. A method that
    has been `begun` only takes none of the others' items out.
    """
    here = frame[(frame.length == length) & (frame.speedup == speedup) & frame["sample"].notna()]
    here = here[~here.method.isin(list(begun(frame, length, speedup)))]
    tried = here.groupby(["sort", "cell", "sample"]).method.transform("nunique")
    return here[(tried == here.method.nunique()) & (here.kind == "item")]


def begun(frame: pandas.DataFrame, length: int, speedup: float) -> dict[str, tuple[int, int]]:
    """Methods tried on fewer than half of the items that the most measured one was tried on: (their items, its)."""
    here = frame[(frame.length == length) & (frame.speedup == speedup) & frame["sample"].notna()]
    tried = here.drop_duplicates(["method", "sort", "cell", "sample"]).method.value_counts()
    return {str(name): (int(n), int(tried.max())) for name, n in tried.items() if 2 * n < tried.max()}


def methods_in(frame: pandas.DataFrame) -> list[str]:
    """The methods that have rows, in the order in which they first come."""
    return [name for name in frame.method.unique() if name != UNPRUNED]


def kl_by_test_set(part: pandas.DataFrame) -> dict[str, dict[str, Mean]]:
    """Test set -> method -> mean KL [nats per token] with its bootstrap interval."""
    found: dict[str, dict[str, Mean]] = {}
    for test_set, rows in part[part.sort == KL].groupby("cell", sort=False):
        found[test_set] = {}
        for name, own in rows.groupby("method", sort=False):
            values = own.kl_nats.astype(float)
            found[test_set][name] = Mean(*paired_bootstrap(values, [0.0] * len(values)), len(values))
    return found


def kl_differences(part: pandas.DataFrame, ours: str = OURS) -> list[dict[str, Any]]:
    """``cell, method, difference`` (method minus ours, a `Mean` over shared items) ``, verdict`` by KL test set.

    ``better``: the method loses less, by an interval without zero; ``worse``; ``open``; ``too few`` under six items.
    """
    return _differences(part[part.sort == KL], "kl_nats", ours, lower_is_better=True)


def score_differences(part: pandas.DataFrame, sort: str, ours: str = OURS) -> list[dict[str, Any]]:
    """The same of answers' scores x 100 by task, where more is better."""
    rows = part[(part.sort == sort) & part.score.notna()]
    return _differences(rows.assign(score=100 * rows.score.astype(float)), "score", ours, lower_is_better=False)


def _differences(rows: pandas.DataFrame, value: str, ours: str, *, lower_is_better: bool) -> list[dict[str, Any]]:
    lines = []
    for cell, own in rows.groupby("cell", sort=False):
        wide = own.pivot_table(index="sample", columns="method", values=value, aggfunc="first", sort=False)
        if ours not in wide:
            continue
        for name in wide.columns.drop(ours):
            pair = wide[[name, ours]].dropna().astype(float)
            if pair.empty:
                continue
            mean = Mean(*paired_bootstrap(pair[name], pair[ours]), len(pair))
            below, above = ("better", "worse") if lower_is_better else ("worse", "better")
            verdict = below if mean.high < 0 else above if mean.low > 0 else "open"
            verdict = verdict if len(pair) >= FEWEST_PAIRS else "too few"
            lines.append({"cell": cell, "method": name, "difference": mean, "verdict": verdict})
    return lines


def answers_kept(part: pandas.DataFrame) -> dict[str, Mean]:
    """Method -> share [%] of the KL items with a known answer, right unpruned, that stay right."""
    rows = part[(part.sort == KL) & part.answer_full.eq(True)]
    return {name: _share(own.answer.astype(bool)) for name, own in rows.groupby("method", sort=False)}


def answers(part: pandas.DataFrame, sort: str = RULER) -> dict[str, dict[str, Any]]:
    """Method -> ``all`` (mean of tasks x 100), ``lost`` (points against unpruned, paired), ``solved`` (score of items
    that the unpruned model solves), ``unpruned``, ``tasks``, ``items``, ``solved_items``."""
    rows = part[(part.sort == sort) & part.score.notna()]
    if rows.empty:
        return {}
    rows = rows.assign(score=rows.score.astype(float))
    long = rows.assign(dataset=rows.cell, item=rows["sample"], variant=rows.method, kind="item")
    found = {}
    for name, own in long.groupby("method", sort=False):
        base = own.assign(variant=UNPRUNED, score=own.unpruned_score.astype(float))
        line = means_over_tasks(pandas.concat([base, own]), against=UNPRUNED, by=("length",))
        line = line[line.variant == name].iloc[0]
        count, solved = int(line["items"]), own[own.unpruned_score.astype(float) >= 1.0]
        lost = Mean(0.0 - line.difference, 0.0 - line.high, 0.0 - line.low, count)
        if own.cell.nunique() > 1 and own.groupby("cell").size().min() < FEWEST_PAIRS:
            # One item resampled within its task is always itself: so few per task say only how tasks differ.
            tasks = own.assign(gap=100 * (own.unpruned_score.astype(float) - own.score)).groupby("cell").gap.mean()
            lost = Mean(*paired_bootstrap(tasks, [0.0] * len(tasks)), count)
        found[name] = {
            "all": line.score,
            "lost": lost,
            "unpruned": line.score - line.difference,
            "solved": Mean(*paired_bootstrap(100 * solved.score, [0.0] * len(solved)), len(solved)) if len(solved)
            else None,
            "tasks": int(line.tasks),
            "items": count,
            "solved_items": len(solved),
        }  # fmt: skip
    return found


def by_task(part: pandas.DataFrame, sort: str = RULER) -> pandas.DataFrame:
    """Tasks down (``task, items, unpruned``), methods across: scores x 100."""
    rows = part[(part.sort == sort) & part.score.notna()]
    lines = []
    for task, own in rows.groupby("cell", sort=False):
        first = own.drop_duplicates("sample")
        line = {"task": task, "items": len(first), "unpruned": 100 * first.unpruned_score.astype(float).mean()}
        for name, each in own.groupby("method", sort=False):
            line[name] = 100 * each.score.astype(float).mean()
        lines.append(line)
    return pandas.DataFrame(lines)


def costs(part: pandas.DataFrame) -> dict[str, dict[str, Any]]:
    """Method -> ``speedup`` (measured time to the first token: the median of ratios to the unpruned run of the same
    turn; None where rows have no times), ``quartiles``, ``timed`` (items with a time), ``commits`` (of the runs that
    these are of), ``limit`` (by FLOPs), ``kv`` (share of the unpruned cache), ``peak`` (share of the unpruned peak
    memory).

    Answers (RULER, LongBench) have no times here: their unpruned run is not repeated where a method comes later, so
    that the two would be of different hours on a machine of changing load.
    """
    found = {}
    for name, own in part[part.method != UNPRUNED].groupby("method", sort=False):
        held = own[own.kv_bytes.notna() & own.unpruned_kv_bytes.notna()]
        timed = held[held.sort.isin((KL, TIME)) & held.prefill_ms.notna() & held.unpruned_prefill_ms.notna()]
        memory = own[(own.sort == MEMORY) & own.peak_bytes.notna()]
        if held.empty:
            continue
        ratios = (timed.unpruned_prefill_ms / timed.prefill_ms).astype(float)
        found[name] = {
            "speedup": float(ratios.median()) if len(ratios) else None,
            "quartiles": (float(ratios.quantile(0.25)), float(ratios.quantile(0.75))),
            "timed": len(timed),
            "commits": set(timed.commit),
            "limit": float(held.flops_speedup.astype(float).median()),
            "kv": float(held.kv_bytes.sum() / held.unpruned_kv_bytes.sum()),
            "peak": float((memory.peak_bytes / memory.unpruned_peak_bytes).mean()) if len(memory) else None,
        }
    return found


def unreached(frame: pandas.DataFrame, length: int, speedup: float) -> dict[str, str]:
    """Method -> why it has no items at this length and speed-up, or how many it failed on and why."""
    here = frame[(frame.length == length) & (frame.speedup == speedup)]
    have = set(at(frame, length, speedup).method)
    found = {row.method: row.error for row in here[here.kind == "out of reach"].itertuples() if row.method not in have}
    for name, (items, most) in begun(frame, length, speedup).items():
        found[name] = f"begun: {items} of {most} items, not in the tables yet"
    some = here[(here.kind == "out of reach") & here["sample"].notna() & here.method.isin(have)]
    for method, rows in some.groupby("method", sort=False):
        count = rows.key.nunique()
        found[str(method)] = f"out of reach on {count} item{'s' * (count != 1)}: {rows.error.iloc[-1]}"
    failed = here[(here.kind == "failure") & ~here.key.isin(set(here[here.kind == "item"].key))]
    for method, rows in failed.groupby("method", sort=False):
        count = rows.key.nunique()
        found[str(method)] = f"failed on {count} item{'s' * (count != 1)}: {rows.error.iloc[-1]}"
    return found


def remarks(frame: pandas.DataFrame) -> dict[str, str]:
    """Method -> in what it is not its paper's method on this model: by its rows, else by its settings."""
    rows = frame[frame.kind == "item"]
    known = {name: methods.get(name).remark for name in methods.names() if name in set(rows.method)}
    said = {str(method): str(each.iloc[-1]) for method, each in rows.groupby("method").remark if each.notna().any()}
    return {name: remark for name, remark in (known | said).items() if remark}


def same_kl_items(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The rows without the KL items that are not measured at every speed-up of their length: what a line connects must
    be the same prompts."""
    rows = frame[(frame.kind == "item") & (frame.sort == KL) & (frame.method != UNPRUNED)]
    counts = rows.groupby(["length", "cell", "sample"]).speedup.nunique()
    most = rows.groupby("length").speedup.nunique()
    everywhere = {place for place, count in counts.items() if count == most[place[0]]}
    places_of = zip(frame.length, frame.cell, frame["sample"], strict=True)
    return frame[[sort != KL or place in everywhere for sort, place in zip(frame.sort, places_of, strict=True)]]


def summary(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One line per length, speed-up and method, for the picture.

    ``length, speedup, method, measured`` (speed-up to the first token), ``kl_nats`` (the mean over the KL test sets,
    each weighing alike), ``kl_items, lost`` (RULER points on items that the unpruned model solves), ``lost_items``.
    """
    lines = []
    for length, speedup in places(frame):
        part = at(frame, length, speedup)
        kl, ruler, cost = kl_by_test_set(part), answers(part), costs(part)
        for name in methods_in(part):
            own = [values[name] for values in kl.values() if name in values]
            solved = ruler.get(name, {}).get("solved")
            lines.append({
                "length": length, "speedup": speedup, "method": name,
                "measured": cost[name]["speedup"] if name in cost else None,
                "kl_nats": sum(each.value for each in own) / len(own) if len(own) == len(kl) and own else None,
                "kl_items": min((each.items for each in own), default=0),
                "lost": 100 - solved.value if solved else None, "lost_items": solved.items if solved else 0,
            })  # fmt: skip
    return pandas.DataFrame(lines)


def scored_by(frame: pandas.DataFrame) -> dict[str, str]:
    """Method -> the name of what scored its tokens."""
    rows = frame[(frame.kind == "item") & frame.scorer.notna()].drop_duplicates("method")
    return dict(zip(rows.method, rows.scorer, strict=True))


def _share(right: pandas.Series) -> Mean:
    return Mean(*paired_bootstrap(100.0 * right.astype(float), [0.0] * len(right)), len(right))


__all__ = ["KL", "LONGBENCH", "RULER", "Mean", "answers", "answers_kept", "at", "begun", "by_task", "costs", "frame_of",
           "kl_by_test_set", "kl_differences", "methods_in", "places", "remarks",
           "same_kl_items", "score_differences", "scored_by", "summary", "unreached"]  # fmt: skip
