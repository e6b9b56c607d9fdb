"""Views of latency rows: the table beside the limits, JSON by length, Markdown, and two runs compared.

Pure: rows (see `run`) in, plain data and text out; no torch, no model, nothing measured here.

Limits: the prefill's is the ratio of causal FLOPs; end to end it is what would be left of the unpruned run's own
milliseconds if prefill reached its limit and decode moved only weights and the shorter cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdtp_lib.extras import extra
from sdtp_lib.records import markdown_table

with extra("train"):
    import pandas

UNPRUNED = "unpruned"
_TIMES = ("prefill_ms", "decode_ms", "end_to_end_ms")
_COUNTED = ("family", "keep_ratio", "prune_layers", "tflops", "compression_ratio", "kv_bytes", "kv_tokens_per_layer",
            "new_tokens", "weight_bytes", "device", "dtype", "model", "weights")  # fmt: skip
_NOISE = 0.03  # share of a median below which two runs are called equal whatever their quartiles say


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per prompt length, number of new tokens and method: medians, quartiles, paired speed-ups, limits.

    Repetitions are paired with the unpruned run's of the same length and number of new tokens.

    Columns: ``prompt_tokens, new_tokens, method, status, repetitions``; ``prefill_ms, decode_ms, end_to_end_ms`` and
    each with ``_q1``, ``_q3``; ``prefill_speedup, decode_speedup, end_to_end_speedup`` (medians of ratios of
    paired repetitions) with ``_q1``, ``_q3``; ``prefill_limit, end_to_end_limit, prefill_share_of_limit,
    end_to_end_share_of_limit``;
    ``tflops, flops_reduction_percent, kv_bytes, kv_reduction_percent, kv_tokens_per_layer, kept_tokens,
    peak_memory_mb, energy_j, decode_tokens_per_s, compression_ratio, family, keep_ratio``.
    """
    table = []
    # Of type object: a missing number is None then, and a whole one stays whole.
    frame = pandas.DataFrame([row for row in rows if row.get("kind") == "latency"], dtype=object)
    frame = frame.where(frame.notna(), None)
    if frame.empty:
        return table
    frame = frame.assign(new_tokens=frame.get("new_tokens"))  # None where rows do not say it
    # One number per prompt length and number of new tokens: within it repetitions are pairs.
    frame["paired"] = frame.groupby(["prompt_tokens", "new_tokens"], sort=False, dropna=False).ngroup()
    for (paired, method), group in frame.groupby(["paired", "method"], sort=False):
        ok = frame[(frame.paired == paired) & (frame.status == "ok")].set_index("repetition")
        tokens = group.iloc[0].prompt_tokens
        own, base = ok[ok.method == method], ok[ok.method == UNPRUNED]
        entry = {"prompt_tokens": tokens, "method": method, "repetitions": len(own)}
        entry["status"] = "ok" if len(own) else "out of memory"
        entry |= {name: group.iloc[-1].get(name) for name in _COUNTED}
        for name in (*_TIMES, "decode_tokens_per_s", "peak_memory_mb", "memory_growth_mb", "energy_j"):
            entry |= _spread(name, own.get(name))
        lengths = entry["kv_tokens_per_layer"]
        entry["kept_tokens"] = lengths[-1] if lengths else None
        if len(own) and len(base):
            for name in _TIMES:
                entry |= _spread(name.replace("_ms", "_speedup"), base[name].astype(float) / own[name].astype(float))
            entry |= _beside_limits(entry, base)
        table.append(entry)
    return table


