"""What a figure or table says, in one sentence, computed from the very values that are drawn.

A notebook prints these beside its figures, so that no sentence can be contradicted by the picture next to it. Each
function takes the frame or arrays of its figure and returns text (Markdown without markup); none draws, none asks a
model. Words for a size ("largely", "hardly") stand at thresholds that are named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from sdtp_lib.pruning.token_fates import TokenFates

# A repetition's scatter (interquartile range over median) and a share of the limit beyond which times are not read.
QUIET, ABOVE_LIMIT = 0.10, 1.05


def best_tokens(best: Mapping[str, Sequence[int]], place: tuple[int, int] | None, layer: int) -> str:
    """Of the best tokens by each label, how many stand in the answer's place."""
    if place is None:
        return "The answer's own words were not found in this prompt."
    first, last = place
    inside = {name: sum(first <= int(i) <= last for i in tokens) for name, tokens in best.items()}
    counts = _list([f"{count} of the {len(best[name])} best by {_words(name)}" for name, count in inside.items()])
    where = f"tokens {first} to {last}, {1 + last - first} of them"
    return f"The answer is read from {where}. At layer {layer}, {counts} stand there."


def concentration(rows: pd.DataFrame, threshold: float) -> str:
    """Saliency that the best tenth of the tokens holds, and how many are salient; ``label, share, top_tenth_share``."""
    median = rows.groupby("label", sort=False)[["share", "top_tenth_share"]].median()
    said = [
        f"by {_words(name)} the best tenth of the tokens holds {_percent(line.top_tenth_share)} of all saliency, and "
        f"{_percent(line.share)} of the tokens are above {threshold:g} of their layer's maximum"
        for name, line in median.iterrows()
    ]
    return f"In the median over layers and prompts, {'; '.join(said)}."


def label_agreement(frame: pd.DataFrame) -> str:
    """How alike two labels rank the tokens; ``layer, rank_correlation``."""
    by_layer = frame.groupby("layer").rank_correlation.median()
    middle = float(by_layer.median())
    how = "largely alike" if middle >= 0.6 else "partly alike" if middle >= 0.3 else "hardly alike"
    low, high = by_layer.idxmin(), by_layer.idxmax()
    return (
        f"The two labels rank the tokens {how}: rank correlation {middle:.2f} in the median over layers, from "
        f"{by_layer[low]:.2f} (layer {low}) to {by_layer[high]:.2f} (layer {high})."
    )


def learned_ranking(rows: pd.DataFrame, chance: float, learned: str = "trained") -> str:
    """Whether the pruners find the label's tokens better than simple scores; ``scorer, rank_correlation, recall``."""
    median = rows.groupby("scorer", sort=False)[["rank_correlation", "recall"]].median()
    own, others = median.loc[learned], median.drop(learned)
    best = others.rank_correlation.idxmax()
    verdict = "better than" if own.rank_correlation > others.rank_correlation[best] else "no better than"
    return (
        f"On {rows['sample_id'].nunique() if 'sample_id' in rows else 'the'} held-out prompts the pruners rank tokens "
        f"{verdict} the best simple score here: rank correlation {own.rank_correlation:.2f} against "
        f"{others.rank_correlation[best]:.2f} ({best}), recall {_percent(own.recall)} against "
        f"{_percent(others.recall[best])} (chance {_percent(chance)}). Medians over prompts and stages."
    )


