"""Rows of a leaderboard as its tests make them: KL about wanted means, scores of RULER item by item."""

from __future__ import annotations

from sdtp_lib.leaderboard import plan, tables

STAMP = {
    "utc": "2026-01-02T03:04:05+00:00", "commit": "abc", "model": "m", "weights": "w", "device": "cpu", "dtype": "d",
}  # fmt: skip
FREE = "attention_pooled"


def kl_rows(values: dict[str, float], test_set: str = "text", count: int = 8, speedup: float = 2.0) -> list[dict]:
    """``count`` items by methods of these mean KLs, the items spread evenly about them."""
    return [
        {**STAMP, "kind": "item", "sort": plan.KL, "cell": test_set, "length": 64, "sample": f"{test_set}{n}",
         "method": name, "speedup": speedup, "scorer": "learned" if name == "sdtp" else name,
         "kl_nats": value * (0.9 + n / 35), "answer": n % 2 == 0, "answer_full": n < 4, "prefill_ms": 60.0,
         "unpruned_prefill_ms": 90.0, "kv_bytes": 1, "unpruned_kv_bytes": 2, "flops_speedup": speedup}
        for n in range(count) for name, value in values.items()
    ]  # fmt: skip


def ruler_rows(
    scores: dict[str, list[float]],
    unpruned: list[float],
    task: str = "niah_single_1",
    sort: str = plan.RULER,
    speedup: float = 2.0,
) -> list[dict]:
    """A score of None: the method cannot be so fast on that item."""
    return [
        {**STAMP, "kind": "out of reach" if score is None else "item", "sort": sort, "cell": task, "length": 64,
         "sample": f"{task}{n}", "method": name, "speedup": speedup, "scorer": name, "score": score,
         "unpruned_score": unpruned[n], "prefill_ms": 30.0, "unpruned_prefill_ms": 90.0, "kv_bytes": 1,
         "unpruned_kv_bytes": 2, "flops_speedup": speedup, "error": None if score is not None else "at most 1.9x",
         "key": f"{task}{n}|{speedup}|{name}"}
        for name, values in scores.items() for n, score in enumerate(values)
    ]  # fmt: skip


def framed(*rows: list[dict]):
    return tables.frame_of([row for part in rows for row in part])