def _beside_limits(entry: Mapping[str, Any], base: pandas.DataFrame) -> dict[str, Any]:
    first = base.iloc[0]
    prefill_limit = first.tflops / entry["tflops"]
    moved = (first.weight_bytes + entry["kv_bytes"]) / (first.weight_bytes + first.kv_bytes)
    prefill, decode = (base[name].astype(float).median() for name in ("prefill_ms", "decode_ms"))
    found: dict[str, Any] = {
        "flops_reduction_percent": 100 * (1 - entry["tflops"] / first.tflops),
        "kv_reduction_percent": 100 * (1 - entry["kv_bytes"] / first.kv_bytes),
        "prefill_limit": prefill_limit,
        "end_to_end_limit": _or_none((prefill + decode) / (prefill / prefill_limit + decode * moved)),
    }
    for name in ("prefill", "end_to_end"):
        limit, reached = found[f"{name}_limit"], entry[f"{name}_speedup"]
        found[f"{name}_share_of_limit"] = reached / limit if limit and reached else None
    return found


def _spread(name: str, values: pandas.Series | None) -> dict[str, float | None]:
    """Median and quartiles; None where there is no value."""
    quartiles = pandas.Series([] if values is None else values, dtype=float).quantile([0.5, 0.25, 0.75])
    return dict(zip((name, f"{name}_q1", f"{name}_q3"), map(_or_none, quartiles), strict=True))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def by_length(rows: Iterable[Mapping[str, Any]], sdtp: str = "keep09") -> dict[str, dict[str, Any]]:
    """The report as data: prompt length -> ``baseline``, ``sdtp``, ``speedup``, ``kv_reduction`` (share, 0 to 1).

    A key is the prompt length (``"1024"``); where rows have several numbers of new tokens, with it (``"1024+64"``).
    """
    report: dict[str, dict[str, Any]] = {}
    table = summary(rows)
    several = several_new_tokens(table)
    unpruned = {(e["prompt_tokens"], e["new_tokens"]): e for e in table if e["method"] == UNPRUNED}
    for entry in table:
        base = unpruned.get((entry["prompt_tokens"], entry["new_tokens"]))
        if entry["method"] != sdtp or base is None or "ok" not in (entry["status"], base["status"]):
            continue
        percent = entry.get("kv_reduction_percent")
        report[f"{entry['prompt_tokens']}" + (f"+{entry['new_tokens']}" if several else "")] = {
            "baseline": _figures(base),
            "sdtp": _figures(entry),
            "speedup": {name: entry.get(f"{name}_speedup") for name in ("prefill", "decode", "end_to_end")},
            "speedup_limit": {name: entry.get(f"{name}_limit") for name in ("prefill", "end_to_end")},
            "kv_reduction": None if percent is None else percent / 100,
        }
    return report


def several_new_tokens(table: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a table's rows differ in how many tokens were generated: only then is it said row by row."""
    return len({row.get("new_tokens") for row in table}) > 1


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown: one table in the shape of the paper's Table 2, every method at every length."""
    table = summary(rows)
    if not table:
        return "No latency rows.\n"
    first = next(row for row in rows if row.get("kind") == "latency")
    described = ", ".join(
        str(first[name]) for name in ("model", "weights", "device", "dtype", "attn_implementation") if first.get(name)
    )
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "commit") if first.get(name))
    new_tokens = sorted({row["new_tokens"] for row in table if row["new_tokens"]})
    lines = [
        f"{described}; batch 1, {'/'.join(map(str, new_tokens))} new tokens; {versions}.",
        "Medians of repetitions taken in turn; speed-ups are medians of paired ratios; "
        "in brackets the share of the FLOPs limit.",
        "",
    ]
    several = several_new_tokens(table)
    places = ["prompt", *(["new tokens"] if several else []), "method"]
    header = [*places]
    for part in ("prefill", "decode", "end to end"):
        header += [f"{part} ms", "speed-up"]
    lines.append(markdown_table(header, [_times_of(row, several) for row in table]))
    # Joules only where the device counts them.
    energy = any(row.get("energy_j") is not None for row in table)
    costs = [_costs_of(row, several, energy) for row in table if row["status"] == "ok"]
    header = [*places, "TFLOPs", "1/tau", "KV MB", "peak MB", *(["energy J"] if energy else [])]
    lines += ["", markdown_table(header, costs)]
    return "\n".join(lines) + "\n"


