"""Which methods rows are of: what scored them, in what each is not its paper's, and which were not measured.

Views of a leaderboard's rows and of the registry; no figure is computed here but counts of rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib import methods
from sdtp_lib.leaderboard.committed import of_other_device
from sdtp_lib.leaderboard.entrants import LEARNED, OURS
from sdtp_lib.leaderboard.tables import at, methods_in, unreached
from sdtp_lib.methods.variant import UNPRUNED
from sdtp_lib.scorers.found import TRAINING_FREE
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.shipped import shipped_for


def scored_by(frame: Any) -> dict[str, str]:
    """Method -> the name of what scored its tokens."""
    rows = frame[(frame.kind == "item") & frame.scorer.notna()].drop_duplicates("method")
    return dict(zip(rows.method, rows.scorer, strict=True))


def is_learned(name: str, used: Mapping[str, str]) -> bool:
    """Whether trained pruners scored the method; ``used`` as `scored_by` says."""
    return name in LEARNED and used.get(name) not in {used.get(TRAINING_FREE), None}


def of_other_pruners(frame: Any) -> dict[str, tuple[int, int]]:
    """Learned method -> how many of its rows are of other pruners than ours has, and how many it has."""
    rows, used = frame[(frame.kind == "item") & frame.scorer_id.notna()], scored_by(frame)
    ours = set(rows[rows.method == OURS].scorer_id)
    found = {}
    for name in methods_in(rows) if ours else ():
        own = rows[rows.method == name].scorer_id
        if is_learned(name, used) and (others := int((~own.isin(ours)).sum())):
            found[name] = (others, len(own))
    return found


def before_what_ships(frame: Any) -> str:
    """That ours was measured with other pruners than those that ship today; empty where it was not, or none ship."""
    shipped = shipped_for(str(frame.model.iloc[0])) if len(frame) else None
    ids = set(frame[(frame.kind == "item") & (frame.method == OURS)].scorer_id.dropna())
    if shipped is None or not ids or ids == {TokenPruners.from_pretrained(shipped).identity}:
        return ""
    return (
        f"`{OURS}` was measured with another set of pruners than the one that ships now, which is not measured in full "
        "yet."
    )


def measured_elsewhere(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of ``rows`` are of another device than the first timed one, and of which; empty where none is."""
    first = next((row for row in rows if row.get("prefill_ms") is not None), rows[0] if rows else {})
    where: Counter[str] = Counter()
    for row in rows:
        if of_other_device(row, first):
            name = row.get("device_name") or row.get("device")
            where[f"{name} (torch {row.get('torch')}, transformers {row.get('transformers')})"] += 1
    said = ", ".join(f"{count:,} of {len(rows):,} rows on {place}" for place, count in where.items())
    return f"{said}, in the same dtype and without times" if said else ""


def remarks(frame: Any) -> dict[str, str]:
    """Method -> in what it is not its paper's method here: by the registry, at a wanted speed-up as all rows are, and
    what its rows say of this model besides."""
    rows, found = frame[frame.kind == "item"], {}
    for name in methods_in(rows):
        said = _scaled(name).remark if name in methods.names() else ""
        own = rows[rows.method == name].remark.dropna()
        if len(own) and own.iloc[-1] not in said:
            said = "; ".join(filter(None, (said, own.iloc[-1])))
        if said:
            found[name] = said
    return found


def not_by_one_dial(frame: Any) -> list[str]:
    """The measured methods whose paper's rule one dial does not scale: their remarks say what stands in its place."""
    measured = methods_in(frame[frame.kind == "item"])
    return [name for name in measured if name in methods.names() and _scaled(name).differs_at_speedup]


def unmeasured(frame: Any, length: int, speedup: float) -> list[str]:
    """The methods without a row at this length and speed-up; those that cannot be so fast have one that says so."""
    have = {*at(frame, length, speedup).method, *unreached(frame, length, speedup), UNPRUNED}
    return [name for name in (*methods.names(), TRAINING_FREE) if name not in have]


def _scaled(name: str) -> methods.Method:
    return dataclasses.replace(methods.get(name), speedup=2.0)  # whichever: what it says is the same for all
