"""docs/leaderboard.md from rows: tables, what they say in words, and what was not run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib.leaderboard import picture as picture_of
from sdtp_lib.leaderboard import tables, words
from sdtp_lib.leaderboard.entrants import LEARNED, OURS
from sdtp_lib.leaderboard.participants import (
    before_what_ships,
    is_learned,
    measured_elsewhere,
    not_by_one_dial,
    of_other_pruners,
    remarks,
    scored_by,
    unmeasured,
)
from sdtp_lib.leaderboard.plan import KL_TEST_SETS
from sdtp_lib.methods.variant import UNPRUNED
from sdtp_lib.provenance import origin_line
from sdtp_lib.records import markdown_table

PICTURE = "../figures/leaderboard.png"
RULE = " --- "
LISTED = 4  # numbers of a list in an error, beyond which only its ends are shown


def has_quality(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows say of the quality that the picture shows, beyond time, cache and memory."""
    return any(row.get("sort") in (tables.KL, tables.RULER) for row in rows)


def page(
    rows: Sequence[Mapping[str, Any]],
    *,
    picture: bool = True,
    others: Mapping[str, str] | None = None,
    over_models: str = "",
    needle_map: str = "",
) -> str:
    """The whole page, as Markdown.

    Parameters
    ----------
    others
        The name and the page of each other model.
    over_models
        A sentence about all of them.
    needle_map
        Of that picture, seen from the page's folder; empty: there is none.
    """
    frame = tables.frame_of(rows)
    done = [row for row in rows if row["kind"] == "item"]
    dates = sorted({row["utc"][:10] for row in done})
    commits = sorted({row["commit"] for row in done})
    timing_only = not has_quality(rows) and not any(row.get("sort") == tables.LONGBENCH for row in rows)
    elsewhere = ", ".join(f"[{name}]({file})" for name, file in (others or {}).items())
    lines = [
        "# Leaderboard",
        "",
        "The methods of `sdtp_lib.methods` at equal prefill FLOPs, on the same items, on one engine. Each length and "
        "speed-up names the methods that were not measured or cannot be so fast. `make leaderboard` writes this page "
        "from rows; no number is typed by hand.",
        "",
        f"Model: {origin_line({**done[0], 'commit': None})}. Measured {' to '.join(sorted({dates[0], dates[-1]}))}, "
        + (f"commit {commits[0]}." if len(commits) == 1 else f"at {len(commits)} commits, which the rows name.")
        + (f" Other models: {elsewhere}." if elsewhere else ""),
        "",
        *([f"Measured elsewhere: {elsewhere_too}.", ""] if (elsewhere_too := measured_elsewhere(done)) else []),
    ]
    if timing_only:
        lines += ["**Random weights of the true sizes**: time, cache and memory are real, quality is not measured.", ""]
    else:
        lines += [*_how_to_read(), *(f"- {place}" for place in words.extent(frame)), ""]
        if picture:
            lines += [f"![Quality lost over prefill speed-up, one line per method]({PICTURE})", ""]
            lines += [said, ""] if has_quality(rows) and (said := picture_of.in_words(frame)) else []
        lines += _in_words(frame, over_models)
        if needle_map:
            lines += ["RULER's planted values by their depth in the prompt and its length, unpruned and pruned, the "
                      "same items in every panel:", "",
                      f"![Share of planted values found, by depth and length]({needle_map})", ""]  # fmt: skip
    lines += _who(frame, "untrained pruners of the trained ones' sizes" if timing_only else "trained pruners")
    for length, speedup in tables.places(frame):
        lines += _place(frame, length, speedup)
    lines += _method_of_the_table(frame, quality=not timing_only)
    return "\n".join(lines) + "\n"


def _how_to_read() -> list[str]:
    return [
        "`0.025 [0.021, 0.030] (24)` is a mean, its 95 % bootstrap interval and the number of items. KL is the "
        "distance to the unpruned model's predictions: lower is better, 0 is the same model. Of RULER and LongBench "
        "higher is better. Test sets of KL: `text` is running text, `needle` asks for one planted sentence, "
        "`instructions` for one of many packed records.",
        "",
        "How much was run:",
        "",
    ]


def _in_words(frame: Any, over_models: str) -> list[str]:
    others = words.better_elsewhere(frame)
    heading, against = words.against_the_default(frame)
    goals = [f"- {goal}" for goal in words.goals(frame)] or ["- not measured at 2x or 1.5x yet"]
    none = "- On no test set, task or data set is another method's mean better than ours."
    places = [f"- {sentence}" for sentence in others] or [none]
    return [
        "## In words",
        "",
        "Goals of this project, by the means:",
        "",
        *goals,
        "",
        f"Where another method is ahead of ours (`{OURS}`):",
        "",
        *places,
        "",
        words.best_training_free(frame),
        "",
        *([over_models, ""] if over_models else []),
        *([heading, "", *(f"- {sentence}" for sentence in against), ""] if against else []),
        "Measured time to the first token:",
        "",
        *(
            [f"- {sentence}" for sentence in words.fastest(frame)]
            or ["- not measured: several processes shared the device"]
        ),
        "",
    ]


