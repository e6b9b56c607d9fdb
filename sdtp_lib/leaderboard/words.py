"""Sentences of the leaderboard, computed from rows: where another method is better, what goals are met, which is best.

Each says what its own figures say, whichever way these turn out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdtp_lib.data.ruler import TASKS
from sdtp_lib.evaluation.tables import FEWEST_PAIRS
from sdtp_lib.leaderboard.entrants import LEARNED, OURS, OWN
from sdtp_lib.leaderboard.participants import scored_by
from sdtp_lib.leaderboard.plan import KL_TEST_SETS, LONGBENCH
from sdtp_lib.leaderboard.tables import (
    Mean,
    answers,
    at,
    costs,
    items_of,
    kl_by_test_set,
    kl_differences,
    methods_in,
    perplexity_change,
    places,
    ruler_differences,
    score_differences,
    shared,
)
from sdtp_lib.scorers.found import TRAINING_FREE

GOAL_SPEEDUP = 2.0
LIGHT_SPEEDUP = 1.5
GOAL_POINTS = 1.0
GOAL_PERPLEXITY = 1.0  # percent


def better_elsewhere(frame: Any) -> list[str]:
    """One sentence per place where a method's mean is better than ours (KL lower, scores higher), and whether its
    interval leaves zero out."""
    return [lead.sentence for lead in _leads(frame)]


def better_in_short(frame: Any) -> str:
    """The same in short: which methods are ahead of ours beyond their interval and where, how often a mean is without
    that, and where this project's other schedules are.
    """
    leads = _leads(frame)
    others = [lead for lead in leads if lead.method not in OWN]
    own = _beyond(lead for lead in leads if lead.method in OWN)
    of_own = f" Of this project's other schedules: {own}." if own else ""
    if not others:
        return f"No other method's mean is ahead of `{OURS}`, at any length and speed-up.{of_own}"
    rest = sum(not lead.beyond for lead in others)
    more = f" {rest} more mean{'s are' if rest > 1 else ' is'} ahead by less than the interval or on too few items."
    return (
        f"Ahead of `{OURS}` beyond the 95 % interval, at any length and speed-up: {_beyond(others) or 'none'}."
        f"{more if rest else ''}{of_own}"
    )


def _beyond(leads: Iterable[_Lead]) -> str:
    """The methods among ``leads`` that are ahead beyond their interval, each with its places in brackets."""
    found: dict[str, list[str]] = {}
    for lead in leads:
        if lead.beyond:
            found.setdefault(lead.method, []).append(lead.where)
    return ", ".join(f"`{method}` ({'; '.join(places)})" for method, places in sorted(found.items()))


@dataclass(frozen=True)
class _Lead:
    """A place where a method's mean is better than ours; ``beyond``: by an interval without zero."""

    method: str
    where: str
    beyond: bool
    sentence: str


def _leads(frame: Any) -> list[_Lead]:
    found = []
    for length, speedup in places(frame):
        part = at(frame, length, speedup)
        place = f"at {speedup:g}x and {length:,} tokens"
        kl = [(line, line["cell"], "lower", f"KL {line['difference'].text(sign=True)}")
              for line in kl_differences(part) if line["difference"].value < 0]  # fmt: skip
        scores = [(line, f"LongBench's {line['cell']}", "higher", f"{line['difference'].text(2, sign=True)} points")
                  for line in score_differences(part, LONGBENCH) if line["difference"].value > 0]  # fmt: skip
        for line, cell, word, by in kl + scores:
            where = f"{cell} {place}"
            sentence = f"{where}: `{line['method']}` is {_how(line, word)}: {by} to ours."
            found.append(_Lead(line["method"], where, line["verdict"] == "better", sentence))
        for line in ruler_differences(part):
            if line["difference"].value > 0:
                sentence = (
                    f"RULER {place}: `{line['method']}` is {_how(line, 'higher')}: {line['own']:.1f} where ours has "
                    f"{line['ours']:.1f} on the same items, {line['difference'].text(1, sign=True)} points to ours."
                )
                found.append(_Lead(line["method"], f"RULER {place}", line["verdict"] == "better", sentence))
    return found


def _how(line: Mapping[str, Any], word: str) -> str:
    """What a difference in a method's favour says: that it is better, or no more than its ``word``."""
    said = {
        "better": "better",
        "open": f"{word}, but its interval holds zero",
        "too few": f"{word}, on too few items to say",
    }
    return said[line["verdict"]]


