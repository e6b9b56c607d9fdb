"""Time and memory of callables, measured in turn, so that two numbers can be compared.

Knows nothing of pruning: a *variant* is a name and a callable. Of variants A, B, C the first repetition runs A B C, the
second B C A, the third C A B. Warm-up comes first; the device is synchronised on both sides of the clock; results are
medians with quartiles, and ratios of paired repetitions. CUDA is timed by events and watched through its allocator, a
CPU by a wall clock, resident set and allocated bytes. Out of memory is a result of a variant, not the end of the run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sdtp_lib.latency.memory import EnergyWatch, MemoryWatch

OK, OUT_OF_MEMORY = "ok", "out of memory"


class Stopwatch:
    """Milliseconds between marks: CUDA events where there is CUDA (no waiting between marks), else a wall clock."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []
        synchronise(self._device)
        self.mark("start")

    def mark(self, name: str) -> None:
        """Note the moment at which all work queued so far is done, as the end of part ``name``."""
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
        else:
            moment = time.perf_counter()
        self._marks.append((name, moment))

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of each part, by name; parts of one name are added. Waits for the device."""
        synchronise(self._device)
        parts: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = before.elapsed_time(after) if self._cuda else 1e3 * (after - before)
            parts[name] = parts.get(name, 0.0) + elapsed
        return parts


def synchronise(device: torch.device | str) -> None:
    """Wait until all work queued on ``device`` is done; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    variants: Mapping[str, Callable[[], Mapping[str, Any] | None]],
    *,
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    on_row: Callable[[dict[str, Any]], None] | None = None,
    done: Callable[[str, int], bool] = lambda variant, repetition: False,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run the variants in turn and give one row per repetition.

    Parameters
    ----------
    variants
        Name -> callable. What a callable returns (a mapping of fields, or None) is added to its row.
    repeats, warmup
        Measured and unmeasured repetitions of each variant.
    on_row
        Called with each row as soon as it is measured, to keep it.
    done
        ``done(variant, repetition)`` skips what an earlier run has measured.
    progress
        Called with a line of text before each call.

    Returns
    -------
    list of dict
        ``variant, repetition, status, latency_ms, peak_memory_mb, memory_growth_mb, energy_j, host_load,
        cpu_share`` and the callable's own fields. ``peak_memory_mb`` is the allocator's peak on CUDA, the peak resident
        set on a CPU. After an out-of-memory row (its times are None) the variant is not called again.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats}, warmup={warmup}: measure at least once, after 0 or more warm-ups.")
    names = list(variants)
    missing = {name: [r for r in range(repeats) if not done(name, r)] for name in names}
    rows: list[dict[str, Any]] = []

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    exhausted: set[str] = set()
    for repetition in range(-warmup, repeats):
        # Turning the order keeps one variant from always running on a machine that another has heated or whose
        # memory it has just let go.
        turn = repetition % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            wanted = bool(missing[name]) if repetition < 0 else repetition in missing[name]
            if name in exhausted or not wanted:
                continue
            if progress is not None:
                progress(f"{name}: {'warm-up' if repetition < 0 else f'repetition {repetition + 1} of {repeats}'}")
            row = measure_once(variants[name], device)
            if row["status"] == OUT_OF_MEMORY:
                exhausted.add(name)
                record({"variant": name, "repetition": max(repetition, 0), **row})
            elif repetition >= 0:
                record({"variant": name, "repetition": repetition, **row})
    return rows


def measure_once(call: Callable[[], Mapping[str, Any] | None], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Time, peak memory and energy of one call, and the fields that it returns."""
    gc.collect()
    memory, energy = MemoryWatch(device), EnergyWatch(device)
    collecting = gc.isenabled()
    gc.disable()
    cpu_share = None
    try:
        watch, cpu_s = Stopwatch(device), time.process_time()
        fields = call() or {}
        watch.mark("latency")
        latency_ms = watch.parts_ms()["latency"]
        cpu_share = 1e3 * (time.process_time() - cpu_s) / (latency_ms * torch.get_num_threads())
        status = OK
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fields, latency_ms, status = {}, None, OUT_OF_MEMORY
    finally:
        if collecting:
            gc.enable()
    if status == OUT_OF_MEMORY and torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return {
        "status": status,
        "latency_ms": latency_ms,
        **memory.read_mb(),
        "energy_j": energy.read_joules(),
        # Both tell who else was on the machine: its load, and the share of its threads' time that this process got.
        "host_load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_share": cpu_share,
        **fields,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a device or of the host, ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))
    )


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Compute with ``count`` CPU threads inside the ``with`` (None: as many as now); yields the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def undisturbed(
    rows: Sequence[Mapping[str, Any]], by: Sequence[str] = ("variant",), tolerance: float = 0.05
) -> list[Mapping[str, Any]]:
    """Rows of repetitions that nobody else's work slowed down, told by CPU time and never by the latency itself.

    A row goes if its ``cpu_share`` is more than ``tolerance`` below the largest of its group. Rows without one (a GPU's
    own time needs no CPU, another kind of row) stay.
    """
    kept = []
    for _, group in grouped(rows, by):
        best = max((row["cpu_share"] for row in group if row.get("cpu_share") is not None), default=0.0)
        kept += [row for row in group if row.get("cpu_share") is None or row["cpu_share"] >= (1 - tolerance) * best]
    return kept


def quartiles(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """First quartile, median and third quartile, or None without values."""
    present = sorted(value for value in values if value is not None)
    if not present:
        return None
    if len(present) == 1:
        return (present[0],) * 3
    return tuple(statistics.quantiles(present, n=4, method="inclusive"))


def summarise(rows: Sequence[Mapping[str, Any]], by: Sequence[str] = ("variant",)) -> list[dict[str, Any]]:
    """One row per group: medians of numeric fields, quartiles as ``<field>_low`` and ``<field>_high``, and ``count``.

    Fields that are not numbers are kept where all rows of the group agree. Rows that ran out of memory only count in
    ``status``.
    """
    summaries = []
    for key, group in grouped(rows, by):
        measured = [row for row in group if row.get("status", OK) == OK]
        summary: dict[str, Any] = {**dict(zip(by, key, strict=True)), "count": len(measured)}
        summary["status"] = OK if measured else OUT_OF_MEMORY
        for field in dict.fromkeys(name for row in measured for name in row):
            if field in (*by, "repetition", "status"):
                continue
            values = [row.get(field) for row in measured]
            if all(_is_number(value) for value in values if value is not None):
                if (spread := quartiles(values)) is not None:
                    summary[f"{field}_low"], summary[field], summary[f"{field}_high"] = spread
            elif all(value == values[0] for value in values):
                summary[field] = values[0]
        summaries.append(summary)
    return summaries


def grouped(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[tuple[tuple, list[Mapping[str, Any]]]]:
    """Rows by the values of some fields, groups in the order of their first rows."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in by), []).append(row)
    return list(groups.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