def _who(frame: Any, pruners: str) -> list[str]:
    used = scored_by(frame)
    learned = sorted({scorer for name, scorer in used.items() if is_learned(name, used)})
    free = [name for name in LEARNED if name in used and not is_learned(name, used)]
    said = [f"Scored by {pruners} ({', '.join(learned)}): " + (
        ", ".join(f"`{name}`" for name in used if is_learned(name, used)) or "none") + "."]  # fmt: skip
    if free:
        said.append(
            f"{', '.join(f'`{name}`' for name in free)} found no pruners for the model and its stages and ran with "
            f"{', '.join(sorted({used[name] for name in free}))}."
        )
    if any(is_learned(name, used) for name in used) and pruners == "trained pruners":
        said.append(
            "The pruners were trained on prompts of the kinds that are measured here, of other documents, names and "
            "ids (`sdtp_lib/data/training_mix.py`); the card of the set that ships says how it was chosen."
        )
    said += [earlier] if (earlier := before_what_ships(frame)) else []
    said += [
        f"`{name}` was measured with other pruners than `{OURS}` in {others:,} of its {of:,} rows: an earlier set, or "
        "one of its own."
        for name, (others, of) in of_other_pruners(frame).items()
    ]
    said += [f"`{name}`: {remark}." for name, remark in remarks(frame).items()]
    return ["## Remarks on the methods", "", *(f"- {sentence}" for sentence in said), ""]


def _place(frame: Any, length: int, speedup: float) -> list[str]:
    part = tables.at(frame, length, speedup)
    kl, ruler = tables.kl_by_test_set(part), tables.answers(part)
    costs, kept, perplexity = tables.costs(part), tables.answers_kept(part), tables.perplexity_change(part)
    names = tables.by_mean_kl(kl, tables.methods_in(part))
    lines = [f"## {speedup:g}x at {length:,} tokens", ""]
    verdicts = {(line["cell"], line["method"]): line for line in tables.kl_differences(part)}
    if kl:
        header = ["method", *kl, *(["perplexity of text, %"] if perplexity else []), "far answers kept, %"]
        body = [
            [name, *(values[name].text() if name in values else "-" for values in kl.values()),
             *([perplexity[name].text(1, sign=True) if name in perplexity else "-"] if perplexity else []),
             kept[name].text(0) if name in kept else "-"]
            for name in names
        ]  # fmt: skip
        said = " by how much the perplexity of what follows a text grows;" if perplexity else ""
        lines += [f"KL to the unpruned model, nats per token, by test set;{said} answers to far questions that are "
                  "right unpruned and stay right.", "", markdown_table(header, body, RULE), ""]  # fmt: skip
        header = [f"method minus {OURS}", *kl]
        body = [
            [name, *(f"{verdicts[test_set, name]['difference'].text(sign=True)} {verdicts[test_set, name]['verdict']}"
                     if (test_set, name) in verdicts else "-" for test_set in kl)]
            for name in names if name != OURS
        ]  # fmt: skip
        lines += [f"Paired by item, method minus ours (`{OURS}`): above zero, ours loses less (`worse` says so of the "
                  "method).",
                  "", markdown_table(header, body, RULE), ""]  # fmt: skip
    if ruler:
        header = ["method", "all items", "points lost, all", "items that unpruned solves", "points lost there"]
        body = []
        for name in [name for name in names if name in ruler]:
            own = ruler[name]
            solved = own["solved"]
            body.append([
                name, f"{own['all']:.1f} ({own['items']} items, {own['tasks']} tasks)", own["lost"].text(1),
                solved.text(1) if solved else "-", f"{100 - solved.value:.1f}" if solved else "-",
            ])  # fmt: skip
        first = max(ruler.values(), key=lambda own: own["items"])
        lines += [f"RULER, scores x 100, mean of tasks; unpruned {first['unpruned']:.1f}. With fewer than six items "
                  "per task the interval of the points lost resamples tasks.", "",
                  markdown_table(header, body, RULE), ""]  # fmt: skip
        fewer = words.on_fewer_items(part)
        lines += [*(f"- {each}" for each in fewer), ""] if fewer else []
        lines += [f"By task{' (in brackets the number of items where a method has fewer)' if fewer else ''}:", "",
                  *_task_table(tables.by_task(part), names), ""]  # fmt: skip
    lines += _longbench(part, names)
    if costs:
        header = ["method", "TTFT speed-up (quartiles)", "limit by FLOPs", "KV cache", "peak memory", "n"]
        body = [
            [name, f"{each['speedup']:.2f}x ({each['quartiles'][0]:.2f} to {each['quartiles'][1]:.2f})"
             if each["speedup"] else "-", f"{each['limit']:.2f}x", f"{100 * each['kv']:.0f} %",
             f"{100 * each['peak']:.0f} %" if each["peak"] is not None else "-", str(each["timed"] or "-")]
            for name, each in sorted(costs.items(), key=lambda pair: -(pair[1]["speedup"] or 0))
        ]  # fmt: skip
        runs = set().union(*(each["commits"] for each in costs.values()))
        several = "; methods are of several runs, so a tenth between two of them says nothing" * (len(runs) > 1)
        lines += ["Time to the first token against the unpruned run of the same turn, scoring included (n: items "
                  f"timed{several}). Cache and peak memory as shares of the unpruned ones.", "",
                  markdown_table(header, body, RULE), ""]  # fmt: skip
    out = tables.unreached(frame, length, speedup)
    if out:
        lines += ["Out of reach, or failed:", "", *[f"- `{name}`: {_plain(why)}" for name, why in out.items()], ""]
    if absent := unmeasured(frame, length, speedup):
        lines += [f"Not measured: {', '.join(f'`{name}`' for name in absent)}.", ""]
    return lines