def _place_of(row: Mapping[str, Any], several: bool) -> list[str]:
    return [str(row["prompt_tokens"]), *([str(row["new_tokens"] or "-")] if several else []), row["method"]]


def _times_of(row: Mapping[str, Any], several: bool) -> list[str]:
    cells = _place_of(row, several)
    if row["status"] != "ok":
        return [*cells, "out of memory", *[""] * 5]
    for name in ("prefill", "decode", "end_to_end"):
        cells += [_number(row.get(f"{name}_ms")), _gain(row, name)]
    return cells


def _costs_of(row: Mapping[str, Any], several: bool, energy: bool) -> list[str]:
    cells = [*_place_of(row, several), f"{row['tflops']:.3f}", f"{row['compression_ratio']:.2f}"]
    cells += [f"{row['kv_bytes'] / 1e6:.1f}", _number(row.get("peak_memory_mb"))]
    return [*cells, _number(row.get("energy_j"), 1)] if energy else cells


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two runs, by prompt length, number of new tokens and method, one entry per field (prefill, decode).

    Of an entry: ``prompt_tokens, new_tokens, method, field, before_ms, after_ms, ratio, verdict``. ``ratio`` is
    after / before. A change counts (``faster``, ``slower``) if it is above 3 % and the quartiles of the two runs do not
    overlap; else the verdict is ``equal``. What only one run has is ``missing``.
    """
    names = ("prompt_tokens", "new_tokens", "method")
    old, new = ({tuple(row[name] for name in names): row for row in summary(rows)} for rows in (before, after))
    found = []
    for place in dict.fromkeys([*old, *new]):
        for field in ("prefill_ms", "decode_ms"):
            a, b = old.get(place, {}), new.get(place, {})
            entry = {**dict(zip(names, place, strict=True)), "field": field, "before_ms": a.get(field),
                     "after_ms": b.get(field), "ratio": None, "verdict": "missing"}  # fmt: skip
            if a.get(field) and b.get(field):
                entry["ratio"] = ratio = b[field] / a[field]
                apart = a[f"{field}_q3"] < b[f"{field}_q1"] or b[f"{field}_q3"] < a[f"{field}_q1"]
                changed = apart and abs(ratio - 1) > _NOISE
                entry["verdict"] = ("slower" if ratio > 1 else "faster") if changed else "equal"
            elif a.get(field) is None and b.get(field) is None:
                continue
            found.append(entry)
    return found


def at_equal_quality(rows: Iterable[Mapping[str, Any]], reference: str = "keep09") -> list[dict[str, Any]]:
    """How long each family of methods takes to be as good as ``reference``, by text: rows of kind ``quality``.

    Within a family, log KL is interpolated over the median prefill time between measured ratios. A family that is worse
    at every ratio gets ``prefill_ms`` None with ``verdict`` "never as good"; one that is better at every ratio gets its
    fastest time and "better throughout". ``sdtp_is_faster_by`` is the family's time over the reference's, and
    ``flops_bound`` what it would be if both ran at the same FLOPs per second.
    """
    points = quality_points(rows)
    found = []
    for text in dict.fromkeys(point["text"] for point in points):
        of_text = [point for point in points if point["text"] == text]
        goal = next((point for point in of_text if point["method"] == reference), None)
        if goal is None:
            continue
        for family in dict.fromkeys(point["family"] for point in of_text if point["family"] != UNPRUNED):
            if family == goal["family"]:
                continue
            line = sorted((p for p in of_text if p["family"] == family), key=lambda p: p["prefill_ms"])
            reached, verdict = _reached(line, goal["kl_nats"])
            found.append(
                {"text": text, "reference": reference, "reference_ms": goal["prefill_ms"], "kl_nats": goal["kl_nats"],
                 "family": family, "verdict": verdict, "prefill_ms": reached["prefill_ms"] if reached else None,
                 "sdtp_is_faster_by": reached["prefill_ms"] / goal["prefill_ms"] if reached else None,
                 "flops_bound": reached["tflops"] / goal["tflops"] if reached else None}
            )  # fmt: skip
    return found


def equal_quality_table(found: Sequence[Mapping[str, Any]]) -> str:
    """`at_equal_quality` as Markdown: one line per family, one column per text, in words."""

    def words(entry: Mapping[str, Any] | None) -> str:
        if entry is None or entry["prefill_ms"] is None:
            return "-" if entry is None else entry["verdict"]
        sign = "at most " if entry["verdict"] == "better throughout" else ""
        times, bound = entry["sdtp_is_faster_by"], entry["flops_bound"]
        return f"{sign}{_number(entry['prefill_ms'])} ms, {times:.2f} times as long (by FLOPs {bound:.2f})"

    by = {(entry["family"], entry["text"]): entry for entry in found}
    texts = {entry["text"]: entry for entry in found}
    names = [f"{text}: {_number(entry['reference_ms'])} ms, KL {entry['kl_nats']:.3f}" for text, entry in texts.items()]
    families = dict.fromkeys(entry["family"] for entry in found)
    header = (f"as good as {found[0]['reference'] if found else '-'}", *names)
    return markdown_table(header, [(family, *(words(by.get((family, text))) for text in texts)) for family in families])


def quality_points(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point per text and method: mean KL over samples, median prefill time, its paired speed-up over unpruned."""
    frame = pandas.DataFrame([row for row in rows if row.get("kind") == "quality"])
    if frame.empty:
        return []
    base = frame[frame.method == UNPRUNED].set_index(["text", "sample"]).prefill_ms.rename("unpruned_ms")
    frame = frame.join(base, on=["text", "sample"])
    points = frame.assign(speedup=frame.unpruned_ms / frame.prefill_ms).groupby(["text", "method"], sort=False).agg(
        family=("family", "first"), keep_ratio=("keep_ratio", "first"), samples=("sample", "size"),
        tflops=("tflops", "first"), kl_nats=("kl_nats", "mean"), prefill_ms=("prefill_ms", "median"),
        prefill_speedup=("speedup", "median"),
    )  # fmt: skip
    return points.reset_index().to_dict("records")


