"""Tables of comparison rows: means with item counts, paired differences with bootstrap intervals, as Markdown.

Views of rows (see `records`); nothing is computed on a model here. A row is of kind ``scorer`` (`compare_scorers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.evaluation.statistics import paired_bootstrap, perplexity_growth
from sdtp_lib.extras import extra
from sdtp_lib.records import markdown_table, read_frame

with extra("train"):
    import pandas

LEARNED_PREFIX = "SDTP"
# Under six pairs even the sign test cannot reach 5 % (2 / 2**5 > 0.05), and resampling them only hides that.
FEWEST_PAIRS = 6


def rows_in(path: Path) -> pandas.DataFrame:
    """The rows of a run that is over or under way, at least one.

    Raises
    ------
    ValueError
        If there is no such file, or it has no rows.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path} yet: measure first (without --tables).")
    frame = read_frame(path)
    if frame.empty:
        raise ValueError(f"{path} has no rows: nothing that was asked for had its data, see above.")
    return frame


def scorer_summary(frame: pandas.DataFrame, *, by: Sequence[str] = ("cell", "setting")) -> pandas.DataFrame:
    """One line per test set (``cell``), setting and scorer, over the samples that *every* scorer of the group has.

    Columns: ``by``, ``scorer, block, items, kl_nats, kl_nats_low, kl_nats_high`` (95 % bootstrap interval of the mean),
    ``loss_change_nats, perplexity_change_percent, answers_percent, answers_full_percent`` (of samples that have
    answers), ``answers_kept_percent`` (of the ``answered_items`` that the unpruned model gets right),
    ``compression_ratio, prefill_flops_share``.
    """
    lines = []
    for group, part in frame[frame.kind == "scorer"].groupby(list(by), sort=False):
        part = _common_samples(part)
        for name, rows in part.groupby("scorer", sort=False):
            mean, low, high = paired_bootstrap(rows.kl_nats, [0.0] * len(rows))
            change = (rows.loss_nats - rows.loss_full_nats).mean()
            line = dict(zip(by, group, strict=True))
            line |= {"scorer": name, "block": rows.block.iloc[0], "items": len(rows)}
            line |= {"kl_nats": mean, "kl_nats_low": low, "kl_nats_high": high, "loss_change_nats": change}
            line["perplexity_change_percent"] = perplexity_growth(change)
            for field in ("answer", "answer_full"):
                values = rows[field].dropna() if field in rows else []
                line[field.replace("answer", "answers") + "_percent"] = (
                    100 * sum(map(bool, values)) / len(values) if len(values) else float("nan")
                )
            answered = rows[rows.answer_full.eq(True)] if "answer_full" in rows else rows[:0]
            line["answers_kept_percent"] = 100 * answered.answer.astype(bool).mean() if len(answered) else float("nan")
            line["answered_items"] = len(answered)
            line |= {name: rows[name].mean() for name in ("compression_ratio", "prefill_flops_share")}
            lines.append(line)
    return pandas.DataFrame(lines)


def beside_oracles(frame: pandas.DataFrame) -> pandas.DataFrame:
    """``frame`` and, in the oracles' block, the learned scores on the samples that the oracles ran on.

    Oracles often run on fewer samples, and how hard a sample is varies more than how good a score is.
    """
    keys = ["cell", "setting", "sample"]
    oracles = frame[frame.block != "deployable"]
    learned = frame[(frame.block == "deployable") & frame.scorer.str.startswith(LEARNED_PREFIX)]
    same = learned.merge(oracles[keys].drop_duplicates(), on=keys)
    if same.empty:
        return frame
    same = same.assign(block=oracles.block.iloc[0], scorer=same.scorer + ", same prompts")
    return pandas.concat([frame, same], ignore_index=True)


