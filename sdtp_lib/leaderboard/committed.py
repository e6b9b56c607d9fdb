"""Rows of a leaderboard as the repository keeps them: the fields that all share stand once, in the first line.

A fresh clone reads its table from these and goes on measuring where they stop. One file per model in docs/, the
embedded model's without a name. Knows files and rows, nothing else.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.files import atomic_write
from sdtp_lib.provenance import content_id, identity, project_root

SHARED = "shared by all rows"
_QUALITY = ("model", "weights_fingerprint", "dtype", "seed")  # what decides a KL or an answer, up to rounding
_ORIGIN = (*_QUALITY, "device", "device_name", "threads", "attn_implementation")


def suffix(model: str) -> str:
    """What a model's files are called beside the embedded one's: none for it, ``-gemma-3-270m`` for that name, and for
    a name without a Latin letter or digit a hash of it."""
    plain = re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.")
    return "" if str(model) == "embedded" else f"-{plain or content_id(str(model))[:8]}"


def path_of(model: str, root: Path | None = None) -> Path:
    """The file of a model's rows under ``root`` (default: the project's)."""
    return (root or project_root()) / "docs" / f"leaderboard{suffix(model)}.jsonl"


def every_committed(root: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Suffix -> rows of every model that has some under ``root``, the embedded one first."""
    paths = sorted(((root or project_root()) / "docs").glob("leaderboard*.jsonl"), key=lambda path: path.stem)
    found = {path.stem.removeprefix("leaderboard"): read_committed(path) for path in paths}
    return {name: rows for name, rows in found.items() if rows}


def of_one_origin(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows, or a row and a run's provenance, are of the same model, device and settings."""
    one, other = identity(one), identity(other)  # ``cuda:0`` and ``cuda:1`` are one device
    return all(one.get(name) == other.get(name) for name in _ORIGIN)


def of_other_device(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a row without times is of the same model and seed as ``other`` but was measured elsewhere.

    Peak memory is of a device as times are.
    """
    untimed = all(row.get(name) is None for name in ("prefill_ms", "unpruned_prefill_ms", "peak_bytes"))
    return untimed and not of_one_origin(row, other) and all(row.get(name) == other.get(name) for name in _QUALITY)


def of_scorers(row: Mapping[str, Any], scorers: Mapping[str, str | None]) -> bool:
    """Whether the scorer that ``scorers`` (method -> id) has for the row's method made it; true of other methods."""
    own = row.get("scorer_id")
    return scorers.get(row.get("method"), own) == own


def of_other_origin(kept: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of ``kept`` that can stand in no table with ``rows``: another model, device, dtype or number of threads."""
    return [row for row in kept if not _in_one_table(row, rows[0])]


def _in_one_table(row: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    return of_one_origin(row, first) or of_other_device(row, first)


def joined(kept: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``rows`` and those of ``kept`` that they do not replace: of the same origin, or without times from another
    device, and of methods that the same scorer scored. New rows never mix two sets of pruners under one name, nor times
    of two devices; a method of which ``rows`` only repeat what ``kept`` has (a run goes on from committed rows) stays
    as it is."""
    kept = [row for row in kept if _in_one_table(row, rows[0])]
    known = {(row["key"], row.get("scorer_id")) for row in kept}
    scored = {row["method"]: row.get("scorer_id") for row in rows if (row["key"], row.get("scorer_id")) not in known}
    staying = {row["key"]: row for row in kept if of_scorers(row, scored)}
    found = staying | {row["key"]: row for row in rows}
    return sorted(found.values(), key=lambda row: of_other_device(row, rows[0]))  # the first says where times are of


def without_beginnings(
    kept: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], dict[str, tuple[int, int]]]:
    """``rows`` less those of methods that another scorer scores now and that have more rows in ``kept``; and these
    methods, with how many rows they have now and in ``kept``.

    A run of half an hour with new pruners measures 12 rows where 400 stand: they stand until there are as many.
    """
    now, before = (_scorers_by_method(some) for some in (rows, [row for row in kept if _in_one_table(row, rows[0])]))
    begun = {
        method: (len(scorers), len(before[method]))
        for method, scorers in now.items()
        if len(before.get(method, ())) > len(scorers) and set(before[method]).isdisjoint(scorers)
    }
    return [row for row in rows if row["method"] not in begun], begun


def _scorers_by_method(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Method -> the scorer's id of each of its rows."""
    found: dict[str, list[str | None]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row.get("scorer_id"))
    return found


def write_committed(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``rows`` to ``path``, those of each device together: first what is equal in all of them, then the rest, one
    line per row.

    Rows {"a": 1, "b": 2} and {"a": 1, "b": 3} become {"kind": "shared by all rows", "a": 1}, {"b": 2}, {"b": 3}.
    """
    devices: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        devices.setdefault((row.get("device"), row.get("device_name")), []).append(row)
    lines = []
    for some in devices.values():
        shared = {name: value for name, value in some[0].items() if name != "kind" and all(
            name in row and row[name] == value for row in some)}  # fmt: skip
        lines.append({"kind": SHARED, **shared})
        lines += [{name: _short(value) for name, value in row.items() if name not in shared} for row in some]
    with atomic_write(path) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def read_committed(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_committed` wrote, whole again; none where there is no file.

    Raises
    ------
    ValueError
        For a line that is no row, such as a conflict that git left: without it others would lack what all share.
    """
    if not path.exists():
        return []
    rows, shared = [], {}
    # By newlines alone: an answer may hold other ends of lines (U+2028), which JSON writes as they are.
    for number, text in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"{path.name}, line {number} is no row: restore the file (git checkout) or mend it.")
        if line.get("kind") == SHARED:
            shared = {name: value for name, value in line.items() if name != "kind"}
        else:
            rows.append({**shared, **line})
    return rows


def _short(value: Any) -> Any:
    """Six digits are more than is measured."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
