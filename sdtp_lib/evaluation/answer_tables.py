"""Tables of answers: scores by task and variant beside paired differences to the unpruned model, all items and solved.

An item that the unpruned model gets wrong tells nothing of what pruning loses, so each line says both: the score of all
items, and the score of those that the unpruned model solves. Views of rows (see `answers`, `fewshot`); no model here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdtp_lib.evaluation.statistics import paired_bootstrap, stratified_bootstrap
from sdtp_lib.extras import extra

with extra("train"):
    import numpy as np
    import pandas


def answers_table(
    frame: pandas.DataFrame, *, against: str, by: Sequence[str] = ("dataset",), solved_from: float = 1.0
) -> pandas.DataFrame:
    """Scores x 100 of `run_items` rows by group and variant, beside the paired difference to ``against``.

    Parameters
    ----------
    solved_from
        An item counts as solved where the variant ``against`` scores at least this.

    Returns
    -------
    frame with the columns of ``by`` and ``variant, items, score, difference, low, high, solved items, solved score,
    solved low, solved high, 1/tau, prefill speed-up, end-to-end speed-up`` (speed-ups: ratios of medians over the
    shared items). Only items that both variants have are counted.
    """
    lines = []
    for group, part in frame[frame.kind == "item"].groupby(list(by), sort=False, dropna=False):
        for variant, ours, theirs in _pairs(part, against):
            line = dict(zip(by, group, strict=True)) | {"variant": variant}
            line |= {"items": len(ours), "score": 100 * ours.score.mean()}
            solved = (theirs.score >= solved_from).to_numpy()
            line |= {"solved items": int(solved.sum())}
            if variant != against:
                line |= _interval(paired_bootstrap(100 * ours.score, 100 * theirs.score))
                if solved.any():
                    mean, low, high = paired_bootstrap(100 * ours.score[solved], [0.0] * int(solved.sum()))
                    line |= {"solved score": mean, "solved low": low, "solved high": high}
                line["1/tau"] = ours.compression_ratio.mean()
                line["prefill speed-up"] = theirs.prefill_seconds.median() / ours.prefill_seconds.median()
                line["end-to-end speed-up"] = theirs.generate_seconds.median() / ours.generate_seconds.median()
            lines.append(line)
    order = [*by, "variant", "items", "score", "difference", "low", "high", "solved items", "solved score",
             "solved low", "solved high", "1/tau", "prefill speed-up", "end-to-end speed-up"]  # fmt: skip
    table = pandas.DataFrame(lines)
    return table[[column for column in order if column in table]]


def means_over_tasks(
    frame: pandas.DataFrame, *, against: str, by: Sequence[str] = ("target_tokens",), solved_from: float = 1.0
) -> pandas.DataFrame:
    """The mean over data sets, each weighing alike, by group and variant; intervals resample items within data sets.

    Columns of ``by`` and ``variant, tasks, items, score, difference, low, high, solved tasks, solved items, solved
    score, solved low, solved high``; the solved ones over the data sets that have an item that ``against`` solves.
    """
    lines = []
    for group, part in frame[frame.kind == "item"].groupby(list(by), sort=False, dropna=False):
        base = part.loc[part.variant == against, ["dataset", "item", "score"]]
        for variant, own in part.groupby("variant", sort=False):
            pairs = own[["dataset", "item", "score"]].merge(base, on=["dataset", "item"], suffixes=("", "_against"))
            tasks = dict(iter(pairs.groupby("dataset")))
            tasks = [tasks[name] for name in part.dataset.unique() if name in tasks]
            if not tasks:
                continue
            scores = [100 * task.score.to_numpy() for task in tasks]
            gaps = [100 * (task.score - task.score_against).to_numpy() for task in tasks]
            solved = [100 * task.score[task.score_against >= solved_from].to_numpy() for task in tasks]
            solved = [values for values in solved if len(values)]
            line = dict(zip(by, group, strict=True)) | {"variant": variant, "tasks": len(scores)}
            line |= {"items": sum(map(len, scores)), "score": stratified_bootstrap(scores)[0]}
            if variant != against:
                line |= _interval(stratified_bootstrap(gaps))
            line |= {"solved tasks": len(solved), "solved items": sum(map(len, solved))}
            if variant != against and solved:
                mean, low, high = stratified_bootstrap(solved)
                line |= {"solved score": mean, "solved low": low, "solved high": high}
            lines.append(line)
    return pandas.DataFrame(lines)


def fewshot_table(frame: pandas.DataFrame, *, against: str = "full") -> pandas.DataFrame:
    """Accuracy x 100 by task and variant, the mean over tasks, and paired differences to ``against``.

    Columns ``task, variant, items, accuracy, difference, low, high, margin_nats, margin change, 1/tau``. The line
    ``mean of tasks`` weighs tasks alike; its interval resamples items within tasks.
    """
    done = frame[frame.kind == "item"]
    lines = []
    for variant in done.variant.unique():
        means, gaps, items = [], [], 0
        for task, part in done.groupby("dataset", sort=False):
            for _, ours, theirs in _pairs(part, against, only=variant):
                line = {"task": task, "variant": variant, "items": len(ours), "accuracy": 100 * ours.score.mean()}
                if variant != against:
                    line |= _interval(paired_bootstrap(100 * ours.score, 100 * theirs.score))
                    line["margin change"] = (ours.margin_nats - theirs.margin_nats).mean()
                    line["1/tau"] = ours.compression_ratio.mean()
                    gaps.append(100 * (ours.score.to_numpy() - theirs.score.to_numpy()))
                line["margin_nats"] = ours.margin_nats.mean()
                lines.append(line)
                means.append(line["accuracy"])
                items += len(ours)
        whole = {"task": "mean of tasks", "variant": variant, "items": items, "accuracy": float(np.mean(means))}
        lines.append(whole | (_interval(stratified_bootstrap(gaps)) if gaps else {}))
    return pandas.DataFrame(lines)


def _pairs(part: pandas.DataFrame, against: str, only: str | None = None) -> Any:
    """(variant, its rows, the rows of ``against``) over the items that both have, in one order."""
    base = part[part.variant == against].set_index("item")
    for variant, rows in part.groupby("variant", sort=False):
        rows = rows.set_index("item")
        shared = rows.index.intersection(base.index)
        if len(shared) and only in (None, variant):
            yield variant, rows.loc[shared], base.loc[shared]


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("difference", "low", "high"), values, strict=True))
