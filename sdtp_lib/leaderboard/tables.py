"""What rows of a leaderboard say: one line per method, length and speed-up, each mean with its interval and count.

Every comparison is paired: a method against this project's learned one on the items that both have (`shared`), a pruned
answer against the unpruned one of the same item. Nothing is computed on a model here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp_lib.evaluation.answer_tables import means_over_tasks
from sdtp_lib.evaluation.statistics import paired_bootstrap, perplexity_growth
from sdtp_lib.evaluation.tables import FEWEST_PAIRS
from sdtp_lib.extras import extra
from sdtp_lib.leaderboard.entrants import OURS
from sdtp_lib.leaderboard.plan import KL, LONGBENCH, MEMORY, RULER, TIME, only_begun
from sdtp_lib.methods.variant import UNPRUNED

with extra("train"):
    import pandas


TEXT = "text"  # the test set of running text


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
    for column in ("kl_nats", "loss_nats", "loss_full_nats", "score", "unpruned_score", "answer", "answer_full",
                   "peak_bytes", "unpruned_peak_bytes", "prefill_ms", "unpruned_prefill_ms", "kv_bytes",
                   "unpruned_kv_bytes", "flops_speedup", "sort", "cell", "sample", "scorer", "scorer_id", "error",
                   "remark", "key"):  # fmt: skip
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
    tried = here.drop_duplicates(["method", "sort", "cell", "sample"]).method.value_counts().to_dict()
    return {name: (tried[name], max(tried.values())) for name in tried if name in only_begun(tried)}


def shared(part: pandas.DataFrame, *names: str) -> pandas.DataFrame:
    """The rows of these methods on the items that all of them have: means of the same items."""
    rows = part[part.method.isin(names)]
    have = rows.groupby(["sort", "cell", "sample"]).method.transform("nunique")
    return rows[have == len(set(names))]


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


def perplexity_change(part: pandas.DataFrame) -> dict[str, Mean]:
    """Method -> by how many percent the perplexity of what follows a text is above the unpruned model's; paired.

    Perplexity is exp of the mean loss [nats per token] over all items, which have equally many tokens.
    """
    rows = part[(part.sort == KL) & (part.cell == TEXT) & part.loss_nats.notna() & part.loss_full_nats.notna()]
    found = {}
    for name, own in rows.groupby("method", sort=False):
        change = paired_bootstrap(own.loss_nats.astype(float), own.loss_full_nats.astype(float))
        found[name] = Mean(*map(perplexity_growth, change), len(own))
    return found


def by_mean_kl(kl: Mapping[str, Mapping[str, Mean]], names: Sequence[str]) -> list[str]:
    """``names`` in the order of their mean over the KL test sets; those that lack one of these come last."""

    def mean(name: str) -> float:
        own = [values[name].value for values in kl.values() if name in values]
        return sum(own) / len(own) if len(own) == len(kl) and own else float("inf")

    return sorted(names, key=mean)


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
            verdict = _verdict(mean, lower_is_better=lower_is_better)
            lines.append({"cell": cell, "method": name, "difference": mean, "verdict": verdict})
    return lines


def _verdict(difference: Mean, *, lower_is_better: bool) -> str:
    if difference.items < FEWEST_PAIRS:
        return "too few"
    below, above = ("better", "worse") if lower_is_better else ("worse", "better")
    return below if difference.high < 0 else above if difference.low > 0 else "open"


def ruler_differences(part: pandas.DataFrame, ours: str = OURS) -> list[dict[str, Any]]:
    """``method, own, ours`` (means of RULER's tasks x 100), ``difference`` (a `Mean`), ``verdict``: on shared items."""
    lines = []
    for name in methods_in(part):
        rows = scored_rows(shared(part, name, ours), RULER)
        if name == ours or rows.empty:
            continue
        own, difference = _over_tasks(rows[rows.method == name], rows[rows.method == ours])
        verdict = _verdict(difference, lower_is_better=False)
        lines.append({"method": name, "own": own, "ours": own - difference.value, "difference": difference,
                      "verdict": verdict})  # fmt: skip
    return lines


def answers_kept(part: pandas.DataFrame) -> dict[str, Mean]:
    """Method -> share [%] of the KL items with a known answer, right unpruned, that stay right."""
    rows = part[(part.sort == KL) & part.answer_full.eq(True)]
    return {name: _share(own.answer.astype(bool)) for name, own in rows.groupby("method", sort=False)}


def answers(part: pandas.DataFrame, sort: str = RULER) -> dict[str, dict[str, Any]]:
    """Method -> ``all`` (mean of tasks x 100), ``lost`` (points against unpruned, paired), ``solved`` (score of items
    that the unpruned model solves), ``unpruned``, ``tasks``, ``items``, ``solved_items``."""
    rows, found = scored_rows(part, sort), {}
    for name, own in rows.groupby("method", sort=False):
        mean, gained = _over_tasks(own, own.assign(score=own.unpruned_score))
        solved = own[own.unpruned_score >= 1.0]
        found[name] = {
            "all": mean,
            "lost": Mean(0.0 - gained.value, 0.0 - gained.high, 0.0 - gained.low, gained.items),
            "unpruned": mean - gained.value,
            "solved": Mean(*paired_bootstrap(100 * solved.score, [0.0] * len(solved)), len(solved)) if len(solved)
            else None,
            "tasks": own.cell.nunique(),
            "items": gained.items,
            "solved_items": len(solved),
        }  # fmt: skip
    return found


def scored_rows(part: pandas.DataFrame, sort: str) -> pandas.DataFrame:
    """The rows of answers that have a score, their scores as numbers."""
    rows = part[(part.sort == sort) & part.score.notna()]
    return rows.assign(score=rows.score.astype(float), unpruned_score=rows.unpruned_score.astype(float))


def _over_tasks(own: pandas.DataFrame, base: pandas.DataFrame) -> tuple[float, Mean]:
    """The mean of tasks x 100 of ``own``, and how far it is above ``base``, rows of the same items."""
    # These columns alone: each pairing copies all that there are, and rows have fifty.
    named = [rows[["kind", "length", "score"]].assign(dataset=rows.cell, item=rows["sample"], variant=variant)
             for rows, variant in ((base, "base"), (own, "own"))]  # fmt: skip
    line = means_over_tasks(pandas.concat(named), against="base", by=("length",))
    line = line[line.variant == "own"].iloc[0]
    gained = Mean(line.difference, line.low, line.high, int(line["items"]))
    if own.cell.nunique() > 1 and own.groupby("cell").size().min() < FEWEST_PAIRS:
        # One item resampled within its task is always itself: so few per task say only how tasks differ.
        pair = own.merge(base[["cell", "sample", "score"]], on=["cell", "sample"], suffixes=("", "_base"))
        tasks = pair.assign(gap=100 * (pair.score - pair.score_base)).groupby("cell").gap.mean()
        gained = Mean(*paired_bootstrap(tasks, [0.0] * len(tasks)), gained.items)
    return line.score, gained


def items_of(part: pandas.DataFrame, sort: str = RULER) -> tuple[int, int, int]:
    """How many items any method has, of how many tasks, and how many of them the unpruned model solves."""
    items = scored_rows(part, sort).drop_duplicates(["cell", "sample"])
    return len(items), items.cell.nunique(), int((items.unpruned_score >= 1.0).sum())


def by_task(part: pandas.DataFrame, sort: str = RULER) -> list[dict[str, Any]]:
    """A line per task: ``task, items, unpruned`` of all items, ``scores`` (method -> score x 100, its own items)."""
    lines = []
    for task, own in scored_rows(part, sort).groupby("cell", sort=False):
        first = own.drop_duplicates("sample")
        scores = {name: (100 * each.score.mean(), len(each)) for name, each in own.groupby("method", sort=False)}
        lines.append({"task": task, "items": len(first), "unpruned": 100 * first.unpruned_score.mean(),
                      "scores": scores})  # fmt: skip
    return lines


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


def _share(right: pandas.Series) -> Mean:
    return Mean(*paired_bootstrap(100.0 * right.astype(float), [0.0] * len(right)), len(right))


__all__ = ["KL", "LONGBENCH", "RULER", "Mean", "answers", "answers_kept", "at", "begun", "by_mean_kl", "by_task",
           "costs", "frame_of", "items_of", "kl_by_test_set", "kl_differences", "methods_in", "perplexity_change",
           "places", "ruler_differences", "score_differences", "scored_rows", "shared", "unreached"]  # fmt: skip