def best_others(part: Any) -> dict[str, tuple[Mean, str, Mean, str]]:
    """Test set -> our mean KL, the best other method, its mean, and the verdict on it, on the items that both have."""
    others: dict[str, list[dict[str, Any]]] = {}
    for line in kl_differences(part):
        if line["method"] not in OWN:
            others.setdefault(line["cell"], []).append(line)
    found = {}
    for test_set, lines in others.items():
        line = min(lines, key=lambda line: line["difference"].value)
        both = kl_by_test_set(shared(part, line["method"], OURS))[test_set]
        found[test_set] = both[OURS], line["method"], both[line["method"]], line["verdict"]
    return found


def goals(frame: Any) -> list[str]:
    """The goals of this project at 2x and then at 1.5x, each with its figure and whether it is met by the mean."""
    found = []
    for length in sorted({length for length, speedup in places(frame) if speedup == GOAL_SPEEDUP}):
        part = at(frame, length, GOAL_SPEEDUP)
        beside = best_others(part)
        for test_set, values in kl_by_test_set(part).items():
            if test_set not in KL_TEST_SETS or OURS not in values:
                continue
            goal = f"lowest KL on {test_set} at 2x, {length:,} tokens: ours"
            if test_set not in beside:
                found.append(f"no other method to say: {goal} {values[OURS].text()}.")
                continue
            ours, best, other, verdict = beside[test_set]
            met = _met(ours.value <= other.value, ours.items)
            level = "; level, the interval of the difference holds zero" if verdict == "open" else ""
            found.append(f"{met}: {goal} {ours.text()}, best of the others `{best}` {other.text()}{level}.")
        found += _points_goal(part, length, GOAL_SPEEDUP)
    for length in sorted({length for length, speedup in places(frame) if speedup == LIGHT_SPEEDUP}):
        part = at(frame, length, LIGHT_SPEEDUP)
        if grown := perplexity_change(part).get(OURS):
            found.append(
                f"{_met(grown.value <= GOAL_PERPLEXITY, grown.items)}: perplexity of text at most "
                f"{GOAL_PERPLEXITY:g} % higher at {LIGHT_SPEEDUP:g}x, {length:,} tokens: {grown.text(1, sign=True)} %."
            )
        found += _points_goal(part, length, LIGHT_SPEEDUP)
    return found


def _points_goal(part: Any, length: int, speedup: float) -> list[str]:
    ours = answers(part).get(OURS)
    if not ours or not ours["solved"]:
        return []
    lost = 100 - ours["solved"].value
    return [
        f"{_met(lost <= GOAL_POINTS, ours['solved_items'])}: at most {GOAL_POINTS:g} point lost on RULER's items that "
        f"the unpruned model solves, {speedup:g}x, {length:,} tokens: {lost:.1f} [{100 - ours['solved'].high:.1f}, "
        f"{100 - ours['solved'].low:.1f}] (n = {ours['solved_items']})."
    ]


def _met(reached: bool, items: int) -> str:
    return "too few items to say" if items < FEWEST_PAIRS else "met" if reached else "MISSED"


def training_free(frame: Any) -> list[tuple[str, float, float, int]]:
    """Methods that no training goes into, best first: name, mean rank over KL test sets, lengths and speed-ups,
    geometric mean KL there, number of these places. Only methods with rows in as many places as the fullest of them
    has; a learned one that found no pruners is the default under another name, and left out.
    """
    ranks: dict[str, list[float]] = {}
    logs: dict[str, list[float]] = {}
    for length, speedup in places(frame):
        for values in kl_by_test_set(at(frame, length, speedup)).values():
            free = {name: value.value for name, value in values.items() if name not in LEARNED}
            for rank, name in enumerate(sorted(free, key=free.get), start=1):
                ranks.setdefault(name, []).append(rank)
                logs.setdefault(name, []).append(math.log(max(free[name], 1e-9)))
    most = max(map(len, ranks.values()), default=0)
    whole = [name for name, values in ranks.items() if len(values) == most]
    lines = [(name, sum(ranks[name]) / most, math.exp(sum(logs[name]) / most), most) for name in whole]
    return sorted(lines, key=lambda line: line[1])


def best_training_free(frame: Any) -> str:
    """The sentence of the above."""
    lines = training_free(frame)
    if not lines:
        return "No method without training has rows yet."
    name, rank, kl, count = lines[0]
    others = ", ".join(f"`{other}` {r:.1f} ({k:.3f})" for other, r, k, _ in lines[1:4])
    rest = f" Then: {others}." if others else ""
    used = scored_by(frame).get(name, name)
    how = f" (scored by {used})" if used != name else ""
    return (
        f"Of the methods that need no training, `{name}`{how} is best by rows: mean rank {rank:.1f}, geometric mean KL "
        f"{kl:.3f}, over {count} test sets by length and speed-up.{rest}"
    )