def with_shorter_prefill(points: pandas.DataFrame) -> pandas.DataFrame:
    """The points of families that save FLOPs in the prefill at some ratio: what cuts the cache alone is left out."""
    whole = points.text.map(points[points.method == UNPRUNED].set_index("text").tflops)
    return points[points.family.isin(points[points.tflops < whole].family)]


def _reached(line: list[dict[str, Any]], kl: float) -> tuple[dict[str, float] | None, str]:
    """Milliseconds and TFLOPs at which a family's points, ascending in time, reach ``kl``, interpolated on log KL."""
    good = [point for point in line if point["kl_nats"] <= kl]
    if not good:
        return None, "never as good"
    right = good[0]
    if right is line[0]:
        return right, "better throughout"
    left = line[line.index(right) - 1]
    span = math.log(left["kl_nats"]) - math.log(max(right["kl_nats"], 1e-12))
    share = (math.log(left["kl_nats"]) - math.log(kl)) / span
    return {name: left[name] + share * (right[name] - left[name]) for name in ("prefill_ms", "tflops")}, "interpolated"


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    names = (*_TIMES, "decode_tokens_per_s", "tflops", "kv_bytes", "kv_tokens_per_layer", "peak_memory_mb", "energy_j",
             "compression_ratio", "status", "repetitions")  # fmt: skip
    return {name: entry.get(name) for name in names}


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _gain(row: Mapping[str, Any], name: str) -> str:
    gain, share = row.get(f"{name}_speedup"), row.get(f"{name}_share_of_limit")
    if gain is None or row["method"] == UNPRUNED:
        return "-"
    return f"{gain:.2f}x" + (f" ({share:.3f})" if share else "")