def paired_differences(
    frame: pandas.DataFrame, scorer: str, *, by: Sequence[str] = ("cell", "setting"), column: str = "kl_nats"
) -> pandas.DataFrame:
    """``scorer`` minus each other scorer, paired by sample: ``difference, low, high, items`` and a ``verdict``.

    The verdict is ``better`` or ``worse`` (lower is better) where the 95 % interval excludes zero, else ``open``; with
    fewer than `FEWEST_PAIRS` samples it is ``too few``.
    """
    lines = []
    for group, part in frame[frame.kind == "scorer"].groupby(list(by), sort=False):
        wide = part.pivot_table(index="sample", columns="scorer", values=column, sort=False)
        if scorer not in wide:
            continue
        for other in wide.columns.drop(scorer):
            pair = wide[[scorer, other]].dropna()
            if pair.empty:
                continue
            mean, low, high = paired_bootstrap(pair[scorer], pair[other])
            verdict = "better" if high < 0 else "worse" if low > 0 else "open"
            if len(pair) < FEWEST_PAIRS:
                verdict = "too few"
            lines.append(
                dict(zip(by, group, strict=True))
                | {"against": other, "difference": mean, "low": low, "high": high, "items": len(pair)}
                | {"verdict": verdict}
            )
    return pandas.DataFrame(lines)


def wide_table(summary: pandas.DataFrame, setting: str, *, column: str = "kl_nats") -> pandas.DataFrame:
    """Scorers down, test sets across, one value; deployable scores first.

    Item counts stand in the headers; oracles, which may run on fewer, have theirs in the block's name.
    """
    part = summary[summary.setting == setting].copy()
    counts = part[part.block == "deployable"].groupby("cell", sort=False)["items"].max()
    for block in part.block.unique():
        fewest = part[part.block == block]["items"]
        if block != "deployable":
            shown = f"{fewest.min()}" if fewest.min() == fewest.max() else f"{fewest.min()}-{fewest.max()}"
            part.loc[part.block == block, "block"] = f"{block} (n={shown})"
    wide = part.pivot_table(index=["block", "scorer"], columns="cell", values=column, sort=False)
    wide = wide[[cell for cell in counts.index if cell in wide]]
    wide.columns = [f"{cell} (n={counts[cell]})" for cell in wide.columns]
    return wide.sort_index(level="block", sort_remaining=False).reset_index()


def best_simple(summary: pandas.DataFrame) -> pandas.DataFrame:
    """For each test set and setting: the best deployable score that is not learned, beside the best learned one."""
    lines = []
    for (cell, setting), part in summary[summary.block == "deployable"].groupby(["cell", "setting"], sort=False):
        learned = part[part.scorer.str.startswith(LEARNED_PREFIX)]
        simple = part[~part.scorer.str.startswith(LEARNED_PREFIX)]
        if learned.empty or simple.empty:
            continue
        a, b = learned.loc[learned.kl_nats.idxmin()], simple.loc[simple.kl_nats.idxmin()]
        lines.append(
            {"cell": cell, "setting": setting, "items": a["items"], "learned": a.scorer, "kl_learned": a.kl_nats}
            | {"best simple": b.scorer, "kl_simple": b.kl_nats, "learned wins": bool(a.kl_nats < b.kl_nats)}
        )
    return pandas.DataFrame(lines)


def markdown(frame: pandas.DataFrame, *, digits: int = 3, bold_lowest: Sequence[str] = ()) -> str:
    """A Markdown table; floats with ``digits`` decimals, missing values as a dash."""
    columns = [str(name) for name in frame.columns]
    lowest = {name: frame[name].min() for name in bold_lowest if name in frame}

    def cell(name: str, value: Any) -> str:
        if value is None or value != value:
            return "-"
        text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        return f"**{text}**" if name in lowest and value == lowest[name] else text

    body = [list(map(cell, columns, row)) for row in frame.itertuples(index=False)]
    return markdown_table(columns, body, rule=" --- ")


def _common_samples(part: pandas.DataFrame) -> pandas.DataFrame:
    """Means over different samples are not comparable: while a run is under way, keep what all scorers have.

    Oracles may run on fewer samples; they are compared on theirs without shrinking the deployable block.
    """
    deployable = part[part.block == "deployable"]
    kept = []
    for block in (deployable, part[part.block != "deployable"]):
        if len(block):
            counts = block.groupby("sample")["scorer"].nunique()
            full = counts[counts == counts.max()].index
            kept.append(block[block["sample"].isin(full)])
    return pandas.concat(kept)