def over_models(frames: Mapping[str, Any]) -> str:
    """Which method that needs no training is best over all models: each model's geometric mean KL, and theirs."""
    lines = {name: {method: kl for method, _, kl, _ in training_free(frame)} for name, frame in frames.items()}
    common = set.intersection(*map(set, lines.values())) if len(lines) > 1 else set()
    if not common:
        return ""
    means = {method: math.exp(sum(math.log(max(each[method], 1e-9)) for each in lines.values()) / len(lines))
             for method in common}  # fmt: skip
    order = sorted(means, key=means.__getitem__)[:4]
    said = ", ".join(f"`{method}` {means[method]:.3f}" for method in order)
    return (
        f"Over {len(lines)} models ({', '.join(lines)}), geometric mean KL of methods without training that have rows "
        f"in every place: {said}. The default of `token_pruning` without pruners is `{TRAINING_FREE}`."
    )


def against_the_default(frame: Any) -> tuple[str, list[str]]:
    """Where the best method without training is not the default: a heading, and how far it is from it by KL, a line
    per place; nothing where it is the default."""
    lines = training_free(frame)
    if not lines or lines[0][0] == TRAINING_FREE:
        return "", []
    best, found = lines[0][0], []
    for length, speedup in places(frame):
        said = [
            f"{line['cell']} {line['difference'].text(sign=True)} {line['verdict']}"
            for line in kl_differences(at(frame, length, speedup), TRAINING_FREE)
            if line["method"] == best
        ]
        if said:
            found.append(f"{speedup:g}x and {length:,} tokens: {'; '.join(said)}.")
    return f"`{best}` minus the default `{TRAINING_FREE}`, KL (below zero: the default loses more):", found


def extent(frame: Any) -> list[str]:
    """How many items there are of what, a line per place, so that nobody reads more into a table than it holds."""
    parts = []
    for length, speedup in places(frame):
        part = at(frame, length, speedup)
        kl = kl_by_test_set(part)
        counts = [value.items for values in kl.values() for value in values.values()]
        ruler = answers(part)
        said = [f"{_span(counts)} per KL test set"] if counts else []
        if ruler:
            items, tasks = ([each[name] for each in ruler.values()] for name in ("items", "tasks"))
            of_tasks = f"{min(tasks)} to {max(tasks)}" if min(tasks) < max(tasks) else str(max(tasks))
            said.append(f"{_span(items)} of RULER ({of_tasks} of its {len(TASKS)} tasks)")
        if longbench := answers(part, LONGBENCH):
            said.append(f"{_span([each['items'] for each in longbench.values()])} of LongBench")
        if said:
            parts.append(f"{length:,} tokens, {speedup:g}x: {', '.join(said)}, {len(methods_in(part))} methods")
    return parts


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{high} item{'s' * (high != 1)}" if low == high else f"{low} to {high} items"


def on_fewer_items(part: Any) -> list[str]:
    """The methods that have fewer items of RULER than there are, and what they and ours score on those they have."""
    items, tasks, _ = items_of(part)
    found, every = [], answers(part)
    for line in ruler_differences(part):
        own = every[line["method"]]
        if own["items"] == items:
            continue
        both = answers(shared(part, line["method"], OURS))
        said = f"it scores {line['own']:.1f} where ours scores {line['ours']:.1f}"
        if solved := both[OURS]["solved"]:
            on = f", on the {solved.items} of them that the unpruned model solves"
            said += f"{on} {both[line['method']]['solved'].value:.1f} and {solved.value:.1f}"
        found.append(
            f"`{line['method']}` has {own['items']} of the {items} items and {own['tasks']} of the {tasks} tasks, so "
            f"that its means do not compare with others: on the {line['difference'].items} that ours has too {said}."
        )
    return found


def fastest(frame: Any) -> list[str]:
    """Which method is ahead of ours in measured time to the first token, place by place."""
    found = []
    for length, speedup in places(frame):
        timed = costs(at(frame, length, speedup))
        few = FEWEST_PAIRS if timed.get(OURS, {}).get("timed", 0) >= FEWEST_PAIRS else 1
        lines = {name: cost for name, cost in timed.items() if cost["timed"] >= few}
        if OURS in lines:
            best = max(lines, key=lambda name, lines=lines: lines[name]["speedup"])
            found.append(
                f"{length:,} tokens, {speedup:g}x by FLOPs: ours is measured at {lines[OURS]['speedup']:.2f}x, the "
                f"fastest, `{best}`, at {lines[best]['speedup']:.2f}x."
            )
    return found