def loss_fell(history: pd.DataFrame) -> str:
    """Where the training loss began and ended; ``step, loss``."""
    loss = history.dropna(subset=["loss"]).groupby("step").loss.mean()
    head, tail = loss.iloc[: max(1, len(loss) // 10)].mean(), loss.iloc[-max(1, len(loss) // 10) :].mean()
    verb = "fell" if tail < head else "did not fall:"
    steps = f"{int(loss.index.max())} steps (means of their first and last tenth)"
    return f"The loss {verb} from {head:.2f} to {tail:.2f} in {steps}."


def kept_overlap(fates: Mapping[str, TokenFates]) -> str:
    """Of the tokens that the first scorer keeps to the end, how many each other keeps; ``random`` is chance."""
    (first, reference), *others = fates.items()
    kept = reference.dropped_at == reference.num_layers
    shares = {name: (kept & (one.dropped_at == one.num_layers)).sum() / kept.sum() for name, one in others}
    said = _list([f"{name} {_percent(share)}" for name, share in shares.items()])
    return (
        f"{kept.sum():,} of {len(kept):,} tokens reach the last layer with {first}; of these {said} are kept too, the "
        "protected first and last tokens, which every scorer keeps, among them."
    )


def answers(frame: pd.DataFrame) -> str:
    """How often each scorer's answer is right at the lowest ratio; ``scorer, pruning_keep_ratio, correct, ...``."""
    lowest = frame[frame.pruning_keep_ratio == frame.pruning_keep_ratio.min()]
    right = lowest.groupby("scorer", sort=False).correct.mean()
    said = _list([f"{name} {_percent(share)}" for name, share in right.items()])
    return (
        f"At keep ratio {lowest.pruning_keep_ratio.iloc[0]:g} the answers are right to: {said}; unpruned to "
        f"{_percent(lowest.unpruned_correct.mean())}. {lowest.task.nunique()} prompt(s): an illustration."
    )


def speedup(summary: pd.DataFrame) -> str:
    """Each method's prefill speed-up beside its limit at the longest prompt, and whether the machine was quiet."""
    pruned = summary[summary.prefill_share_of_limit.notna() & (summary.method != "unpruned")]
    longest = pruned[pruned.prompt_tokens == pruned.prompt_tokens.max()]
    said = [
        f"{row.method} {row.prefill_speedup:.2f} times as fast, of {row.prefill_limit:.2f} that its FLOPs allow "
        f"({_percent(row.prefill_share_of_limit)})"
        for row in longest.itertuples()
    ]
    low, high = pruned.prefill_share_of_limit.min(), pruned.prefill_share_of_limit.max()
    text = (
        f"Prefill of {int(longest.prompt_tokens.iloc[0]):,} tokens: {'; '.join(said)}. "
        f"Over all lengths {_percent(low)} to {_percent(high)} of the limit is reached."
    )
    return " ".join(filter(None, [text, busy(summary)]))


def busy(summary: pd.DataFrame) -> str:
    """Says where times scatter more than a share of the limit can bear; empty on a quiet machine."""
    timed = summary[summary.prefill_ms.notna()]
    scatter = (timed.prefill_ms_q3 - timed.prefill_ms_q1) / timed.prefill_ms
    share = timed.prefill_share_of_limit.where(timed.method != "unpruned")
    faults = []
    if scatter.max() > QUIET:
        row = timed.loc[scatter.idxmax()]
        faults.append(
            f"repetitions of {row.method} at {int(row.prompt_tokens):,} tokens scatter by {_percent(scatter.max())}"
        )
    if share.max() > ABOVE_LIMIT:
        row = timed.loc[share.idxmax()]
        faults.append(f"{row.method} at {int(row.prompt_tokens):,} tokens seems to beat its limit")
    return f"This machine was busy: {_list(faults)}. Read directions, not shares, or run it again." if faults else ""


def decode(summary: pd.DataFrame) -> str:
    """What the shorter cache is to decoding; ``method, prompt_tokens, decode_speedup, kv_reduction_percent``."""
    pruned = summary[(summary.method != "unpruned") & summary.decode_speedup.notna()]
    if pruned.empty:
        return "No decoding was timed."
    longest = pruned[pruned.prompt_tokens == pruned.prompt_tokens.max()]
    said = [f"{row.method} {row.decode_speedup:.2f} times ({row.kv_reduction_percent:.0f} % less cache)" for row in
            longest.itertuples()]  # fmt: skip
    return f"Decoding after {int(longest.prompt_tokens.iloc[0]):,} tokens: {_list(said)} the unpruned speed."


def equal_quality(found: Sequence[Mapping]) -> str:
    """Which families are ever as good as the reference, by text; of `latency.report.at_equal_quality`."""
    said = []
    for text in dict.fromkeys(entry["text"] for entry in found):
        of_text = [entry for entry in found if entry["text"] == text]
        reached = {e["family"]: e["sdtp_is_faster_by"] for e in of_text if e["prefill_ms"] is not None}
        faster = [family for family, factor in reached.items() if factor < 1]
        goal, others = of_text[0]["reference"], f"of {len(of_text)} other families"
        if reached:
            as_good = f"{len(reached)} {others} are as good as {goal} at some ratio ({_list(list(reached))})"
            said.append(f"On {text} {as_good}, and {_list(faster) if faster else 'none'} in less time.")
        else:
            said.append(f"On {text} none {others} is as good as {goal} at any of its ratios.")
    return " ".join(said)


def whole_prefills(points: pd.DataFrame, shorter: pd.DataFrame) -> str:
    """What a figure of prefill times leaves out, and why; of `latency.report.with_shorter_prefill`; ``family``."""
    whole = [name for name in points.family.unique() if name not in ("unpruned", *shorter.family)]
    return f"Not drawn, since they shorten the cache alone, after a whole prefill: {_list(whole)}." if whole else ""


def prediction_error(predicted: pd.DataFrame) -> str:
    """How far the cost model is off; ``what, error_percent``."""
    off = predicted.assign(error=predicted.error_percent.abs()).groupby("what", sort=False).error.agg(["median", "max"])
    said = [f"{name.removesuffix('_ms')} {line['median']:.0f} % (worst {line['max']:.0f} %)" for name, line in
            off.iterrows()]  # fmt: skip
    return f"The model is off by, in the median: {_list(said)}."


def best_scores(summary: pd.DataFrame) -> str:
    """The lowest KL of each test set and what comes next; ``cell, scorer, kl_nats``."""
    said = []
    for cell, part in summary.groupby("cell", sort=False):
        first, second = part.sort_values("kl_nats").head(2).itertuples()
        best, then = (f"{line.scorer} ({line.kl_nats:.3f})" for line in (first, second))
        said.append(f"{_words(cell)}: {best}, then {then}")
    return f"Lowest KL of {summary.scorer.nunique()} scores, nats per token. {'; '.join(said)}."


def without_figures(compared: Sequence[str], summary: pd.DataFrame) -> str:
    """Which methods of a comparison have no line in its table, and why; ``scorer``."""
    missing = [name for name in compared if name not in set(summary.scorer)]
    return f"No figures, since they cannot save as many FLOPs: {_list(missing)}." if missing else ""


def text_and_tasks(summary: pd.DataFrame, scorer: str = "recency") -> str:
    """Where one score ranks on running text and on questions about something far back; ``cell, scorer, kl_nats``."""
    rank = summary.assign(rank=summary.groupby("cell").kl_nats.rank())
    own = rank[rank.scorer == scorer]
    text, tasks = own[own.cell == "text"]["rank"], own[own.cell != "text"]["rank"]
    count = summary.scorer.nunique()
    if text.empty or tasks.empty:
        return ""
    places = f"number {text.iloc[0]:.0f} on running text, and {tasks.mean():.1f} in the mean over tasks"
    return f"Of {count} scores {scorer} is {places}."


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