def _longbench(part: Any, names: Sequence[str]) -> list[str]:
    """Scores by method, what is lost against the unpruned answers of the same items, and what each is ahead of ours."""
    found = tables.answers(part, tables.LONGBENCH)
    if not found:
        return []
    against: dict[str, list[str]] = {}
    tasks = tables.by_task(part, tables.LONGBENCH)
    for line in tables.score_differences(part, tables.LONGBENCH):
        said = f"{line['difference'].text(2, sign=True)} {line['verdict']}"
        against.setdefault(line["method"], []).append(f"{line['cell']}: {said}" if len(tasks) > 1 else said)
    header = ["method", "score", "points lost", "method minus ours"]
    body = [[name, f"{found[name]['all']:.2f} ({found[name]['items']})", found[name]["lost"].text(2),
             "; ".join(against.get(name, ["-"]))] for name in names if name in found]  # fmt: skip
    unpruned = max(found.values(), key=lambda own: own["items"])["unpruned"]
    sets = ", ".join(line["task"] for line in tasks)
    lines = [f"LongBench ({sets}), official metric x 100; unpruned {unpruned:.2f}. Points lost and "
             "differences are paired by item.", "", markdown_table(header, body, RULE), ""]  # fmt: skip
    return lines + (["By data set:", "", *_task_table(tasks, names), ""] if len(tasks) > 1 else [])


def _task_table(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    columns = [name for name in names if any(name in line["scores"] for line in found)]

    def score(line: Mapping[str, Any], name: str) -> str:
        if name not in line["scores"]:
            return "-"
        value, items = line["scores"][name]
        return f"{value:.0f}" + f" ({items})" * (items < line["items"])

    body = [
        [line["task"], str(line["items"]), f"{line['unpruned']:.0f}", *(score(line, name) for name in columns)]
        for line in found
    ]  # fmt: skip
    return [markdown_table(["task", "n", UNPRUNED, *columns], body, RULE)]


def _method_of_the_table(frame: Any, *, quality: bool) -> list[str]:
    have = tables.places(frame)
    missing = [name for name in KL_TEST_SETS if quality and name not in set(frame[frame.sort == tables.KL].cell)]
    longbench = not quality or (frame.sort == tables.LONGBENCH).any()
    of_quality = [
        "- KL: along a fixed continuation of 128 tokens or the answer, read from the pruned cache.",
        "- RULER: lm-eval's generators and metric; generation ends with the right answer or after half as many tokens "
        "again as it has plus 8, so that scores are below those of the official number of new tokens. Essays and "
        "questions are the embedded text unless rows say otherwise.",
    ]
    return [
        "## How it is measured",
        "",
        "- Budgets: each method's own shape, scaled by one dial until its prefill has the wanted share of the unpruned "
        f"causal FLOPs, solved per prompt{_exceptions(frame)}; scoring is not in the FLOPs but is on the clock.",
        *(of_quality if quality else ()),
        "- Time: on each KL item methods run in turn, in an order that changes with the item, each beside an unpruned "
        "run of the same turn; answers of RULER and LongBench are not timed. A shared machine: read the ratios, not "
        "the third digit.",
        f"- Not run: lengths and speed-ups other than {', '.join(f'{s:g}x at {n:,}' for n, s in have)}"
        + (f"; {', '.join(missing)}" if missing else "")
        + ("" if longbench else "; LongBench (`--longbench FOLDER` names its files)")
        + ". The same command goes on from the committed rows.",
    ]


def _exceptions(frame: Any) -> str:
    names = [f"`{name}`" for name in not_by_one_dial(frame)]
    return f" ({', '.join(names)}: not the whole rule, see the remarks above)" if names else ""


def _plain(text: str) -> str:
    """On one line, fit for a table; of a long list of numbers the ends."""
    text = " ".join(text.split()).replace("|", "\\|")
    return re.sub(rf"\[(\d+)(?:, \d+){{{LISTED - 1},}}, (\d+)\]", r"[\1, ..., \2]", text)
